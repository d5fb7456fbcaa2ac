"""Words, numbers and the order of rows, shared by all renderings of a report."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace

from fxtemporal.analysis.cost import Cost, SiteCost
from fxtemporal.passes.rule import Remark
from fxtemporal.reports.cures import CURES
from fxtemporal.reports.data import ReportData

__all__ = [
    "by_cost",
    "cures",
    "flops",
    "left_by_cost",
    "line_of",
    "measured",
    "measured_gain",
    "milliseconds",
    "place",
    "plural",
    "predicted",
    "rows_by_cost",
    "share",
    "summary",
]


_MANY = 3
"""The least number of equal sites without FLOPs that are shown in one row."""
_GONE = 50
"""The speed-up from which a site is reported as gone."""


def by_cost(remarks: Iterable[Remark]) -> list[Remark]:
    """Remarks, sorted by the predicted time of their sites, the longest first."""
    return sorted(remarks, key=lambda r: 0 if r.cost is None else -r.cost.before.milliseconds)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def flops(count: int) -> str:
    """A number of FLOPs as text: ``1.3 G``."""
    value = float(count)
    for prefix in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} T"


def share(remark: Remark, report: ReportData) -> str:
    """The site's share of the model's FLOPs."""
    total = 0 if report.structure is None else report.structure.cost_before.flops
    if remark.cost is None or not total:
        return ""
    return f"{100 * min(remark.cost.before.flops / total, 1):.0f} %"


def predicted(remark: Remark, report: ReportData) -> str:
    """``3.6×, -71 %``: the site's speed-up, and the change of the model's time."""
    if remark.cost is None or remark.status != "applied" or not remark.cost.before.calls:
        return ""
    before, after = remark.cost.before.milliseconds, remark.cost.after.milliseconds
    text = "gone" if after < before / _GONE else f"{before / after:.1f}×"
    if report.structure is not None and (total := report.structure.cost_before.milliseconds):
        text += f", {100 * (after - before) / total:+.0f} %".replace("-0 %", "0 %")
    return text


def milliseconds(remark: Remark) -> tuple[float, float] | None:
    """The measured times of the site, before and after; None if it was not measured."""
    for kind in ("", "network_"):
        before = remark.detail.get(f"{kind}milliseconds_before")
        after = remark.detail.get(f"{kind}milliseconds")
        if before is not None and after is not None:
            return float(before), float(after)
    return None


def measured_gain(remark: Remark) -> float | None:
    times = milliseconds(remark)
    return None if times is None or not times[1] else times[0] / times[1]


def measured(remark: Remark) -> str:
    """``2.1× (8.3 → 3.9 ms)``; " of all" marks times of the network without and with the site."""
    times, gain = milliseconds(remark), measured_gain(remark)
    if times is None or gain is None:
        return ""
    whole = " of all" if "milliseconds" not in remark.detail else ""
    return f"{gain:.2f}×{whole} ({times[0]:.3g} → {times[1]:.3g} ms)"


def line_of(location: str) -> str:
    """A location as shown: a library's file without the folder where it is installed."""
    return re.sub(r"^.*[/\\](?:site|dist)-packages[/\\]", "", location)


def place(remark: Remark) -> str:
    """The place of a site as text: ``model.py:12 (backbone)``."""
    if remark.location is None:
        return remark.target
    return f"{line_of(remark.location)} ({remark.target})"


def rows_by_cost(report: ReportData) -> list[Remark]:
    """Applied rewrites by cost; sites without FLOPs that differ only in place share a row."""
    groups: dict[object, list[Remark]] = {}
    for remark in by_cost(report.by_status("applied")):
        alike = remark.cost is not None and not remark.cost.before.flops and not remark.left
        key = (remark.rule, remark.what, remark.becomes) if alike else id(remark)
        groups.setdefault(key, []).append(remark)
    rows = (group if len(group) < _MANY else [_together(group)] for group in groups.values())
    return by_cost(itertools.chain.from_iterable(rows))


def _together(group: list[Remark]) -> Remark:
    first = group[0]
    costs = [remark.cost for remark in group if remark.cost is not None]
    before = sum((cost.before for cost in costs), Cost())
    after = sum((cost.after for cost in costs), Cost())
    return replace(
        first,
        what=f"{len(group)} × {first.what or first.rule}",
        target=f"{first.target}, and {len(group) - 1} more",
        cost=SiteCost(before, after),
    )


def left_by_cost(report: ReportData) -> list[Remark]:
    """Remarks with reasons, by cost: failed, missed, and applied in part."""
    missed = (*report.by_status("failed"), *report.by_status("missed"))
    return by_cost((*missed, *(r for r in report.by_status("applied") if r.left)))


def cures(remark: Remark) -> list[tuple[str, str, str, str]]:
    """For each reason: its code, its sentence, the line to change, and its cure."""
    return [
        (
            str(reason.code),
            reason.text,
            line_of(reason.location or remark.location or remark.target),
            CURES[reason.code],
        )
        for reason in (*remark.reasons, *remark.left)
    ]


def summary(report: ReportData) -> str:
    """One line: the rewrites, the gain, and the share of the model."""
    if report.stopped:
        return f"The model does not run: {report.stopped}"
    applied = report.by_status("applied")
    would = "would be" if report.mode == "audit" else "were"
    parts = []
    if applied:
        text = f"{plural(len(applied), 'rewrite')} {would} applied"
        gain = report.gain
        if gain is not None:
            how = "measured" if report.timing is not None else "predicted"
            text += f", {how} {gain:.1f}× as fast"
        if report.structure is not None:
            before, after = report.structure.cost_before, report.structure.cost_after
            text += f" ({before.calls:,} → {after.calls:,} ops"
            text += f", {flops(before.flops)} → {flops(after.flops)} FLOPs)"
        parts.append(text)
    else:
        parts.append(f"No rewrite {would} applied")
    if report.findings:
        parts.append(plural(len(report.findings), "usual mistake"))
    if missed := len(report.by_status("missed")):
        parts.append(f"{plural(missed, 'site')} left as {'it is' if missed == 1 else 'they are'}")
    if some := sum(bool(remark.left) for remark in report.by_status("applied")):
        parts.append(f"{some} rewritten in part")
    if failed := len(report.by_status("failed")):
        parts.append(f"{plural(failed, 'rewrite')} failed and undone")
    return "; ".join(parts) + "."
