"""Channels last in memory, also where torch.func transforms the call."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_last", "transformed"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def transformed() -> bool:
    """Whether a transform of torch.func is at work, such as ``torch.vmap``."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None


def channels_last(maps: Tensor) -> Tensor:
    """``maps``, (B, C, H, W) or (B, C, T, H, W), in channels_last; a copy where they are not.

    ``torch.vmap`` takes no format but the contiguous one: there the same is spelled by permuting.
    """
    if not transformed():
        return maps.contiguous(memory_format=_FORMATS[maps.dim()])
    return maps.movedim(1, -1).contiguous().movedim(-1, 1)
