"""The whole path: what optimize, audit and report take, promise and refuse."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import (
    CaptureError,
    Factorize,
    FxTemporalError,
    PassError,
    SpecializationError,
    Tune,
    VerificationError,
)
from fxtemporal.passes.conv3d_forms import Conv3dForms
from tests.strictly import strictly
from tests.zoo import (
    ACROSS_THE_BATCH,
    BLOCKED,
    BODIES,
    CNNLSTM,
    CONV3D,
    SPELLINGS,
    IndexedFrames,
    ResidualConv3d,
    TwoStreams,
    noise,
)

CLIP = noise(2, 3, 4, 8, 8)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU(), nn.Conv3d(4, 4, 3)).eval()


def rules_of(module: nn.Module) -> list[str]:
    return [remark.rule for remark in fxtemporal.report(module).remarks]


# ------------------------------------------------------------------------------------- arguments


def test_the_public_names() -> None:
    for name in fxtemporal.__all__:
        assert hasattr(fxtemporal, name)
    assert {"optimize", "audit", "report"} <= set(fxtemporal.__all__)
    for error in (CaptureError, PassError, SpecializationError, VerificationError):
        assert issubclass(error, FxTemporalError)


def test_signatures_are_the_documented_ones() -> None:
    parameters = inspect.signature(fxtemporal.optimize).parameters
    assert list(parameters)[:3] == ["model", "example_inputs", "example_kwargs"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    assert list(inspect.signature(fxtemporal.report).parameters) == ["gm"]


def test_passes_by_name_by_rule_and_in_order() -> None:
    model = build()
    assert rules_of(strictly(model, (CLIP,), tune="static", passes=[])) == []
    for passes in (["conv3d-forms"], (Conv3dForms(),), ["time-distribute", "conv3d-forms"]):
        result = strictly(model, (CLIP,), tune="static", passes=passes)
        assert rules_of(result) == ["conv3d-forms"] * 2
    assert [r.rule for r in fxtemporal.audit(model, (CLIP,), passes=[]).remarks] == []


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (
            ["conv3d_forms"],
            "no pass is called 'conv3d_forms'; there are split-concat, time-distribute",
        ),
        ("conv3d-forms", r"passes=\['conv3d-forms'\]"),
        ([3], "no pass is called 3"),
        ([Conv3dForms], "no pass is called"),
    ],
)
def test_unknown_passes(passes: Any, words: str) -> None:
    for function in (fxtemporal.optimize, fxtemporal.audit):
        with pytest.raises(PassError, match=words):
            function(build(), (CLIP,), passes=passes)


def test_settings_are_checked_before_the_work() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("it was run")

    for settings in ({"passes": ["no"]}, {"tune": "no"}):
        with pytest.raises(PassError):
            strictly(Never(), (CLIP,), **settings)  # type: ignore[arg-type]


def test_factorize_is_no_pass_name_and_needs_settings() -> None:
    with pytest.raises(PassError, match="factorize"):
        strictly(build(), (CLIP,), passes=["factorize-2plus1d"])
    with pytest.raises(PassError):
        Factorize(rank=0)


def test_keyword_inputs() -> None:
    model = TwoStreams.build()
    x, flow = model.example()
    result = strictly(model, (x,), {"flow": flow}, tune="static")
    assert [r.status for r in fxtemporal.report(result).remarks] == ["applied"]
    torch.testing.assert_close(result(x, flow=flow), model(x, flow))
    torch.testing.assert_close(result(x=x, flow=flow), model(x, flow))
    torch.testing.assert_close(result(x, flow), model(x, flow))
    result = strictly(model, None, {"x": x, "flow": flow}, tune="static")
    torch.testing.assert_close(result(x, flow), model(x, flow))


def test_a_list_of_inputs_is_a_tuple_of_inputs() -> None:
    result = strictly(build(), [CLIP], tune="static")  # type: ignore[arg-type]
    assert rules_of(result) == ["conv3d-forms"] * 2


def test_a_model_without_inputs() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(noise(1, 3, 4, 8, 8))
            self.conv = nn.Conv3d(3, 4, (1, 3, 3))

        def forward(self) -> Tensor:
            return self.conv(self.value)

    model = Constant()
    for example in ((), None):
        result = strictly(model, example, tune="static")
        assert [r.status for r in fxtemporal.report(result).remarks] == ["applied"]
        torch.testing.assert_close(result(), model())


# -------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize(
    "cls",
    [*SPELLINGS, *BODIES, *ACROSS_THE_BATCH, *BLOCKED, *CONV3D],
    ids=lambda cls: cls.__name__,
)
def test_the_zoo_is_never_wrong_never_mute_and_never_changed(cls: Any) -> None:
    model = cls.build()
    inputs = model.example(*cls.sizes[0])
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    result = strictly(model, inputs, tune="static")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    report = fxtemporal.report(result)
    assert report.remarks
    assert not report.by_status("failed")
    assert report.comparison is not None
    assert report.comparison.equal
    for remark in report.remarks:
        assert bool(remark.reasons) == (remark.status == "missed")
        assert all(reason.text for reason in remark.reasons)
        assert remark.location is None or ":" in remark.location
    reference = copy.deepcopy(model)
    for sizes in cls.sizes:
        clips = model.example(*sizes)
        kept = tuple(clip.clone() for clip in clips)
        torch.manual_seed(0)
        expected = reference(*clips)
        torch.manual_seed(0)
        try:
            actual = result(*kept)
        except SpecializationError:
            assert sizes[1] != cls.sizes[0][1], "the batch is free"
            result.load_state_dict(reference.state_dict())
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(clips, kept, strict=True))
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(result.state_dict()[name], value)


def asked_for_inputs(error: CaptureError) -> None:
    assert "example inputs" in str(error)


@pytest.mark.parametrize("cls", [*CONV3D, *SPELLINGS], ids=lambda cls: cls.__name__)
def test_without_example_inputs_the_zoo_is_right_or_an_error(cls: Any) -> None:
    model = cls.build()
    try:
        result = strictly(model)
    except CaptureError as error:
        asked_for_inputs(error)
        return
    assert fxtemporal.report(result).comparison is None
    for sizes in cls.sizes:
        inputs = model.example(*sizes)
        torch.testing.assert_close(result(*inputs), model(*inputs))


def test_measuring_is_the_default_with_inputs() -> None:
    model = CNNLSTM.build()
    result = strictly(model, model.example())
    report = fxtemporal.report(result)
    assert report.timing is not None
    assert report.settings["tune"] == vars(Tune())
    torch.testing.assert_close(result(*model.example(3)), model(*model.example(3)))


def test_verify_can_be_left_out() -> None:
    result = strictly(build(), (CLIP,), tune="static", verify=False)
    assert fxtemporal.report(result).comparison is None
    assert fxtemporal.report(result).by_status("applied")


def test_results_are_the_same_every_time() -> None:
    model = CNNLSTM.build()
    first, second = (strictly(model, model.example(), tune="static") for _ in range(2))
    assert first.code == second.code
    assert fxtemporal.report(first).to_dict() == fxtemporal.report(second).to_dict()


def test_under_no_grad_and_inference_mode() -> None:
    model = IndexedFrames.build()
    expected = model(*model.example(3))
    with torch.no_grad():
        result = strictly(model, model.example(), tune="static")
    torch.testing.assert_close(result(*model.example(3)), expected)
    result(*model.example()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        result = strictly(model, model.example(), tune="static")
        torch.testing.assert_close(result(*model.example(3)), expected)


def test_under_autocast_the_result_is_what_the_model_is_there() -> None:
    model = IndexedFrames.build()
    result = strictly(model, model.example(), tune="static")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = result(*model.example(3)), model(*model.example(3))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_the_default_dtype_of_the_caller_does_not_matter() -> None:
    model = ResidualConv3d.build()
    example = noise(3, 3, 4, 8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        result = strictly(model, (example,), tune="static")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(result(example), model(example))


def test_no_warning_is_given() -> None:
    model = CNNLSTM.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strictly(model, model.example(), tune="static")
        strictly(build(), tune="static")


# ------------------------------------------------------------------------------------- progress


def test_progress_is_shown_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    strictly(build(), (CLIP,), tune="static", progress=False)
    assert capsys.readouterr().err == ""
    strictly(build(), (CLIP,), tune="static", progress=True)
    shown = capsys.readouterr()
    assert "capturing" in shown.err
    assert "verifying" in shown.err
    assert shown.out == ""
    strictly(build(), (CLIP,), tune="static")  # stderr is no terminal here
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------- audit


def test_audit_needs_no_inputs_and_changes_nothing() -> None:
    model = build()
    text = repr(model)
    report = fxtemporal.audit(model)
    assert [r.status for r in report.remarks] == ["applied", "missed"]
    assert report.mode == "audit"
    assert (report.comparison, report.timing) == (None, None)
    assert repr(model) == text


def test_audit_runs_nothing() -> None:
    calls: list[bool] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 1)
            self.conv.register_forward_hook(lambda m, a, o: calls.append(type(o) is Tensor))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    fxtemporal.audit(Counting(), (CLIP,))
    assert not any(calls)


def test_audit_of_the_result_finds_nothing_to_apply() -> None:
    model = CNNLSTM.build()
    result = strictly(model, model.example(), tune="static")
    assert not fxtemporal.audit(result, model.example()).by_status("applied")


def test_report_of_something_else() -> None:
    with pytest.raises(FxTemporalError, match="Sequential carries no report"):
        fxtemporal.report(build())
    gm = fx.symbolic_trace(build())
    gm.meta["fxtemporal"] = "theirs"
    with pytest.raises(FxTemporalError):
        fxtemporal.report(gm)
