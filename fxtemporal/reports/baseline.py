"""Filters a report to what is new since an earlier one: ``fxtemporal audit MODEL --baseline FILE``.

A finding is known if the earlier report has one of the same kind, about the same module, for the
same reasons; lines may have moved. Each entry of the earlier report matches one finding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxtemporal.reports.report import Report
from fxtemporal.support.errors import FxTemporalError

__all__ = ["new_since", "read_baseline"]

Known = Counter[tuple[str, ...]]


def read_baseline(path: Path) -> Known:
    """The entries of a report that was written as JSON.

    Raises:
        FxTemporalError: the file cannot be read, or is not a report.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Counter(_identities(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FxTemporalError(
            f"{path} is no report ({type(error).__name__}: {error}): write one with "
            f"fxtemporal audit MODEL --format json -o {path}"
        ) from error


def new_since(report: Report, known: Known) -> Report:
    """The report without known entries; ``Report.known`` counts these."""
    left = Counter(known)
    count = 0

    def is_new(identity: tuple[str, ...]) -> bool:
        nonlocal count
        if left[identity] > 0:
            left[identity] -= 1
            count += 1
            return False
        return True

    remarks = tuple(r for r in report.remarks if is_new(_remark(r.to_dict())))
    findings = tuple(f for f in report.findings if is_new(_finding(f.to_dict())))
    return replace(report, remarks=remarks, findings=findings, known=count)


def _identities(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        *(_remark(remark) for remark in content["remarks"]),
        *(_finding(finding) for finding in content["findings"]),
    ]


def _remark(remark: Mapping[str, Any]) -> tuple[str, ...]:
    reasons = (*remark["reasons"], *remark["detail"].get("left_because", ()))
    codes = sorted(reason["code"] for reason in reasons)
    return remark["rule"], remark["status"], remark["target"], *codes


def _finding(finding: Mapping[str, Any]) -> tuple[str, ...]:
    return finding["code"], finding["target"]
