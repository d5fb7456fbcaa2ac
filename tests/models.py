"""A zoo of small awkward models, each for one thing that can go wrong.

Every model is an :class:`Awkward`: ``Model.build()`` gives it seeded, in the mode it is meant for,
and ``model.example(batch, frames)`` gives seeded inputs for it, (B, T, 3, 8, 8) unless it says
otherwise. The tuples at the end sort them by what should become of them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxtemporal.ir.reasons import Code

CHANNELS, SIDE, WIDTH, FEATURES = 3, 8, 4, 5


class Awkward(nn.Module):
    """Base of the zoo.

    ``blocker`` is the reason that must keep a loop from being re-rolled as a whole; None means that
    it must be re-rolled. ``sizes`` are pairs (batch, frames) that it runs at. ``trains`` leaves the
    model in training mode. ``fails`` names the error that the model itself raises.
    """

    blocker: ClassVar[Code | None] = None
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((2, 4), (3, 4), (2, 6))
    trains: ClassVar[bool] = False
    fails: ClassVar[type[Exception] | None] = None

    @classmethod
    def build(cls, seed: int = 0) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    _vary(module)
        return model.train(cls.trains)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Any, ...]:
        return (noise(batch, frames, CHANNELS, SIDE, SIDE),)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal noise that is the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _vary(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """A fresh BatchNorm is the identity in eval mode, which would hide mistakes."""
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)


def body() -> nn.Sequential:
    """(B, 3, 8, 8) -> (B, 5): the plainest body a frame can have."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(WIDTH * (SIDE // 2) ** 2, FEATURES),
    )


class WithBody(Awkward):
    """An :class:`Awkward` whose frames go through one :func:`body`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()


# --------------------------------------------------------------------- spellings of the loop


class IndexedFrames(WithBody):
    """The spelling everyone starts with: ``x[:, t]`` for ``range(x.size(1))``."""

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            outs.append(self.body(x[:, t]))
        return torch.stack(outs, dim=1)


class EllipsisFrames(WithBody):
    """``x[:, t, ...]`` with the number of frames from ``x.shape[1]``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t, ...]) for t in range(x.shape[1])], dim=1)


class ColonFrames(WithBody):
    """``x[:, t, :, :, :]`` after unpacking ``x.shape``."""

    def forward(self, x: Tensor) -> Tensor:
        _b, t, _c, _h, _w = x.shape
        return torch.stack([self.body(x[:, i, :, :, :]) for i in range(t)], 1)


class SelectedFrames(WithBody):
    """``x.select(1, t)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x.select(1, t)) for t in range(x.size(1))], dim=1)


class NegativeFrames(WithBody):
    """Dimensions and indices counted from the end: ``x.select(-4, t - T)``, ``stack(dim=-2)``."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.size(-4)
        outs = [self.body(x.select(-4, t - frames)) for t in range(frames)]
        return torch.stack(outs, dim=-2)


class UnboundFrames(WithBody):
    """``for frame in x.unbind(1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(frame) for frame in x.unbind(1)], dim=1)


class FunctionUnboundFrames(WithBody):
    """``torch.unbind`` and ``enumerate``."""

    def forward(self, x: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for _, frame in enumerate(torch.unbind(x, dim=1)):
            outs += [self.body(frame)]
        return torch.stack(outs, dim=1)


class SplitFrames(WithBody):
    """``x.split(1, dim=1)``, each squeezed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(part.squeeze(1)) for part in x.split(1, dim=1)], dim=1)


class ChunkedFrames(WithBody):
    """``torch.chunk`` into as many parts as there are frames, each squeezed."""

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(x, x.size(1), dim=1)
        return torch.stack([self.body(torch.squeeze(part, 1)) for part in parts], dim=1)


class SlicedFrames(WithBody):
    """``x[:, t : t + 1]``, squeezed."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x[:, t : t + 1].squeeze(1)) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class NarrowedFrames(WithBody):
    """``x.narrow(1, t, 1)``, squeezed."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x.narrow(1, t, 1).squeeze(1)) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class IndexSelectedFrames(WithBody):
    """``x.transpose(0, 1)`` first, then ``x[t]``."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return torch.stack([self.body(x[t]) for t in range(len(x))]).transpose(0, 1)


class ChannelsFirstFrames(WithBody):
    """Clips as (B, C, T, H, W): frames are ``x[:, :, t]`` and stacked along dimension 2 or more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, :, t]) for t in range(x.size(2))], dim=2)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(batch, CHANNELS, frames, SIDE, SIDE),)


class ConstantFrames(WithBody):
    """A number of frames written into the code; a longer clip is cut to its first four frames."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(4)], dim=1)


class SubsampledFrames(WithBody):
    """Every other frame, as ``range(0, T, 2)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(0, x.size(1), 2)], dim=1)


class ReversedFrames(WithBody):
    """From the last frame to the first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in reversed(range(x.size(1)))], dim=1)


class StackedFirst(WithBody):
    """Joined by ``stack(dim=0)``: the result is (T, B, F)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=0)


class StackedLast(WithBody):
    """Joined by ``stack(dim=-1)``: the result is (B, F, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=-1)


class ConcatenatedFrames(WithBody):
    """Joined by ``cat`` of unsqueezed frames."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x[:, t]).unsqueeze(1) for t in range(x.size(1))]
        return torch.cat(outs, dim=1)


class IndexedByNone(WithBody):
    """Joined by ``cat`` of ``y[:, None]``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x[:, t])[:, None] for t in range(x.size(1))], 1)


class ConcatenatedFeatures(WithBody):
    """Joined by ``cat`` along the features: (B, T·F)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class ConcatenatedBatch(WithBody):
    """Joined by ``cat`` along the batch: (T·B, F), time-major."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x[:, t]) for t in range(x.size(1))], dim=0)


class ListOfFrames(WithBody):
    """Returns the list of outputs, never joined."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x[:, t]) for t in range(x.size(1))]


class LastFrameOnly(WithBody):
    """Runs the body on every frame and keeps the last output: the rest is dead."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x[:, t]) for t in range(x.size(1))]
        return outs[-1]


class TimeMajor(WithBody):
    """(T, B, C, H, W): frames are ``x[t]``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[t]) for t in range(x.size(0))])

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(frames, batch, CHANNELS, SIDE, SIDE),)


class UnbatchedFrames(Awkward):
    """One clip (T, C, H, W): each ``x[t]`` has no batch dimension at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)
        self.head = nn.Linear(WIDTH, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.head(F.relu(self.conv(x[t])).mean(dim=(1, 2))) for t in range(x.size(0))]
        return torch.stack(outs)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(frames, CHANNELS, SIDE, SIDE),)


class UnsqueezedFrames(WithBody):
    """One clip (T, C, H, W), each frame given a batch of one: ``x[t].unsqueeze(0)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x[t].unsqueeze(0)) for t in range(x.size(0))], dim=0)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(frames, CHANNELS, SIDE, SIDE),)


# ------------------------------------------------------------------------ bodies that may fold


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


class BatchMeanBody(WithBody):
    """Subtracts the mean over the batch: folded frames must not be averaged together."""

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            frame = x[:, t]
            outs.append(self.body(frame - frame.mean(dim=0, keepdim=True)))
        return torch.stack(outs, dim=1)


class FrameMaximumBody(WithBody):
    """Divides by the largest value in the whole frame, over all clips of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x[:, t] / x[:, t].abs().max()) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class BatchSoftmaxBody(WithBody):
    """A softmax over dimension 0, which is the batch."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.body(x[:, t]).softmax(dim=0) for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class BatchTransposedBody(Awkward):
    """Moves the batch to another dimension and works along dimension 0 afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE * SIDE, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = self.linear(x[:, t].flatten(2)).transpose(0, 1)
            outs.append(y.cumsum(0)[-1])
        return torch.stack(outs, dim=1)


class PairwiseBody(WithBody):
    """(B, B) similarities of the clips of a batch: the batch appears twice."""

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = self.body(x[:, t])
            outs.append(y @ y.t())
        return torch.stack(outs, dim=1)


class BatchStatisticsBody(Awkward):
    """A BatchNorm without running statistics: it uses the batch's own even in eval mode."""

    blocker = Code.TRAINING_BATCHNORM

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(self.conv(x[:, t])) for t in range(x.size(1))], dim=1)


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


# ------------------------------------------------------------------ loops that must stay loops


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


def _double(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return output * 2


class HookedBody(WithBody):
    """A forward hook that changes what the body returns."""

    blocker = Code.HOOKED_MODULE

    def __init__(self) -> None:
        super().__init__()
        self.body[0].register_forward_hook(_double)

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


# ----------------------------------------------------------------------- no loop over frames


class AlreadyFolded(WithBody):
    """Folded by hand with ``view(b * t, c, h, w)``: there is nothing to do."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        return self.body(x.view(b * t, c, h, w)).view(b, t, -1)


class Clip3d(Awkward):
    """Base of the models that take (B, C, T, H, W)."""

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(batch, CHANNELS, frames, SIDE, SIDE),)


class ResidualConv3d(Clip3d):
    """A residual network of spatial, temporal and pointwise kernels with BatchNorm3d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(CHANNELS, WIDTH, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm1 = nn.BatchNorm3d(WIDTH)
        self.temporal = nn.Conv3d(WIDTH, 2 * WIDTH, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm2 = nn.BatchNorm3d(2 * WIDTH)
        self.shortcut = nn.Conv3d(WIDTH, 2 * WIDTH, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2 * WIDTH, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        out = self.norm2(self.temporal(x))
        out += self.shortcut(x)
        return self.head(self.relu(out).mean(dim=(2, 3, 4)))


class DenseConv3d(Clip3d):
    """Kernels over time and space, strided and dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(CHANNELS, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv3d(WIDTH, WIDTH, 3, stride=(1, 2, 2), padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class GroupedConv3d(Clip3d):
    """Depthwise and grouped kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv3d(CHANNELS, 2 * CHANNELS, 3, padding=1, groups=CHANNELS)
        self.depthwise = nn.Conv3d(2 * CHANNELS, 2 * CHANNELS, (3, 1, 1), groups=2 * CHANNELS)
        self.grouped = nn.Conv3d(2 * CHANNELS, WIDTH, (1, 3, 3), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.depthwise(self.expand(x)))


class PaddedConv3d(Clip3d):
    """Circular, replicated, ``"same"`` and ``"valid"`` padding."""

    def __init__(self) -> None:
        super().__init__()
        mode = {"padding": (1, 0, 0), "padding_mode": "circular"}
        self.circular = nn.Conv3d(CHANNELS, WIDTH, (3, 1, 1), **mode)
        self.replicate = nn.Conv3d(WIDTH, WIDTH, 3, padding=1, padding_mode="replicate")
        self.same = nn.Conv3d(WIDTH, WIDTH, (1, 2, 4), dilation=(1, 2, 2), padding="same")
        self.valid = nn.Conv3d(WIDTH, WIDTH, (1, 3, 3), padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return self.valid(self.same(self.replicate(self.circular(x))))


class PatchConv3d(Clip3d):
    """Kernel equal to stride, as in the patch embedding of a video transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, FEATURES, (2, 4, 4), stride=(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)


class CausalConv3d(Clip3d):
    """Padded in the past only, by ``F.pad`` before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, WIDTH, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, 2, 0)))


class FunctionalConv3d(Clip3d):
    """``F.conv3d`` and ``torch.conv3d`` on parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Parameter(noise(WIDTH, CHANNELS, 1, 3, 3, seed=2) / 5)
        self.temporal = nn.Parameter(noise(WIDTH, WIDTH, 3, 1, 1, seed=3) / 3)
        self.bias = nn.Parameter(noise(WIDTH, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv3d(x, self.spatial, padding=(0, 1, 1))
        return torch.conv3d(x, self.temporal, self.bias, (1, 1, 1), (1, 0, 0))


class UnbatchedConv3d(Clip3d):
    """One clip (C, T, H, W): Conv3d takes it without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(CHANNELS, WIDTH, (1, 3, 3))
        self.temporal = nn.Conv3d(WIDTH, WIDTH, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(self.spatial(x))

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Tensor]:
        return (noise(CHANNELS, frames, SIDE, SIDE),)


class WholeClipKernel(Clip3d):
    """A kernel over exactly all four frames: one image is left."""

    sizes = ((2, 4), (3, 4))

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(CHANNELS, WIDTH, (4, 1, 1))
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.reduce(x).squeeze(2))


class ScaledConv3d(nn.Conv3d):
    """A Conv3d with a forward of its own; its parameters look like any other's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3 + 1


class SubclassedConv3d(Clip3d):
    """Uses :class:`ScaledConv3d`: putting a plain form in its place drops what it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ScaledConv3d(CHANNELS, WIDTH, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SharedConv3d(Clip3d):
    """One Conv3d called at two places, on maps of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, CHANNELS, (3, 1, 1), padding=(1, 0, 0))
        self.norm1 = nn.BatchNorm3d(CHANNELS)
        self.norm2 = nn.BatchNorm3d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv(x))
        return self.norm2(self.conv(F.avg_pool3d(x, (1, 2, 2))))


class TiedConv3d(Clip3d):
    """Two modules that share one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(CHANNELS, CHANNELS, (1, 3, 3), padding=(0, 1, 1))
        self.second = nn.Conv3d(CHANNELS, CHANNELS, (1, 3, 3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class AliasedConv3d(Clip3d):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(CHANNELS, CHANNELS, (3, 1, 1), padding=(1, 0, 0))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class ParametrizedConv3d(Clip3d):
    """A Conv3d under weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv3d(CHANNELS, WIDTH, (1, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class HookedConv3d(Clip3d):
    """A Conv3d with a hook that changes its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, WIDTH, (1, 3, 3))
        self.conv.register_forward_hook(_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


# -------------------------------------------------------------------------- hard to capture


class OptionalArgument(WithBody):
    """An optional argument, and a keyword-only one, both None by default."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            x = x * mask
        y = torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)
        return y if scale is None else y * scale


class NoGradPart(WithBody):
    """A frozen body under ``torch.no_grad()`` with a trained head: gradients must stop there."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)
        return self.head(features)


class DataDependentBranch(WithBody):
    """``if x.sum() > 0``: which path runs is known only once the numbers are."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x.flip(1)
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class ShapeBranch(WithBody):
    """``if x.size(1) > 4``: a branch on the number of frames, which the trace has to fix."""

    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) > 4:
            x = x[:, ::2]
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class TypeCheck(WithBody):
    """``isinstance(x, torch.Tensor)``: false for a proxy."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, torch.Tensor):
            raise TypeError("a clip must be a tensor")
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], dim=1)


class AssignsFrames(WithBody):
    """``out[:, t] = y`` into a tensor made beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.size(0), x.size(1), FEATURES)
        for t in range(x.size(1)):
            out[:, t] = self.body(x[:, t])
        return out


class NestedInputs(WithBody):
    """Takes and returns dictionaries."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = batch["clip"]
        outs = [self.body(x[:, t]) for t in range(x.size(1))]
        return {"logits": torch.stack(outs, dim=1), "frames": {"last": outs[-1]}}

    def example(self, batch: int = 2, frames: int = 4) -> tuple[dict[str, Tensor]]:
        return ({"clip": noise(batch, frames, CHANNELS, SIDE, SIDE)},)


# ------------------------------------------------------------------------ wrong by themselves


class ClipIntoConv2d(Awkward):
    """A whole clip (B, T, C, H, W) reaches Conv2d: the loop was forgotten."""

    fails = RuntimeError

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MapsIntoLSTM(Awkward):
    """A sequence of spatial maps reaches an LSTM: the flatten was forgotten."""

    fails = ValueError

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, WIDTH, 3)
        self.lstm = nn.LSTM(WIDTH * (SIDE - 2) ** 2, FEATURES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], dim=1)
        return self.lstm(maps)[0]


SPELLINGS: tuple[type[Awkward], ...] = (
    IndexedFrames,
    EllipsisFrames,
    ColonFrames,
    SelectedFrames,
    NegativeFrames,
    UnboundFrames,
    FunctionUnboundFrames,
    SplitFrames,
    ChunkedFrames,
    SlicedFrames,
    NarrowedFrames,
    IndexSelectedFrames,
    ChannelsFirstFrames,
    ConstantFrames,
    SubsampledFrames,
    ReversedFrames,
    StackedFirst,
    StackedLast,
    ConcatenatedFrames,
    IndexedByNone,
    ConcatenatedFeatures,
    ConcatenatedBatch,
    ListOfFrames,
    TimeMajor,
    UnbatchedFrames,
    UnsqueezedFrames,
)
"""One loop in every spelling: all of them fold."""

BODIES: tuple[type[Awkward], ...] = (
    WritesReturnedMap,
    WritesTotal,
    InplaceBody,
    ResidualBody,
    FunctionalBody,
    MethodBody,
    ViewByBatch,
    ViewByFrameBatch,
    ViewByFeatures,
    OneFrameElsewhere,
    TwoLoops,
    TwoStreams,
    TwoClipsOneBody,
    BatchedContext,
    PositionPerFrame,
    FrameDifference,
    MeanOverFrames,
    EvalDropout,
    NormalizedBody,
    ConvThenRecurrence,
    RecurrenceBetween,
    CNNLSTM,
)
"""Bodies that fold, in whole or in the part that computes most."""

ACROSS_THE_BATCH: tuple[type[Awkward], ...] = (
    BatchMeanBody,
    FrameMaximumBody,
    BatchSoftmaxBody,
    BatchTransposedBody,
    PairwiseBody,
)
"""Bodies in which the clips of a batch meet: folding is wrong; refuse it, or batch by vmap."""

BLOCKED: tuple[type[Awkward], ...] = (
    HardCodedView,
    ModulePerFrame,
    PureRecurrence,
    ConvolutionalRecurrence,
    TrainingBatchNorm,
    BatchStatisticsBody,
    TrainingDropout,
    AlwaysDropout,
    WritesItsInput,
    StepAsNumber,
    FirstFrameApart,
    HookedBody,
    ParametrizedBody,
    SpectralNormBody,
    OnlyMovesData,
)
"""Loops that must give their ``blocker`` as a reason, and the original's numbers."""

CONV3D: tuple[type[Awkward], ...] = (
    ResidualConv3d,
    DenseConv3d,
    GroupedConv3d,
    PaddedConv3d,
    PatchConv3d,
    CausalConv3d,
    FunctionalConv3d,
    UnbatchedConv3d,
    WholeClipKernel,
    SubclassedConv3d,
    SharedConv3d,
    TiedConv3d,
    AliasedConv3d,
    ParametrizedConv3d,
    HookedConv3d,
)
"""Conv3d layers, replaceable or not: the numbers must stay."""

CAPTURE: tuple[type[Awkward], ...] = (
    AlreadyFolded,
    LastFrameOnly,
    OptionalArgument,
    NoGradPart,
    DataDependentBranch,
    ShapeBranch,
    TypeCheck,
    AssignsFrames,
    NestedInputs,
)
"""Models that are hard to capture, or that leave nothing to do."""

BROKEN: tuple[type[Awkward], ...] = (ClipIntoConv2d, MapsIntoLSTM)
"""Models that raise ``fails`` by themselves; the error should say what is wrong with them."""

ZOO = SPELLINGS + BODIES + ACROSS_THE_BATCH + BLOCKED + CONV3D + CAPTURE
"""Every model that runs."""
