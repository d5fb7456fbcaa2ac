"""The report: rewrites applied or not, and why, as a table for people and JSON for programs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxtemporal.passes.rule import Remark
from fxtemporal.reports.audit_text import audit_text
from fxtemporal.reports.data import ReportData
from fxtemporal.reports.html import fragment, page
from fxtemporal.reports.markdown import markdown
from fxtemporal.reports.plots import draw
from fxtemporal.reports.sarif import sarif
from fxtemporal.reports.wording import plural
from fxtemporal.support.errors import FxTemporalError

__all__ = ["Report"]


@dataclass(frozen=True)
class Report(ReportData):
    """The outcome of :func:`fxtemporal.optimize` or :func:`fxtemporal.audit`.

    ``mode`` is ``"optimize"`` or ``"audit"``: in an audit, ``"applied"`` means that the rewrite
    would be applied. ``frontend`` says what captured the model (``"fx"``, ``"export"``,
    ``"given"``), and ``note`` why the tracer did not. ``gradients`` says why the result refuses to
    train. ``comparison`` and ``timing`` (of the whole network) are None if nothing was run,
    ``memory`` if no module was made. ``settings`` are the settings of the call. For a factorization
    with a budget, ``curve`` has pairs (share left of the budgeted quantity, predicted error of the
    output).

    ``findings`` are common mistakes, found in an audit. ``structure`` has each module's cost before
    and after; None without shapes. ``stopped`` says why the forward failed, if it did. ``known``
    counts entries left out because a baseline has them. ``refused`` counts the calls so far that a
    guard refused, by what it holds, where something else ran in place of the result. If the model
    could not be captured whole, ``frontend`` is ``"parts"`` and ``regions`` are its captured
    submodules.

    In a notebook a report is shown as HTML.
    """

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the predicted error of the output against the share of the budgeted quantity.

        Args:
            path: a ``.png`` or ``.svg`` file.

        Raises:
            FxTemporalError: the report has no such curve, or Matplotlib is not installed.
        """
        if not self.curve:
            raise FxTemporalError(
                "this report has no curve to plot: factorize with a budget, Factorize(flops=...), "
                "Factorize(params=...) or Factorize(latency=...)"
            )
        draw(self.curve, self.settings["factorize"], path)

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, for a pull request."""
        return markdown(self)

    def to_sarif(self) -> dict[str, Any]:
        """A SARIF 2.1.0 log as a plain dict: code hosts show its results at the user's lines."""
        return sarif(self)

    def to_html(self) -> str:
        """One self-contained page, which needs no network."""
        return page(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 160) -> str:
        """The table, at most ``width`` columns wide if its words allow, and the lines after it."""
        if self.mode == "audit":
            return audit_text(self, width)
        lines = [self._table(width), ""]
        counts = ", ".join(
            f"{len(self.by_status(status))} {status}" for status in ("applied", "missed", "failed")
        )
        lines.append(f"{plural(len(self.remarks), 'site')}: {counts}.")
        if self.timing is not None:
            lines.append(self.timing_text)
        if self.comparison is not None:
            own = self.comparison.original_error
            beside = f" (the original's own: {own:.1e})" if own is not None else ""
            lines.append(f"Relative error: {self.comparison.relative_error:.1e}{beside}.")
        if self.factorized:
            lines += ["", self.factorization(), ""]
        if self.memory is not None and self.memory.frozen != self.memory.original:
            lines.append(f"Memory: {self.memory}.")
        lines += self.capture_notes
        if self.gradients:
            lines.append(f"Not for training: {self.gradients}.")
        lines += [f"Fixed by the trace: {fixed}." for fixed in self.fixed]
        lines += [f"Calls refused by {what}: {count}." for what, count in self.refused.items()]
        return "\n".join(lines)

    def _table(self, width: int) -> str:
        if not self.remarks:
            return "Nothing to do: no loop over frames and no Conv3d was found."
        rows = [
            [
                remark.rule,
                remark.target,
                remark.location or "",
                remark.status,
                _say(remark),
            ]
            for remark in self.remarks
        ]
        headers = ["rule", "target", "line", "status", "what or why"]
        target = max(width // 5, 12)
        taken = [max(len(row[k]) for row in (headers, *rows)) for k in (0, 1, 2, 3)]
        taken[1] = min(taken[1], target)
        what = max(width - sum(taken) - 2 * len(taken), 30)  # gaps are two columns wide
        return tabulate(rows, headers, maxcolwidths=[None, target, None, None, what])


def _say(remark: Remark) -> str:
    """The last column: each reason, or the result for the site."""
    if remark.reasons:
        return "\n".join(f"{reason.code}: {reason.text}" for reason in remark.reasons)
    return ", ".join(f"{key} {_short(value)}" for key, value in remark.detail.items() if value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return ", ".join(str(entry.get("code", entry)) for entry in value)
    return str(value)
