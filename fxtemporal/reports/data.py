"""The data of a report: remarks, findings, times, costs and the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tabulate import tabulate

from fxtemporal.analysis.cost import Structure
from fxtemporal.ir.freeze import Memory
from fxtemporal.ir.guards import Specialization
from fxtemporal.mistakes.finding import Finding
from fxtemporal.passes.rule import Remark
from fxtemporal.tuning.timing import Timing
from fxtemporal.verification.comparison import Comparison

__all__ = ["Region", "ReportData"]


@dataclass(frozen=True)
class Region:
    """A submodule that was captured where the whole model could not be.

    ``path`` and ``kind`` are its name and class, ``frontend`` what captured it, and ``applied`` the
    number of rewrites in it.
    """

    path: str
    kind: str
    frontend: str
    applied: int

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}, by {self.frontend}), rewrites in it: {self.applied}"

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


@dataclass(frozen=True)
class ReportData:
    """The data of :class:`fxtemporal.Report`, without its renderings."""

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
    refused: Mapping[str, int] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()

    @property
    def gain(self) -> float | None:
        """The speed-up of the network: measured if it was, else predicted."""
        if self.timing is not None:
            return self.timing.speedup
        return None if self.structure is None else self.structure.speedup

    @property
    def fixed(self) -> list[str]:
        """What the trace fixed, one entry for all that one line of the user's code read."""
        lines: dict[tuple[str | None, str], list[Specialization]] = {}
        for entry in self.specializations:
            lines.setdefault((entry.location, entry.why), []).append(entry)
        texts = []
        for first, *more in lines.values():
            also = f", and {len(more)} more" if more else ""
            where = f" at {first.location}" if first.location else ""
            texts.append(f"{first.expression} == {first.value!r}{also} ({first.why}{where})")
        return texts

    @property
    def capture_notes(self) -> list[str]:
        """What captured the model, where it was not the tracer alone, as sentences."""
        if self.frontend == "parts":
            return [
                f"The model could not be captured whole: {self.note}",
                *(f"Captured in its place: {region}." for region in self.regions),
            ]
        if self.frontend == "export" and self.note:
            return [f"Captured by torch.export, because the tracer stopped: {self.note}."]
        return [f"Note: {self.note}."] if self.note else []

    @property
    def timing_text(self) -> str:
        """The measured time of the whole network, as a sentence."""
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
        """A table of the factorized layers: ranks, costs and errors."""
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
            "refused": dict(self.refused),
            "regions": [region.to_dict() for region in self.regions],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, default=str)
