"""What may be asked of a result beside the model's numbers: bits, confined NaN, any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import PassError, Tune
from fxtemporal.capture.capture import capture
from fxtemporal.functional import FORMS
from fxtemporal.ir.reasons import Code
from fxtemporal.passes.conv3d_choice import FormChoice
from fxtemporal.passes.conv3d_forms import Conv3dForms
from tests.zoo import noise


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1)),
        nn.Conv3d(8, 4, (3, 1, 1), padding=(1, 0, 0)),
    )
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x[:, t]) for t in range(x.shape[1])], 1)


CLIP = noise(2, 3, 6, 8, 8)


def optimized(model: nn.Module, x: Tensor = CLIP, **settings: Any) -> Any:
    return fxtemporal.optimize(model, (x,), **{"tune": "static", "progress": False} | settings)


def codes(result: Any) -> dict[str, list[Code]]:
    return {r.rule: [why.code for why in r.reasons] for r in fxtemporal.report(result).remarks}


@pytest.mark.parametrize("model", [network, Frames])
@pytest.mark.parametrize("tune", ["static", Tune(seconds=2)])
def test_bitwise_gives_every_bit(model: Any, tune: Any) -> None:
    original = model()
    x = CLIP if model is network else CLIP.transpose(1, 2)
    result = optimized(original, x, exact="bitwise", tune=tune)
    for given in (x, torch.randn_like(x), x.masked_fill(x > 2, torch.nan)):
        with torch.no_grad():
            wanted, found = original(given), result(given)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_bitwise_says_what_it_left() -> None:
    result = optimized(network(), exact="bitwise")
    assert codes(result)["fold-batchnorm"] == [Code.NOT_BITWISE]
    assert codes(optimized(network()))["fold-batchnorm"] == []


@pytest.mark.parametrize("form", ["conv3d_winograd_4", "conv3d_winograd_3", "conv3d_winograd_2"])
def test_bitwise_refuses_a_form_that_rounds_otherwise(form: str) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1))
    x = noise(1, 8, 8, 8, 8)
    rule = Conv3dForms({"0": FormChoice(form, "contiguous", 2.0, 1.0)})
    assert codes(optimized(conv, x, passes=[rule]))["conv3d-forms"] == []
    result = optimized(conv, x, passes=[rule], exact="bitwise")
    with torch.no_grad():
        assert torch.equal(result(x), conv(x))


@pytest.mark.parametrize("exact", ["bitwise", "rounding"])
def test_only_forms_with_the_bits_are_offered(exact: Any) -> None:
    program = capture(nn.Sequential(nn.Conv3d(8, 8, 3, padding=1)), (noise(2, 8, 6, 8, 8),))
    (site,) = Conv3dForms(bitwise=exact == "bitwise").to_choose(program)
    assert "conv3d" in site.forms
    assert ("conv3d_winograd_4" in site.forms) == (exact == "rounding")


@pytest.mark.parametrize("form", ["conv3d_winograd_4", "conv3d_winograd_3"])
@pytest.mark.parametrize("nan", ["any", "confined"])
def test_confined_keeps_a_bad_frame_where_it_is(form: str, nan: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1))
    x = noise(1, 8, 8, 8, 8)
    rule = Conv3dForms({"0": FormChoice(form, "contiguous", 2.0, 1.0)})
    result = optimized(conv, x, passes=[rule], nan=nan)
    spread = False
    for frame in range(8):
        bad = x.index_fill(2, torch.tensor([frame]), torch.nan)
        with torch.no_grad():
            spread |= not torch.equal(conv(bad).isfinite(), result(bad).isfinite())
    assert spread == (nan == "any")
    spreading = [r for r in fxtemporal.report(result).remarks if r.detail.get("spreads_nan")]
    assert bool(spreading) == (nan == "any")


def test_any_layout_is_as_the_last_form_wrote_it() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)))
    assert not FORMS["conv3d_spatial"].function(CLIP, model[0].weight).is_contiguous()
    assert optimized(model)(CLIP).is_contiguous()
    loose = optimized(model, layout="any")
    assert not loose(CLIP).is_contiguous()
    torch.testing.assert_close(loose(CLIP), model(CLIP))


def test_settings_are_in_the_report() -> None:
    result = optimized(network(), exact="bitwise", nan="confined", layout="any")
    settings = fxtemporal.report(result).to_dict()["settings"]
    assert {k: settings[k] for k in ("exact", "nan", "layout")} == {
        "exact": "bitwise",
        "nan": "confined",
        "layout": "any",
    }
    assert optimized(network()).meta["fxtemporal"].to_dict()["settings"].keys() == {"tune"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"exact": "bits"}, "exact must be 'rounding' or 'bitwise', not 'bits'"),
        ({"nan": "none"}, "nan must be 'any' or 'confined'"),
        ({"layout": None}, "layout must be 'same' or 'any'"),
        ({"exact": "bitwise", "verify": False}, "needs example inputs and verify=True"),
    ],
)
def test_what_is_not_known_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(PassError, match=text):
        optimized(network(), **settings)


def test_bitwise_and_a_loss_contradict_each_other() -> None:
    with pytest.raises(PassError, match="contradict"):
        optimized(network(), exact="bitwise", factorize=fxtemporal.Factorize(0.5))


def test_a_rule_keeps_what_it_was_asked_for() -> None:
    rule = Conv3dForms(bitwise=True)
    result = optimized(network(), passes=[rule], nan="confined", tune=Tune(seconds=1))
    with torch.no_grad():
        assert torch.equal(result(CLIP), network()(CLIP))
    assert vars(rule.keeping(confined=True, bitwise=False)) == {
        "choices": None,
        "confined": True,
        "bitwise": True,
    }


def test_a_layout_holds_where_torch_export_captures() -> None:
    class Gradless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, (1, 3, 3))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.seen.add_(1)
            return self.conv(x)

    model = Gradless().to(memory_format=torch.channels_last_3d)
    result = optimized(model)
    assert fxtemporal.report(result).frontend == "export"
    assert result(CLIP).stride() == model(CLIP).stride()


def test_bitwise_needs_inputs() -> None:
    with pytest.raises(PassError, match="needs example inputs"):
        fxtemporal.optimize(network(), exact="bitwise")
