"""Loops that must stay loops, each for its ``blocker``; and one that folds in eval mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxtemporal.ir.reasons import Code

from .base import CHANNELS, FEATURES, WIDTH, Awkward, WithBody, body, double, noise
from .bodies import InplaceBody, ViewByBatch


class BatchStatisticsBody(Awkward):
    """A BatchNorm without running statistics: it uses the batch's own even in eval mode."""

    blocker = Code.TRAINING_BATCHNORM

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(self.conv(x[:, t])) for t in range(x.size(1))], dim=1)


class HardCodedView(ViewByBatch):
    """``view(2, -1)``: runs at batch 2 only, and would mix frames once they are folded."""

    blocker = Code.FIXED_BATCH
    sizes = ((2, 4), (2, 6))

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.head(self.conv(x[:, t]).view(2, -1)) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class ModulePerFrame(Awkward):
    """A module of its own for each frame."""

    blocker = Code.DIFFERENT_PARAMETERS

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(body() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        outs = [body(x[:, t]) for t, body in enumerate(self.bodies)]
        return torch.stack(outs, dim=1)


class PureRecurrence(Awkward):
    """``h = cell(x_t, h)``, and nothing else in the loop."""

    blocker = Code.RECURRENCE

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(CHANNELS, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), FEATURES)
        outs = []
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            outs.append(h)
        return torch.stack(outs, dim=1)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(batch, frames, CHANNELS),)


class ConvolutionalRecurrence(Awkward):
    """A convolution reads the frame together with the state it made of the frame before."""

    blocker = Code.RECURRENCE

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS + WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), WIDTH, x.size(3), x.size(4))
        for t in range(x.size(1)):
            h = torch.tanh(self.conv(torch.cat([x[:, t], h], dim=1)))
        return h


class TrainingBatchNorm(InplaceBody):
    """BatchNorm in training mode: statistics a frame at a time, and running ones T times."""

    trains = True
    blocker = Code.TRAINING_BATCHNORM


class TrainingDropout(Awkward):
    """Dropout in training mode: frames draw one after the other."""

    trains = True
    blocker = Code.RANDOMNESS

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(body(), nn.Dropout(0.5), nn.Linear(FEATURES, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class EvalDropout(TrainingDropout):
    """The same model in eval mode, where dropout is the identity and the loop folds."""

    trains = False
    blocker = None


class AlwaysDropout(WithBody):
    """``F.dropout`` with its default ``training=True``: random even in eval mode."""

    blocker = Code.RANDOMNESS

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.dropout(self.body(x[:, t])) for t in range(x.size(1))], dim=1)


class WritesItsInput(WithBody):
    """``x[:, t].add_(1)``: the caller sees the clip change."""

    blocker = Code.VISIBLE_WRITE

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t].add_(1)) for t in range(x.size(1))], dim=1)


class StepAsNumber(WithBody):
    """``y * t``: the frames differ by a python number."""

    blocker = Code.UNEQUAL_FRAMES

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t] * (t + 1)) for t in range(x.size(1))], dim=1)


class FirstFrameApart(WithBody):
    """The first frame takes another path than the rest."""

    blocker = Code.UNEQUAL_FRAMES

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            frame = x[:, t].abs() if t == 0 else x[:, t].neg()
            outs.append(self.body(frame))
        return torch.stack(outs, dim=1)


class HookedBody(WithBody):
    """A forward hook that changes what the body returns."""

    blocker = Code.HOOKED_MODULE

    def __init__(self) -> None:
        super().__init__()
        self.body[0].register_forward_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class ParametrizedBody(WithBody):
    """Weight norm: the convolution's weight is computed anew at every call."""

    blocker = Code.PARAMETRIZED_MODULE

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.body[0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class SpectralNormBody(WithBody):
    """Spectral norm: in training mode each call also moves a buffer."""

    trains = True
    blocker = Code.PARAMETRIZED_MODULE

    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.body[0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class OnlyMovesData(Awkward):
    """A loop that reorders its input and computes nothing."""

    blocker = Code.NOTHING_TO_BATCH

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, t].flatten(1) for t in range(x.size(1))], dim=1)
