"""Passes by name, with options, and the graph after each of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import Code, PassError
from fxtemporal.cli.main import main
from fxtemporal.passes import DEFAULT_PASSES, TimeDistribute
from fxtemporal.passes.selection import passes_of

CLIP = torch.randn(2, 5, 3, 8, 8)


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.drop(self.conv(x[:, t])) for t in range(x.size(1))], 1)


def test_options_are_arguments_of_the_pass() -> None:
    (rule,) = passes_of(["time-distribute{allow=randomness,training-batchnorm}"])
    assert isinstance(rule, TimeDistribute)
    assert rule.allowed == {Code.RANDOMNESS, Code.TRAINING_BATCHNORM}
    assert passes_of(["time-distribute{}"])[0].exact
    assert passes_of(None) is DEFAULT_PASSES
    assert passes_of([rule, "conv3d-forms"])[0] is rule


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("time-distribute{allow=speed}", "allow must be a list of reason codes"),
        ("time-distribute{deny=randomness}", "has no option 'deny=randomness'; its options are"),
        ("time-distribute{allow}", "has no option 'allow'"),
        ("conv3d-forms{allow=randomness}", "has no option 'allow=randomness'; it has none"),
        ("time-distribute{allow=randomness", "no pass is called"),
        ("{allow=randomness}", "no pass is called '{allow=randomness}'"),
        (TimeDistribute, "no pass is called"),
    ],
)
def test_what_is_no_pass_is_refused(named: str, said: str) -> None:
    with pytest.raises(PassError) as raised:
        passes_of([named])
    assert said in str(raised.value)


def test_an_option_does_what_the_argument_does() -> None:
    model = Frames().train()
    named = ["time-distribute{allow=randomness}"]
    report = fxtemporal.audit(model, (CLIP,), passes=named)
    assert [remark.status for remark in report.remarks] == ["applied"]
    given = fxtemporal.audit(model, (CLIP,), passes=[TimeDistribute(allow=["randomness"])])
    assert given.to_json() == report.to_json()


def test_the_graph_is_written_after_every_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Frames").mkdir()
    (tmp_path / "Frames" / "07-old.py").write_text("stale")
    (tmp_path / "Frames" / "notes.py").write_text("the user's")
    monkeypatch.setenv("FXTEMPORAL_DUMP", str(tmp_path))
    model = Frames().eval()
    fast = fxtemporal.optimize(model, (CLIP,), tune="static")
    names = sorted(path.name for path in (tmp_path / "Frames").iterdir())
    passes = [rule.name for rule in DEFAULT_PASSES]
    steps = ["captured", *passes, "result"]
    assert names == [*(f"{n:02}-{name}.py" for n, name in enumerate(steps)), "notes.py"]
    text = {name: (tmp_path / "Frames" / name).read_text() for name in names}
    assert text["00-captured.py"].count("self.conv(") == 5
    assert text["01-split-concat.py"].count("self.conv(") == 5
    assert text["02-time-distribute.py"].count("self.conv(") == 1
    result = f"{len(steps) - 1:02}-result.py"
    assert text[result].strip() == str(fast.code).strip()
    for name in names[:-1]:
        compile(text[name], name, "exec")


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXTEMPORAL_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    fxtemporal.audit(Frames().eval(), (CLIP,))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Frames").write_text("in the way")
    monkeypatch.setenv("FXTEMPORAL_DUMP", str(tmp_path))
    with pytest.raises(fxtemporal.FxTemporalError, match=r"FXTEMPORAL_DUMP: .* cannot be written"):
        fxtemporal.audit(Frames().eval(), (CLIP,))


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXTEMPORAL_DUMP", "before")
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.drop = nn.Dropout(0.5)\n"
        "        self.line = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return torch.stack([self.drop(self.line(x[:, t])) for t in range(3)], 1)\n"
    )
    asked = ["audit", f"{file}:Net", "--input", "2x3x4", "--train", "--dump", str(tmp_path / "g")]
    named = "time-distribute{allow=randomness,training-batchnorm},conv3d-forms"
    assert main([*asked, "--passes", named, "--fail-on", "applied"]) == 1
    assert len(list((tmp_path / "g" / "Net").iterdir())) == 3
    assert os.environ["FXTEMPORAL_DUMP"] == "before"
    assert main([*asked, "--passes", "time-distribute{deny=x}"]) == 2
    assert "has no option 'deny=x'" in capsys.readouterr().err
    assert main([*asked, "--passes", "time{allow=randomness}"]) == 2
    assert "nothing is called 'time'" in capsys.readouterr().err
