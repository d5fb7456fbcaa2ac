"""Bodies in which the clips of a batch meet: folding is wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import FEATURES, SIDE, Awkward, WithBody


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
