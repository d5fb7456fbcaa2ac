"""Common mistakes of video models, each found by a check that changes nothing.

A check takes a captured program and yields findings. To add one: a file or a function here, a line
in ``CHECKS``, a model in the tests that has the mistake, and one without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fxtemporal.ir.program import Program
from fxtemporal.mistakes.failing import failing, telling_cure
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.mistakes.fixed_sizes import fixed_batch_size, fixed_frames
from fxtemporal.mistakes.layouts import layout_destroyed, permutes_undone
from fxtemporal.mistakes.ranks import linear_on_map, map_into_recurrence, missing_time_axis
from fxtemporal.mistakes.regrouping import axes_mixed, flattened_2plus1d, squeezed_conv3d

__all__ = ["CHECKS", "Finding", "Mistake", "failing", "find", "telling_cure"]

CHECKS: tuple[Callable[[Program], Iterator[Finding]], ...] = (
    linear_on_map,
    missing_time_axis,
    map_into_recurrence,
    fixed_batch_size,
    fixed_frames,
    permutes_undone,
    layout_destroyed,
    axes_mixed,
    flattened_2plus1d,
    squeezed_conv3d,
)


def find(program: Program) -> tuple[Finding, ...]:
    """Every common mistake in ``program``, at most once for each line of the user's code."""
    found: dict[tuple[Mistake, str | None], Finding] = {}
    for check in CHECKS:
        for finding in check(program):
            found.setdefault((finding.code, finding.location or finding.target), finding)
    return tuple(found.values())
