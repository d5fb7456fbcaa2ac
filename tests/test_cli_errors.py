"""Wrong usage and failures on the command line: an exit status, and one line on stderr."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxtemporal import api
from tests.cli_cases import CLIP, MODEL, Run

pytestmark = pytest.mark.usefixtures("imports_are_put_back")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            [],
            "arguments are required: audit|bench|optimize|lower (see fxtemporal --help)",
        ),
        (["banch"], "invalid choice: 'banch'"),
        (["audit"], "the following arguments are required: MODEL (see fxtemporal audit --help)"),
        (["audit", "m:f", "--fast"], "unrecognized arguments: --fast"),
        (["audit", "m:f", "--inp", "2x3"], "unrecognized arguments: --inp 2x3"),
        (["audit", "m:f", "--input"], "argument --input: expected one argument"),
        (["audit", "m:f", "--input", "2,3"], "'2,3' is no shape: write sizes"),
        (["audit", "m:f", "--input", "2x0"], "'2x0' is no shape: write sizes from 1"),
        (["audit", "m:f", "--input", "x3"], "'x3' is no shape"),
        (["audit", "m:f", "--input", "2x-1"], "'2x-1' is no shape"),
        (["audit", "m:f", "--input", ""], "'' is no shape"),
        (["audit", "m:f", "--input", "2x3:float"], "no dtype 'float' (did you mean 'float"),
        (["audit", "m:f", "--input", "2x3:"], "no dtype ''; there are float32, float16"),
        (["audit", "m:f", "--passes", "time"], "--passes: nothing is called 'time'"),
        (["audit", "m:f", "--passes", "a,,b"], "'a,,b' has an empty name"),
        (["audit", "m:f", "--fail-on", "mised"], "'mised' (did you mean 'missed'?); there are"),
        (["audit", "m:f", "--fail-on", "recurence"], "(did you mean 'recurrence'?)"),
        (["audit", "m:f", "--tune", "static"], "unrecognized arguments: --tune static"),
        (["optimize", "m:f"], "the following arguments are required: -o/--output"),
        (["optimize", "m:f", "-o", "m.onnx"], "--output m.onnx: name it *.pt2"),
        (["optimize", "m:f", "-o", "no/m.pt2"], "give a file in a folder that exists"),
        (["optimize", "m:f", "-o", "m.pt2", "--tune", "fast"], "invalid choice: 'fast'"),
        (["optimize", "m:f", "-o", "m.pt2", "--factorize", "half"], "'half': write paper, a"),
        (["optimize", "m:f", "-o", "m.pt2", "--factorize", "0"], "rank must be 'paper'"),
        (["optimize", "m:f", "-o", "m.pt2", "--factorize", "1.5"], "rank must be 'paper'"),
        (["audit", "weights"], "'weights' is no model: write package.module:callable"),
        (["audit", "none.pt2"], "none.pt2: there is no such file"),
        (["audit", "none.py:build"], "none.py: there is no such file"),
        (["audit", "none.py"], "say which callable of it builds the model: none.py:build"),
        (["audit", ":build"], "':build': write package.module:callable"),
        (["audit", ".relative:build"], "write package.module:callable"),
        (["audit", "os:"], "'os:': write package.module:callable"),
        (["audit", "no_such.module:build"], "no module is called 'no_such'"),
        (["audit", "json.no_such:build"], "no module is called 'json.no_such'"),
        (["audit", "torch.nn:Linaer"], "torch.nn has no 'Linaer' (did you mean 'Linear'?)"),
        (["audit", "torch.nn:Linear"], "needs in_features, out_features: name a function"),
        (["audit", "sys:maxsize"], "is an int: name a function"),
        (["audit", "time:time"], "time:time: gave a float, and an nn.Module is needed"),
    ],
)
def test_wrong_usage(
    run: Run,
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments)
    assert ran.status == 2
    assert says in ran.error()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("buidl", "has no 'buidl' (did you mean 'build'?)"),
        ("build_of", "build_of: needs width: name a function"),
        ("Wide", "Wide: needs width: name a function"),
        ("text", "text: gave a str, and an nn.Module is needed"),
        ("number", "number: is an int: name a function"),
    ],
)
def test_what_a_file_does_not_hold(run: Run, model: str, name: str, says: str) -> None:
    ran = run("audit", f"{model}:{name}", *CLIP)
    assert ran.status == 2
    assert f"{model}" in ran.error()
    assert says in ran.error()


@pytest.mark.parametrize("command", ["audit", "optimize"])
def test_a_missing_input_where_it_is_needed(
    run: Run, model: str, tmp_path: Path, command: str
) -> None:
    more = ["-o", tmp_path / "fast.pt2"] if command == "optimize" else []
    ran = run(command, f"{model}:Frames", *more)
    assert ran.status == 2
    assert f"{model}:Frames: " in ran.error()
    assert "--input 2x10x3x32x32" in ran.error()


def test_an_input_beyond_all_memory(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:instance", "--input", "99999999x99999999")
    assert ran.status == 2
    assert "--input 99999999x99999999:float32: " in ran.error()
    assert "give a smaller shape" in ran.error()


# ---------------------------------------------------------------------------- no capture


def test_inputs_that_do_not_fit_the_model(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:Frames", "--input", "2x4x5x6x6")
    assert ran.status == 3
    assert f"{model}:Frames: the model fails on the example inputs" in ran.error()


def test_too_many_inputs(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:Frames", *CLIP, *CLIP)
    assert ran.status == 3
    assert "the example inputs do not fit Frames.forward(clip)" in ran.error()


def test_a_model_that_nothing_can_capture(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:Data", "--input", "9")
    assert ran.status == 3
    assert "Data could not be captured" in ran.error()


def test_an_exception_of_the_users_builder_names_its_line(run: Run, model: str) -> None:
    line = 1 + MODEL.splitlines().index("    return layers[3]")
    ran = run("audit", f"{model}:broken", *CLIP)
    assert ran.status == 3
    assert f"{model}:broken failed: {model}:{line}: IndexError: list index" in ran.error()


def test_the_traceback_is_shown_on_request(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:broken", *CLIP, "--traceback")
    assert ran.status == 3
    assert "Traceback" in ran.err
    assert "return layers[3]" in ran.err
    assert ran.err.splitlines()[-1].startswith("fxtemporal: error: ")


def test_a_builder_that_exits(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:leaves", *CLIP)
    assert ran.status == 3
    assert "SystemExit: no GPU" in ran.error()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def build(:\n", "bad.py:1: SyntaxError: "),
        ("import json\n\njson.loads('{')\n", "bad.py:3: JSONDecodeError: "),
        ("import no_such_package\n", "bad.py:1: ModuleNotFoundError: No module named 'no_such"),
    ],
)
def test_a_file_that_cannot_be_imported_names_its_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    (tmp_path / "bad.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    for text in ("bad.py:build", "bad:build"):
        ran = run("audit", text, *CLIP)
        assert ran.status == 3
        assert "cannot be imported: " in ran.error()
        assert says in ran.error()
        sys.modules.pop("bad", None)


def test_a_defect_of_the_package_is_no_finding(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "audit", math.sqrt)  # raises at the line of the package
    ran = run("audit", f"{model}:Frames", *CLIP)
    assert ran.status == 3
    assert "TypeError: math.sqrt() takes no keyword arguments" in ran.error()
    assert "fxtemporal itself failed" in ran.error()
    assert "FXTEMPORAL_DUMP" in ran.error()


def test_an_interruption(
    run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(program: object, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", save)
    folder = tmp_path / "out"
    folder.mkdir()
    ran = run("optimize", f"{model}:instance", "--input", "2x4", "-o", folder / "fast.pt2")
    assert ran.status == 130
    assert ran.out == ""
    assert not list(folder.iterdir())


WRONG = """
import sys

from torch import nn


class Exits(nn.Module):
    def forward(self, x):
        sys.exit("no such clip")


class Uninitialized(nn.Module):
    def __init__(self):
        self.size = 3
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Exits", "the model's code ends the process: no such clip"),
        ("Uninitialized", "Uninitialized.__init__ does not call super().__init__()"),
    ],
)
def test_what_a_model_does_wrong_is_not_taken_for_a_finding_or_a_defect(
    run: Run, tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "wrong_models.py").write_text(WRONG)
    ran = run("audit", f"{tmp_path / 'wrong_models.py'}:{name}", *CLIP)
    assert ran.status == 3
    assert says in ran.error()
