"""Packed weights: weights of conv2d in the layout in which oneDNN computes.

On a CPU every conv2d first converts its weight to a blocked layout of oneDNN. If the weight is
large and the frames are few, as in the last layers of a network, that takes as long as the
convolution. A prepared weight can be converted once. It is then an opaque tensor
(``weight.is_mkldnn``), which only :func:`conv2d` of this module can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional.layout import plain_strides
from fxtemporal.support.torch_private.convolutions import packed, packs, run_packed
from fxtemporal.support.torch_private.transforms import in_forward_mode

__all__ = ["Weights", "conv2d", "pack_each", "pack_one"]

Weights: TypeAlias = Tensor | Sequence[Tensor]
"""A prepared weight of one conv2d, or those of several, along dimension 0 or in a tuple."""

_LEAST = 2**18
"""The least number of entries for which converting a weight takes a relevant time."""


def pack_each(weights: Tensor, groups: int) -> Weights:
    """(N, C_out, C/groups, kH, kW): the weights of N conv2d, each packed if that pays."""
    return tuple(map(packed, weights)) if _pays(weights[0], groups) else weights


def pack_one(weight: Tensor, groups: int) -> Weights:
    """(C_out, C/groups, kH, kW), packed if that pays."""
    return packed(weight) if _pays(weight, groups) else weight


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv2d`` for a weight that may be packed, on maps with plain strides.

    A packed weight is unpacked if a derivative is asked for, backward or forward, and if the input
    differs from what the weight was packed for: autocast, another dtype, an empty batch.
    """
    if not weight.is_mkldnn:
        maps = plain_strides(input) if groups > 1 else input
        return F.conv2d(maps, weight, bias, stride, padding, dilation, groups)
    differentiated = torch.is_grad_enabled() and (
        input.requires_grad or (bias is not None and bias.requires_grad)
    )
    differentiated |= in_forward_mode()
    cast = torch.is_autocast_enabled("cpu") or input.dtype != weight.dtype
    if differentiated or cast or input.numel() == 0:
        return F.conv2d(input, weight.to_dense(), bias, stride, padding, dilation, groups)
    return run_packed(input, weight, bias, padding, stride, dilation, groups)


def _pays(weight: Tensor, groups: int) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and groups == 1
        and weight.numel() >= _LEAST
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and packs()
    )
