"""An audit as text, Markdown and SARIF: all of it stands in each, and it fits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import Code, Finding, Mistake, Reason, Remark, Report
from fxtemporal.analysis.cost import Block, Cost, SiteCost, Structure
from fxtemporal.reports.cures import CURES
from fxtemporal.reports.wording import flops, summary

SCHEMA = Path(__file__).parent / "data" / "sarif-schema-2.1.0.json"

LOOP = Remark(
    "time-distribute",
    "applied",
    "backbone",
    "model.py:12",
    (),
    {"network_milliseconds_before": 20.0, "network_milliseconds": 10.0},
    "loop of 16 frames over ResNet",
    "one call over all frames for 60 ops",
    SiteCost(Cost(900, 160, 9.0), Cost(900, 10, 3.0)),
)
CONV = Remark(
    "conv3d-forms",
    "applied",
    "stem",
    "model.py:3",
    (),
    {"milliseconds_before": 8.0, "milliseconds": 4.0},
    "Conv3d with a 1×7×7 kernel",
    "2-D convolutions of its frames",
    SiteCost(Cost(100, 1, 1.0), Cost(100, 1, 0.5)),
)
LEFT = Remark(
    "time-distribute",
    "missed",
    "cell",
    "model.py:20",
    (Reason(Code.RECURRENCE, "it reads a state that another frame left", "model.py:21"),),
    {},
    "loop of 16 frames over Cell",
)
ALIKE = dataclasses.replace(LEFT, target="other", location="model.py:40")
FAILED = Remark(
    "pool3d-forms",
    "failed",
    "pool",
    "/abs/lib.py:7",
    (Reason(Code.WRONG_RESULT, "off"),),
    {},
    "pool",
)
MISTAKE = Finding(
    Mistake.AXES_MIXED, "head", "model.py:30", "axes | are <mixed>", "transpose first"
)
REPORT = Report(
    mode="audit",
    remarks=(CONV, LOOP, LEFT, ALIKE, FAILED),
    findings=(MISTAKE,),
    structure=Structure(
        (Block("backbone", 16, Cost(900, 160, 9.0)), Block("stem", 1, Cost(100, 1, 1.0))),
        (Block("backbone", 1, Cost(900, 10, 3.0)), Block("stem", 1, Cost(100, 1, 0.5))),
    ),
)


class Example(nn.Module):
    """A loop, a flat Conv3d and a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.cell = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        frames = [self.conv(y[:, :, t]) for t in range(y.size(2))]
        state = torch.zeros_like(frames[0])
        for frame in frames:
            state = torch.tanh(self.cell(state) + frame)
        return state


def test_every_reason_has_a_cure() -> None:
    assert set(CURES) == set(Code)
    assert all(text and not text.endswith(".") for text in CURES.values())


# -- text ------------------------------------------------------------------------------------------


def test_the_first_line_sums_it_up() -> None:
    first = str(REPORT).splitlines()[0]
    assert "2 rewrites would be applied" in first
    assert "predicted 2.9× as fast" in first
    assert "161 → 11 ops" in first
    assert "1 usual mistake" in first
    assert "2 sites left as they are" in first
    assert "1 rewrite failed and undone" in first


def test_rows_stand_in_the_order_of_what_they_cost() -> None:
    text = str(REPORT)
    assert text.index("loop of 16 frames over ResNet") < text.index("1×7×7")
    assert re.search(r"90 % +3.0×, -60 % +2.00× of all \(20 → 10 ms\)", text)
    assert re.search(r"10 % +2.0×, -5 % +2.00× \(8 → 4 ms\)", text)


def test_each_reason_stands_with_the_line_to_change_and_how() -> None:
    text = str(REPORT)
    assert "recurrence: it reads a state that another frame left" in text
    assert f"→ model.py:21: {CURES[Code.RECURRENCE]}"[:60] in text
    assert "and alike: model.py:40" in text
    assert "failed: pool" in text
    assert "model.py:30 (head): axes-mixed" in text
    assert "→ transpose first" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    model, x = Example().eval(), torch.randn(1, 3, 4, 6, 6)
    for report in (REPORT, fxtemporal.audit(model, (x,))):
        lines = report.text(width).splitlines()
        longest = max(len(word) for line in lines for word in line.split())
        assert max(map(len, lines)) <= max(width, longest + 8)


def test_columns_without_an_entry_are_left_out() -> None:
    unmeasured = dataclasses.replace(CONV, detail={})
    report = dataclasses.replace(REPORT, remarks=(unmeasured,), findings=())
    assert "measured" not in str(report)
    assert "measured" in str(dataclasses.replace(REPORT, remarks=(CONV,)))


def test_a_model_without_sites_is_a_line() -> None:
    report = fxtemporal.audit(nn.Sequential(nn.Linear(3, 4)).eval(), (torch.randn(2, 3),))
    assert str(report).splitlines()[0] == "No rewrite would be applied."


def test_what_stopped_the_forward_comes_first() -> None:
    report = Report(
        mode="audit", remarks=(), findings=(MISTAKE,), stopped="it failed at model.py:3"
    )
    assert summary(report) == "The model does not run: it failed at model.py:3"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (1.5e6, "1.5 M"), (40.7e9, "40.7 G"), (2e12, "2 T")],
)
def test_flops_have_a_prefix(count: float, text: str) -> None:
    assert flops(int(count)) == text


# -- Markdown --------------------------------------------------------------------------------------


def test_markdown_has_all_of_it_and_escapes_what_it_must() -> None:
    text = REPORT.to_markdown()
    assert text.startswith("## fxtemporal")
    for part in ("### Usual mistakes", "### Left as it is", "`recurrence`", "`wrong-result`"):
        assert part in text
    assert "axes \\| are &lt;mixed>" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


# -- SARIF -----------------------------------------------------------------------------------------


def reports() -> list[Report]:
    model, x = Example().eval(), torch.randn(1, 3, 4, 6, 6)
    stopped = Report(mode="audit", remarks=(), findings=(MISTAKE,), stopped="it failed")
    real = fxtemporal.audit(model, (x,))
    optimized = fxtemporal.report(fxtemporal.optimize(model, (x,), tune="static"))
    return [REPORT, stopped, real, optimized, Report(mode="audit", remarks=())]


@pytest.mark.parametrize("k", range(5))
def test_sarif_is_valid(k: int) -> None:
    schema = json.loads(SCHEMA.read_text())
    log = json.loads(json.dumps(reports()[k].to_sarif()))
    jsonschema.validate(log, schema, format_checker=jsonschema.FormatChecker())
    (run,) = log["runs"]
    named = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in run["results"]} == named


def test_sarif_results_stand_on_their_lines() -> None:
    (run,) = REPORT.to_sarif()["runs"]
    found = {}
    for result in run["results"]:
        place = result["locations"][0]["physicalLocation"]
        line = place["region"]["startLine"]
        found[result["ruleId"], line] = result["level"], place["artifactLocation"]["uri"]
    assert found["axes-mixed", 30] == ("warning", "model.py")
    assert found["time-distribute", 12] == ("warning", "model.py")
    assert found["recurrence", 21] == ("note", "model.py")
    assert found["wrong-result", 7] == ("error", "file:///abs/lib.py")


def test_a_sarif_fingerprint_outlives_a_moved_line() -> None:
    moved = dataclasses.replace(LOOP, location="model.py:99")
    prints = [
        dataclasses.replace(REPORT, remarks=(r,)).to_sarif()["runs"][0]["results"][-1]
        for r in (LOOP, moved)
    ]
    assert prints[0]["partialFingerprints"] == prints[1]["partialFingerprints"]
    assert prints[0]["locations"] != prints[1]["locations"]
