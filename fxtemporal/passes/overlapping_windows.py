"""Computes each frame once, where overlapping clips would compute it once a clip.

Clips of w frames, one every s frames, hold each frame w/s times. Work on single frames, such as a
backbone before a temporal head, can be done before the clips are cut::

    before                                          after
    clips = x.unfold(1, w, s).movedim(-1, 2)        y = net(x.flatten(0, 1))     # B·T frames
    y = net(clips.flatten(0, 2))   # B·N·w frames   y = y.unflatten(0, (B, T))
                                                    y = y.unfold(1, w, s).movedim(2, -1)...

Loops over clips have this form once time-distribute has re-rolled them.
:mod:`fxtemporal.analysis.overlapping_clips` finds the clips and the work on single frames.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.analysis.overlapping_clips import Axes, Layout, Windows, windows_of
from fxtemporal.ir.guards import Specialization, guard
from fxtemporal.ir.node_meta import forget_value, mark_no_frame, needed_value, value_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Reason
from fxtemporal.ir.values import rank
from fxtemporal.passes.building.held_modes import modes_of_folded
from fxtemporal.passes.rule import Remark, Rule, Site

__all__ = ["OverlappingWindows"]


class OverlappingWindows(Rule[Windows]):
    """Per-frame work on overlapping clips → once a frame, and clips of the results."""

    name = "overlapping-windows"
    moves_others = True

    def candidates(self, program: Program) -> Iterable[Windows]:
        return tuple(windows_of(program))

    def site(self, program: Program, candidate: Windows) -> Site:
        first = candidate.computing[0]
        target = program.module_path(first) or first.name
        return Site(self.name, first.name, target, program.location(first))

    def preconditions(self, program: Program, candidate: Windows) -> Iterator[Reason]:
        yield from ()

    def detail(self, program: Program, candidate: Windows) -> Mapping[str, Any]:
        clips: int = needed_value(candidate.unfold).shape[candidate.dim]
        return {
            "source": candidate.base.name,
            "dim": candidate.dim,
            "clips": clips,
            "length": candidate.length,
            "step": candidate.step,
            "frames_before": clips * candidate.length,
            "frames": (clips - 1) * candidate.step + candidate.length,
            "ops": len(candidate.computing),
        }

    def nodes(self, program: Program, candidate: Windows) -> Iterable[fx.Node]:
        return candidate.body

    def what(self, program: Program, candidate: Windows) -> str:
        clips: int = needed_value(candidate.unfold).shape[candidate.dim]
        return f"{clips} overlapping clips of {candidate.length} frames"

    def becomes(self, program: Program, candidate: Windows) -> str:
        detail = self.detail(program, candidate)
        return f"{detail['frames']} frames, each computed once, for {detail['frames_before']}"

    def rewrite(self, program: Program, candidate: Windows) -> Mapping[str, Any]:
        detail = self.detail(program, candidate)
        _Rewriter(program, candidate).run()
        return detail

    def modes(self, model: nn.Module, applied: Sequence[Remark]) -> Mapping[str, Specialization]:
        return modes_of_folded(model)


class _Rewriter:
    """Copies the body onto the frames, and cuts clips of the results that others read."""

    def __init__(self, program: Program, windows: Windows) -> None:
        self.program = program
        self.graph = program.graph
        self.windows = windows
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        body = self.windows.body
        with self.graph.inserting_before(body[0]):
            self._hold()
            self.base = self._covered()
            self.sizes = {
                axis: self.graph.call_method("size", (self.base, axis))
                for axis in sorted({a for axes in self.windows.order.values() for a in axes})
                if axis < (rank(self.windows.base) or 0)
            }
            for entry, layout in self.windows.entries.items():
                self.copies[entry] = self._frames(layout)
        for node in body:
            with self.graph.inserting_before(node):
                copy = self.graph.node_copy(node, lambda n: self.copies.get(n, n))
            forget_value(copy)
            self.copies[node] = copy
        for node in reversed(body):
            if node.users and isinstance(value_of(node), torch.Tensor):
                node.replace_all_uses_with(self._clips(node))
            if not node.users:
                self.graph.erase_node(node)

    def _hold(self) -> None:
        """Guard sizes that a view of the clips has as constants: folded frames accept any size."""
        base = self.windows.base
        where = self.program.location(self.windows.body[0])
        for axis, size in self.windows.spelled_out:
            actual = self.graph.call_method("size", (base, axis))
            text = f"{base.name}.size({axis})"
            why = "a view of the clips spells it out"
            self.graph.call_function(guard, (actual, size, text, where, why))

    def _covered(self) -> fx.Node:
        """The base without the last frames that no clip holds."""
        windows = self.windows
        clips = self.graph.call_method("size", (windows.unfold, windows.dim))
        covered: fx.Node = self.graph.call_function(operator.mul, (clips, windows.step))
        rest = windows.length - windows.step
        covered = self.graph.call_function(operator.add, (covered, rest))
        value = self.graph.call_method("narrow", (windows.base, windows.dim, 0, covered))
        mark_no_frame(value)
        return value

    def _frames(self, layout: Layout) -> fx.Node:
        """All frames of the base, folded in the order in which the entry folds the clips."""
        clip_frames = rank(self.windows.base) or 0
        groups = [tuple(a for a in axes if a != clip_frames) for axes in layout]
        groups[0] = tuple(sorted(groups[0]))
        order = [axis for axes in groups for axis in axes]
        value = self.base
        if order != sorted(order):
            value = self.graph.call_method("permute", (value, tuple(order)))
        for place, axes in enumerate(groups):
            if len(axes) > 1:
                value = self.graph.call_method("flatten", (value, place, place + len(axes) - 1))
        return value

    def _clips(self, node: fx.Node) -> fx.Node:
        """The clips of a result, in the order that its readers expect."""
        order = self.windows.order[node]
        axes = tuple(sorted(order))[:-1]
        with self.graph.inserting_after(self.copies[node]):
            anchor = self.copies[node]
            for method, *args in self._steps(node, order, axes):
                with self.graph.inserting_after(anchor):
                    anchor = self.graph.call_method(method, (anchor, *args))
        return anchor

    def _steps(self, node: fx.Node, order: Axes, axes: Axes) -> Iterator[tuple[Any, ...]]:
        sizes = tuple(self.sizes[axis] for axis in axes)
        rest = range(len(axes), len(axes) + (rank(node) or 1) - 1)
        yield "unflatten", 0, sizes
        yield "unfold", axes.index(self.windows.dim), self.windows.length, self.windows.step
        clip_frames = len(axes) + len(rest)
        places = [axes.index(axis) if axis in axes else clip_frames for axis in order]
        yield "permute", (*places, *rest)
        yield "flatten", 0, len(order) - 1
