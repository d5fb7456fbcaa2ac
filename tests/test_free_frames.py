"""Where only the trip count of a loop read T, the result is right for every T."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from fxtemporal import SpecializationError
from fxtemporal.ir.admitted import AdmittedFrames
from tests.strictly import strictly
from tests.zoo import noise

Forward = Callable[..., Any]


class Frames(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.cell = nn.LSTMCell(4, 5)
        self.stem = nn.Conv3d(3, 3, 3, padding=1)
        self.positions = nn.Parameter(noise(64, 4))
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


def every_second(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(0, x.size(1), 2)], 1)


def every_third_from_one(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(1, x.size(1), 3)], 1)


def backwards(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in reversed(range(x.size(1)))], 1)


def turned_around(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(x.size(1))][::-1], 1)


def without_the_ends(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) for t in range(1, x.size(1) - 1)], 1)


def differences(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t] - x[:, t - 1]) for t in range(1, x.size(1))], 1)


def the_last_frame(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return outs[-1] + torch.stack(outs, 1).sum(1)


def mean_by_the_length_of_a_list(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return sum(outs) / len(outs)


def with_a_cell(self: Any, x: Tensor) -> Tensor:
    state = None
    for t in range(x.size(1)):
        state = self.cell(self.features(x[:, t]), state)
    return state[0]


def transposed(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(frame) for frame in x.transpose(0, 1)], 1)


def permuted(self: Any, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 1, 3, 4)
    return torch.stack([self.features(y[:, :, t]) for t in range(y.shape[2])], 1)


def rearranged(self: Any, x: Tensor) -> Tensor:
    frames = einops.rearrange(x, "b t c h w -> t b c h w")
    return torch.stack([self.features(frame) for frame in frames])


def behind_a_stem(self: Any, x: Tensor) -> Tensor:
    y = self.stem(x.transpose(1, 2))
    return torch.stack([self.features(y[:, :, t]) for t in range(y.size(2))], 1)


def looped_over_twice(self: Any, x: Tensor) -> Tensor:
    y = stacked(self, x)
    return torch.stack([torch.tanh(y[:, t]) for t in range(y.size(1))], 1)


def with_positions(self: Any, x: Tensor) -> Tensor:
    frames = [self.features(x[:, t]) + self.positions[t] for t in range(x.size(1))]
    return torch.stack(frames, 1)


def split_one_by_one(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(frame.squeeze(1)) for frame in x.split(1, 1)], 1)


FREE = (
    stacked,
    unbound,
    sliced_and_joined,
    into_an_lstm,
    running_total,
    written,
    over_the_batch,
    every_second,
    every_third_from_one,
    backwards,
    turned_around,
    without_the_ends,
    differences,
    the_last_frame,
    mean_by_the_length_of_a_list,
    with_a_cell,
    transposed,
    permuted,
    rearranged,
    behind_a_stem,
    looped_over_twice,
    with_positions,
    split_one_by_one,
)


LEAST = {without_the_ends: 3, differences: 2, every_third_from_one: 2}


@pytest.mark.parametrize("forward", FREE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("frames", [5, 6])
def test_any_number_of_frames(forward: Forward, frames: int) -> None:
    model = Frames(forward).eval()
    result = strictly(model, (clip(2, frames),), tune="static")
    for batch, other in ((2, frames), (1, 1), (3, 2), (2, 7), (2, 40)):
        if other < LEAST.get(forward, 1):
            continue  # nothing is left to stack
        torch.testing.assert_close(result(clip(batch, other)), model(clip(batch, other)))
    fixed = [entry.expression for entry in fxtemporal.report(result).specializations]
    assert fixed == ["x.dim()"]


def scaled_by_a_python_number(self: Any, x: Tensor) -> Tensor:
    return stacked(self, x) / math.sqrt(int(x.size(1)))


def halved_for_long_clips(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1) * (1 if len(outs) < 8 else 2)


def halved_for_short_clips(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1) * (0.5 if len(outs) < 4 else 1.0)


def another_path_for_two(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1) if len(outs) > 2 else torch.stack(outs, 1).exp()


def a_constant_of_the_number(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1) * torch.tensor([float(len(outs)), 1.0, 2.0, 3.0])


def a_third_of_the_number(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1) * (len(outs) // 3)


def a_branch_on_the_number(self: Any, x: Tensor) -> Tensor:
    y = stacked(self, x)
    return y if x.size(1) > 4 else y * 2


def the_frames_apart(self: Any, x: Tensor) -> Any:
    return [self.features(x[:, t]) for t in range(x.size(1))]


def weighted_by_its_number(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.features(x[:, t]) * (t + 1) for t in range(x.size(1))], 1)


FIXED = (
    scaled_by_a_python_number,
    halved_for_long_clips,
    halved_for_short_clips,
    another_path_for_two,
    a_constant_of_the_number,
    a_third_of_the_number,
    a_branch_on_the_number,
    the_frames_apart,
    weighted_by_its_number,
)


@pytest.mark.parametrize("forward", FIXED, ids=lambda f: f.__name__)
def test_another_number_is_right_or_refused(forward: Forward) -> None:
    model = Frames(forward).eval()
    result = strictly(model, (clip(2, 5),), tune="static")
    torch.testing.assert_close(result(clip(3, 5)), model(clip(3, 5)))
    for frames in (1, 2, 3, 4, 6, 7, 8, 9, 20):
        try:
            actual = result(clip(2, frames))
        except fxtemporal.SpecializationError:
            continue
        torch.testing.assert_close(actual, model(clip(2, frames)))


@pytest.mark.parametrize(
    ("step", "rest", "given", "others"),
    [(4, 1, 9, (5, 13, 33)), (4, 1, 17, (21, 9)), (2, 0, 6, (2, 10)), (4, 0, 16, (20, 8))],
)
def test_a_model_that_takes_some_numbers_only(
    step: int, rest: int, given: int, others: tuple[int, ...]
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.size(1) % step != rest:
            raise ValueError(f"give {step} k + {rest} frames")
        return stacked(self, x)

    model = Frames(forward)
    result = strictly(model, (clip(2, given),), tune="static")
    for frames in others:
        torch.testing.assert_close(result(clip(1, frames)), model(clip(1, frames)))
    with pytest.raises((SpecializationError, ValueError)):
        result(clip(1, given + 1))


def test_without_verification_the_number_stays() -> None:
    result = strictly(Frames(stacked), (clip(2, 3),), tune="static", verify=False)
    with pytest.raises(fxtemporal.SpecializationError):
        result(clip(2, 4))


def test_a_refused_number_of_frames_is_traced_once() -> None:
    class Branches(nn.Module):
        """Another graph from 9 frames on."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            frames = [self.conv(x[:, t]) for t in range(x.size(1))]
            return torch.stack(frames, 1) * (2 if len(frames) > 8 else 1)

    result = strictly(Branches(), (torch.rand(2, 4, 3, 8, 8),), tune="static")
    (admitted,) = (m for m in result.modules() if isinstance(m, AdmittedFrames))
    same_graph, asked = admitted._same_graph, []
    admitted._same_graph = lambda frames: asked.append(frames) or same_graph(frames)
    for _ in range(3):
        with pytest.raises(fxtemporal.SpecializationError, match="at 12 the forward gave another"):
            result(torch.rand(2, 12, 3, 8, 8))
        result(torch.rand(2, 6, 3, 8, 8))
    assert asked == [12, 6]


class WithTheOneBefore(nn.Module):
    """From the second frame on another graph, whose result the ReLU hides now and then."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        before, last = None, None
        for frame in x.unbind(1):
            joined = frame if before is None else torch.cat([frame, before], -1)[..., ::2]
            last, before = F.relu(self.linear(joined)), frame
        return last


@pytest.mark.parametrize("bias", [0.0, -1.0, -3.0, -20.0])
def test_one_frame_is_not_admitted_by_chance(bias: float) -> None:
    model = WithTheOneBefore(bias)
    result = strictly(model, (torch.rand(2, 2, 4),), tune="static")
    for frames in (1, 2, 3, 9):
        x = 40 * noise(5, frames, 4)
        try:
            actual = result(x)
        except fxtemporal.SpecializationError:
            assert frames == 1
        else:
            torch.testing.assert_close(actual, model(x))


def writes_behind_a_break(self: Any, x: Tensor) -> Tensor:
    out = self.features(x[:, 0])
    for t in range(x.size(1)):
        self.conv.bias.data.mul_(0.9)
        if t == 2:
            break
        out = self.features(x[:, t])
    return out


def detaches_one_frame(self: Any, x: Tensor) -> Tensor:
    y = stacked(self, x)
    return y.detach() if x.size(1) == 1 else y


def doubles_the_gradient_of_two(self: Any, x: Tensor) -> Tensor:
    y = stacked(self, x)
    return 2 * y - y.detach() if x.size(1) == 2 else y


@pytest.mark.parametrize(
    "forward", [writes_behind_a_break, detaches_one_frame, doubles_the_gradient_of_two]
)
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_what_equal_outputs_do_not_show(forward: Forward, frames: int) -> None:
    """A number of frames is not admitted for its outputs alone: writes and gradients count too."""
    model, reference = Frames(forward), Frames(forward)
    result = fxtemporal.optimize(model, (clip(2, 3),), tune="static")
    x = clip(1, frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual, expected = result(x), reference(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(model.conv.bias, reference.conv.bias)
    assert actual.requires_grad == expected.requires_grad
    if expected.requires_grad:
        actual.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(model.conv.weight.grad, reference.conv.weight.grad)
