"""The one picture of a report: what an error costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fxtemporal.errors import FxTemporalError

__all__ = ["draw"]


def draw(
    curve: Sequence[tuple[float, float]],
    settings: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> None:
    """Shares and predicted errors as a line, and the budget that was asked for as a point.

    Raises:
        FxTemporalError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxTemporalError(
            f"plotting needs Matplotlib ({error}): pip install fxtemporal[plot]"
        ) from error
    kind, budget = next(
        (name, settings[name]) for name in ("flops", "params", "latency") if name in settings
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([share for share, _ in curve], [error for _, error in curve])
    reached = max((point for point in curve if point[0] <= budget), default=curve[-1])
    axes.plot(*reached, "o", label=f"{kind} = {budget}")
    axes.set_xlabel(f"{kind} that are left, as a share")
    axes.set_ylabel("predicted relative error of the output")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path)
