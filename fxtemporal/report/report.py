"""What was done, what was not, and why: for people as a table, for programs as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from tabulate import tabulate

from fxtemporal.analysis.cost import Structure
from fxtemporal.ir.freeze import Memory
from fxtemporal.ir.guards import Specialization
from fxtemporal.mistakes.finding import Finding
from fxtemporal.passes.rule import Remark
from fxtemporal.report.audit_text import audit_text
from fxtemporal.report.html import fragment, page
from fxtemporal.report.markdown import markdown
from fxtemporal.report.plots import draw
from fxtemporal.report.sarif import sarif
from fxtemporal.report.wording import plural
from fxtemporal.support.errors import FxTemporalError
from fxtemporal.tuning.timing import Timing
from fxtemporal.verification.comparison import Comparison

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`fxtemporal.optimize` or :func:`fxtemporal.audit`.

    ``mode`` is ``"optimize"`` or ``"audit"``: in an audit, ``"applied"`` means that the rewrite
    would be. ``frontend`` says what captured the model (``"fx"``, ``"export"``, ``"given"``) and
    ``note`` why the tracer did not. ``gradients`` says why the result refuses to be trained.
    ``comparison`` and ``timing`` (of the whole network) are None where nothing was run, and
    ``memory`` where nothing was made. ``settings`` is what the choices were made with. ``curve``
    has, of a factorization with a budget, what could be left of the budgeted quantity, as a share,
    and the error of the output that was predicted for each.

    ``findings`` are usual mistakes, looked for in an audit. ``structure`` is what each module costs
    before and after, None without shapes. ``stopped`` says why the forward failed, if it did, and
    ``known`` counts what was left out because a baseline has it.

    In a notebook a report shows itself as HTML.
    """

    mode: Literal["optimize", "audit"]
    remarks: tuple[Remark, ...]
    specializations: tuple[Specialization, ...] = ()
    comparison: Comparison | None = None
    timing: Timing | None = None
    frontend: str = "fx"
    note: str | None = None
    gradients: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    memory: Memory | None = None
    curve: tuple[tuple[float, float], ...] = ()
    findings: tuple[Finding, ...] = ()
    structure: Structure | None = None
    stopped: str | None = None
    known: int = 0

    @property
    def gain(self) -> float | None:
        """How many times as fast the network is: measured if it was, else predicted."""
        if self.timing is not None:
            return self.timing.speedup
        return None if self.structure is None else self.structure.speedup

    @property
    def timing_text(self) -> str:
        """What was measured of the whole network."""
        if self.timing is None:
            return ""
        return (
            f"Network: {self.timing.before:.1f} ms → {self.timing.after:.1f} ms, "
            f"{self.timing.speedup:.2f}× ({self.timing.low:.2f}–{self.timing.high:.2f})."
        )

    @property
    def factorized(self) -> tuple[Remark, ...]:
        """The layers that were factorized, in graph order."""
        applied = self.by_status("applied")
        return tuple(remark for remark in applied if remark.rule == "factorize-2plus1d")

    @property
    def ranks(self) -> dict[str, dict[str, Any]]:
        """Rank, order and bias of each factorized layer, as ``Factorize(rank=...)`` takes them."""
        return {
            remark.detail["weight"].removesuffix(".weight"): {
                name: remark.detail[name] for name in ("rank", "order", "bias")
            }
            for remark in self.factorized
        }

    def factorization(self) -> str:
        """A table of the factorized layers: ranks, what they cost, and how far they are off."""
        rows = []
        for remark in self.factorized:
            detail = remark.detail
            before = detail.get("flops_before")
            off = detail.get("output_error")
            rows.append(
                [
                    remark.target,
                    detail["order"],
                    f"{detail['rank']} of {detail['full_rank']}",
                    detail["parameters"],
                    ""
                    if before is None
                    else f"{before / 1e6:.1f} → {detail['flops_after'] / 1e6:.1f}",
                    "0 (exact)" if detail.get("exact") else f"{detail['weight_error']:.3f}",
                    "" if off is None else f"{off:.3f}",
                ]
            )
        headers = ["layer", "order", "rank", "weights", "MFLOP", "weight error", "output error"]
        return tabulate(rows, headers, disable_numparse=True)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the predicted error of the output against what is left of the budgeted quantity.

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

    def by_status(self, status: str) -> tuple[Remark, ...]:
        return tuple(remark for remark in self.remarks if remark.status == status)

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "frontend": self.frontend,
            "note": self.note,
            "gradients": self.gradients,
            "settings": dict(self.settings),
            "remarks": [remark.to_dict() for remark in self.remarks],
            "specializations": [fixed.to_dict() for fixed in self.specializations],
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "timing": None if self.timing is None else self.timing.to_dict(),
            "memory": None if self.memory is None else self.memory.to_dict(),
            "curve": [list(point) for point in self.curve],
            "findings": [finding.to_dict() for finding in self.findings],
            "structure": None if self.structure is None else self.structure.to_dict(),
            "stopped": self.stopped,
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, for a pull request."""
        return markdown(self)

    def to_sarif(self) -> dict[str, Any]:
        """A SARIF 2.1.0 log as a plain dict: code hosts show it on the lines it is about."""
        return sarif(self)

    def to_html(self) -> str:
        """One self-contained page, which needs no network."""
        return page(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 160) -> str:
        """The table, no wider than ``width`` columns if its words allow, and what follows it."""
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
        if self.frontend == "export" and self.note:
            lines.append(f"Captured by torch.export, because the tracer stopped: {self.note}.")
        elif self.note:
            lines.append(f"Note: {self.note}.")
        if self.gradients:
            lines.append(f"Not for training: {self.gradients}.")
        lines += [f"Fixed by the trace: {fixed}." for fixed in self.specializations]
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
        what = max(width - sum(taken) - 2 * len(taken), 30)  # a gap is two wide
        return tabulate(rows, headers, maxcolwidths=[None, target, None, None, what])


def _say(remark: Remark) -> str:
    """The last column: each reason, or what the site became."""
    if remark.reasons:
        return "\n".join(f"{reason.code}: {reason.text}" for reason in remark.reasons)
    return ", ".join(f"{key} {_short(value)}" for key, value in remark.detail.items() if value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return ", ".join(str(entry.get("code", entry)) for entry in value)
    return str(value)
