"""A finding: a common mistake, its place, and its cure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

__all__ = ["Finding", "Mistake"]


class Mistake(enum.StrEnum):
    """The common mistakes. The value is the stable name in reports."""

    FRAME_LAYER_ON_CLIP = "frame-layer-on-clip"
    """A layer for frames or features meets a clip or a map: Conv2d or Linear on a 5-D input."""
    MISSING_TIME_AXIS = "missing-time-axis"
    """A layer for clips or sequences meets an input without a time axis, or without a batch."""
    MAP_INTO_RECURRENCE = "map-into-recurrence"
    """A recurrent layer is given a spatial map."""
    FIXED_BATCH_SIZE = "fixed-batch-size"
    """The forward is right for one batch size only."""
    FIXED_FRAMES = "fixed-frames"
    """A loop over time is unrolled into the graph: right for one number of frames only."""
    PERMUTES_UNDONE = "permutes-undone"
    """Two permutations undo each other, with nothing between them that needs the first."""
    LAYOUT_DESTROYED = "layout-destroyed"
    """``contiguous()`` undoes channels_last before a layer that is faster in that layout."""
    AXES_MIXED = "axes-mixed"
    """A view joins axes that are not adjacent: its rows hold parts of several frames."""
    FLATTENED_2PLUS1D = "flattened-2plus1d"
    """A (2+1)D layer written with Conv2d and Conv1d copies data for its permutations."""
    SQUEEZED_CONV3D = "squeezed-conv3d"
    """The output of a Conv3d has one frame, which is squeezed away right after."""


@dataclass(frozen=True)
class Finding:
    """One common mistake at one place.

    ``target`` is a module path or a node name, ``location`` is ``file:line`` in the user's code,
    ``text`` describes the mistake, and ``cure`` says what to write instead.
    """

    code: Mistake
    target: str
    location: str | None
    text: str
    cure: str

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "code": str(self.code)}
