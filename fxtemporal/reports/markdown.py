"""Renders a report as Markdown, for a pull request or a wiki."""

from __future__ import annotations

import re

from tabulate import tabulate

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

__all__ = ["markdown"]


def markdown(report: ReportData) -> str:
    """The report as GitHub-flavoured Markdown."""
    parts = ["## fxtemporal", _escaped(summary(report))]
    if applied := rows_by_cost(report):
        becomes = "would become" if report.mode == "audit" else "became"
        headers = ["what", "where", becomes, "FLOPs", "share", "predicted", "measured"]
        rows = [
            [
                remark.what or remark.rule,
                _code(place(remark)),
                remark.becomes,
                "" if remark.cost is None else flops(remark.cost.before.flops),
                share(remark, report),
                predicted(remark, report),
                measured(remark),
            ]
            for remark in applied
        ]
        parts.append(_table(rows, headers))
    if report.findings:
        rows = [
            [_code(line_of(f.location or f.target)), f"`{f.code}`", f.text, f.cure]
            for f in report.findings
        ]
        parts += ["### Usual mistakes", _table(rows, ["where", "code", "what", "cure"])]
    if left := left_by_cost(report):
        rows = [
            [_code(place(remark)), remark.what or remark.rule, f"`{code}`", text, f"{line}: {cure}"]
            for remark in left
            for code, text, line, cure in cures(remark)
        ]
        headers = ["where", "what", "code", "why", "cure"]
        parts += ["### Left as it is", _table(rows, headers)]
    if report.specializations:
        lines = [f"- {_escaped(fixed)}" for fixed in report.fixed]
        parts += ["### Fixed by the trace", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    kept = [k for k in range(len(headers)) if any(row[k] for row in rows)]
    cells = [[_escaped(row[k]) for k in kept] for row in rows]
    return tabulate(cells, [headers[k] for k in kept], tablefmt="github", disable_numparse=True)


def _code(text: str) -> str:
    """A code span; ``text`` may have backquotes."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{text}{space}{fence}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
