"""Renders a report as SARIF 2.1.0, so that code hosts show its results at the user's lines.

The format: OASIS, *Static Analysis Results Interchange Format (SARIF) Version 2.1.0*, 2020.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.mistakes.finding import Mistake
from fxtemporal.passes.rule import Remark
from fxtemporal.reports.cures import CURES
from fxtemporal.reports.data import ReportData
from fxtemporal.reports.wording import by_cost, measured, place, predicted, share

__all__ = ["sarif"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LOCATION = re.compile(r"(.+):(\d+)")


def sarif(report: ReportData) -> dict[str, Any]:
    """One run with a result for each rewrite, each reason and each common mistake."""
    results = [*_results(report)]
    driver = {
        "name": "fxtemporal",
        "semanticVersion": version("fxtemporal"),
        "rules": [_rule(name, text) for name, text in _described(results)],
    }
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"ROOT": {"uri": f"{Path.cwd().as_uri()}/"}},
        "results": results,
    }
    if report.stopped:
        failed = {"level": "error", "message": {"text": report.stopped}}
        run["invocations"] = [
            {"executionSuccessful": False, "toolExecutionNotifications": [failed]}
        ]
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _results(report: ReportData) -> Iterator[dict[str, Any]]:
    for finding in report.findings:
        text = f"{finding.text}. To mend it: {finding.cure}."
        yield _result(str(finding.code), "warning", text, finding.target, finding.location)
    for remark in by_cost(report.remarks):
        if remark.status == "applied":
            yield _applied(report, remark)
        for reason in (*remark.reasons, *remark.left):
            yield _left(remark, reason)


def _applied(report: ReportData, remark: Remark) -> dict[str, Any]:
    does = "fxtemporal.optimize makes of it" if report.mode == "audit" else "it became"
    text = f"{remark.what or remark.rule} ({remark.target}): {does} {remark.becomes or 'less'}"
    gains = [("of the FLOPs", share(remark, report)), ("predicted", predicted(remark, report))]
    said = [f"{value} {name}" for name, value in gains if value]
    said += [f"measured {measured(remark)}"] if measured(remark) else []
    text += f": {', '.join(said)}." if said else "."
    level = "warning" if report.mode == "audit" else "none"
    return _result(remark.rule, level, text, remark.target, remark.location)


def _left(remark: Remark, reason: Reason) -> dict[str, Any]:
    part = "in part stays" if remark.status == "applied" else "stays"
    text = f"{remark.what or remark.rule} ({place(remark)}) {part} as it is: {reason.text}. "
    text += f"To change that: {CURES[reason.code]}."
    location = reason.location or remark.location
    level = "error" if remark.status == "failed" else "note"
    return _result(str(reason.code), level, text, remark.target, location)


def _result(rule: str, level: str, text: str, target: str, location: str | None) -> dict[str, Any]:
    fingerprint = hashlib.sha256(f"{rule} {target}".encode()).hexdigest()[:32]
    logical = {"fullyQualifiedName": target, "kind": "module"}
    where: dict[str, Any] = {"logicalLocations": [logical]}
    match = _LOCATION.fullmatch(location or "")
    if match is not None:
        where["physicalLocation"] = {
            "artifactLocation": _artifact(match[1]),
            "region": {"startLine": max(int(match[2]), 1)},
        }
    return {
        "ruleId": rule,
        "kind": "informational" if level == "none" else "fail",
        "level": level,
        "message": {"text": text},
        "locations": [where],
        "partialFingerprints": {"ruleAndModule/v1": fingerprint},
    }


def _artifact(path: str) -> dict[str, str]:
    """The location of ``path``: relative paths stay relative, so that hosts can map them."""
    if PurePath(path).is_absolute():
        return {"uri": Path(path).as_uri()}
    return {"uri": quote(PurePath(path).as_posix()), "uriBaseId": "ROOT"}


def _described(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """``(rule, description)`` for each rule that has a result."""
    texts = {str(code): CURES[code] for code in Code}
    texts |= {str(mistake): str(mistake).replace("-", " ") for mistake in Mistake}
    names = dict.fromkeys(result["ruleId"] for result in results)
    return [(name, texts.get(name, name.replace("-", " "))) for name in names]


def _rule(name: str, text: str) -> dict[str, Any]:
    title = "".join(word.capitalize() for word in name.split("-"))
    return {
        "id": name,
        "name": title,
        "shortDescription": {"text": name.replace("-", " ")},
        "help": {"text": text},
    }
