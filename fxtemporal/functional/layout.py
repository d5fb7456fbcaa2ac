"""How maps lie in memory: channels last, and as is plain where a size of 1 leaves a choice."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtemporal.support.torch_private.transforms import in_transform

__all__ = ["channels_last", "plain_strides", "plain_weight", "transformed"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def transformed() -> bool:
    """Whether a transform of torch.func is at work, such as ``torch.vmap``."""
    return not torch.compiler.is_compiling() and in_transform()


def channels_last(maps: Tensor) -> Tensor:
    """``maps``, (B, C, H, W) or (B, C, T, H, W), in channels_last; a copy where they are not.

    ``torch.vmap`` takes no format but the contiguous one: there the same is spelled by permuting.
    """
    if not transformed():
        return maps.contiguous(memory_format=_FORMATS[maps.dim()])
    return maps.movedim(1, -1).contiguous().movedim(-1, 1)


def plain_strides(maps: Tensor) -> Tensor:
    """``maps``, (B, C, T, H, W), with the strides of its format where a size of 1 leaves a choice.

    The backward of a BatchNorm in eval mode takes maps of T = 1 with other strides for another
    format, and gives wrong gradients (torch 2.13, on a CPU); so does one whose gradient comes
    back with such strides. So where gradients are asked for, maps that are plain already go through
    the same views. Nothing is copied.
    """
    if torch.compiler.is_compiling() or 1 not in maps.shape or maps.numel() == 0:
        return maps
    if maps.is_contiguous():
        return maps if _settled(maps) else maps.flatten().view(maps.shape)
    rows = maps.permute(0, 2, 3, 4, 1)
    if rows.is_contiguous() and not _settled(rows):
        return rows.flatten().view(rows.shape).permute(0, 4, 1, 2, 3)
    return maps


def plain_weight(weight: Tensor) -> Tensor:
    """``weight`` with the strides of the contiguous format, where a size of 1 leaves a choice.

    The gradient of the weight of a grouped 1×1 conv2d with other strides is a wrong one (torch
    2.13, on one thread of a CPU). Nothing is copied.
    """
    if torch.compiler.is_compiling() or 1 not in weight.shape or not weight.is_contiguous():
        return weight
    return weight if _has_plain_strides(weight) else weight.flatten().view(weight.shape)


def _settled(maps: Tensor) -> bool:
    """Whether contiguous ``maps``, and their gradient, have the strides of that in any case."""
    return not maps.requires_grad and _has_plain_strides(maps)


def _has_plain_strides(tensor: Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return False
        step *= size
    return True
