"""Where only the trip count of a loop read T, the result is right for every T."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from tests.models import noise

Forward = Callable[..., Any]


class Frames(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.cell = nn.LSTMCell(4, 5)
        self.run = forward

    def features(self, frame: Tensor) -> Tensor:
        return F.relu(self.conv(frame)).mean((-2, -1))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def clip(batch: int, frames: int) -> Tensor:
    return noise(batch, frames, 3, 6, 6)


def stacked(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(x.size(1))], 1)


def unbound(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(frame) for frame in x.unbind(1)], 1)


def sliced_and_joined(self: Any, x: Tensor) -> Tensor:
    y = [self.features(x[:, t : t + 1].squeeze(1)).unsqueeze(1) for t in range(x.shape[1])]
    return torch.cat(y, dim=1)


def into_an_lstm(self: Any, x: Tensor) -> Tensor:
    return self.lstm(stacked(self, x))[0][:, -1]


def running_total(self: Any, x: Tensor) -> Tensor:
    total = 0
    for t in range(x.size(1)):
        total = total + self.features(x[:, t])
    return total / x.size(1)


def written(self: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(x.size(0), x.size(1), 4)
    for t in range(x.size(1)):
        out[:, t] = self.features(x[:, t])
    return out


def over_the_batch(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]).softmax(0) for t in range(x.size(1))], 1)


FREE = (
    stacked,
    unbound,
    sliced_and_joined,
    into_an_lstm,
    running_total,
    written,
    over_the_batch,
)


@pytest.mark.parametrize("forward", FREE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("frames", [3, 5])
def test_any_number_of_frames(forward: Forward, frames: int) -> None:
    model = Frames(forward).eval()
    result = fxtemporal.optimize(model, (clip(2, frames),), tune="static")
    for batch, other in ((2, frames), (1, 1), (3, 2), (2, 7), (2, 40)):
        torch.testing.assert_close(result(clip(batch, other)), model(clip(batch, other)))
    fixed = [entry.expression for entry in fxtemporal.report(result).specializations]
    assert fixed == ["x.dim()"]


def mean_by_the_length_of_a_list(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return sum(outs) / len(outs)


def scaled_by_a_python_number(self: Any, x: Tensor) -> Tensor:
    return stacked(self, x) / math.sqrt(int(x.size(1)))


def halved_for_long_clips(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1) * (1 if len(outs) < 8 else 2)


def a_branch_on_the_number(self: Any, x: Tensor) -> Tensor:
    y = stacked(self, x)
    return y if x.size(1) > 4 else y * 2


def every_second(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(0, x.size(1), 2)], 1)


def backwards(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in reversed(range(x.size(1)))], 1)


def without_the_ends(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(1, x.size(1) - 1)], 1)


def the_frames_apart(self: Any, x: Tensor) -> Any:
    return [self.features(x[:, t]) for t in range(x.size(1))]


def the_last_frame(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return outs[-1] + torch.stack(outs, 1).sum(1)


def weighted_by_its_number(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) * (t + 1) for t in range(x.size(1))], 1)


def with_a_cell(self: Any, x: Tensor) -> Tensor:
    state = None
    for t in range(x.size(1)):
        state = self.cell(self.features(x[:, t]), state)
    return state[0]


FIXED = (
    mean_by_the_length_of_a_list,
    scaled_by_a_python_number,
    halved_for_long_clips,
    a_branch_on_the_number,
    every_second,
    backwards,
    without_the_ends,
    the_frames_apart,
    the_last_frame,
    weighted_by_its_number,
    with_a_cell,
)


@pytest.mark.parametrize("forward", FIXED, ids=lambda f: f.__name__)
def test_another_number_is_right_or_refused(forward: Forward) -> None:
    model = Frames(forward).eval()
    result = fxtemporal.optimize(model, (clip(2, 5),), tune="static")
    torch.testing.assert_close(result(clip(3, 5)), model(clip(3, 5)))
    for frames in (3, 4, 6, 9, 20):
        try:
            actual = result(clip(2, frames))
        except fxtemporal.SpecializationError:
            continue
        torch.testing.assert_close(actual, model(clip(2, frames)))


def test_without_verification_the_number_stays() -> None:
    result = fxtemporal.optimize(Frames(stacked), (clip(2, 3),), tune="static", verify=False)
    with pytest.raises(fxtemporal.SpecializationError):
        result(clip(2, 4))
