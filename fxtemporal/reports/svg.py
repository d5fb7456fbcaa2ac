"""SVG drawings for the HTML page, in the colours of its style."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fxtemporal.analysis.cost import Block

__all__ = ["bars", "blocks", "curve"]

_WIDTH = 480
_ROW = 26
_LABEL = 180
_STACK = 5
"""The most sheets of a stack: a module that is called 16 times is drawn as five."""


def blocks(found: Sequence[Block], longest: float, kind: str) -> str:
    """A bar per module, with a width in proportion to its time; a stack if it is called often."""
    shown = [block for block in found if block.cost.milliseconds > longest * 0.004][:40]
    widest = max((block.cost.milliseconds for block in shown), default=0.0)
    scale = (_WIDTH - _LABEL - 70) / max(widest, longest / 3, 1e-9)
    parts = []
    for row, block in enumerate(shown):
        top = row * _ROW
        width = max(min(block.cost.milliseconds * scale, _WIDTH - _LABEL - 70), 2.0)
        for sheet in reversed(range(min(block.times, _STACK))):
            parts.append(
                f'<rect class="{kind} box" x="{_LABEL + 3 * sheet}" y="{top + 8 - 2 * sheet}" '
                f'width="{width:.1f}" height="14" rx="2"></rect>'
            )
        name = block.module or "the model itself"
        short = name if len(name) <= 27 else f"…{name[-26:]}"
        parts.append(
            f'<text x="0" y="{top + 19}">{html.escape(short)}</text>'
            f'<text class="soft" x="{_LABEL + width + 20:.1f}" y="{top + 19}">'
            f"{f'×{block.times}' if block.times > 1 else ''}</text>"
        )
    label = f"{len(shown)} modules, {kind}"
    return _svg(_WIDTH, max(len(shown), 1) * _ROW + 6, parts, label)


def bars(before: float, after: float, longest: float) -> str:
    """Two bars of milliseconds, scaled to the longest time of all sites."""
    if not before or not longest:
        return ""
    parts = []
    for row, (kind, time) in enumerate((("before", before), ("after", after))):
        width = max((_WIDTH - 110) * time / longest, 1.0)
        parts.append(
            f'<rect class="{kind}" x="0" y="{row * 16 + 2}" width="{width:.1f}" height="12" '
            f'rx="2"></rect><text x="{width + 6:.1f}" y="{row * 16 + 12}">{time:.3g} ms</text>'
        )
    return _svg(_WIDTH, 34, parts, f"{before:.3g} ms before, {after:.3g} ms after")


def curve(points: Sequence[tuple[float, float]]) -> str:
    """A curve of error against share, both from 0."""
    highest = max((error for _, error in points), default=0.0) or 1.0
    places = [(50 + 400 * x, 170 - 150 * error / highest) for x, error in sorted(points)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [
        '<path class="axis" d="M50 10 V170 H455" fill="none"></path>',
        f'<polyline class="trend" points="{line}"></polyline>',
        f'<text x="4" y="20">{highest:.2g}</text><text x="30" y="174">0</text>',
        '<text x="430" y="188">100 %</text>',
    ]
    return _svg(_WIDTH, 195, parts, "error against what is left")


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )
