"""Draws plots to files: the curve of a factorization, and milliseconds before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fxtemporal.support.errors import FxTemporalError

__all__ = ["draw", "draw_bars"]


def draw(
    curve: Sequence[tuple[float, float]],
    settings: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> None:
    """Draw shares and predicted errors as a line, and the requested budget as a point.

    Raises:
        FxTemporalError: Matplotlib is not installed.
    """
    figure, axes = _figure()
    kind, budget = next(
        (name, settings[name]) for name in ("flops", "params", "latency") if name in settings
    )
    axes.plot([share for share, _ in curve], [error for _, error in curve])
    reached = max((point for point in curve if point[0] <= budget), default=curve[-1])
    axes.plot(*reached, "o", label=f"{kind} = {budget}")
    axes.set_xlabel(f"{kind} that are left, as a share")
    axes.set_ylabel("predicted relative error of the output")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path)


def draw_bars(times: Mapping[str, tuple[float, float]], path: str | os.PathLike[str]) -> None:
    """Draw milliseconds before and after, by engine.

    Raises:
        FxTemporalError: Matplotlib is not installed.
    """
    figure, axes = _figure()
    places = range(len(times))
    for side, label in enumerate(("as it is", "optimized")):
        heights = [pair[side] for pair in times.values()]
        bars = axes.bar([x + 0.4 * side - 0.2 for x in places], heights, 0.38, label=label)
        axes.bar_label(bars, fmt="%.3g")
    axes.set_xticks(list(places), list(times))
    axes.set_ylabel("milliseconds a call")
    axes.legend()
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    """A figure that needs no display, and its axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxTemporalError(
            f"plotting needs Matplotlib ({error}): pip install fxtemporal[plot]"
        ) from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
