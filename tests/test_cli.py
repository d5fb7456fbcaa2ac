"""The command line: what audit, optimize and lower write, and stdout for reports alone."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fxtemporal
from fxtemporal.cli import arguments
from fxtemporal.cli import main as cli
from fxtemporal.lowering.pt2 import load_exported
from tests.cli_cases import CLIP, Run

pytestmark = pytest.mark.usefixtures("imports_are_put_back")


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


def test_a_forward_of_which_no_graph_is_right(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "fast.pt2"
    ran = run("optimize", f"{model}:Asks", "--input", "2x3", "-o", path, "--tune", "static")
    assert ran.status == 4
    assert f"{model}:Asks: the forward reads requires_grad" in ran.error()
    assert not path.exists()


def test_a_folder_that_is_gone_by_the_time_of_saving(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "removes.py").write_text(
        f"import os\nfrom torch import nn\n"
        f"def build():\n    os.rmdir({str(folder)!r})\n    return nn.Linear(4, 2)\n"
    )
    path, model = folder / "fast.pt2", f"{tmp_path / 'removes.py'}:build"
    ran = run("optimize", model, "--input", "2x4", "-o", path, "--tune", "static")
    assert ran.status == 3
    assert ran.error().startswith(f"{model}: cannot write {path}: the folder {folder} does not ex")


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
