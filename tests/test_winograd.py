"""Temporal Winograd convolution: fewer products, and an error that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import WINOGRAD
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxtemporal.functional import FORMS, ConvGeometry, conv3d_in_form, winograd_weight

BOUNDS = {3: 2e-6, 4: 2e-6, 5: 4e-6, 6: 6e-6}  # by the products of a tile

# (kT, temporal stride, temporal dilation) on the domain of F(m, ·), by m
KERNELS: dict[int, list[tuple[int, int, int]]] = {
    2: [(2, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 1), (3, 2, 1), (5, 2, 1), (7, 3, 1), (3, 1, 3)],
    3: [(2, 1, 1), (3, 1, 1), (4, 1, 1), (3, 2, 1), (5, 2, 1), (7, 2, 1), (3, 1, 2)],
    4: [(2, 1, 1), (3, 1, 1), (3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 1, 4)],
}
ALL = [(m, *kernel) for m, kernels in KERNELS.items() for kernel in kernels]


def geometry(**changes: Any) -> ConvGeometry:
    default: dict[str, Any] = {"kernel": (3, 3, 3), "dtype": torch.float32}
    return ConvGeometry(4, 4, **{**default, **changes})


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(("m", "taps", "stride", "dilation"), ALL)
def test_the_error_in_float32_keeps_its_bound(
    m: int, taps: int, stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 24, 7, 6), torch.randn(32, 64, taps, 3, 3)
    rest = ((stride, 1, 1), (taps // 2, 1, 1), (dilation, 1, 1))
    reference = F.conv3d(x.double(), weight.double(), None, *rest)
    own = relative_error(F.conv3d(x, weight, None, *rest), reference)
    ours = relative_error(FORMS[f"conv3d_winograd_{m}"].function(x, weight, None, *rest), reference)
    assert ours <= BOUNDS[m + -(-taps // stride) - 1]
    assert own <= 1e-6
    in_float64 = FORMS[f"conv3d_winograd_{m}"].function(x.double(), weight.double(), None, *rest)
    assert relative_error(in_float64, reference) <= 1e-14


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
@pytest.mark.parametrize(("m", "taps", "stride", "dilation"), ALL)
def test_any_number_of_frames(m: int, taps: int, stride: int, dilation: int, frames: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, frames, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(6, 2, taps, 3, 2).double(), torch.randn(6).double()
    padding = (dilation * (taps - 1)) // 2
    rest = ((stride, 1, 1), (padding, 1, 0), (dilation, 1, 1), 2)
    function = FORMS[f"conv3d_winograd_{m}"].function
    if frames + 2 * padding < dilation * (taps - 1) + 1:
        with pytest.raises(RuntimeError, match="smaller than the kernel"):
            function(x, weight, bias, *rest)
    else:
        reference = F.conv3d(x, weight, bias, *rest)
        assert relative_error(function(x, weight, bias, *rest), reference) <= 1e-13


@pytest.mark.parametrize(
    ("m", "taps", "stride", "products", "direct"),
    [
        (2, 3, 1, 4, 6),
        (4, 3, 1, 6, 12),
        (2, 5, 1, 6, 10),
        (3, 2, 1, 4, 6),
        (2, 3, 2, 5, 6),
        (4, 3, 2, 9, 12),
        (2, 5, 2, 7, 10),
    ],
)
def test_a_tile_takes_fewer_products(
    m: int, taps: int, stride: int, products: int, direct: int
) -> None:
    x, weight = torch.randn(1, 8, 12 * stride + taps - stride, 5, 5), torch.randn(8, 8, taps, 3, 3)
    counts = []
    for function in (FORMS[f"conv3d_winograd_{m}"].function, FORMS["conv3d"].function):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, stride=(stride, 1, 1))
        counts.append(counter.get_total_flops())
    assert counts[0] * direct == counts[1] * products


@pytest.mark.parametrize("m", [2, 3, 4])
def test_in_half_precision_it_would_be_less_accurate_and_is_refused(m: int) -> None:
    form = FORMS[f"conv3d_winograd_{m}"]
    for dtype in (torch.float16, torch.bfloat16):
        sentences = list(form.blockers(geometry(dtype=dtype)))
        assert sentences == [f"in {dtype} it would be less accurate than conv3d"]
        x, weight = torch.randn(1, 2, 5, 4, 4, dtype=dtype), torch.randn(2, 2, 3, 3, 3, dtype=dtype)
        with pytest.raises(ValueError, match="less accurate"):
            form.function(x, weight)
    assert list(form.blockers(geometry(dtype=None))) == ["the dtype is not known"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_in_half_precision_is_more_than_twice_that_of_conv3d(dtype: torch.dtype) -> None:
    """Why it is refused: of F(2, 3), the most accurate, computed as the form would."""
    torch.manual_seed(0)
    d, w = torch.randn(4, 1000, 64).to(dtype), torch.randn(3, 64).to(dtype)
    exact = torch.stack([sum(d[i + k].double() @ w[k].double() for k in range(3)) for i in (0, 1)])
    direct = exact.to(dtype)  # the products of conv3d are added up in float32, and rounded once
    v = [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]]
    u = [w[0], (w[0] + w[1] + w[2]) / 2, (w[0] - w[1] + w[2]) / 2, w[2]]
    p = [(a.float() @ b.float()).to(dtype) for a, b in zip(v, u, strict=True)]
    ours = torch.stack([p[0] + p[1] + p[2], p[1] - p[2] + p[3]])
    errors = [(y.double() - exact).square().mean().sqrt().item() for y in (direct, ours)]
    assert errors[1] > 2 * errors[0]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_under_autocast_it_is_refused() -> None:
    x, weight = torch.randn(1, 2, 5, 4, 4), torch.randn(2, 2, 3, 3, 3)
    form = FORMS["conv3d_winograd_2"].function
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="less accurate"):
            form(x, weight)
        assert conv3d_in_form("conv3d_winograd_2", x, weight).dtype == torch.bfloat16
        assert form(x.double(), weight.double()).dtype == torch.float64
    assert form(x, weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("conv3d_winograd_2", {"kernel": (1, 3, 3)}, "no two of the 1 taps"),
        ("conv3d_winograd_2", {"stride": (3, 1, 1)}, "at stride 3 no two of the 3 taps"),
        ("conv3d_winograd_4", {"kernel": (4, 3, 3)}, "F(4, 4) needs more than 6 products"),
        (
            "conv3d_winograd_2",
            {"kernel": (5, 1, 1), "stride": (2, 1, 1), "dilation": (2, 1, 1)},
            "the stride 2 and the dilation 2",
        ),
    ],
)
def test_every_blocker(name: str, changes: dict[str, Any], sentence: str) -> None:
    (blocker,) = FORMS[name].blockers(geometry(**changes))
    assert sentence in blocker


def test_the_transformed_taps_of_the_textbook() -> None:
    w = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64)
    w0, w1, w2 = w.unbind(2)
    u = winograd_weight(w, 2)
    assert u.shape == (4, 5, 4, 2, 2)
    for k, expected in enumerate((-w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2)):
        torch.testing.assert_close(u[k], expected)
    phases = winograd_weight(w, 2, stride=2)
    assert phases.shape == (4, 5, 4, 2, 2)
    torch.testing.assert_close(phases[3], w1)


@pytest.mark.parametrize("name", WINOGRAD)
def test_complex_numbers(name: str) -> None:
    x, weight = torch.randn(1, 2, 6, 4, 4).cfloat(), torch.randn(2, 2, 3, 3, 3).cfloat()
    x, weight = x * (1 + 2j), weight * (2 - 1j)
    result = FORMS[name].function(x, weight)
    torch.testing.assert_close(result, F.conv3d(x, weight), rtol=1e-4, atol=1e-4)
