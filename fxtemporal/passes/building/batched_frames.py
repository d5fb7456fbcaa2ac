"""The values of one family, in one tensor.

Two layouts of the same memory, made from each other on demand and only once:

=========  ====================  ======================================
folded     (B·T, ...)            what convolutions and layers run on
unfolded   (B, T, ...)           ``axis`` 1: the frames of a batch-major source
unfolded   (T, B, ...)           ``axis`` 0: those of a time-major one
=========  ====================  ======================================
"""

from __future__ import annotations

import itertools
import operator

from torch import fx
from torch.fx.node import Argument

from fxtemporal.ir.node_meta import mark_no_frame, set_frames

__all__ = ["Stacked", "moved", "pick", "step_of"]


class Stacked:
    """T frames in one tensor, given with the frames unfolded, or folded into dimension 0."""

    def __init__(
        self,
        graph: fx.Graph,
        frames: tuple[int, ...],
        axis: int,
        unfolded: fx.Node | None = None,
        *,
        folded: fx.Node | None = None,
        anchor: fx.Node | None = None,
    ) -> None:
        self.frames = frames
        self.axis = axis
        self._graph = graph
        self._anchor = anchor
        self._unfolded = unfolded
        self._folded = folded
        self._parts: dict[tuple[int, ...], Stacked] = {}
        self._frame: dict[int, fx.Node] = {}
        if folded is not None:
            set_frames(folded, len(frames))

    def _after(self, node: fx.Node, method: str, *args: Argument) -> fx.Node:
        """A view of ``node``, inserted right after it, so that all later nodes can read it."""
        with self._graph.inserting_after(self._behind(node)):
            return self._graph.call_method(method, (node, *args))

    def _behind(self, node: fx.Node) -> fx.Node:
        return node if self._anchor is None or node > self._anchor else self._anchor

    def folded(self) -> fx.Node:
        """(B·T, ...)"""
        if self._folded is None:
            self._folded = self._after(self.unfolded(), "flatten", 0, 1)
            set_frames(self._folded, len(self.frames))
        return self._folded

    def unfolded(self) -> fx.Node:
        """(B, T, ...) or (T, B, ...), as ``axis`` says."""
        if self._unfolded is None:
            assert self._folded is not None
            count = len(self.frames)
            sizes = (-1, count) if self.axis == 1 else (count, -1)
            self._unfolded = self._after(self._folded, "unflatten", 0, sizes)
        return self._unfolded

    def at(self, axis: int) -> Stacked:
        """The same frames along ``axis``: another view of the same memory."""
        if axis == self.axis:
            return self
        moved = self._after(self.unfolded(), "movedim", self.axis, axis)
        return Stacked(self._graph, self.frames, axis, moved, anchor=self._anchor)

    def take(self, frames: tuple[int, ...]) -> Stacked:
        """Only ``frames``: a view if they are evenly spaced, else a copy."""
        if frames == self.frames:
            return self
        if frames not in self._parts:
            positions = tuple(self.frames.index(frame) for frame in frames)
            unfolded = self.unfolded()
            with self._graph.inserting_before(self._behind(unfolded).next):
                part = pick(self._graph, unfolded, self.axis, positions)
            self._parts[frames] = Stacked(self._graph, frames, self.axis, part, anchor=self._anchor)
        return self._parts[frames]

    @property
    def is_unfolded(self) -> bool:
        """Whether the frames are unfolded in the value of :meth:`whole`."""
        return self._folded is None

    def whole(self) -> fx.Node:
        """All frames, in the layout that exists already: a tuple cannot be folded or unfolded."""
        value = self._folded if self._folded is not None else self._unfolded
        assert value is not None
        return value

    def frame(self, position: int) -> fx.Node:
        """The frame at ``position``, as a view."""
        if position not in self._frame:
            frame = self._after(self.unfolded(), "select", self.axis, position)
            mark_no_frame(frame)
            self._frame[position] = frame
        return self._frame[position]

    def frame_of(self, frame: int) -> fx.Node:
        """Frame number ``frame``, as a view."""
        return self.frame(self.frames.index(frame))


def pick(graph: fx.Graph, value: fx.Node, dim: int, entries: tuple[int, ...]) -> fx.Node:
    """``value`` with only ``entries`` of dimension ``dim``, in their order.

    A missing entry raises an error, as in ``select``; a slice would silently give fewer entries.
    """
    steps = {b - a for a, b in itertools.pairwise(entries)} or {1}
    step = steps.pop()
    if not steps and step == -1:
        part = pick(graph, value, dim, entries[::-1])
        return graph.call_method("flip", (part, (dim,)))
    if steps or step < 1:
        listed: tuple[Argument, ...] = (*[slice(None)] * dim, list(entries))
        return graph.call_function(operator.getitem, (value, listed))
    span = entries[-1] - entries[0] + 1
    part = graph.call_method("narrow", (value, dim, entries[0], span))
    mark_no_frame(part)
    if step == 1:
        return part
    spaced: tuple[Argument, ...] = (*[slice(None)] * dim, slice(None, None, step))
    result = graph.call_function(operator.getitem, (part, spaced))
    mark_no_frame(result)
    return result


def moved(graph: fx.Graph, value: fx.Node, source: int, destination: int) -> fx.Node:
    """``value`` with dimension ``source`` at ``destination``."""
    if source == destination:
        return value
    return graph.call_method("movedim", (value, source, destination))


def step_of(frames: tuple[int, ...]) -> int | None:
    """The distance between frames if it is constant and positive, else None."""
    steps = {b - a for a, b in itertools.pairwise(frames)}
    step = steps.pop() if len(steps) == 1 else None
    return step if step is not None and step > 0 else None
