"""Memory layouts of maps: channels last, and plain strides if a size of 1 leaves a choice."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtemporal.support.torch_private.transforms import in_transform

__all__ = ["channels_last", "plain_strides", "plain_weight", "transformed"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def transformed() -> bool:
    """Whether a transform of torch.func, such as ``torch.vmap``, is active."""
    return not torch.compiler.is_compiling() and in_transform()


def channels_last(maps: Tensor) -> Tensor:
    """``maps``, (B, C, H, W) or (B, C, T, H, W), in channels_last; a copy if they are not.

    ``torch.vmap`` supports only the contiguous format: there the layout is made by permuting.
    """
    if not transformed():
        return maps.contiguous(memory_format=_FORMATS[maps.dim()])
    return maps.movedim(1, -1).contiguous().movedim(-1, 1)


def plain_strides(maps: Tensor) -> Tensor:
    """``maps``, (B, C, ...), with the usual strides of its format for dimensions of size 1.

    With other strides, the backward of a BatchNorm in eval mode takes maps of T = 1 for another
    format, and gives wrong gradients (torch 2.13, on a CPU). The same happens if the gradient has
    such strides, and in conv2d with groups. So if gradients are asked for, maps with plain strides
    go through the same views. Nothing is copied.
    """
    if torch.compiler.is_compiling() or 1 not in maps.shape or maps.numel() == 0:
        return maps
    if maps.is_contiguous():
        return maps if _settled(maps) else maps.flatten().view(maps.shape)
    rows = maps.movedim(1, -1)
    if rows.is_contiguous() and not _settled(rows):
        return rows.flatten().view(rows.shape).movedim(-1, 1)
    return maps


def plain_weight(weight: Tensor) -> Tensor:
    """``weight`` with the usual contiguous strides for dimensions of size 1.

    With other strides, a grouped 1×1 conv2d gives a wrong gradient of its weight (torch 2.13, on
    one thread of a CPU). Nothing is copied.
    """
    if torch.compiler.is_compiling() or 1 not in weight.shape or not weight.is_contiguous():
        return weight
    return weight if _has_plain_strides(weight) else weight.flatten().view(weight.shape)


def _settled(maps: Tensor) -> bool:
    """Whether contiguous ``maps`` have plain strides, and no gradient that might not."""
    return not maps.requires_grad and _has_plain_strides(maps)


def _has_plain_strides(tensor: Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return False
        step *= size
    return True
