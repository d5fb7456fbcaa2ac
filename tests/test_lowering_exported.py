"""A ``.pt2`` runs without this package and equals the module; what could run code is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal.lowering.export import LSTM_WEIGHTS
from fxtemporal.lowering.pt2 import load_exported, save_exported
from fxtemporal.support.errors import CaptureError, LoweringError


class Frames(nn.Module):
    """(B, T, 3, H, W) -> (B, 5), with a loop over the frames and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, clip: Tensor) -> Tensor:
        maps = [self.conv(clip[:, t]).relu().mean((2, 3)) for t in range(clip.size(1))]
        return self.lstm(torch.stack(maps, 1))[0][:, -1]


class Volume(nn.Module):
    """(B, 3, T, H, W), with keyword arguments, and a dict as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))
        self.norm = nn.BatchNorm3d(4)

    def forward(self, clip: Tensor, *, scale: Tensor, power: int = 1) -> dict[str, Tensor]:
        x = self.norm(self.conv(clip)) * scale
        return {"map": x**power, "count": x.flatten(1).argmax(1)}


class OneClip(nn.Module):
    """(1, T, 4): the model itself fixes the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, clip: Tensor) -> Tensor:
        return torch.stack([self.linear(clip[:, t]) for t in range(3)], 1).view(1, 6)


def optimized(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    return fxtemporal.optimize(model.eval(), args, kwargs, tune="static", verify=False)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> tuple[fx.GraphModule, Tensor, Path]:
    torch.manual_seed(0)
    clip = torch.randn(1, 4, 3, 6, 7)
    fast = optimized(Frames(), clip)
    path = tmp_path_factory.mktemp("saved") / "frames.pt2"
    save_exported(fast, (clip,), None, path)
    return fast, clip, path


# ---------------------------------------------------------------------------- saving


def test_saved_from_a_batch_of_one_it_runs_at_every_batch_and_height(
    frames: tuple[fx.GraphModule, Tensor, Path],
) -> None:
    fast, _, path = frames
    loaded = load_exported(path).module()
    for shape in ((1, 4, 3, 6, 7), (2, 4, 3, 6, 7), (5, 4, 3, 9, 8)):
        clip = torch.randn(shape)
        torch.testing.assert_close(loaded(clip), fast(clip), rtol=1e-5, atol=1e-6)


def test_a_size_that_the_trace_fixed_is_fixed_in_the_file(
    frames: tuple[fx.GraphModule, Tensor, Path],
) -> None:
    loaded = load_exported(frames[2]).module()
    with pytest.raises(AssertionError, match=r"size\(\)\[1\] == 4"):
        loaded(torch.randn(2, 5, 3, 6, 7))


def test_only_the_file_is_left(
    frames: tuple[fx.GraphModule, Tensor, Path],
) -> None:
    assert [path.name for path in frames[2].parent.iterdir()] == ["frames.pt2"]


WITHOUT_FXTEMPORAL = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fxtemporal":
            raise ImportError("fxtemporal is blocked")

sys.meta_path.insert(0, Blocked())
import torch

inputs, outputs = torch.load("expected.pt", weights_only=True)
result = torch.export.load(sys.argv[1]).module()(inputs)
torch.testing.assert_close(result, outputs, rtol=1e-5, atol=1e-6)
assert "fxtemporal" not in sys.modules
print("equal")
"""


def test_loads_and_runs_where_fxtemporal_cannot_be_imported(
    frames: tuple[fx.GraphModule, Tensor, Path], tmp_path: Path
) -> None:
    fast, _, path = frames
    clip = torch.randn(3, 4, 3, 6, 7)
    torch.save((clip, fast(clip).detach()), tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FXTEMPORAL, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr


def test_keyword_arguments_and_nested_outputs(tmp_path: Path) -> None:
    clip, scale = torch.randn(1, 3, 4, 5, 6), torch.rand(1, 1, 1, 1, 1)
    fast = optimized(Volume(), clip, scale=scale, power=2)
    program = save_exported(fast, (clip,), {"scale": scale, "power": 2}, tmp_path / "v.pt2")
    loaded = program.module()
    for batch in (1, 3):
        wider, scales = torch.randn(batch, 3, 6, 5, 6), torch.rand(batch, 1, 1, 1, 1)
        result = loaded(wider, scale=scales, power=2)
        expected = fast(wider, scale=scales, power=2)
        torch.testing.assert_close(result["map"], expected["map"], rtol=1e-5, atol=1e-6)
        assert torch.equal(result["count"], expected["count"])


def test_a_batch_that_the_model_fixes_stays_fixed(tmp_path: Path) -> None:
    clip = torch.randn(1, 3, 4)
    fast = optimized(OneClip(), clip)
    program = save_exported(fast, (clip,), {}, tmp_path / "one.pt2")
    torch.testing.assert_close(program.module()(clip), fast(clip))
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(clip.repeat(2, 1, 1))


def test_half_precision_is_compared_within_its_rounding(tmp_path: Path) -> None:
    clip = torch.randn(2, 4, 3, 6, 6, dtype=torch.bfloat16)
    fast = optimized(Frames().bfloat16(), clip)
    program = save_exported(fast, (clip,), {}, tmp_path / "half.pt2")
    assert program.module()(clip).dtype == torch.bfloat16


def test_a_view_as_example_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    many = torch.randn(4000, 3, 4)
    fast = optimized(nn.Linear(4, 2), many[:2])
    save_exported(fast, (many[:2],), {}, tmp_path / "small.pt2")
    assert (tmp_path / "small.pt2").stat().st_size < 40_000


def test_saving_changes_neither_module_nor_example(tmp_path: Path) -> None:
    clip, scale = torch.randn(2, 3, 4, 5, 6), torch.rand(1)
    model = Volume().train()
    fast = fxtemporal.optimize(model, (clip,), {"scale": scale}, tune="static", verify=False)
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    example = clip.clone()
    save_exported(fast, (clip,), {"scale": scale}, tmp_path / "train.pt2")
    torch.testing.assert_close(dict(fast.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(clip, example)
    assert fast.training


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("missing/model.pt2", r"folder .*missing does not exist; create it first"),
        ("model.pt", r"name it \*\.pt2"),
        ("folder.pt2", "it is a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / "folder.pt2").mkdir()
    clip = torch.randn(2, 4)
    with pytest.raises(LoweringError, match=match):
        save_exported(optimized(nn.Linear(4, 2), clip), (clip,), {}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def fail(error: BaseException) -> Callable[..., None]:
    def raising(*args: Any, **kwargs: Any) -> None:
        raise error

    return raising


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"what was there before")
    clip = torch.randn(2, 4)
    fast = optimized(nn.Linear(4, 2), clip)
    monkeypatch.setattr(torch.export, "save", fail(error))
    expected = LoweringError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_exported(fast, (clip,), {}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_bytes() == b"what was there before"


def test_a_file_that_computes_other_numbers_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.randn(2, 4)
    fast, other = (optimized(nn.Linear(4, 2), clip) for _ in range(2))
    wrong = torch.export.export(other, (clip,))
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: wrong)
    with pytest.raises(LoweringError, match="gives other numbers"):
        save_exported(fast, (clip,), {}, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_what_torch_export_refuses_is_a_lowering_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.randn(2, 4)
    fast = optimized(nn.Linear(4, 2), clip)
    monkeypatch.setattr(torch.export, "export", fail(RuntimeError("cannot do this\nnor that")))
    with pytest.raises(LoweringError, match=r"torch\.export refuses .*: cannot do this\. Use"):
        save_exported(fast, (clip,), {}, tmp_path / "model.pt2")


# ---------------------------------------------------------------------------- loading


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of an archive with records changed, or left out where ``change`` gives None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"none\.pt2: there is no such file"):
        load_exported(tmp_path / "none.pt2")


def test_what_is_no_pt2(tmp_path: Path) -> None:
    text, archive = tmp_path / "text.pt2", tmp_path / "zip.pt2"
    text.write_text("a text")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/b", "c")
    empty = tmp_path / "empty.pt2"
    empty.write_bytes(b"")
    for path in (text, archive, empty):
        with pytest.raises(CaptureError, match=r"not a \.pt2: write one with torch\.export\.save"):
            load_exported(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_file_cut_short(
    frames: tuple[fx.GraphModule, Tensor, Path], tmp_path: Path, share: float
) -> None:
    content = frames[2].read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CaptureError, match="damaged or cut short"):
        load_exported(path)


def test_a_damaged_byte_is_found(
    frames: tuple[fx.GraphModule, Tensor, Path], tmp_path: Path
) -> None:
    content = bytearray(frames[2].read_bytes())
    at = content.find(b'"graph_module"')
    content[at + 3] ^= 0x20
    path = tmp_path / "damaged.pt2"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"damaged at \w+/models/model\.json"):
        load_exported(path)


def test_an_archive_without_a_program(
    frames: tuple[fx.GraphModule, Tensor, Path], tmp_path: Path
) -> None:
    def change(name: str, content: bytes) -> bytes | None:
        return None if name.startswith("models/") else content

    path = rewritten(frames[2], tmp_path / "without.pt2", change)
    with pytest.raises(CaptureError, match="without an exported program"):
        load_exported(path)


def test_a_program_of_another_version_says_so(
    frames: tuple[fx.GraphModule, Tensor, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def change(name: str, content: bytes) -> bytes | None:
        if name != "models/model.json":
            return content
        program = json.loads(content)
        program["schema_version"] = {"major": 999, "minor": 0}
        return json.dumps(program).encode()

    path = rewritten(frames[2], tmp_path / "future.pt2", change)
    with pytest.raises(CaptureError, match="another version wrote it"):
        load_exported(path)
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".pickle", ".pt2"])
@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_pickles_are_refused_and_not_run(tmp_path: Path, suffix: str, form: str) -> None:
    path, trace = tmp_path / f"model{suffix}", tmp_path / "it-ran"
    save = torch_saved if form == "torch.save" else pickle.dumps
    path.write_bytes(save(Bomb(trace)))
    with pytest.raises(CaptureError, match=r"it can run code; export it with torch\.export\.save"):
        load_exported(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("record", "forge", "match"),
    [
        ("data/sample_inputs/model.pt", "bomb", "pickle data/sample_inputs/model.pt in it"),
        ("data/weights/weight_0", "bomb", "pickle data/weights/weight_0 in it"),
        ("data/constants/model_constants_config.json", "custom", "a Python object"),
        ("models/model.json", "target", r"a call of 'torch\.os\.system'"),
        ("models/model.json", "size", "the size"),
    ],
)
def test_what_would_run_code_inside_a_pt2_is_refused(
    frames: tuple[fx.GraphModule, Tensor, Path],
    tmp_path: Path,
    record: str,
    forge: str,
    match: str,
) -> None:
    trace = tmp_path / "it-ran"

    def change(name: str, content: bytes) -> bytes | None:
        if name == "data/weights/model_weights_config.json" and record.endswith("weight_0"):
            config = json.loads(content)
            for payload in config["config"].values():
                payload["use_pickle"] = payload["path_name"] == "weight_0"
            return json.dumps(config).encode()
        if name != record:
            return content
        if forge == "bomb":
            return torch_saved(Bomb(trace))
        if forge == "custom":
            payload = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True}
            return json.dumps({"config": {"x": {**payload, "tensor_meta": None}}}).encode()
        if forge == "target":
            return content.replace(b"torch.ops.aten.relu.default", b"torch.os.system")
        start = content.index(b'"expr_str": "') + len(b'"expr_str": "')
        return content[:start] + b"exec('import os')+" + content[start:]

    path = rewritten(frames[2], tmp_path / "forged.pt2", change)
    with pytest.raises(CaptureError, match=f"refused: .*{match}"):
        load_exported(path)
    assert not trace.exists()


def test_compiled_libraries_are_refused(
    frames: tuple[fx.GraphModule, Tensor, Path], tmp_path: Path
) -> None:
    path = rewritten(frames[2], tmp_path / "compiled.pt2", lambda name, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/data/aotinductor/model/model.so", b"")
    with pytest.raises(CaptureError, match="compiled libraries, which can run code"):
        load_exported(path)


def test_every_operator_and_size_of_a_torch_export_is_accepted(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            rows = torch.sym_max(x.size(0) // 2, y.size(0) % 7) + int(x.size(1) / 2)
            with torch.no_grad():
                z = x.reshape(-1)[:rows] & 1
            return torch.cat([z, y.new_zeros(-(-x.size(0) // 3))])

    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    args = (torch.ones(12, 8, dtype=torch.int64), torch.ones(9, 3, dtype=torch.int64))
    program = torch.export.export(Sizes(), args, dynamic_shapes=(dims, dims), strict=False)
    torch.export.save(program, tmp_path / "sizes.pt2")
    assert torch.equal(load_exported(tmp_path / "sizes.pt2").module()(*args), Sizes()(*args))


def test_the_lstm_warning_alone_is_silenced() -> None:
    import re

    said = "The tensor attributes self.l._flat_weights[0], self.l._flat_weights[1] were assigned"
    other = "The tensor attributes self.l._flat_weights[0], self.cache were assigned"
    assert re.match(LSTM_WEIGHTS, f"{said} during export.")
    assert not re.match(LSTM_WEIGHTS, f"{other} during export.")
