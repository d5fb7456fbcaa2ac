"""What audit says would be applied is what optimize applies, on every model there is."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from benchmarks.conv3d_models import CONV3D
from benchmarks.loop_models import LOOPS
from benchmarks.models import MODELS
from fxtemporal import Report
from fxtemporal.reports.baseline import new_since, read_baseline
from tests.zoo import ZOO, Awkward

CASES = {**MODELS, **LOOPS, **CONV3D}
SLOW = ("nested_crops", "sliding_windows", "two_stream")
LARGE = {name for name in CASES if name in (*CONV3D, *SLOW) or "resnet" in name or "64" in name}
RUNS = [cls for cls in ZOO if cls.fails is None]


def applied(report: Report) -> Counter[tuple[str, str, str]]:
    return Counter((r.rule, r.target, r.becomes) for r in report.by_status("applied"))


def agree(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        audit = fxtemporal.audit(model, inputs)
    except fxtemporal.CaptureError:
        with pytest.raises(fxtemporal.CaptureError):
            fxtemporal.optimize(model, inputs, tune="static", verify=False)
        return
    fast = fxtemporal.optimize(model, inputs, tune="static", verify=False)
    assert applied(audit) == applied(fxtemporal.report(fast))
    before, after = audit.structure, fxtemporal.report(fast).structure
    assert before is not None
    assert before == after
    for remark in audit.remarks:
        assert remark.what
        assert remark.becomes or remark.status != "applied"
        assert remark.cost is not None


def _of_the_zoo(number: int, kind: type[Awkward]) -> Any:
    """Every third model in each run; all of them in the longest profile."""
    marks = [pytest.mark.long] if number % 3 else []
    return pytest.param(kind, marks=marks, id=kind.__name__)


@pytest.mark.parametrize("kind", [_of_the_zoo(*entry) for entry in enumerate(RUNS)])
def test_the_zoo_of_awkward_models(kind: type[Awkward]) -> None:
    model = kind.build()
    agree(model, model.example())


@pytest.mark.parametrize("name", [name for name in CASES if name not in LARGE])
def test_the_models_of_the_benchmarks(name: str) -> None:
    agree(CASES[name].build(), CASES[name].inputs())


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(LARGE))
def test_the_large_models_of_the_benchmarks(name: str) -> None:
    agree(CASES[name].build(), CASES[name].inputs())


class TwoLoops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv3d(3, 4, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([torch.relu(self.first(x[:, t])) for t in range(x.size(1))], 2)
        return self.second(y)


CLIP = torch.randn(2, 4, 3, 8, 8)


def test_measured_gains_stand_beside_what_is_predicted() -> None:
    report = fxtemporal.audit(TwoLoops().eval(), (CLIP,), measure=True, progress=False)
    assert report.mode == "audit"
    assert report.timing is not None
    assert report.structure is not None
    for remark in report.by_status("applied"):
        assert remark.cost is not None
        kinds = ("milliseconds", "network_milliseconds")
        assert any(f"{kind}_before" in remark.detail and kind in remark.detail for kind in kinds)
    assert "measured" in str(report)
    assert report.gain == report.timing.speedup


def test_measuring_needs_inputs() -> None:
    with pytest.raises(fxtemporal.PassError, match="example inputs"):
        fxtemporal.audit(nn.Conv3d(3, 4, 3), measure=True)


def test_the_model_is_not_touched() -> None:
    model = TwoLoops().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxtemporal.audit(model, (CLIP,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- what is new -----------------------------------------------------------------------------------


def saved(report: Report, path: Path) -> Path:
    path.write_text(report.to_json(), encoding="utf-8")
    return path


def test_against_itself_nothing_is_new(tmp_path: Path) -> None:
    report = fxtemporal.audit(TwoLoops().eval(), (CLIP,))
    left = new_since(report, read_baseline(saved(report, tmp_path / "base.json")))
    assert left.remarks == left.findings == ()
    assert left.known == len(report.remarks) + len(report.findings) > 0
    assert "more are in the baseline" in str(left)


def test_a_moved_line_is_not_new_and_a_second_one_is(tmp_path: Path) -> None:
    report = fxtemporal.audit(TwoLoops().eval(), (CLIP,))
    known = read_baseline(saved(report, tmp_path / "base.json"))
    moved = [dataclasses.replace(r, location="elsewhere.py:1") for r in report.remarks]
    twice = dataclasses.replace(report, remarks=(*moved, moved[0]))
    left = new_since(twice, known)
    assert left.remarks == (moved[0],)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"remarks": 3, "findings": []}'])
def test_what_is_no_report_is_no_baseline(tmp_path: Path, content: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(content)
    with pytest.raises(fxtemporal.FxTemporalError, match="is no report"):
        read_baseline(path)


def test_json_has_costs_findings_and_structure() -> None:
    content = json.loads(fxtemporal.audit(TwoLoops().eval(), (CLIP,)).to_json())
    assert content["structure"]["before"]
    assert content["findings"][0]["code"] == "fixed-frames"
    assert {"what", "becomes", "cost"} <= content["remarks"][0].keys()
