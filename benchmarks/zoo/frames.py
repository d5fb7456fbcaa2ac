"""Image networks over the frames of a clip, as models of several packages use them.

``encoder(frame)`` is a vector of features, (B, F), or of logits; ``network(frame)`` is a map,
(B, C, H, W). What a package returns instead is made such a tensor where its models are built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CarriedMask", "FramesLSTM", "FramesMean", "StackedMaps"]


class FramesLSTM(nn.Module):
    """The features of each frame, stacked in a loop, an LSTM over them, and its last step."""

    def __init__(
        self, encoder: nn.Module, width: int, hidden: int = 32, layers: int = 1, classes: int = 5
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([self.encoder(x[:, t]) for t in range(x.shape[1])], dim=1)
        output, _ = self.lstm(features)
        result: Tensor = self.head(output[:, -1])
        return result


class FramesMean(nn.Module):
    """The mean over the unbound frames, as in TSN; of features if there is a ``head``."""

    def __init__(self, encoder: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Identity() if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        features = [self.encoder(frame) for frame in torch.unbind(x, dim=1)]
        result: Tensor = self.head(torch.stack(features, dim=1).mean(dim=1))
        return result


class StackedMaps(nn.Module):
    """A map of each frame, or of each slice of a volume: frames are dimension ``dim``."""

    def __init__(self, network: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.network = network
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.network(frame) for frame in x.unbind(self.dim)], dim=self.dim)


class CarriedMask(nn.Module):
    """Each frame is segmented with the mask of the frame before it as one more channel."""

    def __init__(self, network: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.network = network
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[0], 1, *x.shape[-2:])
        masks = []
        for frame in x.unbind(self.dim):
            mask = torch.sigmoid(self.network(torch.cat((frame, mask), dim=1)))
            masks.append(mask)
        return torch.stack(masks, dim=self.dim)
