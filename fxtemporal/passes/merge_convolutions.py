"""Merges convolutions that read the same input through the same window.

Each branch of an Inception block begins with a 1×1×1 convolution of the same input. One convolution
with all their kernels reads that input once, and gives the engine more work at a time::

    before   a = self.branch0(x)                          C → 64
             b = self.branch1(x)                          C → 96
    after    w = self._prepared_0(branch0.weight, branch1.weight)      (160, C, kT, kH, kW)
             y = F.conv3d(x, w, ...)
             a, b = narrow(y, channels, 0, 64), narrow(y, channels, 64, 96)

The slices are views if their readers allocate new memory. A reader that could notice the shared
memory (a view, an in-place op, an output) gets a copy. An in-place ReLU whose write nobody else can
see becomes out-of-place: a write into a slice would invalidate what autograd saved for the others.
A convolution called twice on one input is computed once. A legal merge is not always faster:
measuring decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxtemporal.analysis.aliasing import Aliasing, written_by
from fxtemporal.analysis.interference import attributes_written, mode_switch, written_between
from fxtemporal.ir.leaf import leaf_function
from fxtemporal.ir.node_meta import copy_meta, forget_value, needed_value, value_of
from fxtemporal.ir.ops import Attr, Op
from fxtemporal.ir.prepared import derivation, origin, prepare
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.passes.building.convolution_call import layer_call
from fxtemporal.passes.rule import Rule, Site

__all__ = ["Branches", "MergeConvolutions", "concatenated"]

_DIMS = {f"conv{n}d": n for n in (1, 2, 3)}


@leaf_function
def concatenated(*parts: Tensor) -> Tensor:
    """The kernels, or the biases, of several convolutions, one after another."""
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Branches:
    """Two or more calls of convolutions with one input and one window, in graph order.

    ``ops`` has None for a module that is not described.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    ops: tuple[Op | None, ...]
    names: tuple[str, ...]
    aliasing: Aliasing
    written: frozenset[str]


class MergeConvolutions(Rule[Branches]):
    """Convolutions of one input → one convolution, and slices of its channels."""

    name = "merge-convolutions"
    alike = True
    moves_others = True

    def candidates(self, program: Program) -> Iterable[Branches]:
        groups: dict[tuple[Any, ...], list[tuple[fx.Node, Op | None]]] = {}
        for node in program.graph.nodes:
            op = program.op(node) if node.op.startswith("call") else None
            window = _window(program, node, op)
            if window is not None:
                groups.setdefault(window, []).append((node, op))
        if all(len(group) < 2 for group in groups.values()):
            return
        aliasing, written = Aliasing(program), attributes_written(program)
        for window, group in groups.items():
            if len(group) < 2:
                continue
            nodes, ops = zip(*group, strict=True)
            names = tuple(_name(program, node, op) for node, op in group)
            yield Branches(window[1], nodes, ops, names, aliasing, written)

    def site(self, program: Program, candidate: Branches) -> Site:
        location = program.location(candidate.nodes[0])
        return Site(self.name, "+".join(candidate.names), candidate.names[0], location)

    def preconditions(self, program: Program, candidate: Branches) -> Iterator[Reason]:
        first, last = candidate.nodes[0], candidate.nodes[-1]
        for node, op in zip(candidate.nodes, candidate.ops, strict=True):
            if op is None:
                yield blocked_module(program, node) or Reason(
                    Code.SUBCLASS, f"{node.target} is not exactly a layer of torch.nn"
                )
                continue
            for value in (op.args["weight"], op.args["bias"]):
                name = origin(program, value)
                if value is not None and name is None:
                    yield Reason(Code.COMPUTED_WEIGHT, f"{value} is computed at each call")
                elif name in candidate.written:
                    yield Reason(Code.VISIBLE_WRITE, f"the forward writes {name}")
        writer = written_between(candidate.aliasing, candidate.source, first, last)
        if writer is not None:
            text = f"{writer.name} writes the input between {first.name} and {last.name}"
            yield Reason(Code.VISIBLE_WRITE, text)
        switch = mode_switch(program, first, last)
        if switch is not None:
            text = f"{switch.name}, which stands between them, may switch a mode"
            yield Reason(Code.UNSUPPORTED_OP, text)

    def nodes(self, program: Program, candidate: Branches) -> Iterable[fx.Node]:
        return candidate.nodes

    def what(self, program: Program, candidate: Branches) -> str:
        return f"{len(candidate.nodes)} convolutions of one input"

    def becomes(self, program: Program, candidate: Branches) -> str:
        return "one convolution, and slices of its channels"

    def rewrite(self, program: Program, candidate: Branches) -> Mapping[str, Any]:
        detail = self.detail(program, candidate)
        first = candidate.nodes[0]
        ops = [op for op in candidate.ops if op is not None]
        distinct = {_weights(op): op for op in reversed(ops)}
        distinct = {key: distinct[key] for key in dict.fromkeys(map(_weights, ops))}
        weights = [op.args["weight"] for op in distinct.values()]
        biases = [op.args["bias"] for op in distinct.values() if op.args["bias"] is not None]
        slices = [_Slice(program, candidate.aliasing, node) for node in candidate.nodes]
        for value in (*weights, *biases):
            _move_before(first, value)
        with program.graph.inserting_before(first):
            weight = self._joined(program, weights)
            bias = self._joined(program, biases) if biases else None
            merged = layer_call(program, ops[0], weight, bias)
        copy_meta(merged, first)
        spans, start = {}, 0
        for key, op in distinct.items():
            spans[key] = (start, _channels(program, op))
            start += spans[key][1]
        for part, op in zip(slices, ops, strict=True):
            part.take(merged, -1 - _DIMS[op.name], spans[_weights(op)])
        return detail

    def _joined(self, program: Program, values: list[Any]) -> fx.Node:
        nodes = [program.argument(value) for value in values]
        only: fx.Node = nodes[0]
        return only if len(nodes) == 1 else prepare(program, concatenated, nodes)

    def detail(self, program: Program, candidate: Branches) -> Mapping[str, Any]:
        channels = [_channels(program, op) for op in candidate.ops if op is not None]
        return {
            "layers": ", ".join(candidate.names),
            "channels": " + ".join(map(str, channels)),
        }


def _window(program: Program, node: fx.Node, op: Op | None) -> tuple[Any, ...] | None:
    """A key that is equal for convolutions that can be merged; None if ``node`` is none."""
    if op is None:
        if node.op != "call_module" or not node.all_input_nodes:
            return None
        module = program.gm.get_submodule(str(node.target))
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups != 1:
            return None
        sizes = (module.stride, module.padding, module.dilation)
        biased = module._parameters.get("bias", module) is not None
        dtype = next(module.parameters()).dtype  # not weight.dtype: weight may be parametrized
        name, kernel = f"conv{len(module.kernel_size)}d", tuple(module.kernel_size)
        args = (*sizes, module.padding_mode, not biased)
        return (name, node.all_input_nodes[0], kernel, dtype, *args)
    if op.name not in _DIMS or op.args["groups"] != 1:
        return None
    value, source = op.args["weight"], op.args["input"]
    tensor = program.tensor(value.name) if isinstance(value, Attr) else value_of(value)
    if not isinstance(tensor, Tensor) or not isinstance(source, fx.Node):
        return None
    args = tuple(op.args[name] for name in ("stride", "padding", "dilation", "padding_mode"))
    window = (*args, op.args["bias"] is None)
    if any(
        isinstance(entry, fx.Node)
        for value in window
        if isinstance(value, tuple)
        for entry in value
    ):
        return None
    return (op.name, source, tuple(tensor.shape[2:]), tensor.dtype, *window)


def _channels(program: Program, op: Op) -> int:
    value = op.args["weight"]
    tensor = program.tensor(value.name) if isinstance(value, Attr) else needed_value(value)
    return int(tensor.shape[0])


def _name(program: Program, node: fx.Node, op: Op | None) -> str:
    """The module that owns the weight; the node's name if no module owns it."""
    weight = None if op is None else origin(program, op.args["weight"])
    if weight is not None and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return str(node.target) if node.op == "call_module" else node.name


def _move_before(first: fx.Node, value: Any) -> None:
    """Move the prepared ``value``, and the nodes it is prepared from, before ``first``."""
    if not isinstance(value, fx.Node) or value < first:
        return
    for source in value.all_input_nodes:
        _move_before(first, source)
    first.prepend(value)


def _weights(op: Op) -> tuple[Any, Any]:
    """A key that tells apart convolutions of one input and one window: their weights."""
    return derivation(op.args["weight"]), derivation(op.args["bias"])


class _Slice:
    """The changes to make for one branch, decided before the graph changes."""

    def __init__(self, program: Program, aliasing: Aliasing, node: fx.Node) -> None:
        self.graph = program.graph
        self.node = node
        self.shared = aliasing.shared_with(node)
        self.relus = [user for user in node.users if _hidden_relu(program, aliasing, user, node)]
        rest = [user for user in node.users if user not in self.relus]
        self.copied = not all(_reads_only(program, user) for user in rest)

    def take(self, merged: fx.Node, dim: int, span: tuple[int, int]) -> None:
        """Replace the branch by ``span`` (start, length) of ``merged`` along ``dim``."""
        graph, node = self.graph, self.node
        with graph.inserting_before(node):
            part = graph.call_method("narrow", (merged, dim, *span))
            if self.copied:
                part = graph.call_method("clone", (part,))
        copy_meta(part, node)
        for relu in () if self.copied else self.relus:
            with graph.inserting_before(relu):
                new = graph.call_function(F.relu, (part,))
            copy_meta(new, relu)
            relu.replace_all_uses_with(new)
            graph.erase_node(relu)
        for other in self.shared:
            if other.op.startswith("call"):
                forget_value(other)  # its memory is another one now
        node.replace_all_uses_with(part)
        parameters = [value for value in node.all_input_nodes if value.op == "get_attr"]
        graph.erase_node(node)
        for value in parameters:
            if not value.users:
                graph.erase_node(value)


def _hidden_relu(program: Program, aliasing: Aliasing, user: fx.Node, node: fx.Node) -> bool:
    op = program.op(user)
    if op is None or op.name != "relu" or not op.inplace or op.args["input"] is not node:
        return False
    return aliasing.visible(user, node) is None


def _reads_only(program: Program, user: fx.Node) -> bool:
    """Whether ``user`` works the same on a slice of a larger tensor as on a separate tensor."""
    op = program.op(user) if user.op.startswith("call") else None
    return op is not None and op.owns and not written_by(program, user)
