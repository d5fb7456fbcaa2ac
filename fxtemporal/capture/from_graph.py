"""Captures a ``torch.fx.GraphModule`` that the user gave as a program."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.capture.arguments import bind_example
from fxtemporal.capture.normalize import normalize
from fxtemporal.capture.tracing.base_tracer import RecordingTracer
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.node_meta import forget_value, has_value, set_value
from fxtemporal.ir.program import Program
from fxtemporal.ir.raised import first_line
from fxtemporal.ir.shallow_copy import twin
from fxtemporal.ir.values import run_node
from fxtemporal.support.errors import CaptureError, ForwardError
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from fxtemporal.support.torch_private.operators import tree_flatten_spec
from fxtemporal.support.torch_private.transforms import leaving_transforms

__all__ = ["from_graph_module", "graph_module", "refuse_quotes"]

_TAKEN = frozenset(dir(fx.GraphModule)) | {"_graph", "meta"}
"""Attributes of every graph module: an attribute of a model cannot have the same name."""
_NOT_IN_QUOTES = re.compile(r'["\\]|[^\x20-\U0010ffff]|[\x7f-\x9f\u2028\u2029\u202a-\u202e]')
"""Characters refused in names: generated code puts a name between quotes without escaping it."""


def refuse_quotes(model: nn.Module) -> None:
    """Refuse names that would end their quotes in generated code, and continue as code.

    Names of modules, parameters and buffers, for every way of capturing.
    """
    for named in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        for path, _ in named:
            if _NOT_IN_QUOTES.search(path):
                raise _no_name(path.rpartition(".")[2], path)


def _no_name(name: str, path: str) -> CaptureError:
    return CaptureError(
        f"the model has a part called {name!r} (in {path!r}), a name that code generated from a "
        "graph cannot use: rename it"
    )


def refuse_names(graph: fx.Graph) -> None:
    """Refuse names that generated code cannot write as ``self.name`` or ``name=value``."""
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


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> OptimizedModule:
    graph._tracer_cls = RecordingTracer  # unpickling traces the generated code with it
    gm = OptimizedModule(root, graph, name, later=True)
    gm.meta = {}
    return gm


def from_graph_module(
    model: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Program:
    graph = fx.Graph(tracer_cls=RecordingTracer)
    graph.output(graph.graph_copy(model.graph, {}))
    graph._codegen = model.graph._codegen
    for node in graph.nodes:
        forget_value(node)
    root = twin(model)
    gm = graph_module(root, graph, type(model).__name__)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = Program(gm, fake_mode, "given")
    if example is not None:
        _fill_in_values(program, *example)
    normalize(program)
    return program


@leaving_transforms()
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
        fake = partial(program.fake_mode.from_tensor, static_shapes=True)
        set_value(node, pytree.tree_map_only(torch.Tensor, fake, value))
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not all(has_value(source) for source in node.all_input_nodes):
            continue
        try:
            set_value(node, run_node(program.gm, node, program.fake_mode))
        except (DataDependentOutputException, DynamicOutputShapeException):
            continue  # its size depends on the data: it stays without a value
        except Exception as error:  # any op of the user's graph may refuse these inputs
            text = first_line(error)
            where = program.location(node)
            message = (
                f"the graph fails on the example inputs at {where or f'node {node.name}'} "
                f"({node.op} {node.target}): {text}"
            )
            raise ForwardError(message, text, where, program.module_path(node)) from error
