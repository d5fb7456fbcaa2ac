"""One loop over frames in every spelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CHANNELS, FEATURES, SIDE, WIDTH, Awkward, WithBody, noise


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
