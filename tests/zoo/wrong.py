"""Models that raise an error by themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import CHANNELS, FEATURES, SIDE, WIDTH, Awkward


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
