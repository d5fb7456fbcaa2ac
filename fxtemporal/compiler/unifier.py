"""Unifies graphs, one for each number of frames T, to one graph for all T."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.families import is_input
from fxtemporal.ir.admitted import AdmittedFrames
from fxtemporal.ir.guards import TRIP_COUNT, guard
from fxtemporal.ir.node_meta import forget_value, readers_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import attribute, shape

__all__ = ["Unifier", "code", "counts_laps", "skeleton"]


def counts_laps(check: fx.Node) -> bool:
    """Whether only loops read the size that the guard ``check`` holds."""
    return set(readers_of(check)) == {TRIP_COUNT}


def code(program: Program) -> list[tuple[Any, ...]]:
    """A key of the graph, node by node, without the texts of its guards."""
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    return [
        (node.op, node.target, repr(fx.node.map_arg((args, node.kwargs), position.__getitem__)))
        for node in program.graph.nodes
        for args in [node.args[:2] if node.target is guard else node.args]
    ]


def _sizes(column: Sequence[fx.Node], dim: int) -> tuple[int, ...] | None:
    shapes = [shape(node) or () for node in column]
    return tuple(s[dim] for s in shapes) if all(len(s) > dim for s in shapes) else None


def skeleton(program: Program) -> list[tuple[str, Any]]:
    """The kinds and targets of all nodes, in order."""
    calls = [(node.op, node.target) for node in program.graph.nodes]
    return [("settings", program.layer_settings), *calls]


class _DifferError(Exception):
    """Two graphs differ in more than numbers that follow from T."""


class Unifier:
    """Unifies programs that differ only in numbers that follow from the number of frames."""

    def __init__(self, alike: Sequence[tuple[int, Program]]) -> None:
        self.frames = tuple(frames for frames, _ in alike)
        self.programs = tuple(program for _, program in alike)
        self.program = self.programs[0].copy()
        self.graph = self.program.graph
        self.nodes = list(self.graph.nodes)
        columns = zip(*(program.graph.nodes for program in self.programs), strict=True)
        self.columns = [tuple(column) for column in columns]
        self.position = {
            node: position for position, column in enumerate(self.columns) for node in column
        }
        self.sizes: dict[tuple[int, ...], tuple[fx.Node, int]] = {}
        self.read: dict[tuple[int, ...], fx.Node] = {}
        self.least = 0
        """The fewest frames at which no number that is computed from them turns negative."""

    def run(self) -> Program | None:
        """The unified program; None if the graphs differ in more than such numbers."""
        try:
            for node, column in zip(self.nodes, self.columns, strict=True):
                self._unify(node, column)
        except _DifferError:
            return None
        self.program.drop_unread()
        self.program.refresh()
        return self.program

    def check_frames(self, dim: int) -> AdmittedFrames | None:
        """Insert a guard on T: it is admitted, and the same for all inputs that have T entries.

        None if no input has T entries in dimension ``dim``.
        """
        sizes = [
            (node, f"{node.target if node.op == 'placeholder' else node.name}.size({dim})")
            for node, column in zip(self.nodes, self.columns, strict=True)
            if is_input(node) and _sizes(column, dim) == self.frames
        ]
        if not sizes:
            return None
        last = max(node for node, _ in sizes)
        checks = AdmittedFrames(sizes[0][1], self.frames)
        checks.example = self.frames[0]
        number = 0
        while hasattr(self.program.gm, path := f"_frames_{number}"):
            number += 1
        self.program.gm.add_module(path, checks)
        with self.graph.inserting_after(last):
            call = self.graph.call_module(path, ())
        with self.graph.inserting_before(call):
            call.args = tuple(self.graph.call_method("size", (node, dim)) for node, _ in sizes)
        self.program.refresh()
        return checks

    def _unify(self, node: fx.Node, column: tuple[fx.Node, ...]) -> None:
        if node.op == "get_attr":
            self._same_tensor(column)
        values = [n.args[1] for n in column] if node.target is guard else []
        if any(value != values[0] for value in values):
            if not all(counts_laps(n) for n in column):
                raise _DifferError
            self.graph.erase_node(node)
            return
        if node.target is not guard:  # the text and location of guards differ
            args = self._merged([n.args for n in column], node, node.args)
            kwargs = self._merged([n.kwargs for n in column], node, node.kwargs)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs = args, kwargs
                forget_value(node)
        self._learn(node, column)

    def _same_tensor(self, column: tuple[fx.Node, ...]) -> None:
        """Require equal tensors: one computed during the trace may depend on T."""
        found = [
            attribute(program.gm, str(node.target))
            for program, node in zip(self.programs, column, strict=True)
        ]
        for other in found[1:]:
            if other is found[0]:
                continue
            tensors = isinstance(other, torch.Tensor) and isinstance(found[0], torch.Tensor)
            if not tensors or other.shape != found[0].shape or not torch.equal(other, found[0]):
                raise _DifferError

    def _merged(self, values: Sequence[Any], node: fx.Node, mine: Any) -> Any:
        """The value that all ``values`` share, with nodes for the numbers in which they differ."""
        first = values[0]
        if isinstance(first, fx.Node):
            if len({self.position[value] for value in values}) > 1:
                raise _DifferError
            return mine
        if any(type(value) is not type(first) for value in values):
            raise _DifferError
        if isinstance(first, slice):
            parts = [(value.start, value.stop, value.step) for value in values]
            return slice(*self._merged(parts, node, (mine.start, mine.stop, mine.step)))
        if isinstance(first, list | tuple):
            if len({len(value) for value in values}) > 1:
                raise _DifferError
            merged = [
                self._merged(parts, node, own) for own, *parts in zip(mine, *values, strict=True)
            ]
            return tuple(merged) if isinstance(first, tuple) else merged
        if isinstance(first, dict):
            if any(list(value) != list(first) for value in values):
                raise _DifferError
            return {
                key: self._merged([value[key] for value in values], node, mine[key])
                for key in first
            }
        if all(repr(value) == repr(first) for value in values):
            return mine
        if type(first) is not int:
            raise _DifferError
        return self._number(tuple(values), node)

    def _number(self, values: tuple[int, ...], node: fx.Node) -> fx.Node:
        """A node that computes ``values[i]`` at the i-th number of frames."""
        if values in self.sizes:
            if values not in self.read:
                source, dim = self.sizes[values]
                with self.graph.inserting_after(source):
                    self.read[values] = self.graph.call_method("size", (source, dim))
            return self.read[values]
        (t0, t1), (v0, v1) = self.frames[:2], values[:2]
        factor, rest = divmod(v1 - v0, t1 - t0)
        offset = v0 - factor * t0
        linear = all(factor * t + offset == v for t, v in zip(self.frames, values, strict=True))
        if rest or not linear or self.frames not in self.sizes:
            raise _DifferError
        if factor > 0 and min(values) >= 0:  # an index below 0 would count from the end
            self.least = max(self.least, -(offset // factor))
        number = self._number(self.frames, node)
        with self.graph.inserting_before(node):
            if factor != 1:
                number = self.graph.call_function(operator.mul, (number, factor))
            return self.graph.call_function(operator.add, (number, offset))

    def _learn(self, node: fx.Node, column: tuple[fx.Node, ...]) -> None:
        """Record the sizes of ``node`` that differ between the numbers of frames."""
        shapes = [shape(n) or () for n in column]
        for dim, sizes in enumerate(zip(*shapes, strict=False)):
            if len(set(sizes)) > 1:
                self.sizes.setdefault(tuple(sizes), (node, dim))
