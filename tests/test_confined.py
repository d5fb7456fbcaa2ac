"""What the model computes as a finite number is one, of clips with NaN and infinite values too.

Forms that are not so say that they are not, and can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from fxtemporal import passes
from fxtemporal.functional import FORMS, ConvGeometry
from fxtemporal.functional.pool3d import POOL_FORMS, PoolWindow
from fxtemporal.passes.conv3d_choice import FormChoice
from fxtemporal.passes.conv3d_forms import Conv3dForms
from tests.zoo import noise

SPREADING = {"conv3d_winograd_3", "conv3d_winograd_4", "conv3d_toeplitz"}

LAYERS: tuple[tuple[tuple[int, int, int], dict[str, Any], int], ...] = (
    ((3, 3, 3), {"padding": (1, 1, 1)}, 9),
    ((3, 3, 3), {"time_padding": (2, 0), "padding": (0, 1, 1)}, 9),
    ((3, 3, 3), {"padding": (1, 1, 1), "stride": (2, 1, 1)}, 9),
    ((2, 3, 3), {"padding": (0, 1, 1)}, 8),
    ((5, 1, 1), {"padding": (2, 0, 0), "padding_mode": "replicate"}, 9),
    ((3, 3, 3), {"padding": (2, 1, 1), "dilation": (2, 1, 1)}, 9),
    ((3, 3, 3), {"padding": (1, 1, 1), "groups": 2}, 3),
    ((3, 3, 3), {}, 3),
    ((1, 3, 3), {"padding": (0, 1, 1), "stride": (2, 1, 1)}, 5),
    ((1, 1, 1), {"stride": (2, 2, 2)}, 5),
    ((2, 2, 2), {"stride": (2, 2, 2)}, 6),
)


def spoiled(x: Tensor) -> Iterator[Tensor]:
    """``x`` with one frame of NaN, and with one infinite pixel, at each of its frames."""
    for t in range(x.shape[2]):
        frame, pixel, rest = x.clone(), x.clone(), x.clone()
        frame[:, :, t] = torch.nan
        pixel[0, 1, t, 2, 3] = torch.inf
        rest[:, 0, t] = -torch.inf
        yield from (frame, pixel, rest)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_keeps_finite_what_conv3d_keeps_finite_or_says_so(name: str) -> None:
    form, spreads, met = FORMS[name], False, 0
    for kernel, options, frames in LAYERS:
        x = noise(2, 4, frames, 6, 6)
        weight = noise(6, 4 // options.get("groups", 1), *kernel)
        if name == "conv3d_low_rank":
            weight = weight[:, :, :1].expand_as(weight).contiguous()
        arguments = {"stride": (1, 1, 1), "padding": (0, 0, 0), "dilation": (1, 1, 1)}
        arguments |= {"groups": 1, "padding_mode": "zeros", "time_padding": (0, 0)} | options
        geometry = ConvGeometry.of(x, weight, **arguments)
        if any(form.blockers(geometry)) or any(form.weight_blockers(weight, geometry)):
            continue
        met += 1
        for clip in spoiled(x):
            expected = FORMS["conv3d"].function(clip, weight, **arguments)
            got = form.function(clip, weight, **arguments)
            finite = expected.isfinite()
            spreads |= not bool(got[finite].isfinite().all())
    assert met
    assert spreads == (name in SPREADING)
    assert form.confined != spreads


POOLS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "max_pool3d": (
        ((1, 2, 2), (1, 2, 2)), ((3, 1, 1), (1, 1, 1), (1, 0, 0)), ((2, 1, 1), (2, 2, 2)),
    ),
    "avg_pool3d": (
        ((1, 3, 3), (1, 1, 1), (0, 1, 1)), ((3, 1, 1), (1, 1, 1), (1, 0, 0)),
        ((2, 1, 1), (2, 1, 1)),
    ),
    "adaptive_avg_pool3d": (((None, 1, 1),), ((None, 2, 2),), ((3, None, None),), ((1, None, 1),)),
}  # fmt: skip


@pytest.mark.parametrize("name", POOL_FORMS)
def test_a_form_of_a_pooling_spreads_nothing(name: str) -> None:
    form = POOL_FORMS[name]
    met = 0
    for arguments in POOLS[form.op]:
        adaptive = form.op.startswith("adaptive")
        padding = arguments[2] if len(arguments) > 2 else (0, 0, 0)
        window = PoolWindow(sizes=arguments[0]) if adaptive else PoolWindow(arguments[0], padding)
        if any(form.blockers(window)):
            continue
        met += 1
        for clip in spoiled(noise(2, 4, 6, 6, 6)):
            expected = getattr(F, form.op)(clip, *arguments)
            got = form.function(clip, *arguments)
            assert bool(got[expected.isfinite()].isfinite().all())
    assert met


def test_a_frame_of_another_size_rounds_only_what_it_meets_in_a_confined_form() -> None:
    x, weight = noise(1, 8, 16, 6, 6), noise(8, 8, 3, 3, 3)
    x[:, :, 7] *= 1e4
    options: dict[str, Any] = {"padding": (1, 1, 1)}
    exact = F.conv3d(x.double(), weight.double(), **options)
    apart = [t for t in range(16) if t not in (6, 7, 8)]

    def off(name: str) -> float:
        got = FORMS[name].function(x, weight, **options).double()
        return float((got - exact)[:, :, apart].abs().max() / exact[:, :, apart].abs().max())

    assert off("conv3d") < 2e-6
    assert off("conv3d_winograd_2") < 5e-6
    assert 1e-5 < off("conv3d_winograd_4") < 1e-2


def sites(form: str) -> tuple[nn.Module, Tensor, dict[str, FormChoice]]:
    frames = 3 if form == "conv3d_toeplitz" else 16
    model = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1)).eval()
    return model, noise(1, 4, frames, 6, 6), {"0": FormChoice(form, "contiguous", 2.0, 1.0)}


@pytest.mark.parametrize("form", sorted(SPREADING | {"conv3d_winograd_2", "conv3d_taps"}))
def test_a_remark_says_that_its_form_spreads_nan(form: str) -> None:
    model, x, choices = sites(form)
    fast = fxtemporal.optimize(
        model, (x,), passes=[Conv3dForms(choices)], tune="static", progress=False
    )
    report = fxtemporal.report(fast)
    (remark,) = report.remarks
    assert remark.detail["form"] == form
    assert remark.detail.get("spreads_nan", False) == (form in SPREADING)
    assert ("spreads NaN" in remark.becomes) == (form in SPREADING)
    assert ("spreads_nan" in str(report)) == (form in SPREADING)


@pytest.mark.parametrize("form", sorted(SPREADING))
def test_a_confined_rule_never_takes_a_form_that_spreads_nan(form: str) -> None:
    model, x, choices = sites(form)
    rule = Conv3dForms(choices, confined=True)
    fast = fxtemporal.optimize(model, (x,), passes=[rule], tune="static", progress=False)
    (remark,) = fxtemporal.report(fast).remarks
    assert remark.detail.get("form") != form
    for clip in spoiled(x):
        finite = model(clip).isfinite()
        assert bool(fast(clip)[finite].isfinite().all())


def test_a_confined_rule_offers_no_form_that_spreads_nan() -> None:
    model, x, _ = sites("conv3d_taps")
    program = fxtemporal.capture.capture.capture(model, (x,))
    for confined in (False, True):
        (site,) = Conv3dForms(confined=confined).to_choose(program)
        assert SPREADING.isdisjoint(site.forms) == confined
        assert "conv3d_winograd_2" in site.forms


# -- the passes ------------------------------------------------------------------------------------


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.linear, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(2)):
            y = F.relu(self.norm(self.conv(x[:, :, t]))).mean((2, 3))
            y = self.linear(y).unsqueeze(1)
            outs.append(self.attention(y, y, y)[0][:, 0])
        return torch.stack(outs, 2)


class Recurrent(nn.Module):
    """Frames up to the one that holds NaN are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = x.new_zeros(x.size(0), 5), []
        for t in range(x.size(2)):
            h = self.cell(x[:, :, t].mean((2, 3)), h)
            outs.append(h)
        return torch.stack(outs, 2)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(4, 3, 1), nn.Conv3d(4, 5, 1)
        self.norm, self.pool = nn.BatchNorm3d(5), nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.pool(self.norm(self.b(x)))], 1)


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(2) - 2):
            clip = x[:, :, t : t + 3]
            frames = clip.transpose(1, 2).flatten(0, 1)
            outs.append(self.conv(frames).unflatten(0, (-1, 3)).mean(1))
        return torch.stack(outs, 1)


class ConvRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(4 + 3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = x.new_zeros(x.size(0), 3, *x.shape[3:]), []
        for t in range(x.size(2)):
            h = torch.tanh(self.gates(torch.cat([x[:, :, t], h], 1)))
            outs.append(h)
        return torch.stack(outs, 2)


@pytest.mark.parametrize("make", [Loop, Recurrent, Branches, Windows, ConvRecurrent])
def test_no_pass_spreads_what_is_not_finite(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), noise(2, 4, 6, 6, 6)
    fast = fxtemporal.optimize(
        model, (x,), passes=passes.DEFAULT_PASSES, tune="static", progress=False
    )
    assert any(remark.status == "applied" for remark in fxtemporal.report(fast).remarks)
    with torch.no_grad():
        for clip in spoiled(x):
            finite = model(clip).isfinite()
            assert bool(fast(clip)[finite].isfinite().all())
