"""The audit command: formats, files, what fails it, and what was there before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxtemporal.cli import main as cli

MODEL = """
import torch
from torch import nn


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, clip):
        return torch.stack([self.conv(clip[:, t]) for t in range(clip.size(1))], 1)


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, clip):
        return self.conv(clip)


class Nothing(nn.Module):
    def forward(self, clip):
        return torch.relu(clip)


class Features(Frames):
    def forward(self, clip):
        raise RuntimeError("only its method is called")

    def features(self, clip):
        return super().forward(clip)
"""
TRACKER = """
import torch
from torch import nn


class Tracker(nn.Module):
    def __init__(self):
        super().__init__()
        self.frame = nn.Conv2d(3, 8, 3)
        self.update = nn.Linear(8, 8)

    def forward(self, clip):
        state = clip.new_zeros(clip.size(0), 8)
        for t in range(clip.size(1)):
            state = torch.tanh(self.update(state) + self.frame(clip[:, t]).mean((-2, -1)))
        return state
"""
CLIP = ("--input", "2x4x3x8x8")


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "suffix", "starts"),
    [
        ("table", ".txt", "1 rewrite would be applied"),
        ("json", ".json", "{"),
        ("markdown", ".md", "## fxtemporal"),
        ("sarif", ".sarif", "{"),
        ("html", ".html", "<!doctype html>"),
    ],
)
def test_each_format_on_stdout_and_by_the_name_of_the_file(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    suffix: str,
    starts: str,
) -> None:
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "--format", kind]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(starts)
    path = tmp_path / f"report{suffix}"
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "-o", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text().rstrip() == printed.rstrip()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_format_goes_before_the_name_of_the_file(model: str, tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    arguments = ["audit", f"{model}:Frames", *CLIP, "-o", str(path), "--format", "json"]
    assert cli.main(arguments) == 0
    assert json.loads(path.read_text())["mode"] == "audit"


def test_a_mistake_that_stops_the_forward_is_reported_and_ends_with_3(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", f"{model}:Clip", *CLIP]) == 3
    out, err = capsys.readouterr()
    assert "frame-layer-on-clip" in out
    lines = MODEL.splitlines()
    assert f"model.py:{lines.index('        return self.conv(clip)') + 1}" in out
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "status"),
    [
        ("missed", 0),
        ("applied", 1),
        ("fixed-frames", 1),
        ("axes-mixed", 0),
        ("slower:1", 1),
        ("slower:100000", 0),
        ("missed,slower:0", 1),
    ],
)
def test_what_fails_an_audit(
    model: str, capsys: pytest.CaptureFixture[str], names: str, status: int
) -> None:
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "--fail-on", names]) == status
    assert ("--fail-on found" in capsys.readouterr().err) == bool(status)


def test_a_method_in_place_of_the_forward(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{model}:Features", *CLIP, "--method", "features"]) == 0
    assert "1 rewrite would be applied" in capsys.readouterr().out
    assert cli.main(["audit", f"{model}:Features", *CLIP, "--method", "feature"]) == 2
    assert "Features has no method 'feature'" in capsys.readouterr().err


def test_what_is_left_of_a_loop_fails_an_audit_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tracker.py"
    path.write_text(TRACKER)
    arguments = ["audit", f"{path}:Tracker", *CLIP]
    assert cli.main([*arguments, "--fail-on", "missed"]) == 0
    assert "1 rewritten in part" in capsys.readouterr().out
    assert cli.main([*arguments, "--fail-on", "recurrence"]) == 1


@pytest.mark.parametrize(
    "name", ["slower", "slower:", "slower:x", "slower:-1", "slower:inf", "faster:3"]
)
def test_what_nothing_can_fail_on(
    model: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "--fail-on", name]) == 2
    assert "nothing is called" in capsys.readouterr().err


def test_with_a_baseline_only_what_is_new_counts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.json"
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "-o", str(base)]) == 0
    again = ["audit", f"{model}:Frames", *CLIP, "--baseline", str(base)]
    assert cli.main([*again, "--fail-on", "applied,fixed-frames"]) == 0
    assert "2 more are in the baseline" in capsys.readouterr().out
    other = tmp_path / "other.json"
    assert cli.main(["audit", f"{model}:Nothing", *CLIP, "-o", str(other)]) == 0
    new = ["audit", f"{model}:Frames", *CLIP, "--baseline", str(other)]
    assert cli.main([*new, "--fail-on", "applied,fixed-frames"]) == 1


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("-o", "report.pdf"), "give --format, or a name that ends in .txt"),
        (("-o", "nowhere/report.json"), "a folder that exists"),
        (("--baseline", "none.json"), "is no report"),
        (("--format", "xml"), "invalid choice"),
        (("--measure", "--input", "x"), "is no shape"),
    ],
)
def test_wrong_usage_is_a_line(
    model: str, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], match: str
) -> None:
    assert cli.main(["audit", f"{model}:Frames", *CLIP, *more]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert len(err.strip().splitlines()) == 1


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def refuses(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", refuses)
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "-o", str(path)]) == 2
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".report")] == []


def test_measured(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{model}:Frames", *CLIP, "--measure"]) == 0
    assert "Network:" in capsys.readouterr().out


@pytest.mark.long
def test_r3d_18_is_audited_in_ten_seconds_from_the_start_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "from benchmarks.conv3d_models import CONV3D\nr3d_18 = CONV3D['r3d_18'].build\n"
    )
    command = [sys.executable, "-m", "fxtemporal", "audit", f"{path}:r3d_18"]
    start = time.perf_counter()
    ran = subprocess.run([*command, "--input", "1x3x16x112x112"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert ran.returncode == 0
    assert "Conv3d" in ran.stdout
    assert seconds < 10
