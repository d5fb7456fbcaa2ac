"""Models that are hard to capture: branches, optional arguments, frames assigned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import CHANNELS, FEATURES, SIDE, WithBody, noise


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
