"""Loops whose bodies may fold, in whole or in the part that computes most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CHANNELS, FEATURES, SIDE, WIDTH, Awkward, WithBody, body, noise


class InplaceBody(Awkward):
    """Convolution, BatchNorm, in-place ReLU, max pooling, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(WIDTH * (SIDE // 2) ** 2, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = self.pool(self.relu(self.norm(self.conv(x[:, t]))))
            outs.append(self.head(torch.flatten(y, 1)))
        return torch.stack(outs, dim=1)


class ResidualBody(Awkward):
    """A residual block with ``out += identity``: a write that nobody else sees."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, WIDTH, 1)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)

    def frame(self, x: Tensor) -> Tensor:
        identity = self.stem(x)
        out = self.norm(self.conv(identity))
        out += identity
        return F.relu(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.frame(x[:, t]) for t in range(x.size(1))], dim=1)


class FunctionalBody(Awkward):
    """The same layers spelled as functions on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(noise(WIDTH, CHANNELS, 3, 3, seed=2) / 5)
        self.offset = nn.Parameter(noise(WIDTH, seed=3))
        self.register_buffer("mean", noise(WIDTH, seed=4))
        self.register_buffer("variance", noise(WIDTH, seed=5).square() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = F.conv2d(x[:, t], self.kernel, self.offset, padding=1)
            y = F.batch_norm(y, self.mean, self.variance)
            y = F.relu(F.avg_pool2d(y, kernel_size=2))
            outs.append(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return torch.stack(outs, dim=1)


class MethodBody(Awkward):
    """Tensor methods and operators: permute, matmul, softmax, chained views."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(CHANNELS, WIDTH, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = x[:, t].permute(0, 2, 3, 1) @ self.weight
            y = y.softmax(dim=-1).reshape(y.size(0), -1, y.size(3))
            outs.append((y * 2 + 1).mean(dim=1).tanh())
        return torch.stack(outs, dim=1)


class ViewByBatch(Awkward):
    """``view(b, -1)`` with b from ``x.size(0)``: after folding it must follow the folded batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)
        self.head = nn.Linear(WIDTH * (SIDE - 2) ** 2, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        outs = [self.head(self.conv(x[:, t]).view(b, -1)) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class ViewByFrameBatch(ViewByBatch):
    """``view(y.shape[0], -1)`` with the batch asked of the frame itself."""

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = self.conv(x[:, t])
            outs.append(self.head(y.view(y.shape[0], -1)))
        return torch.stack(outs, dim=1)


class ViewByFeatures(ViewByBatch):
    """``view(-1, features)``: the batch is whatever is left."""

    def forward(self, x: Tensor) -> Tensor:
        features = WIDTH * (SIDE - 2) ** 2
        outs = [self.head(self.conv(x[:, t]).view(-1, features)) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class OneFrameElsewhere(WithBody):
    """The loop's first output and one inner map are used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outs, maps = [], []
        for t in range(x.size(1)):
            maps.append(self.body[0](x[:, t]))
            outs.append(self.body[1:](maps[-1]))
        return torch.stack(outs, dim=1), self.extra(outs[0]), maps[-1]


class TwoLoops(WithBody):
    """A second loop over the first one's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.body(x[:, t]) for t in range(x.size(1))]
        return torch.stack([torch.sigmoid(self.second(f)) for f in features], dim=1)


class TwoStreams(WithBody):
    """Two clips, through bodies of their own, met in each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.other = body()

    def forward(self, x: Tensor, flow: Tensor) -> Tensor:
        outs = [self.body(x[:, t]) * self.other(flow[:, t]) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor, Tensor]:
        shape = batch, frames, CHANNELS, SIDE, SIDE
        return noise(*shape), noise(*shape, seed=2)


class TwoClipsOneBody(WithBody):
    """One body on both clips: frames of either share parameters, and are not one family by time."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)
        second = torch.stack([self.body(y[:, t]) for t in range(y.size(1))], dim=1)
        return first, second

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor, Tensor]:
        shape = frames, CHANNELS, SIDE, SIDE
        return noise(batch, *shape), noise(batch + 1, *shape, seed=2)


class BatchedContext(WithBody):
    """Every frame meets one (B, F) vector, which must be repeated for each frame of its clip."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) + context for t in range(x.size(1))], dim=1)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor, Tensor]:
        return noise(batch, frames, CHANNELS, SIDE, SIDE), noise(batch, FEATURES, seed=2)


class PositionPerFrame(WithBody):
    """Adds row t of a learnt table to frame t: another slice of one parameter for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(noise(16, FEATURES, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x[:, t]) + self.positions[t] for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class FrameDifference(WithBody):
    """A stencil: each output reads the body's output one frame earlier."""

    def forward(self, x: Tensor) -> Tensor:
        y = [self.body(x[:, t]) for t in range(x.size(1))]
        return torch.stack([torch.tanh(y[t] - y[t - 1]) for t in range(1, x.size(1))], dim=1)


class MeanOverFrames(WithBody):
    """Outputs are added up in python, then divided by their number."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.size(1)
        return sum(self.body(x[:, t]) for t in range(frames)) / frames


class NormalizedBody(Awkward):
    """Group, instance and layer norm: a sample at a time, so they fold even in training mode."""

    trains = True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)
        self.group = nn.GroupNorm(2, WIDTH)
        self.instance = nn.InstanceNorm2d(WIDTH)
        self.layer = nn.LayerNorm(SIDE - 2)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            outs.append(self.layer(self.instance(self.group(self.conv(x[:, t])))))
        return torch.stack(outs, dim=1)


class ConvThenRecurrence(WithBody):
    """Features of each frame fold; the GRU cell that reads them one by one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), WIDTH)
        for t in range(x.size(1)):
            h = self.cell(self.body(x[:, t]), h)
        return h


class RecurrenceBetween(ConvThenRecurrence):
    """Folds before and after a recurrence: features, a GRU cell, a classifier on every state."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), WIDTH)
        outs = []
        for t in range(x.size(1)):
            h = self.cell(self.body(x[:, t]), h)
            outs.append(self.head(h))
        return torch.stack(outs, dim=1)


class CNNLSTM(WithBody):
    """The whole of the usual thing: features of each frame, an LSTM, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)
        return self.head(self.lstm(features)[0][:, -1])


class WritesReturnedMap(Awkward):
    """``y.relu_()`` on a map that was put aside before, and is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, outs = [], []
        for t in range(x.size(1)):
            y = self.conv(x[:, t])
            kept.append(y)
            outs.append(y.relu_().mean(dim=(2, 3)))
        return torch.stack(kept, dim=1), torch.stack(outs, dim=1)


class WritesTotal(WithBody):
    """A total that every frame adds to in place."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.size(0), FEATURES)
        for t in range(x.size(1)):
            total += self.body(x[:, t])
        return total
