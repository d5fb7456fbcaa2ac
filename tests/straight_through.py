"""A function whose backward is not that of its forward: no graph can hold its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 3
