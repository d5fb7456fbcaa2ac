"""lower and load: what every backend has in common, each running the real engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Artifact, LoweringError, SpecializationError
from fxtemporal.lowering.artifact import manifest_path
from fxtemporal.lowering.export import export

RUNS = {"onnx": "model.onnx", "openvino": "model.xml", "inductor": "model.pt2"}
"""Backends whose engine runs here, and what their files are called."""

QUICK = ["onnx", "openvino"]
"""Those that build in a second."""


class Frames(nn.Module):
    """(B, T, 3, H, W) -> (B, T, 4): a loop over frames."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, clip: Tensor) -> Tensor:
        outs = []
        for t in range(clip.size(1)):
            y = self.norm(self.conv(clip[:, t])).relu().mean((2, 3))
            outs.append(self.head(y))
        return torch.stack(outs, 1)


class Nested(nn.Module):
    """Keyword arguments, a list, a number; a dict, a tuple and None."""

    def forward(self, clip: Tensor, others: list[Tensor], scale: float = 2.0) -> dict[str, Any]:
        total = clip * scale + others[0] - others[1]
        return {"total": total, "more": (total.mean(1), others[1] + 1), "none": None}


def clip(batch: int = 1, frames: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(batch + 10 * frames)
    return torch.randn(batch, frames, 3, size, size, generator=generator)


def optimized(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    return fxtemporal.optimize(model.eval(), args, kwargs, tune="static")


@pytest.fixture(scope="module")
def fast() -> fx.GraphModule:
    return optimized(Frames(), clip())


@pytest.fixture(scope="module")
def lowered(
    fast: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """An artifact of each backend, built once; tests copy what they spoil."""
    made: dict[str, Artifact] = {}

    def of(backend: str) -> Artifact:
        if backend not in made:
            path = tmp_path_factory.mktemp(backend) / RUNS[backend]
            made[backend] = fxtemporal.lower(fast, (clip(),), backend, path)
        return made[backend]

    return of


def copied(artifact: Artifact, folder: Path) -> Path:
    for file in artifact.path.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / artifact.path.name


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", RUNS)
def test_an_artifact_computes_what_the_module_does_at_every_batch(
    backend: str, fast: fx.GraphModule, lowered: Callable[[str], Artifact]
) -> None:
    artifact = fxtemporal.load(lowered(backend).path)
    for batch in (1, 2, 5):
        x = clip(batch)
        torch.testing.assert_close(artifact(x), fast(x).detach(), rtol=1e-5, atol=1e-6)
    assert artifact.detail["relative_error"] < 1e-5
    assert artifact.detail["compared_at"] >= 2
    assert artifact.detail["build_seconds"] > 0


@pytest.mark.parametrize("backend", RUNS)
def test_results_are_not_overwritten_by_the_next_call(
    backend: str, lowered: Callable[[str], Artifact]
) -> None:
    artifact = lowered(backend)
    first = artifact(clip())
    kept = first.clone()
    artifact(torch.randn(1, 3, 3, 8, 8))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


@pytest.mark.parametrize("backend", QUICK)
def test_frames_stay_free_where_the_graph_allows(backend: str, fast: fx.GraphModule) -> None:
    artifact = fxtemporal.lower(fast, (clip(),), backend, dynamic="frames")
    for batch, frames in ((1, 3), (2, 6)):
        x = clip(batch, frames)
        torch.testing.assert_close(artifact(x), fast(x).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(SpecializationError, match=r"shape \(batch, size_1, 3, 8, 8\)"):
        artifact(clip(1, 3, 9))
    with pytest.raises(SpecializationError, match="size_1 from 2 to 6"):
        artifact(clip(1, 7))  # nobody traced the forward at so many


@pytest.mark.parametrize("backend", RUNS)
def test_arguments_and_results_are_nested_as_the_modules(backend: str) -> None:
    model = Nested()
    args, kwargs = (torch.randn(2, 3),), {"others": [torch.randn(2, 3), torch.randn(2, 3)]}
    artifact = fxtemporal.lower(
        optimized(model, *args, **kwargs, scale=3.0),
        args,
        backend,
        example_kwargs={**kwargs, "scale": 3.0},
    )
    expected = model(*args, **kwargs, scale=3.0)
    for result in (
        artifact(*args, **kwargs, scale=3.0),
        artifact(*args, scale=3.0, **kwargs),
    ):
        torch.testing.assert_close(result, expected)
    with pytest.raises(SpecializationError, match=r"scale .* fixed to 3\.0, not 2\.0"):
        artifact(*args, **kwargs, scale=2.0)
    with pytest.raises(SpecializationError, match=r"takes \(\*, others=\[\*, \*\], scale=\*\)"):
        artifact(*args, **kwargs)


@pytest.mark.parametrize("backend", QUICK)
def test_sizes_that_must_agree_do(backend: str) -> None:
    model = optimized(Nested(), torch.randn(2, 3), [torch.randn(2, 3), torch.randn(2, 3)])
    example = (torch.randn(2, 3), [torch.randn(2, 3), torch.randn(2, 3)])
    artifact = fxtemporal.lower(model, example, backend)
    with pytest.raises(SpecializationError, match="shape"):
        artifact(torch.randn(3, 3), [torch.randn(3, 3), torch.randn(4, 3)])


def test_other_arguments_are_refused(lowered: Callable[[str], Artifact]) -> None:
    artifact = lowered("onnx")
    for wrong in (clip().double(), clip()[0], clip(1, 3, 9), clip()[:, :, :2], 3.0):
        with pytest.raises(SpecializationError, match=r"clip of this onnx artifact"):
            artifact(wrong)
    with pytest.raises(SpecializationError, match=r"takes \(\*\), not \(\*, \*\)"):
        artifact(clip(), clip())


@pytest.mark.parametrize("backend", QUICK)
def test_a_batch_that_the_model_fixes_stays_fixed(backend: str) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 6).cumsum(0)

    x = torch.randn(2, 3, 2)
    artifact = fxtemporal.lower(Fixed(), (x,), backend)
    torch.testing.assert_close(artifact(x), Fixed()(x))
    with pytest.raises(SpecializationError, match=r"shape \(2, 3, 2\)"):
        artifact(torch.randn(4, 3, 2))


def test_a_module_and_an_exported_program_are_lowered_too() -> None:
    model = Frames().eval()
    for given in (model, torch.export.export(model, (clip(2),))):
        artifact = fxtemporal.lower(given, (clip(2),), "onnx")
        expected = model(clip(2)).detach()
        torch.testing.assert_close(artifact(clip(2)), expected, rtol=1e-5, atol=1e-6)


def test_lowering_changes_neither_module_nor_example(fast: fx.GraphModule) -> None:
    x = clip()
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    code, kept = fast.code, x.clone()
    fxtemporal.lower(fast, (x,), "onnx")
    assert fast.code == code
    assert before.keys() == fast.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in fast.state_dict().items())
    assert torch.equal(x, kept)


def test_the_original_beside_it(fast: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    artifact = fxtemporal.lower(fast, (clip(),), "onnx", path, original=Frames().eval())
    assert artifact.detail["nodes"] < artifact.detail["original"]["nodes"]
    assert artifact.remark.rule == "lower-onnx"
    assert artifact.remark.detail["original"]["bytes"] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("spoil", ["cut", "flip", "empty"])
def test_a_damaged_artifact_is_refused(
    backend: str, spoil: str, lowered: Callable[[str], Artifact], tmp_path: Path
) -> None:
    path = copied(lowered(backend), tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        middle = len(whole) // 2
        spoilt = {
            "cut": whole[: 2 * len(whole) // 3],
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
        }[spoil]
        file.write_bytes(spoilt)
        with pytest.raises(LoweringError, match=r"cut short or altered|it cannot be read"):
            fxtemporal.load(path)
        file.write_bytes(whole)
    fxtemporal.load(path)


@pytest.mark.parametrize("backend", RUNS)
def test_a_missing_part_is_named(
    backend: str, lowered: Callable[[str], Artifact], tmp_path: Path
) -> None:
    path = copied(lowered(backend), tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(LoweringError, match=r"no such file|missing"):
            fxtemporal.load(path)
        file.write_bytes(whole)


def test_a_renamed_artifact_and_an_unknown_backend_are_refused(
    lowered: Callable[[str], Artifact], tmp_path: Path
) -> None:
    path = copied(lowered("onnx"), tmp_path)
    other = path.rename(path.with_name("other.onnx"))
    manifest_path(path).rename(manifest_path(other))
    with pytest.raises(LoweringError, match=r"model\.onnx, a part of it, is missing"):
        fxtemporal.load(other)


def test_a_manifest_of_another_version_says_so(
    lowered: Callable[[str], Artifact], tmp_path: Path
) -> None:
    path = copied(lowered("onnx"), tmp_path)
    content = json.loads(manifest_path(path).read_text())
    content["format"] += 1
    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest_path(path).write_text(json.dumps({**content, "checksum": checksum}))
    with pytest.raises(LoweringError, match="another version of fxtemporal wrote it"):
        fxtemporal.load(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_when_a_build_fails_and_what_was_there_stays(
    fast: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there before")

    def save(program: torch.onnx.ONNXProgram, draft: str, **keywords: Any) -> None:
        Path(draft).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    expected = LoweringError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        fxtemporal.lower(fast, (clip(),), "onnx", path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"what was there before"


def test_an_artifact_is_replaced_by_a_whole_one(fast: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    fxtemporal.lower(Frames().eval(), (clip(2, 2),), "openvino", path)
    fxtemporal.lower(fast, (clip(),), "openvino", path)
    assert fxtemporal.load(path)(clip()).shape == (1, 3, 4)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["model.bin", "model.xml", "model.xml.json"]


def test_without_a_path_the_artifact_goes_with_what_was_returned(fast: fx.GraphModule) -> None:
    artifact = fxtemporal.lower(fast, (clip(),), "onnx")
    folder = artifact.path.parent
    assert folder.is_dir()
    artifact(clip())
    del artifact
    assert not folder.exists()


def test_an_engine_that_computes_other_numbers_is_not_kept(
    fast: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    class Off(onnxruntime.InferenceSession):
        def run(self, *args: Any) -> list[Any]:
            return [result + 1e-3 for result in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    with pytest.raises(LoweringError, match="onnx gives other numbers than the module"):
        fxtemporal.lower(fast, (clip(),), "onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free", ["batch", "frames", "all"])
def test_where_not_all_sizes_can_be_free_fewer_are(fast: fx.GraphModule, free: str) -> None:
    class Frames3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            frames = [self.conv(x[:, t]).mean((-2, -1)) for t in range(x.size(1))]
            return torch.stack(frames, 1).mean(1)

    x = torch.randn(2, 6, 3, 8, 8)
    result = fxtemporal.optimize(Frames3().eval(), (x,), tune="static")
    (given,) = fxtemporal.lower(result, (x,), "onnx", dynamic=free).manifest.inputs
    assert given["shape"][0] == "batch"
    assert isinstance(given["shape"][1], str) == (free != "batch")


def test_sizes_that_an_engine_does_not_take_free_are_fixed_and_the_reason_is_told(
    fast: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.onnx.ONNXProgram.save

    def save(program: torch.onnx.ONNXProgram, draft: str, **keywords: Any) -> None:
        if not all(isinstance(d, int) for x in program.model.graph.inputs for d in x.shape):
            Path(draft).with_suffix(".left").write_bytes(b"half")
            raise RuntimeError("no symbols here")
        real(program, draft, **keywords)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    artifact = fxtemporal.lower(fast, (clip(2),), "onnx", tmp_path / "model.onnx")
    assert "no symbols here" in artifact.detail["sizes_fixed_because"]
    torch.testing.assert_close(artifact(clip(2)), fast(clip(2)).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(SpecializationError):
        artifact(clip(3))
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.json"}
    with pytest.raises(LoweringError, match="no symbols here"):
        fxtemporal.lower(fast, (clip(2),), "onnx", tmp_path / "model.onnx", dynamic="batch")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "path", "options", "says"),
    [
        ("onxx", None, {}, "no backend is called 'onxx'; there are onnx"),
        ("onnx", "model.pt", {}, "name it *.onnx"),
        ("onnx", "no/model.onnx", {}, "does not exist; create it first"),
        ("onnx", "folder.onnx", {}, "it is a folder"),
        ("onnx", None, {"opsett": 18}, "no option 'opsett'; there are dynamic, opset"),
        ("onnx", None, {"dynamic": "height"}, "dynamic must be one of none, batch"),
        ("openvino", None, {"precision": "int8"}, "precision is float32 or float16"),
    ],
)
def test_wrong_usage(
    fast: fx.GraphModule, tmp_path: Path, backend: str, path: str, options: Any, says: str
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    place = None if path is None else tmp_path / path
    with pytest.raises(LoweringError) as raised:
        fxtemporal.lower(fast, (clip(),), backend, place, **options)
    assert says in str(raised.value)


def test_what_is_not_installed_is_named(
    fast: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fxtemporal.lowering.openvino", None)
    with pytest.raises(LoweringError, match=r"pip install 'fxtemporal\[openvino\]'"):
        fxtemporal.lower(fast, (clip(),), "openvino")


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + 1, x.shape[0]


@pytest.mark.parametrize(
    ("model", "says"),
    [(Counter(), "writes into calls"), (InPlace(), "writes into x"), (Sizes(), "result 1")],
)
def test_what_an_artifact_cannot_do(model: nn.Module, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        fxtemporal.lower(model, (torch.randn(2, 3),), "onnx")


def test_what_torch_export_refuses() -> None:
    class DependsOnData(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(LoweringError, match=r"model\.onnx was not written: torch\.export refuses"):
        fxtemporal.lower(DependsOnData(), (torch.randn(2, 3),), "onnx")


# -- the program -----------------------------------------------------------------------------------


def test_a_size_is_free_only_where_the_module_takes_another() -> None:
    class HalfFixed(nn.Module):
        """Any batch, and 4 frames: at another number it raises."""

        def forward(self, x: Tensor) -> Tensor:
            if x.size(1) != 4:
                raise ValueError("4 frames")
            return x * 2

    exported = export(HalfFixed(), ((torch.randn(1, 4, 3),), {}))
    assert exported.shapes == {0: ("batch", 4, "size_1")}
    assert exported.ranges["batch"] == (1, None)


def test_a_number_that_goes_wrong_at_another_size_is_fixed() -> None:
    class Baked(nn.Module):
        """Right at 4 frames alone in what torch.export makes of it."""

        def forward(self, x: Tensor) -> Tensor:
            return x * len([*x.unbind(1)])

    model = Baked()
    exported = export(model, ((torch.randn(2, 4, 3),), {}))
    assert exported.shapes[0][1] == 4


class Branches(nn.Module):
    """Another computation from 9 frames on."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :8] * 2 if x.size(1) > 8 else x + 1


class Compares(nn.Module):
    """Another computation where there are more clips than frames."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.size(0) > x.size(1) + 3 else x + 1


def test_a_branch_on_a_size_bounds_it() -> None:
    artifact = fxtemporal.lower(Branches(), (torch.randn(2, 4, 3),), "onnx", dynamic="frames")
    x = torch.randn(3, 8, 3)
    torch.testing.assert_close(artifact(x), Branches()(x))
    with pytest.raises(SpecializationError, match="from 2 to 8"):
        artifact(torch.randn(3, 9, 3))


def test_of_sizes_that_a_branch_compares_one_is_fixed_and_bounds_the_other() -> None:
    exported = export(Compares(), ((torch.randn(2, 4, 3),), {}))
    assert exported.shapes == {0: ("batch", 4, 3)}
    assert exported.ranges["batch"][1] == 4 + 3
    artifact = fxtemporal.lower(Compares(), (torch.randn(2, 4, 3),), "onnx")
    x = torch.randn(7, 4, 3)
    torch.testing.assert_close(artifact(x), Compares()(x))
    with pytest.raises(SpecializationError, match="7"):
        artifact(torch.randn(8, 4, 3))
    guarded = export(Compares(), ((torch.randn(2, 4, 3),), {}), guarded=True)
    assert guarded.shapes[0][0] == "batch"


def test_free_sizes_by_name() -> None:
    x = torch.randn(2, 4, 3, 5, 6)
    shapes = {
        free: export(nn.ReLU(), ((x,), {}), free).shapes[0]
        for free in ("none", "batch", "frames", "all")
    }
    assert shapes["none"] == (2, 4, 3, 5, 6)
    assert shapes["batch"] == ("batch", 4, 3, 5, 6)
    assert [isinstance(size, str) for size in shapes["frames"]] == [True, True, True, False, False]
    assert all(isinstance(size, str) for size in shapes["all"])


def test_the_manifest_is_json_that_names_what_it_takes(lowered: Callable[[str], Artifact]) -> None:
    content = json.loads(manifest_path(lowered("onnx").path).read_text())
    assert content["inputs"] == [
        {"name": "clip", "dtype": "torch.float32", "shape": ["batch", "size_1", 3, 8, 8]}
    ]
    assert [*content["files"]] == ["model.onnx"]
