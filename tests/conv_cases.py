"""Convolutions drawn at random on the domain of one form, for the tests of the forms of conv3d."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxtemporal.functional import FORMS, ConvGeometry

MODES = ("zeros", "reflect", "replicate", "circular")
NAMES = tuple(FORMS)
WINOGRAD = {"conv3d_winograd_2": 2, "conv3d_winograd_3": 3, "conv3d_winograd_4": 4}

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclass(frozen=True)
class Case:
    """A convolution on one form's domain, and the sizes of two inputs (B, T, H, W)."""

    geometry: ConvGeometry
    bias: bool
    sizes: tuple[tuple[int, int, int, int], ...]
    rank: int | None = None  # of the weight over time; None: as it comes

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

    def layer(self, dtype: torch.dtype = torch.float64) -> Padded:
        torch.manual_seed(0)
        return Padded(self, dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        torch.manual_seed(1)
        c = self.geometry.in_channels
        return [torch.randn(b, c, t, h, w, dtype=dtype) for b, t, h, w in self.sizes]


class Padded(nn.Conv3d):
    """The reference: nn.Conv3d itself, behind the zeros of ``time_padding``."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        g = case.geometry
        super().__init__(
            g.in_channels, g.out_channels, g.kernel, bias=case.bias, dtype=dtype, **case.keywords
        )
        self.time_padding = g.time_padding
        if case.rank is not None:
            filters = torch.randn(case.rank, g.kernel[0], dtype=dtype)
            kernels = self.weight.detach()[:, :, : case.rank] / case.rank
            self.weight = nn.Parameter(
                torch.einsum("ocihw,it->octhw", kernels, filters), requires_grad=False
            )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, *self.time_padding)))


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
    time_padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    rank = None
    if name == "conv3d_spatial":
        kernel = (1, *kernel[1:])
    elif name == "conv3d_temporal":
        kernel = (kernel[0], 1, 1)
    elif name == "conv3d_pointwise":
        kernel = (1, 1, 1)
    elif name == "conv3d_full_extent":
        time_padding = (0, 0)
        if padding == "same":
            kernel = (1, *kernel[1:])
        elif padding != "valid":
            padding = (0, *padding[1:])
    elif name == "conv3d_patchify":
        time_padding = (0, 0)
        stride, padding = kernel, draw(st.sampled_from([(0, 0, 0), "valid"]))
        dilation = tuple(1 if k > 1 else d for k, d in zip(kernel, dilation, strict=True))
    elif name == "conv3d_spread":
        stride = (1, *stride[1:])
    elif name in WINOGRAD:
        phases = 1 if padding == "same" else stride[0]
        longest = draw(st.integers(2, 7 - WINOGRAD[name]))
        kernel = (phases * longest - draw(st.integers(0, phases - 1)), *kernel[1:])
        if phases > 1:
            dilation = (1, *dilation[1:])
    elif name == "conv3d_low_rank":
        kernel = (max(2, kernel[0]), *kernel[1:])
        rank = draw(st.integers(1, kernel[0] - 1))
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
        time_padding=time_padding,
        dtype=torch.float64,
    )
    sizes = []
    for batch in (draw(st.integers(1, 3)), draw(st.integers(0, 3))):
        size = []
        for axis in range(3):
            pads = geometry.layer_pads[axis]
            low = max(1, geometry.reach[axis] - sum(geometry.pads[axis]))
            zeros = sum(time_padding) if axis == 0 else 0
            if mode == "reflect":  # which needs more than it mirrors
                low = max(low, max(pads) + 1 - zeros)
            elif mode == "circular":
                low = max(low, max(pads) - zeros)
            high = low + 4
            if name == "conv3d_toeplitz" and axis == 0:
                high = max(low, geometry.reach[0])
            size.append(draw(st.integers(low, high)))
        if name == "conv3d_full_extent":
            size[0] = geometry.reach[0]
        sizes.append((batch, *size))
    if name == "conv3d_toeplitz" and max(s[1] for s in sizes) > geometry.reach[0]:
        # Mirroring needs more frames than the kernel reaches over: without it, then.
        geometry = replace(geometry, padding_mode="zeros")
        sizes = [(b, min(t, geometry.reach[0]), h, w) for b, t, h, w in sizes]
    return Case(geometry, draw(st.booleans()), tuple(sizes), rank)


def call(name: str, case: Case, layer: nn.Conv3d, x: Tensor) -> Tensor:
    more = {"time_padding": case.geometry.time_padding, **case.keywords}
    return FORMS[name].function(x, layer.weight, layer.bias, **more)


def assert_close(result: Tensor, reference: Tensor, relative: float = 1e-12) -> None:
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    if reference.numel():
        scale = max(1.0, reference.abs().max().item())
        assert (result - reference).abs().max().item() <= relative * scale


ONE_EACH: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "conv3d": ((3, 3, 3), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d_spatial": ((1, 3, 2), {"stride": (2, 1, 2), "padding": (0, 1, 1)}),
    "conv3d_temporal": ((3, 1, 1), {"stride": (1, 2, 1), "padding": (1, 0, 0)}),
    "conv3d_pointwise": ((1, 1, 1), {"stride": (2, 2, 1)}),
    "conv3d_full_extent": ((4, 3, 3), {"padding": (0, 1, 1)}),
    "conv3d_patchify": ((2, 3, 2), {"stride": (2, 3, 2)}),
    "conv3d_channels_last_3d": ((3, 3, 3), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d_taps": ((3, 3, 3), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d_stacked": ((3, 3, 3), {"stride": (2, 2, 1), "time_padding": (2, 0)}),
    "conv3d_spread": ((3, 3, 2), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d_toeplitz": ((3, 3, 3), {"padding": (1, 1, 1), "dilation": (2, 1, 1)}),
    "conv3d_winograd_2": ((3, 3, 3), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "conv3d_winograd_3": ((3, 3, 3), {"stride": (2, 1, 1), "padding": (1, 1, 0)}),
    "conv3d_winograd_4": ((3, 3, 3), {"padding": (1, 1, 1), "time_padding": (1, 0)}),
    "conv3d_low_rank": ((3, 3, 3), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
}


class Layer(nn.Module):
    """One call of each form, of 4 to 6 channels in 2 groups, on at least 4 frames of 9×8."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kernel, self.keywords = ONE_EACH[name]
        self.form = FORMS[name]
        self.function = self.form.function
        torch.manual_seed(0)
        conv = {key: value for key, value in self.keywords.items() if key != "time_padding"}
        self.conv = nn.Conv3d(4, 6, kernel, groups=2, **conv)
        if name == "conv3d_low_rank":
            with torch.no_grad():
                self.conv.weight.copy_(self.conv.weight[:, :, :1] / 2)
            self.conv.weight.requires_grad_(False)

    def geometry(self, x: Tensor) -> ConvGeometry:
        kernel = tuple(self.conv.kernel_size)
        return ConvGeometry(4, 6, kernel, groups=2, **self.keywords).at(x)

    def reference(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, *self.keywords.get("time_padding", (0, 0)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.conv.weight, self.conv.bias, groups=2, **self.keywords)
