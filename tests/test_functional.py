"""Each form of conv3d equals conv3d on its domain, and refuses everything else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxtemporal import functional
from fxtemporal.functional import FORMS, ConvGeometry

MODES = ("zeros", "reflect", "replicate", "circular")
NAMES = tuple(FORMS)

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# nn.Conv3d itself warns that "same" with an even kernel copies its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@dataclass(frozen=True)
class Case:
    """A convolution on one form's domain, and the sizes of two inputs (B, T, H, W)."""

    geometry: ConvGeometry
    bias: bool
    sizes: tuple[tuple[int, int, int, int], ...]

    @property
    def keywords(self) -> dict[str, Any]:
        g = self.geometry
        return {
            "stride": g.stride,
            "padding": g.padding,
            "dilation": g.dilation,
            "groups": g.groups,
            "padding_mode": g.padding_mode,
        }

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Conv3d:
        g = self.geometry
        torch.manual_seed(0)
        channels = (g.in_channels, g.out_channels, g.kernel)
        return nn.Conv3d(*channels, bias=self.bias, dtype=dtype, **self.keywords)

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        torch.manual_seed(1)
        c = self.geometry.in_channels
        return [torch.randn(b, c, t, h, w, dtype=dtype) for b, t, h, w in self.sizes]


def triples(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    groups = draw(st.integers(1, 3))
    kernel = draw(triples(1, 4))
    dilation = draw(triples(1, 2))
    stride = draw(triples(1, 3))
    mode = draw(st.sampled_from(MODES))
    padding: Any = draw(st.one_of(triples(0, 2), st.sampled_from(["same", "valid"])))
    if name == "conv3d_spatial":
        kernel = (1, *kernel[1:])
    elif name == "conv3d_temporal":
        kernel = (kernel[0], 1, 1)
    elif name == "conv3d_pointwise":
        kernel = (1, 1, 1)
    elif name == "conv3d_full_extent" and padding == "same":
        kernel = (1, *kernel[1:])
    elif name == "conv3d_full_extent" and padding != "valid":
        padding = (0, *padding[1:])
    elif name == "conv3d_patchify":
        stride, padding = kernel, draw(st.sampled_from([(0, 0, 0), "valid"]))
        dilation = tuple(1 if k > 1 else d for k, d in zip(kernel, dilation, strict=True))
    if padding == "same":
        stride = (1, 1, 1)
    geometry = ConvGeometry(
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    )
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = []
    for batch in (draw(st.integers(1, 3)), draw(st.integers(0, 3))):
        size = []
        for axis in range(3):
            pads = geometry.pads[axis]
            low = max(1, reach[axis] - sum(pads))
            if mode == "reflect":  # which needs more than it mirrors
                low = max(low, max(pads) + 1)
            elif mode == "circular":
                low = max(low, *pads)
            size.append(draw(st.integers(low, low + 4)))
        if name == "conv3d_full_extent":
            size[0] = reach[0]
        sizes.append((batch, *size))
    if name == "conv3d_full_extent":
        geometry = replace(geometry, frames=reach[0])
    return Case(geometry, draw(st.booleans()), tuple(sizes))


def call(name: str, case: Case, layer: nn.Conv3d, x: Tensor) -> Tensor:
    return FORMS[name].function(x, layer.weight, layer.bias, **case.keywords)


def assert_close(result: Tensor, reference: Tensor, relative: float = 1e-12) -> None:
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    if reference.numel():
        scale = max(1.0, reference.abs().max().item())
        assert (result - reference).abs().max().item() <= relative * scale


@pytest.mark.parametrize("name", NAMES)
def test_equals_conv3d_with_its_gradients_at_two_sizes(name: str) -> None:
    @quick
    @given(cases(name))
    def check(case: Case) -> None:
        assert list(FORMS[name].blockers(case.geometry)) == []
        layer = case.layer()
        for x in case.inputs():
            x.requires_grad_()
            before = x.detach().clone()
            leaves = [x, *layer.parameters()]
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
                scale = reference.abs().max().item()
                own = (layer(x) - reference).abs().max().item()
                ours = (result - reference).abs().max().item()
                assert ours <= 4 * own + 1e-6 * max(1.0, scale)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_equals_conv3d_without_a_batch(name: str) -> None:
    @settings(quick, max_examples=15)
    @given(cases(name))
    def check(case: Case) -> None:
        layer, x = case.layer(), case.inputs()[0][0]
        assert_close(call(name, case, layer, x), layer(x))

    check()


ONE_EACH = {
    "conv3d": ((3, 3, 3), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d_spatial": ((1, 3, 2), {"stride": (2, 1, 2), "padding": (0, 1, 1)}),
    "conv3d_temporal": ((3, 1, 1), {"stride": (1, 2, 1), "padding": (1, 0, 0)}),
    "conv3d_pointwise": ((1, 1, 1), {"stride": (2, 2, 1)}),
    "conv3d_full_extent": ((4, 3, 3), {"padding": (0, 1, 1)}),
    "conv3d_patchify": ((2, 3, 2), {"stride": (2, 3, 2)}),
}


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        kernel, self.keywords = ONE_EACH[name]
        self.function = FORMS[name].function
        torch.manual_seed(0)
        self.conv = nn.Conv3d(4, 6, kernel, groups=2, **self.keywords)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.conv.weight, self.conv.bias, groups=2, **self.keywords)


def test_one_each_names_every_form() -> None:
    assert tuple(ONE_EACH) == NAMES
    assert all(FORMS[name].function is getattr(functional, name) for name in NAMES)
    assert {*NAMES, "FORMS", "ConvGeometry", "Form", "conv3d_spanning"} == set(functional.__all__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_half_precision(name: str, dtype: torch.dtype) -> None:
    layer, x = Layer(name), torch.randn(2, 4, 4, 9, 8)
    result, reference = layer.to(dtype)(x.to(dtype)), layer.conv.float()(x.to(dtype).float())
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), reference, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_input(name: str) -> None:
    layer = Layer(name)
    x = torch.randn(2, 8, 9, 4, 4).permute(0, 3, 4, 2, 1)  # (B, C, T, H, W), strides in disorder
    torch.testing.assert_close(layer(x), layer.conv(x))


@pytest.mark.parametrize("name", NAMES)
def test_export_keeps_the_batch_free(name: str) -> None:
    layer, batch = Layer(name), torch.export.Dim("batch")
    x = torch.randn(3, 4, 4, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 7):
        x = torch.randn(size, 4, 4, 9, 8)
        torch.testing.assert_close(program(x), layer.conv(x))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "conv3d_full_extent"])
def test_export_keeps_frames_and_pixels_free(name: str) -> None:
    layer = Layer(name)
    free = {axis: torch.export.Dim(f"d{axis}", min=6, max=99) for axis in (2, 3, 4)}
    x = torch.randn(2, 4, 8, 12, 11)
    program = torch.export.export(layer, (x,), dynamic_shapes=(free,)).module()
    for size in ((6, 7, 9), (11, 13, 12)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(program(x), layer.conv(x))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name: str) -> None:
    layer = Layer(name)
    x = torch.randn(3, 4, 4, 9, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), layer.conv(x))


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
        g = replace(case.geometry, frames=x.shape[2])
        if any(FORMS[name].blockers(g)):
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
