"""The command line: every exit status, every error as one line, and stdout for reports alone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxtemporal
from fxtemporal import __version__
from fxtemporal.cli import arguments
from fxtemporal.cli import main as cli
from fxtemporal.lowering.pt2 import load_exported
from fxtemporal.support.errors import LoweringError, VerificationError

ROOT = Path(__file__).parent.parent
CLIP = ("--input", "2x4x3x6x6")

MODEL = '''
"""Models of the kinds that a user may name."""

import sys

import torch
from torch import nn

from beside import CHANNELS


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, clip):
        return torch.stack([self.norm(self.conv(clip[:, t])) for t in range(clip.size(1))], 1)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, clip):
        return torch.stack([self.norm(clip[:, t]) for t in range(clip.size(1))], 1)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 3)

    def forward(self, tokens, mask, scale):
        assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
        return self.embedding(tokens) * mask.unsqueeze(-1) * scale


class Data(nn.Module):
    def forward(self, x):
        return x[: int(x.sum().item())] if x.sum() > 0 else x


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        Counts.calls += 1
        return x * Counts.calls


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()


def build():
    print("built")
    return Frames()


def build_of(width, *rest, depth=1):
    return Wide(width)


def broken():
    layers = []
    return layers[3]


def leaves():
    sys.exit("no GPU")


def text():
    return "a model"


instance = nn.Linear(4, 2)
number = 3
'''


@pytest.fixture(autouse=True)
def _imports_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("models_of_a_user", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "beside.py").write_text("CHANNELS = 3\n")
    (tmp_path / "models_of_a_user.py").write_text(MODEL)
    return str(tmp_path / "models_of_a_user.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 of two steps of a Conv2d, unrolled, with its example."""

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 3)

        def forward(self, clip: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.conv(clip[:, t]) for t in range(4)], 1)

    path = tmp_path_factory.mktemp("saved") / "loop.pt2"
    torch.export.save(torch.export.export(Loop(), (torch.randn(2, 4, 3, 6, 6),)), path)
    return path


class Ran:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def error(self) -> str:
        """The one line on stderr, without its head; nothing may be on stdout."""
        head = "fxtemporal: error: "
        assert self.out == ""
        assert self.err.startswith(head), self.err
        assert self.err.count("\n") == 1
        return self.err.removeprefix(head).strip()


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    return run


# ---------------------------------------------------------------------------- audit


def test_audit_prints_the_table_alone_on_stdout(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:build", *CLIP, "--passes", "time-distribute")
    assert ran.status == 0
    assert ran.out.startswith("1 rewrite would be applied")
    assert "loop of 4 frames" in ran.out
    assert ran.err == "built\n"


def test_audit_as_json_is_json_alone(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:build", *CLIP, "--json", "--passes", "time-distribute")
    report = json.loads(ran.out)
    assert ran.status == 0
    assert report["mode"] == "audit"
    assert [remark["status"] for remark in report["remarks"]] == ["applied"]


@pytest.mark.parametrize(
    ("names", "train", "status"),
    [
        ("missed", False, 0),
        ("applied", False, 1),
        ("failed,applied", False, 1),
        ("recurrence", True, 0),
        ("missed", True, 1),
        ("training-batchnorm", True, 1),
        ("training-batchnorm", False, 0),
    ],
)
def test_fail_on_a_status_or_a_reason(
    run: Run, model: str, names: str, train: bool, status: int
) -> None:
    more = ["--train"] if train else []
    ran = run("audit", f"{model}:Norms", *CLIP, "--fail-on", names, *more)
    assert ran.status == status
    assert ("--fail-on found 1 " in ran.err) == (status == 1)
    assert ran.out


def test_fail_on_does_not_mix_with_json(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:Frames", *CLIP, "--fail-on", "applied", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["remarks"]


def test_only_the_passes_named_are_run(run: Run, model: str) -> None:
    ran = run("audit", f"{model}:Frames", *CLIP, "--passes", "conv3d-forms", "--json")
    assert json.loads(ran.out)["remarks"] == []


def test_inputs_of_several_dtypes_in_order(run: Run, model: str) -> None:
    inputs = [f"--input={text}" for text in ("2x5:int64", "2x5:bool", "2x5x3:float64")]
    assert run("audit", f"{model}:Lookup", *inputs).status == 0


@pytest.mark.parametrize("dtype", arguments.DTYPES)
def test_every_dtype_makes_the_same_tensor_each_time(dtype: str) -> None:
    options = arguments.parser().parse_args(["audit", "m:f", "--input", f"3x40:{dtype}"])
    (first,), (second,) = cli._inputs(options), cli._inputs(options)  # type: ignore[misc]
    assert first.dtype == getattr(torch, dtype)
    assert first.shape == (3, 40)
    assert torch.equal(first, second)
    if not first.dtype.is_floating_point:
        assert set(first.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("name", ["build", "Frames"])
def test_a_module_name_is_found_in_the_working_directory(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(Path(model).parent)
    assert run("audit", f"models_of_a_user:{name}", *CLIP).status == 0


def test_an_instance_needs_no_call(run: Run, model: str) -> None:
    assert run("audit", f"{model}:instance", "--input", "2x4").status == 0


def test_audit_without_inputs_where_none_are_needed(run: Run, model: str) -> None:
    assert run("audit", f"{model}:instance").status == 0


def test_a_file_named_like_a_module_does_not_replace_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("from torch import nn\nbuild = nn.Identity\n")
    ran = run("audit", f"{tmp_path / 'json.py'}:build", "--input", "2x3", "--json")
    assert ran.status == 0
    assert sys.modules["json"] is json


# ---------------------------------------------------------------------------- a .pt2 as MODEL


def test_a_pt2_is_audited_on_its_own_example(run: Run, saved: Path) -> None:
    ran = run("audit", saved, "--json")
    assert ran.status == 0
    assert json.loads(ran.out)["frontend"] == "given"


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_pt2_is_optimized_into_a_pt2(run: Run, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "fast.pt2"
    ran = run("optimize", saved, "-o", path, "--tune", "static")
    assert ran.status == 0, ran.err
    clip = torch.randn(2, 4, 3, 6, 6)
    expected = torch.export.load(saved).module()(clip)
    torch.testing.assert_close(load_exported(path).module()(clip), expected)


def test_a_pt2_without_example_needs_an_input(run: Run, saved: Path, tmp_path: Path) -> None:
    program = torch.export.load(saved)
    program.example_inputs = None
    torch.export.save(program, tmp_path / "bare.pt2")
    ran = run("optimize", tmp_path / "bare.pt2", "-o", tmp_path / "fast.pt2")
    assert ran.status == 2
    assert "bare.pt2: give an --input" in ran.error()


def test_a_damaged_pt2(run: Run, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(saved.read_bytes()[:-200])
    ran = run("audit", path)
    assert ran.status == 3
    assert ran.error() == f"{path}: damaged or cut short: write or copy it again"


def test_no_pt2(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "archive.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    ran = run("audit", path)
    assert ran.status == 3
    assert "not a .pt2" in ran.error()


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.pkl", "model.pt2"])
def test_a_pickle_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / name)
    ran = run("audit", tmp_path / name, "--input", "2x2")
    assert ran.status == 3
    assert "it can run code; export it with torch.export.save" in ran.error()


# ---------------------------------------------------------------------------- optimize


def test_optimize_writes_a_file_that_equals_the_model(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "fast.pt2"
    ran = run("optimize", f"{model}:build", *CLIP, "-o", path, "--tune", "static")
    assert ran.status == 0
    assert "2 applied" in ran.out
    assert "frozen_0" in load_exported(path).state_dict
    assert f"fxtemporal: wrote {path} (" in ran.err
    torch.manual_seed(0)
    original = sys.modules["models_of_a_user"].Frames().eval()
    clip = torch.randn(3, 4, 3, 6, 6)
    torch.testing.assert_close(load_exported(path).module()(clip), original(clip))


def test_optimize_keeps_the_parameters_on_request(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "fast.pt2"
    ran = run("optimize", f"{model}:build", *CLIP, "-o", path, "--tune", "static", "--no-freeze")
    assert ran.status == 0
    torch.manual_seed(0)
    original = sys.modules["models_of_a_user"].Frames().eval()
    loaded = load_exported(path)
    assert original.state_dict().keys() <= loaded.state_dict.keys()
    clip = torch.randn(3, 4, 3, 6, 6)
    torch.testing.assert_close(loaded.module()(clip), original(clip))


def test_optimize_measures_unless_told_otherwise(run: Run, model: str, tmp_path: Path) -> None:
    ran = run("optimize", f"{model}:Frames", *CLIP, "-o", tmp_path / "fast.pt2", "--json")
    report = json.loads(ran.out)
    assert ran.status == 0
    assert report["timing"]["rounds"] >= 3
    assert report["comparison"]["equal"] is True


def test_optimize_keeps_a_memory_limit(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "fast.pt2"
    more = ("--memory-limit", "1KiB", "--json")
    ran = run("optimize", f"{model}:Frames", *CLIP, "-o", path, *more)
    report = json.loads(ran.out)
    assert ran.status == 0
    assert report["settings"]["tune"]["memory_limit"] == "1KiB"
    assert report["remarks"][-1]["reasons"][0]["code"] == "memory-limit"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--memory-limit", "lots"), "'512MiB' or '2GB'"),
        (("--memory-limit", "1GB", "--tune", "static"), "--memory-limit needs measuring"),
    ],
)
def test_memory_limits_that_mean_nothing(
    run: Run, model: str, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    ran = run("optimize", f"{model}:Frames", *CLIP, "-o", tmp_path / "fast.pt2", *more)
    assert ran.status == 2
    assert words in ran.error()


@pytest.mark.parametrize("rank", ["paper", "2", "0.5"])
def test_optimize_factorizes_on_request(run: Run, tmp_path: Path, rank: str) -> None:
    more = ("--tune", "static", "--no-verify", "--factorize", rank, "--json")
    (tmp_path / "volume.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv3d(3, 8, 3))\n"
    )
    fast = tmp_path / "fast.pt2"
    ran = run("optimize", f"{tmp_path}/volume.py:build", "--input", "1x3x5x6x6", "-o", fast, *more)
    report = json.loads(ran.out)
    assert ran.status == 0
    assert report["remarks"][0]["rule"] == "factorize-2plus1d"
    assert report["remarks"][0]["status"] == "applied"
    assert report["comparison"] is None


def test_a_forward_that_counts_its_calls(
    run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fast.pt2"
    ran = run("optimize", f"{model}:Counts", "--input", "2x3", "-o", path, "--tune", "static")
    assert ran.status == 3
    assert f"{model}:Counts: the forward " in ran.error()
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(VerificationError("other numbers"), 4), (LoweringError("torch.export refuses"), 3)],
)
def test_errors_while_saving(
    run: Run,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
) -> None:
    def save(*args: Any) -> None:
        raise error

    monkeypatch.setattr("fxtemporal.lowering.pt2.save_exported", save)
    path = tmp_path / "fast.pt2"
    ran = run("optimize", f"{model}:instance", "--input", "2x4", "-o", path)
    assert ran.status == status
    assert ran.error() == f"{model}:instance: {error}"


# ---------------------------------------------------------------------------- lower


@pytest.mark.parametrize(("backend", "name"), [("onnx", "fast.onnx"), ("openvino", "fast.xml")])
def test_lower_writes_what_an_engine_runs(
    run: Run, model: str, tmp_path: Path, backend: str, name: str
) -> None:
    pytest.importorskip(backend)
    path = tmp_path / name
    more = ["--backend", backend, "--tune", "static", "--compare", "--json"]
    ran = run("lower", f"{model}:build", *CLIP, "-o", path, *more)
    assert ran.status == 0
    assert f"fxtemporal: wrote {path} (" in ran.err
    remark = json.loads(ran.out)["remarks"][-1]
    assert remark["rule"] == f"lower-{backend}"
    assert remark["detail"]["nodes"] < remark["detail"]["original"]["nodes"]
    torch.manual_seed(0)
    original = sys.modules["models_of_a_user"].Frames().eval()
    clip = torch.randn(3, 4, 3, 6, 6)
    torch.testing.assert_close(fxtemporal.load(path)(clip), original(clip).detach())


def test_lower_builds_an_engine_without_measuring(run: Run, model: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "fast.engine"
    more = ["--option", "compute_capabilities=8.0,8.9", "--option", "batch=1,8"]
    ran = run("lower", f"{model}:build", *CLIP, "-o", path, "--backend", "tensorrt", *more)
    assert ran.status == 0
    assert "lower-tensorrt" in ran.out
    artifact = fxtemporal.load(path)
    assert artifact.detail["compute_capabilities"] == ["8.0", "8.9"]
    assert artifact.manifest.ranges["batch"] == [1, 8]


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--backend", "onxx"], 2, "no 'onxx' (did you mean 'onnx'?); there are onnx, openvino"),
        (["--backend", "openvino"], 2, "name it *.xml"),
        (["--backend", "onnx", "--option", "opset"], 2, "'opset': write NAME=VALUE"),
        (["--backend", "onnx", "--option", "opsett=18"], 2, "no option 'opsett'"),
        ([], 2, "the following arguments are required: --backend"),
    ],
)
def test_lower_refuses_what_it_cannot_do(
    run: Run, model: str, tmp_path: Path, more: list[str], status: int, says: str
) -> None:
    ran = run(
        "lower", f"{model}:build", *CLIP, "-o", tmp_path / "m.onnx", "--tune", "static", *more
    )
    assert ran.status == status
    assert says in ran.error()
    assert not list(tmp_path.glob("*.onnx"))


# ---------------------------------------------------------------------------- wrong usage


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
    def audit(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("never\nmind")

    monkeypatch.setattr("fxtemporal.api.audit", audit)
    ran = run("audit", f"{model}:Frames", *CLIP)
    assert ran.status == 3
    assert "ZeroDivisionError: never mind" in ran.error()
    assert "A defect of fxtemporal: please report it" in ran.error()


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


# ---------------------------------------------------------------------------- help, terminals


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
