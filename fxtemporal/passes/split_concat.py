"""Splits a layer that reads a frame joined with a state, so that the frame's half can be batched.

ConvLSTM, ConvGRU and most recurrent cells written by hand run one layer over the frame and the
state together. That makes all of it part of the recurrence. But the layer is linear in its input
channels, and the frame's channels do not depend on the state::

    before   for t in range(T):
                 gates = conv(cat([x[:, t], h], 1))                       T convolutions over all
    after    wx, wh = weight.narrow(1, 0, Cx), weight.narrow(1, Cx, Ch)
             for t in range(T):
                 gates = conv2d(x[:, t], wx, bias) + conv2d(h, wh)        T over h, T over frames

The frames' half is then a loop without a recurrence: time-distribute, which runs next, makes it one
convolution. The slices are views of the parameter, made once a call, so that gradients reach it and
the state dict is unchanged. Results differ by the order of a sum.

A state that is the same at each step, such as coordinates, is convolved once for all steps.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument

from fxtemporal.analysis.aliasing import Aliasing
from fxtemporal.analysis.conv_recurrences import Cell, ConvStep, Part, cells_of
from fxtemporal.ir.node_meta import copy_meta, mark_no_frame, needed_value
from fxtemporal.ir.ops import Attr
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.ir.values import shape
from fxtemporal.passes.rule import Rule, Site
from fxtemporal.support.torch_private.convolutions import suggest_memory_format

__all__ = ["SplitConcat"]

_CONVOLUTIONS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


class SplitConcat(Rule[Cell]):
    """layer(cat([frame, state])) → layer(frame) + layer(state)."""

    name = "split-concat"
    moves_others = True  # the state of one cell may be the output of another

    def candidates(self, program: Program) -> Iterable[Cell]:
        return tuple(cells_of(program))

    def site(self, program: Program, candidate: Cell) -> Site:
        layer = candidate.first.layer
        return Site(self.name, layer.name, _target(candidate), program.location(layer))

    def preconditions(self, program: Program, candidate: Cell) -> Iterator[Reason]:
        op = candidate.first.op
        if op is None:
            reason = blocked_module(program, candidate.first.layer)
            assert reason is not None
            yield reason
        elif op.args.get("groups", 1) != 1:
            text = f"its {op.args['groups']} groups do not divide into those of frame and state"
            yield Reason(Code.UNSUPPORTED_OP, text)
        if len({_value(program, part).dtype for part in candidate.first.parts}) > 1:
            yield Reason(Code.UNSUPPORTED_OP, "it joins tensors of different dtypes")
        yield from candidate.blockers
        yield from _visible_writes(program, candidate)

    def detail(self, program: Program, candidate: Cell) -> Mapping[str, Any]:
        channels = candidate.first.channels
        kinds = ["state" if i in candidate.state else "frame" for i in range(len(channels))]
        return {
            "steps": len(candidate.steps),
            "parts": ", ".join(kinds),
            "channels": ", ".join(map(str, channels)),
        }

    def nodes(self, program: Program, candidate: Cell) -> Iterable[fx.Node]:
        return [node for step in candidate.steps for node in (step.join, step.layer)]

    def what(self, program: Program, candidate: Cell) -> str:
        return f"{len(candidate.steps)} steps of a layer that reads a frame and a state as one"

    def becomes(self, program: Program, candidate: Cell) -> str:
        return "one call for all frames, and a smaller layer a step for the state"

    def rewrite(self, program: Program, candidate: Cell) -> Mapping[str, Any]:
        detail = self.detail(program, candidate)
        _Splitter(program, candidate).run()
        return detail


def _target(cell: Cell) -> str:
    """The module that owns the weight; the node's name if no module owns it."""
    layer, op = cell.first.layer, cell.first.op
    weight = None if op is None else op.args["weight"]
    if isinstance(weight, Attr) and weight.name.endswith(".weight"):
        return weight.name.removesuffix(".weight")
    return str(layer.target) if layer.op == "call_module" else layer.name


def _value(program: Program, part: Part) -> torch.Tensor:
    value = program.tensor(part.name) if isinstance(part, Attr) else needed_value(part)
    assert isinstance(value, torch.Tensor)
    return value


def _visible_writes(program: Program, cell: Cell) -> Iterator[Reason]:
    """Reasons for in-place writes that the layer sees in the parts but not in their ``cat``."""
    aliasing = Aliasing(program)
    for writer, written in aliasing.writes():
        reached = set(aliasing.shared_with(written))
        if any(_hidden(aliasing, cell, step, writer, reached) for step in cell.steps):
            text = f"{writer.name} writes in place what {cell.first.join.name} joins"
            yield Reason(Code.VISIBLE_WRITE, text)
            return
        if any(_holds(program, part, reached) for part in _fixed(cell)):
            yield Reason(Code.VISIBLE_WRITE, f"{writer.name} writes a weight in place")
            return


def _hidden(
    aliasing: Aliasing, cell: Cell, step: ConvStep, writer: fx.Node, reached: set[fx.Node]
) -> bool:
    """Whether the ``cat`` of ``step`` hides a write from its layer, or from the batched frames."""
    if step.join < writer < step.layer:
        return not reached.isdisjoint((step.join, *step.join.all_input_nodes))
    frames = {p for i, p in enumerate(step.parts) if i not in cell.state and isinstance(p, fx.Node)}
    late = frames & reached if cell.first.join < writer else set()
    return any(not aliasing.derives_from(part, writer) for part in late)


def _fixed(cell: Cell) -> list[Any]:
    """Values that all steps read: the weights, and parts that are parameters."""
    op = cell.first.op
    weights = [] if op is None else [op.args["weight"], op.args["bias"]]
    return weights + [p for step in cell.steps for p in step.parts if isinstance(p, Attr)]


def _holds(program: Program, value: Any, reached: set[fx.Node]) -> bool:
    """Whether ``value`` is one of the nodes ``reached``, or shares memory with one."""
    if not isinstance(value, Attr):
        return value in reached
    memory = program.tensor(value.name).untyped_storage()._cdata
    kept = [program.tensor(str(node.target)) for node in reached if node.op == "get_attr"]
    return any(tensor.untyped_storage()._cdata == memory for tensor in kept)


# -- the rewrite -----------------------------------------------------------------------------------


class _Splitter:
    """Replaces each step by a sum; the weights are sliced before the first step."""

    def __init__(self, program: Program, cell: Cell) -> None:
        self.program = program
        self.graph = program.graph
        self.cell = cell
        assert cell.first.op is not None
        self.args = cell.first.op.args
        self.convolution = _CONVOLUTIONS.get(cell.first.op.name)
        aliasing = Aliasing(program)
        self.written = {n for _, w in aliasing.writes() for n in aliasing.shared_with(w)}
        self.states: dict[tuple[Part, ...], fx.Node] = {}
        self.sums: dict[Part, fx.Node] = {}

    def run(self) -> None:
        with self.graph.inserting_before(self.cell.first.layer):
            weight = self.program.argument(self.args["weight"])
            self.bias = self.program.argument(self.args["bias"])
            halves = (*self.cell.frames, self.cell.state)
            self.weights = {half: self._slice(weight, half) for half in halves}
        for step in self.cell.steps:
            with self.graph.inserting_before(step.layer):
                total = self._sum(step)
            self.sums[step.layer] = total
            step.layer.replace_all_uses_with(total)
            self.graph.erase_node(step.layer)
            if not step.join.users:
                self.graph.erase_node(step.join)

    def _slice(self, weight: fx.Node, half: tuple[int, ...]) -> fx.Node:
        """``weight`` for the input channels of the parts in ``half``."""
        runs: list[list[int]] = []
        for position in half:
            start = sum(self.cell.first.channels[:position])
            if not runs or sum(runs[-1]) != start:
                runs.append([start, 0])
            runs[-1][1] += self.cell.first.channels[position]
        slices = [self.graph.call_method("narrow", (weight, 1, *run)) for run in runs]
        for piece in slices:
            mark_no_frame(piece)  # no frame of the weight
        if len(slices) > 1:
            return self.graph.call_function(torch.cat, (slices, 1))
        return self.graph.call_method("contiguous", (slices[0],))  # once, not at every step

    def _sum(self, step: ConvStep) -> fx.Node:
        first, *others = self.cell.frames
        frames = [self._half(step, first, self.bias)]
        frames += [self._half(step, half, None) for half in others]
        halves = [*frames, self._state(step)]
        return reduce(lambda a, b: self._call(step, operator.add, a, b), halves)

    def _state(self, step: ConvStep) -> fx.Node:
        """The state's half: one node for all steps with the same, never written, states."""
        parts = tuple(step.parts[position] for position in self.cell.state)
        if parts not in self.states or not self.written.isdisjoint(parts):
            self.states[parts] = self._half(step, self.cell.state, None)
        return self.states[parts]

    def _half(self, step: ConvStep, half: tuple[int, ...], bias: fx.Node | None) -> fx.Node:
        parts = [self._part(step, step.parts[position]) for position in half]
        joined = parts[0]
        if len(parts) > 1:
            joined = self._call(step, torch.cat, parts, step.dim)
        weight, args = self.weights[half], self.args
        if self.convolution is None:
            return self._call(step, F.linear, joined, weight, bias)
        padding = args["padding"]
        if args["padding_mode"] != "zeros":
            joined = self._call(step, F.pad, joined, self._pads(), args["padding_mode"])
            padding = 0
        rest = args["stride"], padding, args["dilation"]
        return self._call(step, self.convolution, joined, weight, bias, *rest)

    def _part(self, step: ConvStep, part: Part) -> fx.Node:
        """``part`` in the memory layout of the ``cat``, which the layer's output takes over."""
        node: fx.Node = self.program.argument(self.sums.get(part, part))
        layout = suggest_memory_format(needed_value(step.join))
        if suggest_memory_format(_value(self.program, part)) == layout:
            return node
        kwargs: dict[str, Argument] = {"memory_format": layout}
        return self.graph.call_method("contiguous", (node,), kwargs)

    def _pads(self) -> tuple[int, ...]:
        """Padding in the order of F.pad: from the last dimension on, before and after."""
        padding = self.args["padding"]
        kernel = _kernel(self.program, self.args["weight"])
        pads: list[int] = []
        for axis, (size, dilation) in enumerate(zip(kernel, self.args["dilation"], strict=True)):
            both = dilation * (size - 1) if padding == "same" else 2 * padding[axis]
            pads = [both // 2, both - both // 2, *pads]
        return tuple(pads)

    def _call(self, step: ConvStep, function: Any, *args: Any) -> fx.Node:
        """A new node that stands for part of the step's layer."""
        node = self.graph.call_function(function, args)
        copy_meta(node, step.layer)
        return node


def _kernel(program: Program, weight: Part) -> tuple[int, ...]:
    sizes = program.tensor(weight.name).shape if isinstance(weight, Attr) else shape(weight)
    assert sizes is not None
    return tuple(sizes[2:])
