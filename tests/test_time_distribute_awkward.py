"""Awkward loops compute the same when they are re-rolled, or say why they are not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from tests.awkward_loops import CASES
from tests.awkward_loops.case import Case, vectors
from tests.rerolling import (
    LINE,
    all_differences,
    convolutions,
    differs,
    optimized,
    reasons,
    remarks,
    rerolled,
)

pytestmark = pytest.mark.usefixtures("in_float64")

NAMES = [c.forward.__name__ for c in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_an_awkward_loop_computes_the_same_at_every_size(case: Case) -> None:
    model, fast = rerolled(case)
    assert [r for r in remarks(fast) if r.status == "failed"] == []
    assert all_differences(model, fast, case.inputs, case.at, case.fixed) == {}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_an_awkward_loop_is_rerolled_or_says_why_not(case: Case) -> None:
    _, fast = rerolled(case)
    assert remarks(fast) or case.at[1] == 1
    for remark in remarks(fast):
        assert LINE.search(remark.location or ""), remark
        assert remark.reasons or remark.status == "applied"
    if case.left is not None:
        assert convolutions(fast, case.inputs(*case.at)) == case.left, reasons(fast)
    if case.code is not None:
        assert LINE.search(reasons(fast)[case.code])


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_verification_finds_nothing_wrong_with_an_awkward_loop(case: Case) -> None:
    model, alone = rerolled(case)
    fast = optimized(model, case.inputs(*case.at), verify=True)
    assert [(r.target, r.status) for r in remarks(fast)] == [
        (r.target, r.status) for r in remarks(alone)
    ]


def test_a_shape_that_depends_on_the_data_stays_in_the_loop_or_is_not_captured() -> None:
    class PositiveOnly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            outs = [torch.tanh(x[:, t]) for t in range(x.size(1))]
            return torch.stack([y[y > 0].sum() for y in outs])

    model = PositiveOnly()
    with contextlib.suppress(fxtemporal.CaptureError):
        assert differs(model, optimized(model, vectors(2, 4)), vectors(2, 4)) is None
