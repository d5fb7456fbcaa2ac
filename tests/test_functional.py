"""Each form of conv3d equals conv3d on its domain, and refuses everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_cases import (
    MODES,
    NAMES,
    ONE_EACH,
    WINOGRAD,
    Case,
    Layer,
    assert_close,
    call,
    cases,
    quick,
    triples,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxtemporal import functional
from fxtemporal.functional import FORMS, ConvGeometry

TRACED = tuple(name for name in NAMES if name != "conv3d_low_rank")
"""All but the form that reads the weight's numbers, which no trace can."""

FREE_FRAMES = tuple(
    name
    for name in TRACED
    if name not in ("conv3d_full_extent", "conv3d_toeplitz") and name not in WINOGRAD
)
"""Those of them that take any number of frames."""

# nn.Conv3d itself warns that "same" with an even kernel copies its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("name", NAMES)
def test_equals_conv3d_with_its_gradients_at_two_sizes(name: str) -> None:
    @quick
    @given(cases(name))
    def check(case: Case) -> None:
        layer = case.layer()
        for x in case.inputs():
            assert list(FORMS[name].blockers(case.geometry.at(x))) == []
            x.requires_grad_()
            before = x.detach().clone()
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            reference, result = layer(x), call(name, case, layer, x)
            assert_close(result, reference)
            assert torch.equal(x, before)
            upstream = torch.randn_like(reference)
            expected = torch.autograd.grad(reference, leaves, upstream)
            got = torch.autograd.grad(result, leaves, upstream)
            for ours, theirs in zip(got, expected, strict=True):
                assert_close(ours, theirs)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_is_as_close_to_float64_as_conv3d_is(name: str) -> None:
    @settings(quick, max_examples=25)
    @given(cases(name), st.booleans())
    def check(case: Case, channels_last: bool) -> None:
        exact = case.layer()
        layer = case.layer().float()
        exact.load_state_dict(layer.state_dict())
        for x in case.inputs(torch.float32):
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last_3d)
            reference = exact(x.double())
            result = call(name, case, layer, x)
            assert result.dtype == torch.float32
            assert result.shape == reference.shape
            if reference.numel():
                scale = max(1.0, reference.abs().max().item())
                own = (layer(x) - reference).abs().max().item()
                ours = (result - reference).abs().max().item()
                assert ours <= 4 * own + (1e-5 if name in WINOGRAD else 1e-6) * scale

    check()


@pytest.mark.parametrize("name", NAMES)
def test_equals_conv3d_without_a_batch(name: str) -> None:
    @settings(quick, max_examples=15)
    @given(cases(name))
    def check(case: Case) -> None:
        layer, x = case.layer(), case.inputs()[0][0]
        assert_close(call(name, case, layer, x), layer(x))

    check()


def close(result: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=5e-6)


def test_one_each_names_every_form() -> None:
    assert tuple(ONE_EACH) == NAMES
    assert all(FORMS[name].function is getattr(functional, name) for name in NAMES)
    others = """FORMS ConvFunction ConvGeometry Form conv3d_in_form conv3d_packed conv3d_spanning
    conv3d_weight temporal_rank winograd_weight"""
    assert {*NAMES, *others.split()} == set(functional.__all__)
    assert all(FORMS[name].function.__name__ == name for name in NAMES)
    assert all("Domain" in FORMS[name].function.__doc__ for name in NAMES[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WINOGRAD])
def test_half_precision_stays_half_precision(name: str, dtype: torch.dtype) -> None:
    layer, x = Layer(name), torch.randn(2, 4, 4, 9, 8)
    result, reference = layer.to(dtype)(x.to(dtype)), layer.float().reference(x.to(dtype).float())
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), reference, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("name", ["conv3d_taps", "conv3d_stacked", "conv3d_spread"])
def test_rounding_each_tap_in_half_precision_costs_less_than_one_bit(
    name: str, taps: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 32, 6, 8, 8), torch.randn(32, 32, taps, 3, 3) / 50
    rest = ((1, 1, 1), (taps // 2, 1, 1))
    x, weight = x.to(dtype), weight.to(dtype)
    exact = functional.conv3d(x.double(), weight.double(), None, *rest)
    ours, own = (
        (f(x, weight, None, *rest).double() - exact).square().mean().sqrt().item()
        for f in (FORMS[name].function, functional.conv3d)
    )
    assert ours <= 2 * own


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_input(name: str) -> None:
    layer = Layer(name)
    x = torch.randn(2, 8, 9, 4, 4).permute(0, 3, 4, 2, 1)  # (B, C, T, H, W), strides in disorder
    close(layer(x), layer.reference(x))


@pytest.mark.parametrize("name", TRACED)
def test_export_keeps_the_batch_free(name: str) -> None:
    layer, batch = Layer(name), torch.export.Dim("batch")
    x = torch.randn(3, 4, 4, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 7):
        x = torch.randn(size, 4, 4, 9, 8)
        close(program(x), layer.reference(x))


@pytest.mark.parametrize("name", FREE_FRAMES)
def test_export_keeps_frames_and_pixels_free(name: str) -> None:
    layer = Layer(name)
    free = {axis: torch.export.Dim(f"d{axis}", min=6, max=99) for axis in (2, 3, 4)}
    x = torch.randn(2, 4, 8, 12, 11)
    program = torch.export.export(layer, (x,), dynamic_shapes=(free,)).module()
    for size in ((6, 7, 9), (11, 13, 12)):
        x = torch.randn(2, 4, *size)
        close(program(x), layer.reference(x))


@pytest.mark.parametrize("name", TRACED)
def test_compiles_without_a_graph_break(name: str) -> None:
    layer = Layer(name)
    x = torch.randn(3, 4, 4, 9, 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    close(compiled(x), layer.reference(x))


@pytest.mark.parametrize("name", ["conv3d_spatial", "conv3d_temporal", "conv3d_pointwise"])
def test_channels_last_3d_passes_through(name: str) -> None:
    x = torch.randn(2, 4, 4, 9, 8).contiguous(memory_format=torch.channels_last_3d)
    assert Layer(name)(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_spatial_brings_the_input_to_channels_last_3d() -> None:
    result = Layer("conv3d_spatial")(torch.randn(2, 4, 4, 9, 8))
    assert result.is_contiguous(memory_format=torch.channels_last_3d)


def test_patchify_crops_what_fills_no_patch() -> None:
    x, weight = torch.randn(1, 3, 5, 11, 10), torch.randn(4, 3, 2, 4, 4)
    result = functional.conv3d_patchify(x, weight, stride=(2, 4, 4))
    assert result.shape == (1, 4, 2, 2, 2)
    whole = functional.conv3d(x[:, :, :4, :8, :8], weight, stride=(2, 4, 4))
    torch.testing.assert_close(result, whole)


def test_reference_is_what_nn_conv3d_computes_for_even_kernels_and_same() -> None:
    @quick
    @given(triples(1, 4), triples(1, 2), st.sampled_from(MODES))
    def check(kernel: tuple[int, ...], dilation: tuple[int, ...], mode: str) -> None:
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        layer = nn.Conv3d(
            2, 2, kernel, padding="same", dilation=dilation, padding_mode=mode, dtype=torch.float64
        )
        x = torch.randn(1, 2, *(r + 1 for r in reach), dtype=torch.float64)
        result = functional.conv3d(
            x, layer.weight, layer.bias, (1, 1, 1), "same", dilation, 1, mode
        )
        assert_close(result, layer(x))

    check()


# ------------------------------------------------------------------------- outside the domain


def geometry(**changes: Any) -> ConvGeometry:
    return replace(ConvGeometry(4, 4, (1, 1, 1)), **changes)


@pytest.mark.parametrize(
    ("name", "changes", "sentences"),
    [
        ("conv3d", {"kernel": (3, 3, 3), "padding": "same"}, []),
        ("conv3d_spatial", {"kernel": (3, 3, 3)}, ["the kernel reaches over 3 frames, not 1"]),
        (
            "conv3d_temporal",
            {"kernel": (3, 1, 2)},
            ["the kernel reaches over 1×2 pixels, not 1×1"],
        ),
        (
            "conv3d_pointwise",
            {"kernel": (2, 3, 1)},
            [
                "the kernel reaches over 2 frames, not 1",
                "the kernel reaches over 3×1 pixels, not 1×1",
            ],
        ),
        (
            "conv3d_full_extent",
            {"kernel": (3, 3, 3), "frames": 8, "padding": (1, 1, 1)},
            ["time is padded by (1, 1)", "the kernel reaches over 3 frames, and there are 8"],
        ),
        (
            "conv3d_full_extent",
            {"kernel": (3, 1, 1), "dilation": (2, 1, 1)},
            ["the kernel reaches over 5 frames, and how many there are is not known"],
        ),
        (
            "conv3d_patchify",
            {"kernel": (2, 4, 4), "stride": (1, 4, 4)},
            ["the stride (1, 4, 4) is not the kernel size (2, 4, 4)"],
        ),
        (
            "conv3d_patchify",
            {"kernel": (2, 4, 1), "stride": (2, 4, 1), "padding": (0, 1, 2), "dilation": (3, 1, 2)},
            [
                "height is padded by (1, 1)",
                "width is padded by (2, 2)",
                "the kernel is dilated by 3 along time",
            ],
        ),
    ],
)
def test_every_blocker_is_named_and_the_form_refuses(
    name: str, changes: dict[str, Any], sentences: list[str]
) -> None:
    g = geometry(**changes)
    assert list(FORMS[name].blockers(g)) == sentences
    if sentences and (name != "conv3d_full_extent" or g.frames):
        x = torch.zeros(1, 4, g.frames or 8, 8, 8)
        with pytest.raises(ValueError, match=name) as raised:
            FORMS[name].function(
                x, torch.zeros(4, 4, *g.kernel), None, g.stride, g.padding, g.dilation
            )
        assert all(sentence in str(raised.value) for sentence in sentences)


@pytest.mark.parametrize("name", NAMES)
def test_a_form_computes_conv3d_or_raises_whatever_the_geometry(name: str) -> None:
    """No silent wrong answer: drawn without regard to the domain."""

    @quick
    @given(cases("conv3d"))
    def check(case: Case) -> None:
        layer, x = case.layer(), case.inputs()[0]
        layer.requires_grad_(False)
        form, g = FORMS[name], case.geometry.at(x)
        if any(form.blockers(g)) or any(form.weight_blockers(layer.weight, g)):
            with pytest.raises(ValueError, match=name):
                call(name, case, layer, x)
        else:
            assert_close(call(name, case, layer, x), layer(x))

    check()


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"padding_mode": "mirror"}, "padding_mode is 'mirror'"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": "same", "stride": (1, 2, 1)}, "needs stride"),
        ({"padding": (0, -1, 0)}, "negative"),
        ({"stride": (1, 1)}, "stride is"),
        ({"dilation": (1, 1, 1, 1)}, "dilation is"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_no_convolution_has_this_geometry(name: str, keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FORMS[name].function(torch.zeros(1, 2, 1, 4, 4), torch.zeros(2, 2, 1, 1, 1), **keywords)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_weights_of_a_wrong_rank(name: str) -> None:
    function = FORMS[name].function
    with pytest.raises(ValueError, match="the input has shape"):
        function(torch.zeros(2, 4, 4), torch.zeros(2, 2, 1, 1, 1))
    with pytest.raises(ValueError, match="the weight has shape"):
        function(torch.zeros(1, 2, 4, 4, 4), torch.zeros(2, 2, 1, 1))


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_an_axis_with_nothing_on_it_raises_as_in_conv3d(name: str, batch: int, axis: int) -> None:
    shape = [batch, 4, 4, 9, 8]
    shape[axis] = 0
    kernel, keywords = ONE_EACH[name]
    keywords = {**keywords, "padding": (0, 0, 0)}
    x, weight = torch.zeros(shape), torch.zeros(6, 4, *kernel)
    with pytest.raises(RuntimeError):
        functional.conv3d(x, weight, **keywords)
    with pytest.raises((RuntimeError, ValueError)):
        FORMS[name].function(x, weight, **keywords)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_channels_raise(name: str) -> None:
    kernel, keywords = ONE_EACH[name]
    with pytest.raises(RuntimeError):
        FORMS[name].function(torch.zeros(2, 3, 4, 9, 8), torch.zeros(6, 4, *kernel), **keywords)


def test_forms_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMS["conv3d"] = FORMS["conv3d_spatial"]  # type: ignore[index]
