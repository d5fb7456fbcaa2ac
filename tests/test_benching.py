"""``bench``: before and after on each engine, in one run; what an engine refuses is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxtemporal.cli import bench as benching
from fxtemporal.cli import main as cli
from fxtemporal.cli.bench import bench
from fxtemporal.support.errors import FxTemporalError, PassError


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.relu(self.conv(x[:, t])) for t in range(x.size(1))], 1)


CLIP = torch.randn(1, 8, 3, 8, 8)


def test_eager_mode_is_measured_on_both_sides() -> None:
    found = bench(Loop().eval(), (CLIP,), ["eager"], seconds=0.2)
    (eager,) = found.engines
    assert eager.before is not None
    assert eager.after is not None
    assert len(eager.before.values) == len(eager.after.values) >= 3
    assert eager.speedup is not None
    assert all(error is not None and error < 1e-5 for error in eager.errors)
    assert "eager" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["engines"][0]["speedup"]


def test_what_an_engine_refuses_is_said() -> None:
    pytest.importorskip("openvino")

    class Eigenvalues(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(super().forward(x))

    found = bench(Eigenvalues().eval(), (CLIP,), ["eager", "openvino"], seconds=0.1)
    eager, refused = found.engines
    assert eager.speedup is not None
    assert refused.before is refused.after is refused.speedup is None
    assert refused.note.startswith("not measured: OpConversionFailure: ")
    assert "No conversion rule found for operations: aten::linalg_eigvalsh" in refused.note
    assert "\n" not in refused.note
    assert "not measured" in str(found)


def test_a_picture_of_it(tmp_path: Path) -> None:
    found = bench(Loop().eval(), (CLIP,), ["eager"], seconds=0.1)
    found.plot(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FxTemporalError, match="nothing to plot"):
        benching.Bench(()).plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (((CLIP,), ["egaer"]), {}, "no engine 'egaer'"),
        (((CLIP,), ["eager"]), {"seconds": 0}, "above 0"),
        (((CLIP, 3), ["eager"]), {}, "tensors alone"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: Any, options: Any, match: str) -> None:
    with pytest.raises(PassError, match=match):
        bench(Loop().eval(), *arguments, **options)


MODEL = """
import torch
from torch import nn

class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 1)
"""


def run(tmp_path: Path, *arguments: str) -> int:
    path = tmp_path / "loop.py"
    path.write_text(MODEL)
    return cli.main(["bench", f"{path}:Loop", *arguments])


CLI = ("--engines", "eager", "--seconds", "0.1")


def test_the_command_prints_a_table_or_json_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "bench.svg"
    assert run(tmp_path, "--input", "1x4x3x8x8", *CLI, "--plot", str(picture)) == 0
    assert capsys.readouterr().out.startswith("engine")
    assert "<svg" in picture.read_text()
    assert run(tmp_path, "--input", "1x4x3x8x8", *CLI, "--json") == 0
    assert json.loads(capsys.readouterr().out)["engines"][0]["engine"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (CLI, "give an --input"),
        (("--input", "1x4x3x8x8", "--engines", "nothing"), "no engine 'nothing'"),
        (("--input", "1x4x3x8x8", "--seconds", "0"), "no number above 0"),
        (("--input", "1x4x3x8x8", "--plot", "bench.jpg"), "name it *.png or *.svg"),
        (("--input", "1x4x3x8x8", "--plot", "nowhere/bench.png"), "a folder that exists"),
    ],
)
def test_wrong_usage_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], match: str
) -> None:
    assert run(tmp_path, *arguments) == 2
    assert match in capsys.readouterr().err
