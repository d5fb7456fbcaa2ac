"""Captures what users have as a :class:`fxtemporal.ir.program.Program`.

========================  ==========================================================
``nn.Module``             the shape-aware tracer; ``torch.export`` where that fails
``fx.GraphModule``        taken as it is, shapes filled in from the example inputs
``ExportedProgram``       its module, with guards on the sizes it was exported for
========================  ==========================================================

A module is captured by the first attempt of a list that succeeds; each attempt gets the errors of
those before it. The program shares every parameter with the model it came from and nothing else, so
rewriting it never changes the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.proxy import TraceError
from torch.nn.parameter import is_lazy

from fxtemporal.capture.arguments import (
    Model,
    behind_pre_hooks,
    bind_example,
    check_arguments,
    example_of,
)
from fxtemporal.capture.failures import raise_if_model_fails, reason_of, refusal
from fxtemporal.capture.from_export import from_export, from_exported
from fxtemporal.capture.from_graph import (
    from_graph_module,
    graph_module,
    refuse_names,
    refuse_quotes,
)
from fxtemporal.capture.normalize import normalize
from fxtemporal.capture.tracing.base_tracer import one_capture
from fxtemporal.capture.tracing.errors import GradientModeError, StatefulError
from fxtemporal.capture.tracing.module_state import settle
from fxtemporal.capture.tracing.python_patches import custom_functions, refusing_seeds
from fxtemporal.capture.tracing.shape_tracer import ShapeTracer
from fxtemporal.ir.in_place import is_in_place
from fxtemporal.ir.program import Program
from fxtemporal.ir.shallow_copy import twin
from fxtemporal.ir.shape_memo import ShapeMemo, Shapes
from fxtemporal.ir.shared_state import RandomStates
from fxtemporal.ir.stand_in import StandIn, own_inputs, stand_in
from fxtemporal.support.errors import CaptureError
from fxtemporal.support.torch_private import symbolic_trace
from fxtemporal.support.torch_private.fake_tensors import FakeTensorMode

__all__ = ["capture"]


def capture(
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    frontend: str | None = None,
    only: str | None = None,
    shapes: Shapes | None = None,
) -> Program:
    """Capture ``model`` as it runs on ``model(*args, **kwargs)``.

    Without example inputs no shapes are known. ``frontend="export"`` uses torch.export without
    trying the tracer; ``only="fx"`` raises where the tracer fails, without trying torch.export.
    ``shapes`` are those that another capture found, ``program.shapes.known``, and found new here.

    Raises:
        CaptureError: the model cannot be captured, or does not run on the example inputs.
    """
    check_arguments(model, args, kwargs)
    example = None if args is None and kwargs is None else (args or (), dict(kwargs or {}))
    with one_capture, custom_functions() as functions, refusing_seeds():
        program = _captured(model, example, frontend, only, {} if shapes is None else shapes)
    if functions:
        named = ", ".join(dict.fromkeys(functions))
        program.gradients = f"a graph does not hold the backward of {named}"
    return program


Example: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_Attempt: TypeAlias = Callable[[nn.Module, Example | None, Sequence[Exception], Shapes], Program]
"""Captures a model on its example, or raises. It gets the errors of the attempts before it."""


def _captured(
    model: Model, example: Example | None, frontend: str | None, only: str | None, shapes: Shapes
) -> Program:
    if isinstance(model, ExportedProgram):
        return from_exported(model, *(example_of(model, *(example or (None, None))) or ((), {})))
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            "the model has lazy layers, which get their weights at the first call: call it once"
        )
    refuse_quotes(model)
    if isinstance(model, fx.GraphModule):
        return from_graph_module(model, example)
    failures: list[Exception] = []
    attempts: Iterable[_Attempt] = (_trace, _trace_in_both_modes, _trace_wrapped, _export)
    if frontend == "export" and example is not None:
        failures, attempts = [_UntraceableError("the traced graph gave other numbers")], (_export,)
    elif (why := _called_otherwise(model)) is not None:
        failures, attempts = [_UntraceableError(why)], (_export,)
    elif only is not None:
        attempts = (_trace, _trace_in_both_modes, _trace_wrapped)
    for attempt in attempts:
        if not _promises(attempt, failures):
            continue
        try:
            return attempt(model, example, failures, shapes)
        except CaptureError:
            raise
        except Exception as error:  # the user's forward ran on proxies: it may raise anything
            if attempt is _export:
                raise
            failures.append(error)
    raise refusal(model, example, _reasons(failures)) from failures[-1]


def _reasons(failures: Sequence[Exception]) -> list[tuple[str, str]]:
    return [("the tracer", reason_of(error)) for error in failures]


class _UntraceableError(Exception):
    """The reason not to trace a model, if it is known before a trace."""


def _called_otherwise(model: nn.Module) -> str | None:
    """Why calling ``model`` does not call the forward of its class; None if it does."""
    if "forward" in vars(model) and not is_in_place(vars(model)["forward"]):
        return "the model's forward was replaced on the instance"
    if type(model).__call__ is not nn.Module.__call__:
        return f"{type(model).__name__} has a __call__ of its own"
    return None


def _trace(
    model: nn.Module, example: Example | None, failures: Sequence[Exception], shapes: Shapes
) -> Program:
    """Capture by the tracer, which goes through functions that a library put under
    ``torch.fx.wrap``.
    """
    return _traced(model, example, shapes)


def _trace_in_both_modes(
    model: nn.Module, example: Example | None, failures: Sequence[Exception], shapes: Shapes
) -> Program:
    """By the tracer, if it makes no difference whether gradients are recorded."""
    program = _traced(model, example, shapes, grad_mode=True)
    if not _same_code(program, _traced(model, example, shapes, grad_mode=False)):
        raise failures[-1]
    return program


def _same_code(one: Program, other: Program) -> bool:
    """Whether two traces of a model are one graph, over equal constants."""
    if str(one.gm.code) != str(other.gm.code) or one.layer_settings != other.layer_settings:
        return False
    constants = [name for name in vars(one.gm) if name.startswith("_tensor_constant")]
    pairs = [(getattr(one.gm, name), getattr(other.gm, name, None)) for name in constants]
    return all(mine is theirs or _equal(mine, theirs) for mine, theirs in pairs)


def _equal(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return False
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def _trace_wrapped(
    model: nn.Module, example: Example | None, failures: Sequence[Exception], shapes: Shapes
) -> Program:
    """Capture by the tracer, with one node for each call of a function under ``torch.fx.wrap``."""
    return _traced(model, example, shapes, wrapped=True)


def _promises(attempt: _Attempt, failures: Sequence[Exception]) -> bool:
    """Whether an attempt may do better than those before it."""
    asked = [error for error in failures if isinstance(error, GradientModeError)]
    if attempt is _trace_in_both_modes:
        return any(error.answerable for error in asked)
    if attempt is _trace_wrapped:  # the trace may have failed within a function under torch.fx.wrap
        stateful = any(isinstance(error, StatefulError) for error in failures)
        return bool(symbolic_trace.wrapped_functions()) and not stateful and not asked
    return True


def _export(
    model: nn.Module, example: Example | None, failures: Sequence[Exception], shapes: Shapes
) -> Program:
    """Capture by torch.export, which gives the forward real Python numbers for sizes."""
    *_, error = failures
    if isinstance(error, StatefulError) and (example is None or not error.exportable):
        raise CaptureError(
            f"{error}: a graph cannot carry it. Make it an input and an output, or a buffer."
        ) from error
    if example is None and isinstance(error, _UntraceableError):
        raise CaptureError(f"{error}: give example inputs")
    if example is None:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced without shapes: {reason_of(error)}. Give "
            "example inputs."
        ) from error
    if isinstance(error, StatefulError | _UntraceableError):
        return from_export(model, *example, why=[("the tracer", str(error))])
    raise_if_model_fails(model, example, error)
    program = from_export(model, *example, why=_reasons(failures))
    asked = next((e for e in failures if isinstance(e, GradientModeError)), None)
    program.doubt = program.doubt if asked is None else str(asked)
    return program


def _traced(
    model: nn.Module,
    example: Example | None,
    shapes: Shapes,
    *,
    wrapped: bool = False,
    grad_mode: bool | None = None,
) -> Program:
    """Trace a stand-in; the graph uses the parameters and modules of the model itself."""
    with stand_in(model, share_parameters=True, watched=True) as other:
        return _trace_of(model, other, example, shapes, wrapped=wrapped, grad_mode=grad_mode)


def _trace_of(
    model: nn.Module, other: StandIn, example: Example | None, known: Shapes, **settings: Any
) -> Program:
    bound = None
    if example is not None:
        args, kwargs = behind_pre_hooks(other.module, *own_inputs(example))
        settings["positional"] = len(args)
        bound = bind_example(model, args, kwargs)
        other.forget_changes()  # the result has these hooks too
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = ShapeMemo(fake_mode, known)
    tracer = ShapeTracer(fake_mode, bound, shapes=shapes, **settings)
    states = RandomStates()
    with _without_logs():  # of an op that refuses its input: the error says it
        graph = tracer.trace(other.module)
    for value in tracer.returned.values():
        if other.original(value) is not value:
            raise TraceError(f"the forward returns a {type(value).__name__} that it keeps")
    note, writes = settle(model, other, states, example)
    root = twin(model)
    _use_originals(graph, other, root)
    refuse_names(graph)
    gm = graph_module(root, graph, type(model).__name__)
    gm.return_as(tracer.returns)
    program = Program(gm, fake_mode, "fx", note, shapes)
    program.modes, program.writes = tracer.modes, writes
    with _without_logs():
        normalize(program)
    return program


def _use_originals(graph: fx.Graph, other: StandIn, root: nn.Module) -> None:
    """Replace the stand-in's copies in ``graph`` by the model's own objects."""
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
    """Silence torch's log about fake tensors; what the user's code logs is passed on."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
