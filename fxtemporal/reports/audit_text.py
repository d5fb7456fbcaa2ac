"""Renders an audit as text: a summary line, a table, and the changes to make.

On a terminal too narrow for the table each row becomes a short paragraph.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from tabulate import tabulate

from fxtemporal.passes.rule import Remark
from fxtemporal.reports.data import ReportData
from fxtemporal.reports.wording import (
    cures,
    flops,
    left_by_cost,
    line_of,
    measured,
    place,
    predicted,
    rows_by_cost,
    share,
    summary,
)

__all__ = ["audit_text"]

_NARROW = 110
"""Columns below which a table would wrap."""
_HEADERS = ("what", "where", "would become", "FLOPs", "share", "predicted", "measured")


def audit_text(report: ReportData, width: int = 160) -> str:
    """The audit as text, at most ``width`` columns wide if its words allow."""
    parts = [_filled(summary(report), width)]
    if applied := rows_by_cost(report):
        table = _table(report, applied, width)
        parts.append(table if width >= _NARROW and table else _list(report, applied, width))
    if report.findings:
        parts.append("\n".join(("Usual mistakes", *_mistakes(report, width))))
    if left := left_by_cost(report):
        parts.append("\n".join(("Left as it is", *_left(left, width))))
    notes = [f"Fixed by the trace: {fixed}." for fixed in report.fixed]
    notes += report.capture_notes
    if report.timing is not None:
        notes.append(report.timing_text)
    if report.known:
        notes.append(f"{report.known} more are in the baseline.")
    if notes:
        parts.append("\n".join(_filled(note, width) for note in notes))
    return "\n\n".join(parts)


def _cells(report: ReportData, remark: Remark) -> list[str]:
    size = "" if remark.cost is None else flops(remark.cost.before.flops)
    return [
        remark.what or remark.rule,
        place(remark),
        remark.becomes,
        size,
        share(remark, report),
        predicted(remark, report),
        measured(remark),
    ]


def _table(report: ReportData, applied: list[Remark], width: int) -> str | None:
    """The table of applied rewrites; None if its words do not fit."""
    rows = [_cells(report, remark) for remark in applied]
    kept = [k for k in range(len(_HEADERS)) if any(row[k] for row in rows)]
    rows = [[row[k] for k in kept] for row in rows]
    headers = [_HEADERS[k] for k in kept]
    taken = [max(len(line[k]) for line in (headers, *rows)) for k in range(len(kept))]
    wide = {headers.index(name) for name in ("what", "where", "would become") if name in headers}
    rest = width - sum(taken[k] for k in range(len(kept)) if k not in wide) - 2 * len(kept)
    room = max(rest // len(wide), 12) if wide else 0
    limits = [min(taken[k], room) if k in wide else None for k in range(len(kept))]
    return tabulate(rows, headers, maxcolwidths=limits, disable_numparse=True)


def _list(report: ReportData, applied: list[Remark], width: int) -> str:
    lines = []
    for number, remark in enumerate(applied, 1):
        what, where, becomes, size, part, gain, times = _cells(report, remark)
        lines.append(_filled(f"{number}. {what}: {where}", width))
        if becomes:
            lines.append(_filled(f"would become {becomes}", width, 3))
        numbers = [f"{size} FLOPs" if size else "", part, gain and f"predicted {gain}", times]
        if any(numbers):
            lines.append(_filled(", ".join(filter(None, numbers)), width, 3))
    return "\n".join(lines)


def _mistakes(report: ReportData, width: int) -> Iterator[str]:
    for finding in report.findings:
        where = finding.target
        if finding.location:
            where = f"{line_of(finding.location)} ({finding.target})"
        yield _filled(f"{where}: {finding.code}: {finding.text}", width, 2)
        yield _filled(f"→ {finding.cure}", width, 4)


def _left(left: list[Remark], width: int) -> Iterator[str]:
    """A paragraph for each site; sites of one rule with the same reasons share one."""
    groups: dict[tuple[str, ...], list[Remark]] = {}
    for remark in left:
        codes = tuple(code for code, *_ in cures(remark))
        groups.setdefault((remark.rule, remark.status, *codes), []).append(remark)
    for (rule, status, *_), remarks in groups.items():
        first = remarks[0]
        said = {"failed": "failed: ", "applied": "in part: "}.get(status, "")
        yield _filled(f"{place(first)}: {said}{first.what or rule}", width, 2)
        for code, text, line, cure in cures(first):
            yield _filled(f"{code}: {text}", width, 4)
            yield _filled(f"→ {line}: {cure}", width, 4)
        if len(remarks) > 1:
            others = ", ".join(line_of(r.location or r.target) for r in remarks[1:5])
            more = f" and {len(remarks) - 5} more" if len(remarks) > 5 else ""
            yield _filled(f"and alike: {others}{more}", width, 4)


def _filled(text: str, width: int, indent: int = 0) -> str:
    return textwrap.fill(
        text,
        max(width, indent + 30),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
