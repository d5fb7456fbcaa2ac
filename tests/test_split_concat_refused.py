"""A layer over a join that is not split says why, or is no candidate; the numbers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxtemporal
from fxtemporal.ir.reasons import Code
from tests.split_concat_cells import (
    FRAMES,
    HIDDEN,
    IN,
    SIDE,
    ConvLSTM,
    Coordinates,
    Direct,
    Features,
    clip,
    close,
    convolutions,
    optimized,
    remarks,
)
from tests.zoo import noise

pytestmark = pytest.mark.usefixtures("in_float64")


def hooked() -> nn.Module:
    model = ConvLSTM()
    model.conv.register_forward_hook(lambda module, args, out: out * 2)
    return model


def parametrized() -> nn.Module:
    model = ConvLSTM()
    parametrizations.weight_norm(model.conv)
    return model


def replaced() -> nn.Module:
    model = ConvLSTM()
    plain = model.conv.forward
    model.conv.forward = lambda x: plain(x) * 2
    return model


def grouped() -> nn.Module:
    return ConvLSTM(channels=HIDDEN, groups=2)


class WritesJoin(ConvLSTM):
    """The join is written before the layer reads it."""

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        both = torch.cat([x, h], dim=1)
        both[:, :1].mul_(2)
        return both


class WritesState(ConvLSTM):
    """A part is written between the join and the layer."""

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        h = h * 1
        both = torch.cat([x, h], dim=1)
        h.zero_()
        return both


class WritesFrames(ConvLSTM):
    """The clip is written when the first step has been taken."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        frames = [x[:, t] for t in range(x.size(1))]
        h = c = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for frame in frames:
            h, c = self.step(frame, h, c)
            x.mul_(2)
        return h


class MixedDtypes(ConvLSTM):
    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat([x.float(), h], dim=1)


class TrainedBody(Features):
    """Batch norm in training mode keeps the frames apart."""

    def eval(self) -> TrainedBody:
        return self.train()


def group_inputs(batch: int) -> Tensor:
    return noise(batch, FRAMES, HIDDEN, SIDE, SIDE).double()


REFUSED: dict[str, tuple[Callable[[], nn.Module], Code, Callable[[int], Tensor]]] = {
    "hooks": (hooked, Code.HOOKED_MODULE, clip),
    "parametrization": (parametrized, Code.PARAMETRIZED_MODULE, clip),
    "forward replaced": (replaced, Code.SUBCLASS, clip),
    "groups": (grouped, Code.UNSUPPORTED_OP, group_inputs),
    "join written": (WritesJoin, Code.VISIBLE_WRITE, clip),
    "state written": (WritesState, Code.VISIBLE_WRITE, clip),
    "frames written": (WritesFrames, Code.VISIBLE_WRITE, clip),
    "dtypes": (MixedDtypes, Code.UNSUPPORTED_OP, clip),
    "batch norm in training": (TrainedBody, Code.TRAINING_BATCHNORM, clip),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_the_same_numbers(name: str) -> None:
    build, code, inputs = REFUSED[name]
    model = build().double().eval()
    fast = optimized(model, inputs(2))
    (remark,) = remarks(fast)
    assert remark.status == "missed"
    assert {reason.code for reason in remark.reasons} == {code}
    assert remark.detail["steps"] == FRAMES
    close(fast(inputs(3).clone()), model(inputs(3).clone()))


class WrittenState(Direct):
    """One tensor is the state of each step, written between them."""

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_ones(x.size(0), HIDDEN + 1, *x.shape[3:])
        state = memory[:, 1:]
        outs = []
        for t in range(x.size(1)):
            outs.append(self.conv(torch.cat([x[:, t], state], 1)))
            memory.mul_(2)
        return torch.stack(outs, 1)


def test_a_state_that_is_written_is_read_at_each_step() -> None:
    model = WrittenState().double()
    fast = optimized(model, clip())
    missed = [remark for remark in remarks(fast) if remark.status == "missed"]
    assert "visible-write" in {str(r.code) for remark in missed for r in remark.reasons}
    assert convolutions(fast, clip()) == 1  # each cat holds the state of its step
    close(fast(clip(3)), model(clip(3)))


def test_coordinates_are_no_state_and_the_join_is_batched_whole() -> None:
    model = Coordinates().double()
    fast = optimized(model, clip())
    assert "split-concat" not in {r.rule for r in remarks(fast) if r.status == "applied"}
    assert convolutions(fast, clip()) == 1
    close(fast(clip(3)), model(clip(3)))


class WeightOfFrame(ConvLSTM):
    """All steps share a weight that the first frame makes."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * x[:, 0].mean()
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t in range(x.size(1)):
            h = F.conv2d(torch.cat([x[:, t], h], 1), weight, padding=1)[:, :HIDDEN]
        return h


# -- no candidates ---------------------------------------------------------------------------------


class JoinedFrames(nn.Module):
    """All parts are frames: the loop is re-rolled as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * IN, HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.conv(torch.cat([x[:, t], x[:, t].relu()], 1)) for t in range(x.size(1))]
        return torch.stack(outs, 1)


class OwnConvolutions(nn.Module):
    """Each step has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(IN + HIDDEN, HIDDEN, 3, padding=1) for _ in range(FRAMES)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t, conv in enumerate(self.convs):
            h = torch.tanh(conv(torch.cat([x[:, t], h], 1)))
        return h


class StatesAlone(nn.Module):
    """No part is a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * IN, IN, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = g = x[:, 0]
        for _ in range(4):
            h, g = torch.tanh(self.conv(torch.cat([h, g], 1))), h
        return h


class OtherDimension(nn.Module):
    """Frame and state are joined along a dimension of space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN, IN, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.size(1)):
            h = torch.tanh(self.conv(torch.cat([x[:, t], h], 2))[:, :, :SIDE])
        return h


class OneStep(ConvLSTM):
    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        return self.step(x[:, 0], h, h)[0]


@pytest.mark.parametrize(
    "kind",
    [JoinedFrames, OwnConvolutions, StatesAlone, OtherDimension, OneStep, WeightOfFrame],
)
def test_nothing_to_split(kind: type[nn.Module]) -> None:
    model = kind().double()
    fast = optimized(model, clip())
    assert not remarks(fast)
    close(fast(clip(3)), model(clip(3)))


class FourFrames(ConvLSTM):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv.weight.new_zeros(2, HIDDEN, SIDE, SIDE)
        for t in range(4):
            h = torch.tanh(self.conv(torch.cat([x[:, t], h], 1))[:, :HIDDEN])
        return h


def test_without_example_inputs_there_are_no_frames() -> None:
    model = FourFrames().double()
    fast = fxtemporal.optimize(model)
    assert not remarks(fast)
    close(fast(clip()), model(clip()))
