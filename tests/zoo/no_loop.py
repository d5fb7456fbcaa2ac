"""Models without a loop over frames: folded by hand, or made of Conv3d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .base import CHANNELS, FEATURES, SIDE, WIDTH, Awkward, WithBody, double, noise


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
        self.conv.register_forward_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
