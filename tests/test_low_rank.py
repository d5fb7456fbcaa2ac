"""A kernel whose taps are combinations of few: found by its numbers, exact, never in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxtemporal.functional import FORMS, ConvGeometry, conv3d_low_rank, temporal_rank

FORM = FORMS["conv3d_low_rank"]


def of_rank(rank: int, taps: int, out: int = 6, channels: int = 4, **kinds: Any) -> Tensor:
    torch.manual_seed(0)
    filters, kernels = torch.randn(rank, taps), torch.randn(rank, out, channels, 3, 2)
    return torch.einsum("rt,rochw->octhw", filters.double(), kernels.double()).to(**kinds)


def inflated(**kinds: Any) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(6, 4, 1, 3, 2) / 3).expand(-1, -1, 3, -1, -1).contiguous().to(**kinds)


def centred(**kinds: Any) -> Tensor:
    weight = torch.zeros(6, 4, 3, 3, 2)
    weight[:, :, 1] = inflated()[:, :, 0]
    return weight.to(**kinds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rank", "taps"), [(1, 2), (1, 3), (2, 3), (3, 5), (5, 5), (3, 3)])
def test_the_rank_is_found(rank: int, taps: int, dtype: torch.dtype) -> None:
    assert temporal_rank(of_rank(rank, taps, dtype=dtype)) == rank


def test_the_rank_of_inflated_kernels_is_one() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert temporal_rank(inflated(dtype=dtype)) == 1
        assert temporal_rank(centred(dtype=dtype)) == 1
    assert temporal_rank(torch.zeros(2, 2, 3, 1, 1)) == 0


def test_one_number_changed_by_little_more_than_rounding_counts() -> None:
    weight = inflated(dtype=torch.float32)
    weight[0, 0, 0, 0, 0] += 1e-4
    assert temporal_rank(weight) == 2
    weight = inflated(dtype=torch.float64)
    weight[0, 0, 0, 0, 0] += 1e-10
    assert temporal_rank(weight) == 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [2, 6])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("rank", "stride"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_filtering_before_and_after_the_convolution(
    rank: int, stride: int, groups: int, out: int, bias: bool
) -> None:
    """C_out < C filters the results, and everything else the frames."""
    weight = of_rank(rank, 3, out, 4 // groups, dtype=torch.float64)
    offset = torch.randn(out).double() if bias else None
    for shape in ((2, 4, 5, 4, 4), (1, 4, 1, 5, 3)):
        x = torch.randn(shape).double().requires_grad_()
        rest = ((stride, 1, 1), (1, 1, 0), (1, 1, 1), groups)
        result, reference = (f(x, weight, offset, *rest) for f in (conv3d_low_rank, F.conv3d))
        assert_close(result, reference, 1e-13)
        upstream = torch.randn_like(reference)
        (ours,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (result, reference))
        assert_close(ours, theirs, 1e-13)


def test_the_work_is_that_of_the_rank() -> None:
    x, weight = torch.randn(1, 4, 8, 6, 6), inflated()
    geometry = ConvGeometry(4, 6, (3, 3, 2), padding=(1, 1, 1))
    prepared = FORM.prepare(weight, geometry)
    with FlopCounterMode(display=False) as ours:
        FORM.run(x, prepared, None, geometry)
    with FlopCounterMode(display=False) as direct:
        F.conv3d(x, weight, padding=1)
    assert ours.get_total_flops() * 3 == direct.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [inflated, centred])
def test_in_half_precision_it_is_as_accurate_as_conv3d(weight: Any, dtype: torch.dtype) -> None:
    w, x = weight(dtype=dtype), torch.randn(2, 4, 9, 8, 8).to(dtype)
    exact = F.conv3d(x.double(), w.double())
    errors = [
        (f(x, w).double() - exact).square().mean().sqrt().item()
        for f in (conv3d_low_rank, F.conv3d)
    ]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (torch.randn(6, 4, 3, 3, 2), "the 3 taps are of full rank"),
        (inflated().requires_grad_(), "the weight is being trained, and its rank may change"),
        (inflated() * torch.inf, "the weight is not finite"),
        (
            of_rank(1, 3, dtype=torch.bfloat16) * torch.tensor(1.0).bfloat16(),
            None,  # rounded to bfloat16 it may be of any rank; whatever is said, it is refused
        ),
    ],
)
def test_what_the_numbers_forbid(weight: Tensor, sentence: str | None) -> None:
    geometry = ConvGeometry(4, 6, (3, 3, 2), dtype=weight.dtype)
    assert not list(FORM.blockers(geometry))
    blockers = list(FORM.weight_blockers(weight, geometry))
    assert blockers == [sentence] if sentence else blockers
    for attempt in (
        lambda: FORM.prepare(weight, geometry),
        lambda: conv3d_low_rank(torch.randn(1, 4, 5, 4, 4).to(weight.dtype), weight),
    ):
        with pytest.raises(ValueError, match="conv3d_low_rank does not compute"):
            attempt()


def test_a_trained_weight_is_taken_where_no_gradient_is_asked_for() -> None:
    weight = inflated().requires_grad_()
    x = torch.randn(1, 4, 5, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(conv3d_low_rank(x, weight), F.conv3d(x, weight))


def test_one_tap_is_of_no_low_rank() -> None:
    geometry = ConvGeometry(4, 6, (1, 3, 2))
    assert list(FORM.blockers(geometry)) == ["the kernel reaches over 1 frame"]


def test_a_prepared_weight_is_exported_with_a_free_batch_and_free_frames() -> None:
    weight = inflated()
    geometry = ConvGeometry(4, 6, (3, 3, 2), padding=(1, 1, 0))

    class Prepared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("prepared", FORM.prepare(weight, geometry))

        def forward(self, x: Tensor) -> Tensor:
            return FORM.run(x, self.prepared, None, geometry)

    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("frames", min=4, max=99)}
    program = torch.export.export(Prepared(), (torch.randn(2, 4, 6, 5, 5),), dynamic_shapes=(free,))
    for batch, frames in ((3, 9), (2, 4)):
        x = torch.randn(batch, 4, frames, 5, 5)
        expected = F.conv3d(x, weight, padding=(1, 1, 0))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=5e-6)
