"""The report says all of it: as a table for people, as JSON for programs."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

import fxtemporal
from fxtemporal import Code, Comparison, Factorize, Reason, Remark, Report, Specialization, Tune
from fxtemporal.passes.conv3d_forms import Conv3dForms
from fxtemporal.tuning.timing import Timing
from fxtemporal.verification.comparison import Sample
from tests.zoo import (
    CNNLSTM,
    AssignsFrames,
    DenseConv3d,
    FrameDifference,
    NoGradPart,
    ResidualConv3d,
    TrainingDropout,
    WholeClipKernel,
)

APPLIED = Remark(
    "conv3d-forms", "applied", "stem", "model.py:12", (), {"form": "conv3d_spatial", "frames": 4}
)
MISSED = Remark(
    "conv3d-forms",
    "missed",
    "layer1.conv",
    "model.py:20",
    (
        Reason(Code.SHAPES_UNKNOWN, "it needs example inputs"),
        Reason(Code.DENSE_KERNEL, "the 3×3×3 kernel reaches over time and space"),
    ),
)
FAILED = Remark("time-distribute", "failed", "body", None, (Reason(Code.WRONG_RESULT, "off"),))
FULL = Report(
    mode="optimize",
    remarks=(APPLIED, MISSED, FAILED),
    specializations=(Specialization("x.size(1)", 4, "model.py:9", "range() read it"),),
    comparison=Comparison((Sample("the example inputs", 1e-6, 2e-7, 1e-7, 4e-7),)),
    timing=Timing(20.0, 10.0, 2.0, 1.9, 2.1, 9),
    frontend="export",
    note="a branch reads the data of x (model.py:7)",
    settings={"tune": {"seconds": 60.0}},
)


# ------------------------------------------------------------------------------------ the table


def test_the_table_has_a_row_for_each_site() -> None:
    text = str(FULL)
    for word in (
        "conv3d-forms",
        "stem",
        "layer1.conv",
        "model.py:12",
        "applied",
        "missed",
        "failed",
    ):
        assert word in text
    assert "form conv3d_spatial, frames 4" in text


def test_every_reason_stands_in_the_table() -> None:
    text = " ".join(str(FULL).split())
    assert "shapes-unknown: it needs example inputs" in text
    assert "dense-kernel: the 3×3×3 kernel" in text
    assert "wrong-result: off" in text


def test_the_lines_below_the_table() -> None:
    text = str(FULL)
    assert "3 sites: 1 applied, 1 missed, 1 failed." in text
    assert "20.0 ms → 10.0 ms, 2.00× (1.90–2.10)" in text
    assert "Relative error: 2.0e-07 (the original's own: 1.0e-07)." in text
    assert "Captured by torch.export" in text
    assert "a branch reads the data of x (model.py:7)" in text
    assert "Fixed by the trace: x.size(1) == 4 (range() read it at model.py:9)." in text


def test_one_line_for_all_that_a_line_of_the_model_read() -> None:
    reads = [
        Specialization(f"x[:, {t}].size(-1)", 8, "model.py:9", "int() read it") for t in range(16)
    ]
    other = Specialization("x.dim()", 5, None, "its rank")
    report = Report(mode="optimize", remarks=(), specializations=(*reads, other))
    assert report.fixed == [
        "x[:, 0].size(-1) == 8, and 15 more (int() read it at model.py:9)",
        "x.dim() == 5 (its rank)",
    ]
    assert str(report).count("Fixed by the trace") == 2
    assert len(report.to_dict()["specializations"]) == 17


def test_an_audit_says_would_apply() -> None:
    text = str(dataclasses.replace(FULL, mode="audit"))
    assert text.startswith("1 rewrite would be applied")
    assert "would be" not in str(FULL)


def test_nothing_found_is_said() -> None:
    text = str(fxtemporal.audit(nn.ReLU(), (torch.ones(2, 3),)))
    assert text.startswith("No rewrite would be applied.")


def test_long_names_and_texts_are_wrapped() -> None:
    long = Remark(
        "conv3d-forms", "missed", "block." * 30, "m.py:1", (Reason(Code.RECURRENCE, "word " * 80),)
    )
    assert max(map(len, str(Report("audit", (long,))).splitlines())) < 200


def test_by_status() -> None:
    assert FULL.by_status("applied") == (APPLIED,)
    assert FULL.by_status("missed") == (MISSED,)
    assert FULL.by_status("failed") == (FAILED,)


# ------------------------------------------------------------------------------------- the JSON


def test_json_is_the_dict() -> None:
    assert json.loads(FULL.to_json()) == json.loads(json.dumps(FULL.to_dict()))
    assert "\n" not in FULL.to_json(indent=None)


def test_the_dict_is_plain_and_complete() -> None:
    plain = FULL.to_dict()
    assert list(plain) == [
        "mode",
        "frontend",
        "note",
        "gradients",
        "settings",
        "remarks",
        "specializations",
        "comparison",
        "timing",
        "memory",
        "curve",
        "findings",
        "structure",
        "stopped",
        "refused",
        "regions",
    ]
    assert plain["remarks"][1] == {
        "rule": "conv3d-forms",
        "status": "missed",
        "target": "layer1.conv",
        "location": "model.py:20",
        "what": "",
        "becomes": "",
        "reasons": [
            {"code": "shapes-unknown", "text": "it needs example inputs"},
            {"code": "dense-kernel", "text": "the 3×3×3 kernel reaches over time and space"},
        ],
        "detail": {},
        "cost": None,
    }
    assert plain["specializations"][0]["expression"] == "x.size(1)"
    assert plain["comparison"]["equal"] is True
    assert plain["timing"]["speedup"] == 2.0


def test_what_was_not_run_is_null() -> None:
    plain = json.loads(Report("audit", ()).to_json())
    assert (plain["comparison"], plain["timing"], plain["note"]) == (None, None, None)


def strict(text: str) -> Any:
    """Parsed as a strict parser does it: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


ZOO = (
    CNNLSTM,
    ResidualConv3d,
    DenseConv3d,
    WholeClipKernel,
    FrameDifference,
    TrainingDropout,
    NoGradPart,
    AssignsFrames,
)


@pytest.mark.long
@pytest.mark.parametrize("cls", ZOO, ids=lambda cls: cls.__name__)
def test_reports_of_the_zoo_are_strict_json_and_a_table(cls: Any) -> None:
    model = cls.build()
    result = fxtemporal.optimize(model, model.example(), tune="static")
    report = fxtemporal.report(result)
    parsed = strict(report.to_json())
    assert [r["target"] for r in parsed["remarks"]] == [r.target for r in report.remarks]
    assert parsed["comparison"]["equal"] is True
    text = str(report)
    assert all(str(reason.code) in text for r in report.remarks for reason in r.reasons)
    assert report.settings == {"tune": "static"}
    strict(fxtemporal.audit(model, model.example()).to_json())


def test_errors_without_bound_are_strict_json_too() -> None:
    infinite = Sample("a batch of 3", float("inf"), float("inf"), None, 0.0, "raised")
    report = Report("optimize", (), comparison=Comparison((infinite,), exact=False))
    parsed = strict(report.to_json())
    assert parsed["comparison"]["samples"][0]["problem"] == "raised"


def test_a_measured_and_factorized_report() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Conv3d(4, 4, (1, 3, 3)))
    x, forms = torch.randn(1, 3, 4, 8, 8), Conv3dForms({})
    tune = Tune(seconds=0.5)
    result = fxtemporal.optimize(model, (x,), passes=[forms], factorize=Factorize(2), tune=tune)
    parsed = strict(fxtemporal.report(result).to_json())
    assert parsed["settings"]["factorize"]["rank"] == 2
    assert parsed["settings"]["tune"]["seconds"] == 0.5
    assert parsed["comparison"]["exact"] is False
    assert parsed["timing"]["rounds"] >= 3
    assert {r["rule"] for r in parsed["remarks"]} == {"factorize-2plus1d", "conv3d-forms"}


# ------------------------------------------------------------------------------------ its pieces


def test_codes_are_stable_names() -> None:
    assert str(Code.DENSE_KERNEL) == "dense-kernel"
    assert Code("dense-kernel") is Code.DENSE_KERNEL
    for code in Code:
        assert str(code) == code.name.lower().replace("_", "-")
    assert json.dumps(Code.RECURRENCE) == '"recurrence"'


def test_remarks_and_reasons_are_frozen_and_comparable() -> None:
    assert copy.deepcopy(FULL) == FULL
    for thing, name in ((FULL, "mode"), (APPLIED, "status"), (MISSED.reasons[0], "text")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, "other")


def test_the_report_of_a_result_cannot_be_changed_through_its_dict() -> None:
    plain = FULL.to_dict()
    plain["remarks"][0]["detail"]["form"] = "other"
    plain["settings"]["tune"] = "other"
    assert APPLIED.detail["form"] == "conv3d_spatial"
    assert FULL.settings["tune"] == {"seconds": 60.0}


def test_the_network_line_is_absent_when_nothing_was_timed() -> None:
    assert "Network" not in str(dataclasses.replace(FULL, timing=None))
    assert "Relative error" not in str(dataclasses.replace(FULL, comparison=None))
    assert "Captured by" not in str(dataclasses.replace(FULL, frontend="fx", note=None))
