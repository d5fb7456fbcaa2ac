"""A batching rule says where the samples are in what an op gives, as the op really puts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxtemporal
from fxtemporal.analysis.batching_rules import How
from fxtemporal.analysis.loops import Loop, SourceBatch, loops_of
from fxtemporal.capture.capture import capture
from fxtemporal.ir.values import shape

SAMPLES = 7  # a size that no other dimension has
Step = Callable[[Tensor], Tensor]


class Frames(nn.Module):
    """The steps on each frame of (B, T, 2, 3, 5), and then a batch of all frames."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        frames = []
        for t in range(x.size(1)):
            f = x[:, t]
            for step in self.steps:
                f = step(f)
            frames.append(f * 2)
        return torch.stack(frames, 1)


def clip(batch: int = SAMPLES, frames: int = 4) -> Tensor:
    return torch.rand(batch, frames, 2, 3, 5, generator=torch.Generator().manual_seed(batch))


def loop_of(model: nn.Module) -> Loop:
    (loop,) = loops_of(capture(model, (clip(),)))
    return loop


def steps(rank: int) -> st.SearchStrategy[tuple[Step, int]]:
    """One op that moves dimensions of a frame of ``rank``, and the rank of what it gives."""
    dims = st.integers(0, rank - 1)
    choices = [
        st.permutations(range(rank)).map(lambda order: (lambda f: f.permute(*order), rank)),
        st.tuples(dims, dims).map(lambda two: (lambda f: f.transpose(*two), rank)),
        st.just((lambda f: f.relu(), rank)),
        st.just((lambda f: f * 3, rank)),
    ]
    if rank < 5:
        choices.append(st.integers(0, rank).map(lambda d: (lambda f: f.unsqueeze(d), rank + 1)))
    if rank > 2:
        choices.append(dims.map(lambda d: (lambda f: f.select(d, 0), rank - 1)))
        choices.append(dims.map(lambda d: (lambda f: f.unbind(d)[-1], rank - 1)))
        choices.append(
            st.integers(0, rank - 2).map(lambda d: (lambda f: f.flatten(d, d + 1), rank - 1))
        )
    return st.one_of(choices)


@st.composite
def chains(draw: st.DrawFn) -> list[Step]:
    rank, found = 4, []
    for _ in range(draw(st.integers(1, 5))):
        step, rank = draw(steps(rank))
        found.append(step)
    return found


def claims(loop: Loop) -> Iterator[tuple[tuple[int, ...], int]]:
    """The shape of what each op gives for one frame, and where the samples are said to be."""
    for family, plan in loop.plans.items():
        for dim, origin in plan.origins.items():
            if isinstance(origin, SourceBatch) and (sizes := shape(family.first)) is not None:
                yield sizes, dim


@settings(max_examples=60, deadline=None)
@given(chains())
def test_samples_are_where_the_rules_say(chain: list[Step]) -> None:
    model = Frames(chain)
    for sizes, dim in claims(loop_of(model)):
        assert sizes[dim] == SAMPLES
    result = fxtemporal.optimize(model, (clip(),), tune="static", verify=False)
    for x in (clip(), clip(3), clip(1)):
        torch.testing.assert_close(result(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("chain", "hows"),
    [
        ([lambda f: f.permute(1, 0, 2, 3), lambda f: f[0]], (How.IN_FRONT, How.IN_FRONT)),
        (
            [lambda f: f.transpose(0, 2), lambda f: f.relu(), lambda f: f.transpose(0, 2)],
            (How.IN_FRONT, How.FOLDED, How.IN_FRONT),
        ),
        ([lambda f: f.unsqueeze(0), lambda f: f.squeeze(0)], (How.IN_FRONT, How.IN_FRONT)),
    ],
)
def test_samples_that_come_back_fold_again(chain: list[Step], hows: tuple[How, ...]) -> None:
    loop = loop_of(Frames(chain))
    (source,) = (family for family in loop.families if family.source)
    plans = [loop.plans[family] for family in loop.families if family in loop.plans]
    assert [plan.how for plan in plans] == [*hows, How.FOLDED]
    assert source.source is not None
    assert plans[-1].origin == SourceBatch.of(source.source)
    assert plans[0].origin != plans[-1].origin
