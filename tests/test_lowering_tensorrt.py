"""TensorRT engines, really built, for GPUs that are not here; and what is said without them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lowering import Frames, clip, optimized
from torch import Tensor, nn

import fxtemporal
from benchmarks.conv3d_models import CONV3D
from benchmarks.loop_models import LOOPS
from fxtemporal import LoweringError
from fxtemporal.lowering import tensorrt
from fxtemporal.lowering.tensorrt import load_engine
from fxtemporal.passes import PORTABLE_PASSES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

AMPERE, ADA = "8.0", "8.9"


def engine(model: nn.Module, x: Tensor, path: Path | None = None, **options: Any) -> Any:
    options = {"compute_capabilities": [AMPERE, ADA], **options}
    return fxtemporal.lower(model, (x,), "tensorrt", path, **options)


def test_an_engine_of_a_loop_has_fewer_layers_than_the_loops(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    x = clip(2, 16)
    artifact = engine(optimized(Frames(), x), x, path, original=Frames().eval())
    detail = artifact.detail
    assert detail["layer_kinds"]["convolution"] == 1
    assert detail["original"]["layer_kinds"]["convolution"] == 16
    assert 3 * detail["layers"] < detail["original"]["layers"]
    assert detail["library"].startswith("tensorrt_rtx ")
    assert detail["compute_capabilities"] == [AMPERE, ADA]
    assert path.stat().st_size == detail["bytes"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    remark = fxtemporal.load(path).remark
    assert remark.detail["engine_seconds"] > 0
    assert remark.detail["original"]["engine_seconds"] > 0


@pytest.mark.parametrize(
    ("name", "before", "after"), [("resnet18_lstm_64", 4 * 20, 20), ("r3d_18", 20, 20)]
)
def test_engines_of_networks_that_people_have(name: str, before: int, after: int) -> None:
    model = {**LOOPS, **CONV3D}[name].build()
    x = torch.randn((1, 4, 3, 32, 32) if name in LOOPS else (1, 3, 4, 32, 32))
    fast = fxtemporal.optimize(model, (x,), passes=PORTABLE_PASSES, tune="static", verify=False)
    detail = engine(fast, x, original=model).detail
    kinds = [entry["layer_kinds"]["convolution"] for entry in (detail["original"], detail)]
    assert kinds == [before, after]
    assert detail["layers"] <= detail["original"]["layers"]


def test_an_engine_of_a_factorized_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3)).eval()
    x = torch.randn(1, 3, 6, 12, 12)
    cut = fxtemporal.optimize(model, (x,), factorize=fxtemporal.Factorize(0.3), tune="static")
    artifact = engine(cut, x)
    assert artifact.detail["layer_kinds"]["convolution"] == 4


@pytest.mark.parametrize(("batch", "ranges"), [((1, 8), [1, 8]), ((2, 3, 4), [2, 4]), (None, None)])
def test_a_range_of_batches(batch: Any, ranges: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    engine(optimized(Frames(), clip()), clip(), path, batch=batch)
    manifest = fxtemporal.load(path).manifest
    assert manifest.ranges.get("batch") == ranges
    shape = manifest.inputs[0]["shape"]
    assert shape == ([1, 3, 3, 8, 8] if batch is None else ["batch", 3, 3, 8, 8])
    if batch is not None:
        with pytest.raises(fxtemporal.SpecializationError, match=f"from {ranges[0]} to"):
            manifest.flatten((clip(9),), {})


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
def test_precision(precision: str) -> None:
    artifact = engine(optimized(Frames(), clip()), clip(), precision=precision, workspace="64MiB")
    assert artifact.manifest.inputs[0]["dtype"] == "torch.float32"
    half = precision in ("float16", "bfloat16")
    assert (artifact.detail["layer_kinds"].get("cast", 0) > 0) == half
    assert artifact.detail.get("precision") == (precision if half else None)


def test_the_model_keeps_its_precision() -> None:
    model = Frames().eval()
    engine(model, clip(), precision="float16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@without_gpu
def test_an_engine_does_not_run_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    artifact = engine(optimized(Frames(), clip()), clip(), path)
    assert "no GPU" in artifact.detail["not_compared"]
    for call in (lambda: artifact(clip()), lambda: load_engine(path)):
        with pytest.raises(LoweringError, match="there is no GPU here"):
            call()


def test_a_damaged_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    engine(optimized(Frames(), clip()), clip(), path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for spoilt in (whole[:-1], flipped, whole + b"\0"):
        path.write_bytes(spoilt)
        with pytest.raises(LoweringError, match="cut short or altered"):
            load_engine(path)


@without_gpu
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compute_capabilities": None}, r"compute_capabilities=\['8\.0', '8\.9'\]"),
        ({"compute_capabilities": ["7.0"]}, r"'7\.0'; it does for 7\.5, 8\.0"),
        ({"compute_capabilities": "8.0"}, "is a list"),
        ({"compute_capabilities": []}, "is a list"),
        ({"library": "tensorrt"}, "leave compute_capabilities out"),
        ({"library": "trt"}, "library is tensorrt or tensorrt_rtx"),
        ({"precision": "int8"}, "precision must be one of float32"),
        ({"batch": (4, 2)}, r"batch is \(least, most\)"),
        ({"batch": (0, 2)}, r"batch is \(least, most\)"),
        ({"batch": (1, 2, 3, 4)}, r"batch is \(least, most\)"),
        ({"dynamic": "batch"}, r"batch=\(1, 8\)"),
        ({"dynamic": "frames", "batch": (1, 2)}, "the batch alone can be free"),
        ({"workspace": "much"}, "workspace must be a number of bytes"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    fast = optimized(Frames(), clip())
    with pytest.raises(fxtemporal.FxTemporalError, match=says):
        engine(fast, clip(), **options)


def test_what_the_parser_refuses_is_said() -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.det(x)

    with pytest.raises(LoweringError, match=r"model\.engine was not written"):
        engine(Unsupported(), torch.randn(2, 3, 3))


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(LoweringError, match=r"pip install 'fxtemporal\[tensorrt-rtx\]'"):
        engine(Frames().eval(), clip())


def test_load_engine_names_another_backend(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fxtemporal.lower(Frames().eval(), (clip(),), "onnx", path)
    with pytest.raises(LoweringError, match="is a file of onnx"):
        load_engine(path)


@without_gpu
def test_torch_tensorrt_says_what_it_lacks() -> None:
    with pytest.raises(LoweringError, match=r"pip install 'fxtemporal\[tensorrt\]'"):
        fxtemporal.lower(Frames().eval(), (clip(),), "torch_tensorrt")


def test_the_gpu_is_asked_for_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tensorrt.absent() is None
