"""An error says whose fault it is, at which line, and a cure that cures."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxtemporal
from fxtemporal import Code, ForwardError, FxTemporalError, InternalError
from fxtemporal.capture.failures import refusal
from fxtemporal.compiler import rewriting, state
from fxtemporal.ir.program import Program
from fxtemporal.passes.rule import Rule, Site

CLIP = torch.randn(2, 3, 8, 6, 6)


class Calls(nn.Module):
    """Calls one layer, or one function, on one line."""

    def __init__(self, layer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


LINE = f"test_messages.py:{inspect.getsourcelines(Calls.forward)[1] + 1}"


class Net3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def everywhere(model: Any, *inputs: Any) -> Iterator[str]:
    """What optimize and lower say, each as an error of fxtemporal."""
    for call in (fxtemporal.optimize, lambda m, x: fxtemporal.lower(m, x, "onnx")):
        with pytest.raises(FxTemporalError) as caught:
            call(model, inputs)
        yield str(caught.value)


CURES: dict[str, tuple[Callable[[Any], Any], Any, int]] = {
    "a clip of (B, T, C, H, W)": (nn.Conv3d(3, 4, 1), CLIP.transpose(1, 2), 1),
    "a clip of (B, T, H, W, C)": (nn.Conv3d(3, 4, 1), CLIP.permute(0, 2, 3, 4, 1), 1),
    "frames to a Conv3d": (nn.Conv3d(3, 4, 1), CLIP[:, :, 0], 1),
    "one clip of (T, C, H, W)": (nn.Conv3d(3, 4, 1), CLIP[0].transpose(0, 1), 1),
    "grey clips": (nn.Conv3d(1, 4, 1), CLIP[:, 0], 1),
    "frames of (B, H, W, C)": (nn.Conv2d(3, 4, 1), CLIP[:, :, 0].permute(0, 2, 3, 1), 1),
    "a clip to a Conv2d": (nn.Conv2d(3, 4, 1), CLIP.transpose(1, 2), 1),
    "a clip to BatchNorm2d": (nn.BatchNorm2d(3).eval(), CLIP, 1),
    "a pooled clip to a Linear": (nn.Linear(3, 5), CLIP.mean((2, 3, 4), keepdim=True), 2),
    "maps to a Linear": (nn.Linear(108, 5), CLIP.transpose(1, 2), 1),
    "maps to an LSTM": (nn.LSTM(3, 5, batch_first=True), CLIP.transpose(1, 2), 1),
    "double": (nn.Conv3d(3, 4, 1), CLIP.double(), 1),
    "bytes": (nn.Conv3d(3, 4, 1), CLIP.to(torch.uint8), 1),
    "half": (nn.Conv3d(3, 4, 1).half(), CLIP, 1),
    "sparse": (nn.Conv3d(3, 4, 1), CLIP.to_sparse(), 1),
    "floats as indices": (nn.Embedding(9, 4), CLIP.abs(), 1),
    "an array": (nn.Conv3d(3, 4, 1), CLIP.numpy(), 1),
    "a list of clips": (nn.Conv3d(3, 4, 1), [CLIP, CLIP], 1),
    "a list of samples": (nn.Conv3d(3, 4, 1), [CLIP[0], CLIP[1]], 1),
    "a function": (lambda x: F.conv3d(x, torch.ones(4, 3, 1, 1, 1)), CLIP[:, :, 0], 1),
}


@pytest.mark.parametrize("name", CURES)
def test_a_cure_is_one_with_which_the_call_goes_on(name: str) -> None:
    layer, x, least = CURES[name]
    for message in everywhere(Calls(layer).eval(), x):
        assert LINE in message or inspect.isfunction(layer)
        cure = message.partition("To mend it: ")[2]
        told = re.findall(
            r"(?:torch\.\w+\(x\)|x\.\w+\((?:[^()]|\([^()]*\))*\)(?:\.\w+\([^)]*\))*)", cure
        )
        assert len(told) >= least, message
        for change in told:
            layer(eval(change, {"torch": torch, "x": x}))


def test_without_a_cure_the_message_says_what_the_layer_takes() -> None:
    for message in everywhere(Calls(nn.Conv3d(3, 4, 1)), torch.randn(2, 8, 6, 6)):
        assert message.endswith("To mend it: give it (B, 3, T, H, W)")
    for message in everywhere(Calls(nn.Linear(7, 4)), torch.randn(2, 8)):
        assert message.endswith("To mend it: give it 7 features, or build it for 8")


def test_nothing_is_told_of_a_layer_whose_input_fits() -> None:
    conv = nn.Conv3d(3, 4, 1)

    def refuse(*_: Any) -> None:
        raise KeyError("no")

    conv.register_forward_hook(refuse)
    for message in everywhere(Calls(conv), CLIP):
        assert message.endswith(": KeyError: 'no'")
        assert "in module 'layer'" in message


class Wrapping(nn.Module):
    """Like MONAI's Compose: what a part raises is the cause of what the model raises."""

    def __init__(self, cause: bool) -> None:
        super().__init__()
        self.cause = cause
        self.part = nn.Conv3d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.part(x)
        except RuntimeError as error:
            if self.cause:
                raise ValueError("applying a part") from error
            raise ValueError("neither works")  # noqa: B904


def test_the_cause_comes_before_the_wrapper() -> None:
    for message in everywhere(Wrapping(cause=True), CLIP):
        first, _, rest = message.partition("passes it on as ")
        assert "in module 'part'" in first
        assert "expected input[2, 3, 8, 6, 6] to have 4 channels" in first
        assert rest.startswith("ValueError: applying a part")
    for message in everywhere(Wrapping(cause=False), CLIP):
        assert ": ValueError: neither works (while it handled RuntimeError: " in message


def test_an_error_around_the_call_of_fxtemporal_is_no_part_of_it() -> None:
    try:
        raise LookupError("elsewhere")
    except LookupError:
        (first, _) = everywhere(Calls(nn.Conv3d(5, 4, 1)), CLIP)
    assert "elsewhere" not in first


class Uninitialized(nn.Module):
    def __init__(self) -> None:
        self.size = 3


NOT_A_MODEL: dict[str, tuple[Any, str]] = {
    "a function": (F.relu, "expected an nn.Module"),
    "a class": (nn.ReLU, "expected an nn.Module"),
    "a state dict": ({"weight": CLIP}, "expected an nn.Module"),
    "no super().__init__()": (Uninitialized(), "does not call super().__init__()"),
}


@pytest.mark.parametrize("name", NOT_A_MODEL)
def test_what_is_no_model_is_called_so(name: str) -> None:
    model, words = NOT_A_MODEL[name]
    assert all(words in message for message in everywhere(model, CLIP))


ON_DATA: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "an index out of range": (nn.Embedding(4, 5), torch.tensor([[1, 9]])),
    "a device that is not there": (lambda x: x.to("cuda:77"), CLIP),
}


@pytest.mark.parametrize("name", ON_DATA)
def test_a_model_that_fails_on_data_alone_is_the_one_that_fails(name: str) -> None:
    layer, x = ON_DATA[name]
    with pytest.raises(ForwardError, match="the model fails on the example inputs"):
        fxtemporal.optimize(Calls(layer), (x,), tune="static")


class Frames:
    def __init__(self, frames: Tensor) -> None:
        self.frames = frames


def test_lower_says_what_it_cannot_lower() -> None:
    def says(model: nn.Module, x: Any, words: str) -> None:
        with pytest.raises(FxTemporalError, match=words):
            fxtemporal.lower(model, x, "onnx")

    says(Calls(lambda x: None), (CLIP,), "returns no tensor")
    says(Net3d().to("meta"), (CLIP.to("meta"),), "meta device")
    says(Net3d(), CLIP, "must be a tuple")
    says(Calls(Frames), (CLIP,), "returns a Frames, which a file cannot hold")
    says(Calls(lambda x: x if x.sum() > 0 else -x), (CLIP,), r"refuses Calls: .*test_messages.py:")


def test_a_keyword_that_is_misspelt_is_named() -> None:
    with pytest.raises(fxtemporal.CaptureError, match="'X' may be 'x'"):
        fxtemporal.optimize(Net3d(), (), {"X": CLIP})


# -- what no attempt can capture -------------------------------------------------------------------


def test_the_reasons_of_all_attempts_the_shortest_first() -> None:
    tried = [("the tracer", "m.py:1: a long reason"), ("torch.export", "m.py:1: short")] * 2
    message = str(refusal(Net3d(), CLIP, tried))
    reasons = "m.py:1: short (torch.export); m.py:1: a long reason (the tracer). Move"
    assert f"could not be captured: {reasons}" in message


READS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "numpy": (lambda x: torch.from_numpy(x.numpy() * 2), "numpy() reads the data of x"),
    "item": (lambda x: x if x.sum().item() > 0 else -x, "which depends on data, not on a shape"),
    "a generator": (lambda x: (x + t for t in range(3)), "returns a generator"),
}


@pytest.mark.parametrize("name", READS)
def test_a_refusal_calls_it_what_it_is(name: str) -> None:
    function, words = READS[name]
    with pytest.raises(fxtemporal.CaptureError, match=re.escape(words)):
        fxtemporal.optimize(Calls(function), (CLIP,), tune="static")


def test_sparse_inputs_are_the_reason_and_dense_ones_the_cure() -> None:
    x = torch.randn(4, 5).to_sparse()
    with pytest.raises(fxtemporal.CaptureError, match=r"x\.to_dense\(\)"):
        fxtemporal.optimize(Calls(nn.Linear(5, 3)), (x,), tune="static")
    fxtemporal.optimize(Calls(nn.Linear(5, 3)), (x.to_dense(),), tune="static")


# -- defects ---------------------------------------------------------------------------------------


def fails(*_: Any, **__: Any) -> Any:
    return {}["lost"]


def test_a_defect_is_called_one_and_asks_for_the_dump(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rewriting, "run_rules", fails)
    monkeypatch.setattr(state, "run_rules", {}.__getitem__)
    monkeypatch.setenv("FXTEMPORAL_DUMP", str(tmp_path))
    with pytest.raises(InternalError, match=r"itself failed in optimize at .*state\.py:\d+: \w+Er"):
        fxtemporal.optimize(Net3d().eval(), (CLIP,), tune="static")
    assert (tmp_path / "Net3d" / "00-captured.py").is_file()


class Raises(Rule[fx.Node]):
    """A pass with a defect in one of its methods."""

    name = "raises"

    def __init__(self, method: str) -> None:
        setattr(self, method, fails)

    def candidates(self, program: Program) -> Iterable[fx.Node]:
        return [node for node in program.graph.nodes if node.op == "call_module"]

    def site(self, program: Program, candidate: fx.Node) -> Site:
        return Site(self.name, candidate.name, candidate.name, program.location(candidate))

    def preconditions(self, program: Program, candidate: fx.Node) -> Any:
        return ()

    def rewrite(self, program: Program, candidate: fx.Node) -> Any:
        return {}


@pytest.mark.parametrize("method", ["candidates", "site", "preconditions", "what", "rewrite"])
def test_a_pass_that_raises_is_left_out_and_the_others_run(method: str) -> None:
    model, passes = Net3d().eval(), [Raises(method), "conv3d-forms"]
    for report in (
        fxtemporal.report(fxtemporal.optimize(model, (CLIP,), passes=passes, tune="static")),
        fxtemporal.audit(model, (CLIP,), passes=passes),
    ):
        (failed,) = report.by_status("failed")
        assert failed.rule == "raises"
        assert "KeyError: 'lost'" in failed.reasons[0].text
        assert [remark.rule for remark in report.by_status("applied")] == ["conv3d-forms"]


# -- never mute, never changed ---------------------------------------------------------------------


class Autocast(Net3d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def test_a_conv3d_under_autocast_has_a_remark_whose_cure_cures() -> None:
    report = fxtemporal.report(fxtemporal.optimize(Autocast().eval(), (CLIP,), tune="static"))
    (remark,) = report.remarks
    assert (remark.target, remark.reasons[0].code) == ("conv", Code.NESTED_GRAPH)
    assert remark.location is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cured = fxtemporal.optimize(Net3d().eval(), (CLIP,), tune="static")
    assert [r.target for r in fxtemporal.report(cured).by_status("applied")] == ["conv"]


class Branches(Net3d):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_a_layer_that_is_a_region_has_its_path_and_its_line() -> None:
    report = fxtemporal.audit(Branches().eval(), (CLIP.abs(),))
    (remark,) = report.remarks
    assert remark.target == "conv"
    assert "test_messages.py:" in str(remark.location)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_module_inside_stays_as_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(torch.jit.script(Net3d().eval()), nn.Conv3d(4, 4, 1)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(CLIP)
    result = fxtemporal.optimize(model, (CLIP,), tune="static")
    torch.testing.assert_close(result(CLIP), expected)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
