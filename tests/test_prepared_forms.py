"""A weight prepared once computes what the form computes, and a call outside the domain is safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import NAMES, WINOGRAD, Layer, assert_close, cases, quick
from hypothesis import given, settings
from torch import Tensor, fx, nn

from fxtemporal.functional import FORMS, ConvGeometry, conv3d_in_form

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

AS_THEY_ARE = {
    "conv3d",
    "conv3d_spatial",
    "conv3d_temporal",
    "conv3d_pointwise",
    "conv3d_full_extent",
    "conv3d_patchify",
}
DIFFERENTIABLE = tuple(name for name in NAMES if name != "conv3d_low_rank")


def test_which_forms_prepare() -> None:
    assert {name for name in NAMES if not FORMS[name].prepares} == AS_THEY_ARE


@pytest.mark.parametrize("name", NAMES)
def test_prepare_and_run_is_the_form(name: str) -> None:
    form = FORMS[name]

    @settings(quick, max_examples=15)
    @given(cases(name))
    def check(case: Any) -> None:
        layer = case.layer()
        for x in case.inputs():
            prepared = form.prepare(layer.weight, case.geometry.at(x))
            for given_x in (x, x[0]) if len(x) else (x,):
                result = form.run(given_x, prepared, layer.bias, case.geometry)
                assert_close(result, layer(given_x))

    check()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_through_both_steps(name: str) -> None:
    """Of second order too, by finite differences."""
    form = FORMS[name]
    kernel = {"conv3d_spatial": (1, 2, 2), "conv3d_temporal": (2, 1, 1)}.get(name, (2, 1, 2))
    kernel = (1, 1, 1) if name == "conv3d_pointwise" else kernel
    stride = kernel if name == "conv3d_patchify" else (1, 1, 1)
    frames = 2 if name in ("conv3d_full_extent", "conv3d_toeplitz") else 3
    geometry = ConvGeometry(2, 2, kernel, stride, groups=2, frames=frames)
    if name not in ("conv3d_full_extent", "conv3d_patchify"):
        geometry = ConvGeometry(2, 2, kernel, stride, groups=2, frames=frames, time_padding=(1, 0))
    torch.manual_seed(0)
    x = torch.randn(2, 2, frames, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return form.run(x, form.prepare(weight, geometry), bias, geometry)

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_weight_survives_a_buffer_and_a_copy(name: str) -> None:
    layer = Layer(name)
    x = torch.randn(2, 4, 4, 9, 8)
    geometry, form = layer.geometry(x), FORMS[name]
    holder = nn.Module()
    holder.register_buffer("kept", form.prepare(layer.conv.weight, geometry).detach())
    kept = holder.double().float().kept
    torch.testing.assert_close(form.run(x, kept, layer.conv.bias, geometry), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_dense(name: str) -> None:
    """Whatever the layout: no view of something larger is handed on."""
    if name in WINOGRAD:  # whose last tile is cut
        pytest.skip("T' = 4 is no whole number of tiles")
    layer = Layer(name)
    for x in (torch.randn(2, 4, 4, 9, 8), torch.randn(2, 9, 8, 4, 4).permute(0, 4, 3, 1, 2)):
        result = layer(x)
        assert result.untyped_storage().nbytes() <= 4 * result.numel()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*AS_THEY_ARE, "conv3d_toeplitz")])
def test_the_result_is_in_channels_last_3d(name: str) -> None:
    for x in (torch.randn(1, 4, 4, 9, 8), torch.randn(1, 9, 8, 4, 4).permute(0, 4, 3, 1, 2)):
        assert Layer(name)(x).is_contiguous(memory_format=torch.channels_last_3d)


# ----------------------------------------------------------------------- outside the domain


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6])
def test_toeplitz_of_every_short_clip(frames: int) -> None:
    form = FORMS["conv3d_toeplitz"]
    torch.manual_seed(0)
    weight = torch.randn(6, 2, 3, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 4, frames, 5, 4, dtype=torch.float64)
    rest: tuple[Any, ...] = ((1, 1, 1), (2, 1, 1), (2, 1, 1), 2)
    expected = F.conv3d(x, weight, None, *rest)
    if frames <= 5:
        assert_close(form.function(x, weight, None, *rest), expected)
    else:
        with pytest.raises(ValueError, match="reaches over 5 frames, fewer than the 6"):
            form.function(x, weight, None, *rest)
    assert_close(conv3d_in_form("conv3d_toeplitz", x, weight, None, *rest), expected)


def test_a_single_frame_meets_the_middle_tap_alone() -> None:
    form, weight = FORMS["conv3d_toeplitz"], torch.randn(6, 4, 3, 3, 3)
    geometry = ConvGeometry(4, 6, (3, 3, 3), padding=(1, 1, 1), frames=1)
    prepared = form.prepare(weight, geometry)
    assert torch.equal(prepared, weight[:, :, 1])


def test_a_weight_prepared_for_another_number_of_frames_is_refused_or_left_aside() -> None:
    form = FORMS["conv3d_toeplitz"]
    weight = torch.randn(6, 4, 3, 3, 3)
    geometry = ConvGeometry(4, 6, (3, 3, 3), padding=(1, 1, 1), frames=2)
    prepared = form.prepare(weight, geometry)
    for frames in (1, 2, 3, 7):
        x = torch.randn(2, 4, frames, 4, 4)
        expected = F.conv3d(x, weight, padding=1)
        result = conv3d_in_form("conv3d_toeplitz", x, weight, padding=(1, 1, 1), prepared=prepared)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=5e-5)
        if frames == 2:
            result = form.run(x, prepared, None, geometry)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=5e-5)
        else:
            with pytest.raises(ValueError, match="frames"):
                form.run(x, prepared, None, geometry)


@pytest.mark.parametrize("name", NAMES)
def test_in_form_computes_every_convolution(name: str) -> None:
    @settings(quick, max_examples=30)
    @given(cases("conv3d"))
    def check(case: Any) -> None:
        layer = case.layer().requires_grad_(False)
        if name == "conv3d_low_rank" and case.geometry.kernel[0] > 1:
            layer.weight.copy_(layer.weight[:, :, :1].expand_as(layer.weight))
        more = {"time_padding": case.geometry.time_padding, **case.keywords}
        for x in case.inputs():
            result = conv3d_in_form(name, x, layer.weight, layer.bias, **more)
            assert_close(result, layer(x))

    check()


def test_a_prepared_weight_that_is_given_is_used() -> None:
    x, weight = torch.randn(1, 2, 5, 4, 4), torch.randn(2, 2, 3, 3, 3)
    form = FORMS["conv3d_taps"]
    prepared = form.prepare(weight, ConvGeometry(2, 2, (3, 3, 3)))
    result = conv3d_in_form("conv3d_taps", x, weight, prepared=2 * prepared)
    torch.testing.assert_close(result, 2 * F.conv3d(x, weight), rtol=1e-4, atol=1e-4)


class InForm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3, 3))
        kept = FORMS["conv3d_winograd_2"].prepare(self.weight, ConvGeometry(2, 2, (3, 3, 3)))
        self.register_buffer("kept", kept.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv3d_in_form("conv3d_winograd_2", x, self.weight, None, prepared=self.kept)


def test_a_traced_graph_calls_it_as_it_is() -> None:
    model = InForm()
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [conv3d_in_form]
    for shape in ((1, 2, 5, 4, 4), (3, 2, 8, 5, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), F.conv3d(x, model.weight), rtol=1e-4, atol=1e-4)
    half = traced.bfloat16()(x.bfloat16())  # outside the domain: conv3d itself
    assert torch.equal(half, F.conv3d(x.bfloat16(), model.weight))


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_graph_calls_each_form_as_it_is(name: str) -> None:
    traced = fx.symbolic_trace(Layer(name))
    (called,) = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert called is FORMS[name].function
    x = torch.randn(2, 4, 4, 9, 8)
    torch.testing.assert_close(traced(x), Layer(name)(x))


@pytest.mark.parametrize("name", NAMES)
def test_time_padding_must_be_two_counts(name: str) -> None:
    x, weight = torch.zeros(1, 2, 1, 4, 4), torch.zeros(2, 2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"time_padding is \(1,\); it must be"):
        FORMS[name].function(x, weight, time_padding=(1,))
    with pytest.raises(ValueError, match=r"time_padding \(0, -1\) is negative"):
        FORMS[name].function(x, weight, time_padding=(0, -1))
