"""``torch.compile(model, backend="fxtemporal")``: the rewrites on Dynamo's graph, then Inductor.

Dynamo passes a graph whose parameters, buffers and free sizes are inputs. For the rewrites,
parameters become attributes of the graph, and sizes are read from the tensors that have them.
Afterwards the graph takes its original inputs again, so that it uses a replaced or trained
parameter as the original does::

    weight, s0, x  →  F.conv2d(x, weight)            as Dynamo has it
    x              →  F.conv2d(x, self.weight)       while it is rewritten
    weight, s0, x  →  F.conv2d(x, weight)            for the backend that compiles it
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from fxtemporal.api import optimize, report
from fxtemporal.passes import PORTABLE_PASSES
from fxtemporal.passes.fold_batchnorm import FoldBatchNorm
from fxtemporal.passes.rule import Rule
from fxtemporal.reports.report import Report
from fxtemporal.support.errors import FxTemporalError, PassError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private.compilers import dynamo_backend, inductor_backend, is_static

__all__ = ["OPTIONS", "compile_graph"]

Compile: TypeAlias = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

log = logging.getLogger("fxtemporal")

OPTIONS = ("backend", "options", "passes", "tune", "verify", "on_report")

_PASSES = [rule for rule in PORTABLE_PASSES if not isinstance(rule, FoldBatchNorm)]
"""Without FoldBatchNorm: a folded weight would be computed at every call, and compilers fuse a
BatchNorm anyway."""


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """A backend of torch.compile.

    Args:
        options: ``backend``, which compiles the rewritten graph (default: ``"inductor"``), and
            ``options``, which are passed to it; ``passes`` (default: those that reduce work on any
            engine), ``tune`` (default: ``"static"``) and ``verify`` (default: True), as in
            :func:`fxtemporal.optimize`; ``on_report``, a function that is called with the
            :class:`fxtemporal.Report` of each graph.
        mode: Inductor's mode, such as ``"max-autotune"``.

    Raises:
        PassError: an unknown option.
    """
    asked = dict(options or {})
    for name in asked:
        if name not in OPTIONS:
            raise PassError(f"fxtemporal has no option {name!r}; there are {', '.join(OPTIONS)}")
    compile_inner = _inner(asked.get("backend", "inductor"), asked.get("options"), mode)
    try:
        with quiet():
            rewritten, found = _rewritten(gm, example_inputs, asked)
    except PassError:
        raise
    except FxTemporalError as error:
        log.warning("a graph of torch.compile is left as it is: %s", error)
        return compile_inner(gm, list(example_inputs))
    if (on_report := asked.get("on_report")) is not None:
        on_report(found)
    log.info("%s", found)
    return compile_inner(rewritten, list(example_inputs))


def _inner(
    backend: str | Callable[..., Any], options: Mapping[str, Any] | None, mode: str | None
) -> Compile:
    if backend == "inductor":
        return inductor_backend(mode, options or {})
    found = dynamo_backend(backend)
    return found if options is None else partial(found, options=dict(options))


def _rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], asked: Mapping[str, Any]
) -> tuple[fx.GraphModule, Report]:
    bound, tensors, inputs = _bound(gm, example_inputs)
    passes: Iterable[str | Rule[Any]] = asked.get("passes", _PASSES)
    fast = optimize(
        bound,
        inputs,
        passes=[*passes],
        tune=asked.get("tune", "static"),
        verify=asked.get("verify", True),
        otherwise="error",
        progress=False,
    )
    assert isinstance(fast, fx.GraphModule)  # a graph is captured whole
    return _unbound(gm, fast, tensors), report(fast)


def _bound(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[fx.GraphModule, dict[str, str], tuple[Tensor, ...]]:
    """The graph with only its real inputs; ``{attribute: input}`` of the others; those inputs."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    graph, root = fx.Graph(), nn.Module()
    for name, module in gm.named_children():
        root.add_module(name, module)
    for name, value in [*gm.named_parameters(recurse=False), *gm.named_buffers(recurse=False)]:
        setattr(root, name, value)
    copies: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, str] = {}
    inputs = []
    sizes: dict[str, tuple[fx.Node, int]] = {}
    for node, value in zip(placeholders, example_inputs, strict=True):
        if isinstance(value, Tensor) and is_static(value):
            name = f"_input_{len(tensors)}"
            if isinstance(value, nn.Parameter):
                root.register_parameter(name, value)
            else:
                root.register_buffer(name, value)
            tensors[name] = str(node.target)
        elif isinstance(value, Tensor):
            copies[node] = graph.node_copy(node)
            inputs.append(value)
            for dim, size in enumerate(node.meta["example_value"].shape):
                sizes.setdefault(str(size), (copies[node], dim))
    attributes = iter(tensors)
    for node, value in zip(placeholders, example_inputs, strict=True):
        if node in copies:
            continue
        if isinstance(value, Tensor):
            copies[node] = graph.get_attr(next(attributes))
        elif str(node.meta["example_value"]) in sizes:
            copies[node] = graph.call_method("size", sizes[str(node.meta["example_value"])])
        elif node.users:
            raise FxTemporalError(f"{node.name} is a number that is no size of an input")
    graph.output(graph.graph_copy(gm.graph, copies))
    return fx.GraphModule(root, graph), tensors, tuple(inputs)


def _unbound(
    gm: fx.GraphModule, fast: fx.GraphModule, tensors: Mapping[str, str]
) -> fx.GraphModule:
    """``fast`` with the inputs of ``gm``."""
    held = {id(getattr(fast, name)) for name in tensors}
    for node in fast.graph.find_nodes(op="call_module"):
        module = fast.get_submodule(str(node.target))
        if any(id(value) in held for value in (*module.parameters(), *module.buffers())):
            raise FxTemporalError(f"{node.target} holds a parameter that is an input of the graph")
    graph = fx.Graph()
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = {str(node.target): graph.node_copy(node) for node in placeholders}
    copies: dict[fx.Node, fx.Node] = {}
    for node in fast.graph.nodes:
        if node.op == "placeholder":
            copies[node] = given[str(node.target)]
        elif node.op == "get_attr" and node.target in tensors:
            copies[node] = given[tensors[str(node.target)]]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    result = fx.GraphModule(fast, graph)
    result.meta.update(gm.meta)
    return result
