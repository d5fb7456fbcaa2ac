"""Help, the version, terminals, and the command as a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxtemporal
from fxtemporal import __version__
from fxtemporal.cli import main as cli

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "arguments", [["--help"], ["audit", "--help"], ["optimize", "--help"], ["lower", "--help"]]
)
def test_help_says_what_a_model_is_and_what_the_exit_status_means(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "path/to/file.py:callable" in out
    assert "eval mode" in out
    assert "4  verification failed" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fxtemporal {__version__}\n"


def test_on_a_terminal_the_report_is_as_wide_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "of this and that " * 12
    report = fxtemporal.audit(nn.Conv3d(3, 4, (1, 3, 3)), (torch.randn(1, 3, 4, 8, 8),))
    report = dataclasses.replace(report, frontend="export", note=note)
    assert cli._fitted(report) == str(report)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "90")
    assert max(map(len, cli._fitted(report).splitlines())) <= 90


def command_line(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fxtemporal", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_run_as_a_module() -> None:
    process = command_line("audit", "examples/cnn_lstm.py:build", "--input", "2x10x3x32x32")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "examples/cnn_lstm.py:33" in out
    assert "1 rewrite would be applied" in out
    assert err == ""


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = command_line("audit", "examples/cnn_lstm.py:build", "--input", "2x10x3x32x32")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert err == ""
