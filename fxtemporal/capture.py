"""From what users have to a :class:`fxtemporal.graph.Program`.

========================  ==========================================================
``nn.Module``             the shape-aware tracer; ``torch.export`` where that fails
``fx.GraphModule``        taken as it is, shapes filled in from the example inputs
``ExportedProgram``       its module, with the sizes it was exported for checked
========================  ==========================================================

The program shares every parameter with the model it came from and nothing else, so rewriting it
never changes the model.
"""

from __future__ import annotations

import inspect
import keyword
import logging
import operator
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    is_fake,
)
from torch.export import Dim, ExportedProgram
from torch.fx import _symbolic_trace
from torch.fx._pytree import tree_flatten_spec
from torch.nn.parameter import is_lazy

from fxtemporal.errors import CaptureError, ForwardError
from fxtemporal.exported_guards import check_exported_sizes, holds_on_example
from fxtemporal.graph import Program, run_node
from fxtemporal.mistakes.failing import failing
from fxtemporal.module import OptimizedModule
from fxtemporal.ops import WHOLE, Op
from fxtemporal.quiet import quiet
from fxtemporal.shared_state import RandomStates
from fxtemporal.small_sizes import refuse_small_sizes
from fxtemporal.source import is_user_file, short_location
from fxtemporal.stand_in import StandIn, own_inputs, stand_in
from fxtemporal.tracing.answers import (
    custom_functions,
    modes_read,
    refusing_long_lists,
    refusing_seeds,
)
from fxtemporal.tracing.errors import GradientModeError, OpError, StatefulError
from fxtemporal.tracing.recording import RecordingTracer, one_capture
from fxtemporal.tracing.shape_tracer import ShapeTracer
from fxtemporal.tracing.state import refuse_unseen, settle, settle_export
from fxtemporal.twins import twin

__all__ = ["Model", "behind_pre_hooks", "bind_example", "capture", "check_arguments", "example_of"]

Model = nn.Module | fx.GraphModule | ExportedProgram


def capture(
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    frontend: str | None = None,
    only: str | None = None,
) -> Program:
    """Capture ``model`` as it runs on ``model(*args, **kwargs)``.

    Without example inputs only what needs no shapes is known. ``frontend="export"`` skips the
    tracer; ``only="fx"`` does not turn to it where the tracer fails.

    Raises:
        CaptureError: the model cannot be captured, or does not run on the example inputs.
    """
    check_arguments(model, args, kwargs)
    with one_capture, custom_functions() as functions, refusing_seeds():
        program = _captured(model, args, kwargs, frontend, only)
    if functions:
        named = ", ".join(dict.fromkeys(functions))
        program.gradients = f"a graph does not hold the backward of {named}"
    return program


def _captured(
    model: Model,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    frontend: str | None,
    only: str | None,
) -> Program:
    if isinstance(model, ExportedProgram):
        return _from_exported(model, *(example_of(model, args, kwargs) or ((), {})))
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            "the model has lazy layers, which get their weights at the first call: call it once"
        )
    _refuse_quotes(model)
    example = None if args is None and kwargs is None else (args or (), dict(kwargs or {}))
    if isinstance(model, fx.GraphModule):
        return _from_graph_module(model, example)
    if frontend == "export" and example is not None:
        return _from_export(model, *example, why="the traced graph gave other numbers")
    why = _called_otherwise(model)
    if why is not None:
        if example is None:
            raise CaptureError(f"{why}: give example inputs")
        return _from_export(model, *example, why=why)
    return _from_module(model, example, fall_back=only is None)


def example_of(
    model: Model, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The example inputs to use: those given, or those that an ExportedProgram carries."""
    if args is not None or kwargs is not None:
        return args or (), dict(kwargs or {})
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        own_args, own_kwargs = model.example_inputs
        return tuple(own_args), dict(own_kwargs)
    return None


def bind_example(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """``{parameter: value}`` of ``model.forward(*args, **kwargs)``, defaults left out."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}"
        ) from error
    return dict(bound.arguments)


def check_arguments(model: Any, args: Any, kwargs: Any) -> None:
    """Raise :class:`CaptureError` unless these are a model, a tuple and a dict."""
    if not isinstance(model, nn.Module | ExportedProgram):
        raise CaptureError(
            f"expected an nn.Module, a torch.fx.GraphModule or an ExportedProgram, "
            f"got {type(model).__name__}"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise CaptureError(
            "a module that torch.compile returned: give the original (its _orig_mod), and compile "
            "the result"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python to trace: give the original module")
    if args is not None and not isinstance(args, tuple | list):
        raise CaptureError(
            f"example_inputs must be a tuple of the forward's arguments, got "
            f"{type(args).__name__}: write optimize(model, (x,))"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(f"example_kwargs must be a dict, got {type(kwargs).__name__}")


def _called_otherwise(model: nn.Module) -> str | None:
    """Why a call of ``model`` is not a call of its class's forward."""
    if "forward" in vars(model):
        return "the model's forward was replaced on the instance"
    if type(model).__call__ is not nn.Module.__call__:
        return f"{type(model).__name__} has a __call__ of its own"
    return None


# -- nn.Module -------------------------------------------------------------------------------------


def _from_module(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    *,
    wrapped: bool = False,
    fall_back: bool = True,
) -> Program:
    """Trace: through what a library put under ``torch.fx.wrap``, or, if that fails, ``wrapped``."""
    with stand_in(model, share_parameters=True, watched=True) as other:
        try:
            return _traced(model, other, example, wrapped)
        except CaptureError:
            raise
        except StatefulError as error:
            if error.exportable and example is not None and fall_back:
                return _from_export(model, *example, why=str(error))
            raise CaptureError(
                f"{error}: a graph cannot carry it. Make it an input and an output, or a buffer."
            ) from error
        except Exception as error:  # the user's forward ran on proxies: it may raise anything
            if not wrapped and _symbolic_trace._wrapped_fns_to_patch:
                return _from_module(model, example, wrapped=True, fall_back=fall_back)
            if example is None:
                raise CaptureError(
                    f"{type(model).__name__} cannot be traced without shapes: {_reason(error)}. "
                    "Give example inputs."
                ) from error
            if not fall_back:
                raise CaptureError(_reason(error)) from error
            _raise_if_model_fails(model, example, error)
            program = _from_export(model, *example, why=_reason(error))
            if isinstance(error, GradientModeError):
                program.doubt = str(error)
            return program


def _traced(
    model: nn.Module,
    other: StandIn,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    wrapped: bool,
) -> Program:
    """A trace of the stand-in, over the parameters and modules of ``model`` itself."""
    bound = None
    if example is not None:
        given = own_inputs(example)
        bound = bind_example(model, *behind_pre_hooks(other.module, *given))
        other.forget_changes()  # the result has these hooks too
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracer = ShapeTracer(fake_mode, bound, wrapped=wrapped)
    states = RandomStates()
    with _without_logs():  # of an op that refuses its input: the error says it
        graph = tracer.trace(other.module)
    note = settle(model, other, states, example)
    root = twin(model)
    _use_originals(graph, other, root)
    _refuse_names(graph)
    gm = _graph_module(root, graph, type(model).__name__)
    program = Program(gm, fake_mode, "fx", note)
    program.modes = tracer.modes
    _normalize(program)
    return program


def _use_originals(graph: fx.Graph, other: StandIn, root: nn.Module) -> None:
    """Put what the model holds in place of the copies that ``graph`` was traced from."""
    for name, value in vars(other.module).items():
        if name.startswith("_tensor_constant"):
            vars(root)[name] = other.original(value)
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, other.original)
        node.kwargs = fx.node.map_aggregate(node.kwargs, other.original)
        if callable(node.target):
            node.target = other.original(node.target)


@contextmanager
def _without_logs() -> Iterator[None]:
    """Without what torch logs of fake tensors; what the user's code logs is passed on."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


_TAKEN = frozenset(dir(fx.GraphModule)) | {"_graph", "meta"}
"""Attributes of every graph module, which a model's own cannot stand beside."""


_NOT_IN_QUOTES = re.compile(r'["\\]|[^\x20-\U0010ffff]|[\x7f-\x9f\u2028\u2029\u202a-\u202e]')
"""A name that is no identifier stands between quotes in generated code, as it is."""


def _refuse_quotes(model: nn.Module) -> None:
    """Whatever captures the model: a name must not end its quotes, and go on as code."""
    for named in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        for path, _ in named:
            if _NOT_IN_QUOTES.search(path):
                raise _no_name(path.rpartition(".")[2], path)


def _no_name(name: str, path: str) -> CaptureError:
    return CaptureError(
        f"the model has a part called {name!r} (in {path!r}), a name that code generated from a "
        "graph cannot use: rename it"
    )


def _refuse_names(graph: fx.Graph) -> None:
    """Generated code writes ``self.name``: not every name that a module takes can stand there."""
    for node in graph.nodes:
        for name in node.kwargs:
            if not name.isidentifier():
                raise CaptureError(
                    f"the forward calls {node.target} with an argument called {name!r}, which code "
                    "generated from a graph cannot write: give it by position"
                )
        if node.op not in ("call_module", "get_attr"):
            continue
        first, *rest = str(node.target).split(".")
        taken = [first] if first in _TAKEN else []
        taken += [name for name in (first, *rest) if keyword.iskeyword(name)]
        if taken:
            raise _no_name(taken[0], str(node.target))


def _graph_module(root: nn.Module, graph: fx.Graph, name: str) -> OptimizedModule:
    graph._tracer_cls = RecordingTracer  # what unpickling will trace the generated code with
    gm = OptimizedModule(root, graph, name)
    gm.meta = {}
    return gm


def behind_pre_hooks(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """What the forward gets: the result keeps the model's hooks, and they run before its graph."""
    for number, hook in model._forward_pre_hooks.items():
        if number in model._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(model, args, kwargs) or (args, kwargs)
            continue
        changed = hook(model, args)
        if changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _normalize(program: Program) -> None:
    """Fewer spellings for every rule behind: see the functions."""
    _one_index_a_node(program)
    _reads_after_writes(program)
    _one_cat(program)
    program.hoist_checks()
    program.refresh()


def _one_index_a_node(program: Program) -> None:
    """``x[:, v, t]`` becomes ``x[:, v][:, t]``, so that each index is a loop's own.

    So do the rows and columns of a tile, ``x[..., i:j, k:l]``.
    """
    for node in list(program.graph.nodes):
        op = program.op(node) if node.op == "call_function" else None
        if op is None or op.name != "getitem" or not isinstance(op.args["input"], fx.Node):
            continue
        index = op.args["index"]
        if any(part != WHOLE and type(part) is not int and not _is_window(part) for part in index):
            continue
        source, dim = node.args[0], 0
        with program.graph.inserting_before(node):
            for part in index:
                if part == WHOLE:
                    dim += 1
                    continue
                entry = part if type(part) is int else slice(*part[1:])
                where = (*[slice(None)] * dim, entry)
                source = program.graph.call_function(operator.getitem, (source, where))
                source.meta.update({k: v for k, v in node.meta.items() if k != "val"})
                dim += type(part) is not int
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)


def _is_window(part: Any) -> bool:
    """Whether a described index is a slice between numbers."""
    sliced = isinstance(part, tuple) and part[:1] == ("slice",)
    return sliced and all(bound is None or type(bound) is int for bound in part[1:])


def _reads_after_writes(program: Program) -> None:
    """Let what reads a tensor after an in-place op read the op's result, which is that tensor."""
    for node in program.graph.nodes:
        op = program.op(node)
        if op is None or not op.inplace:
            continue
        written = op.args.get("input")
        if isinstance(written, fx.Node) and written.op != "get_attr":
            later = {user for user in written.users if user > node}
            written.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _one_cat(program: Program) -> None:
    """``out = cat([out, y_t])``, once a frame, becomes one cat of all its parts."""
    absorbed: set[fx.Node] = set()
    for node in reversed(list(program.graph.nodes)):
        op = program.op(node)
        if op is None or op.name != "cat" or node in absorbed:
            continue
        parts = _parts_of_cat(program, node, op, absorbed)
        if parts is None or len(parts) == len(op.nodes()):
            continue
        with program.graph.inserting_before(node):
            joined = program.graph.call_function(torch.cat, (parts, op.args["dim"]))
        joined.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(joined)
        program.graph.erase_node(node)
    for node in sorted(absorbed, reverse=True):
        if not node.users:
            program.graph.erase_node(node)


def _parts_of_cat(
    program: Program, node: fx.Node, op: Op, absorbed: set[fx.Node]
) -> list[fx.Node] | None:
    """The tensors that ``node`` joins, those of a cat inside it included; empty ones left out."""
    tensors, dim = op.args["tensors"], op.args["dim"]
    value = node.meta.get("val")
    if not isinstance(tensors, tuple) or not isinstance(value, torch.Tensor):
        return None
    if not all(isinstance(part, fx.Node) for part in tensors):
        return None
    parts: list[fx.Node] = []
    pending = list(reversed(tensors))
    while pending:
        part = pending.pop()
        inner = program.op(part)
        if inner is not None and inner.name == "cat" and len(part.users) == 1:
            within, whole = inner.args["tensors"], inner.args["dim"] == dim
            if whole and isinstance(within, tuple) and all(isinstance(t, fx.Node) for t in within):
                absorbed.add(part)
                pending.extend(reversed(within))
                continue
        known = part.meta.get("val")
        nothing = isinstance(known, torch.Tensor) and tuple(known.shape) == (0,)
        if not nothing or value.dim() == 1 or known.dtype != value.dtype:
            parts.append(part)
    return parts


def _raise_if_model_fails(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], error: Exception
) -> None:
    """Tell a wrong input from a forward that the tracer cannot follow."""
    args, kwargs = own_inputs(example)
    try:
        with stand_in(model) as other, torch.no_grad(), quiet():
            other.module(*args, **kwargs)
    except Exception as own:  # whatever the model raises, the message passes it on
        raise _forward_error(model, own, error) from own


def _forward_error(model: nn.Module, own: Exception, traced: Exception) -> ForwardError:
    """Why the model fails on the example inputs, where, and the usual cure."""
    message = str(own).strip().splitlines()[0] if str(own).strip() else type(own).__name__
    frames = [
        frame for frame in traceback.extract_tb(own.__traceback__) if is_user_file(frame.filename)
    ]
    where = short_location(frames[-1].filename, frames[-1].lineno or 0) if frames else None
    module, shapes = "", ""
    if isinstance(traced, OpError):
        where = traced.location or where
        module, shapes = traced.module_path, traced.operand_shapes
    said = f" in module '{module}'" if module else ""
    said += f" at {where}" if where else ""
    said += f" on {shapes}" if shapes else ""
    text = f"the model fails on the example inputs{said}: {message}"
    return _with_cure(model, ForwardError(text, message, where, module, shapes))


def _with_cure(model: nn.Module, error: ForwardError) -> ForwardError:
    """The same, with what to do about it where it is a usual mistake."""
    mistake = failing(model, error)
    if mistake is not None:
        error.args = (f"{error}. To mend it: {mistake.cure}",)
    return error


def _reason(error: Exception) -> str:
    """One line: what stopped the tracer, and at which line of the user's code."""
    cause = error.__cause__ if isinstance(error, OpError) and error.__cause__ else error
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)]
    where = f" ({short_location(frames[-1].filename, frames[-1].lineno or 0)})" if frames else ""
    if isinstance(error, OpError) and error.location:
        where = f" ({error.location})"
    return f"{type(cause).__name__}: {text}{where}"


# -- torch.export ----------------------------------------------------------------------------------


def _from_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str
) -> Program:
    """Capture with torch.export: every dimension free that the model leaves free."""
    wide_args, wide_kwargs = pytree.tree_map_only(torch.Tensor, _two_samples, (args, kwargs))
    attempts = [
        (wide_args, wide_kwargs, _free(model, wide_args, wide_kwargs)),
        (args, kwargs, _free(model, args, kwargs)),
        (args, kwargs, None),
    ]
    errors = []
    for a, k, dynamic in attempts:
        try:
            with stand_in(model, share_parameters=True, watched=True) as other:
                states = RandomStates()
                with quiet(), refusing_long_lists(), modes_read(other.module) as modes:
                    exported = torch.export.export(
                        other.module, a, k, dynamic_shapes=dynamic, strict=False
                    )
                settle_export(other, states)
            refuse_unseen(model, exported, (args, kwargs))
        except StatefulError as error:
            raise CaptureError(f"{error}: make it an input and an output, or a buffer") from error
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises its own tree, and the model's errors
            errors.append(error)
            continue
        _refuse_frozen_parameters(exported, other.module)
        program = _from_exported(exported, args, kwargs)
        if not holds_on_example(program):  # of a batch of one, where two were shown
            errors.append(CaptureError("a guard that does not hold on the example inputs"))
            continue
        program.frontend, program.note = "export", why
        _share_tensors(program.gm, model, other)
        _set_training_as(program.gm, model)
        known = dict(program.gm.named_modules())
        program.modes = {path if path in known else "": fixed for path, fixed in modes.items()}
        refuse_small_sizes(program, exported, model, (args, kwargs))
        return program
    raise CaptureError(
        f"{type(model).__name__} could not be captured. The tracer stopped at {why}; torch.export "
        f"at {_reason(errors[-1])}. Move what depends on the data out of the forward, or optimize "
        "the part of the model that does not."
    ) from errors[-1]


def _refuse_frozen_parameters(exported: ExportedProgram, model: nn.Module) -> None:
    """A forward that reaches the model by another way than self has its weights made constants."""
    weights = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())} - {0}
    for name, value in exported.constants.items():
        if isinstance(value, torch.Generator):
            raise CaptureError(
                "the forward draws random numbers from a generator of its own, whose state a graph "
                "cannot carry: draw them before the call, and make them an input"
            )
        if name in exported.graph_signature.buffers or not isinstance(value, torch.Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(value) or is_fake(value):
            raise CaptureError(
                "torch.export left a tensor without data in the graph, for a function transform "
                "(torch.func) in the forward: optimize the part of the model around it"
            )
        if value.data_ptr() in weights:
            raise CaptureError(
                "the forward uses a parameter that it does not reach through self (a closure, a "
                "method of another module): torch.export would make it a constant. Define the "
                "forward in the class"
            )


def _two_samples(tensor: torch.Tensor) -> torch.Tensor:
    """torch.export takes a size of 1 for a constant; a batch of one is shown to it as two."""
    if tensor.dim() == 0 or tensor.shape[0] != 1:
        return tensor
    return tensor.repeat(2, *[1] * (tensor.dim() - 1))


def _free(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``dynamic_shapes`` that let every dimension be free that torch.export can let be."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    free: dict[str, Any] = pytree.tree_map(_free_dimensions, dict(bound))
    return free


def _free_dimensions(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: Dim.AUTO for dim, size in enumerate(value.shape) if size != 1}


def _set_training_as(gm: fx.GraphModule, model: nn.Module) -> None:
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in gm.named_modules():
        module.training = modes.get(path, model.training)


def _share_tensors(gm: fx.GraphModule, model: nn.Module, other: StandIn) -> None:
    """Put the model's own tensors in place of torch.export's, and of the stand-in's."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for kind in ("_parameters", "_buffers"):
        for path, module in gm.named_modules(remove_duplicate=False):
            for name in getattr(module, kind):
                full = f"{path}.{name}" if path else name
                if full in tensors:
                    getattr(module, kind)[name] = tensors[full]
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    vars(module)[name] = other.original(value)


def _from_exported(
    exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    gm = exported.module()
    assert isinstance(gm, fx.GraphModule)
    for hooks in (  # its checks of the input follow as nodes of the graph
        gm._forward_pre_hooks,
        gm._forward_pre_hooks_with_kwargs,
        gm._forward_hooks,
        gm._forward_hooks_with_kwargs,
        gm._forward_hooks_always_called,
    ):
        hooks.clear()
    program = _from_graph_module(gm, (args, kwargs) if args or kwargs else None)
    check_exported_sizes(program, exported)
    program.refresh()
    return program


# -- GraphModule -----------------------------------------------------------------------------------


def _from_graph_module(
    model: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Program:
    graph = fx.Graph(tracer_cls=RecordingTracer)
    graph.output(graph.graph_copy(model.graph, {}))
    graph._codegen = model.graph._codegen
    for node in graph.nodes:
        node.meta.pop("val", None)
    root = twin(model)
    gm = _graph_module(root, graph, type(model).__name__)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = Program(gm, fake_mode, "given")
    if example is not None:
        _fill_in_values(program, *example)
    _normalize(program)
    return program


def _fill_in_values(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the graph on fake tensors made from the example inputs."""
    codegen = program.graph._codegen
    flat: Sequence[Any]
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        both = spec.num_children == 2 and spec.child(1).type is dict  # (args, kwargs)
        try:
            flat = tree_flatten_spec((tuple(args), kwargs) if both else tuple(args), spec)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise CaptureError(f"the example inputs do not fit the graph's: {error}") from error
    else:
        bound = bind_example(program.gm, args, kwargs)
        parameters = inspect.signature(program.gm.forward).parameters
        flat = [bound.get(name, parameters[name].default) for name in parameters]
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, flat, strict=True):
        node.meta["val"] = pytree.tree_map_only(
            torch.Tensor,
            lambda t: program.fake_mode.from_tensor(t, static_shapes=True),
            value,
        )
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not all("val" in source.meta for source in node.all_input_nodes):
            continue
        try:
            node.meta["val"] = run_node(program.gm, node, program.fake_mode)
        except (DataDependentOutputException, DynamicOutputShapeException):
            continue  # its size depends on the data: it stays without a value
        except Exception as error:  # any op of the user's graph may refuse these inputs
            text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            where = program.location(node)
            message = (
                f"the graph fails on the example inputs at {where or f'node {node.name}'} "
                f"({node.op} {node.target}): {text}"
            )
            failed = ForwardError(message, text, where, program.module_path(node))
            raise _with_cure(program.gm, failed) from error
