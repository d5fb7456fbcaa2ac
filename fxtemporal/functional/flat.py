"""Forms for kernels that are flat along some axis, which equal 2-D convolutions.

An axis along which the kernel has size 1 joins the batch or another axis, so that a conv2d on a
view remains. Nothing is prepared: each form takes a view of the 5-D weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional.geometry import ConvGeometry, every, pad
from fxtemporal.functional.layout import channels_last
from fxtemporal.functional.packed import conv2d

__all__ = [
    "full_extent",
    "kernel_is_stride",
    "one_frame_kernel",
    "one_pixel_kernel",
    "patchify",
    "pointwise",
    "pointwise_kernel",
    "spans_all_frames",
    "spatial",
    "temporal",
]

_AXES = ("time", "height", "width")


def one_frame_kernel(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel[0] != 1:
        yield f"the kernel reaches over {geometry.kernel[0]} frames, not 1"


def one_pixel_kernel(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel[1:] != (1, 1):
        height, width = geometry.kernel[1:]
        yield f"the kernel reaches over {height}×{width} pixels, not 1×1"


def pointwise_kernel(geometry: ConvGeometry) -> Iterator[str]:
    yield from one_frame_kernel(geometry)
    yield from one_pixel_kernel(geometry)


def spans_all_frames(geometry: ConvGeometry) -> Iterator[str]:
    reach = geometry.reach[0]
    if geometry.pads[0] != (0, 0):
        yield f"time is padded by {geometry.pads[0]}"
    if geometry.frames is None:
        yield f"the kernel reaches over {reach} frames, and how many there are is not known"
    elif geometry.frames != reach:
        yield f"the kernel reaches over {reach} frames, and there are {geometry.frames}"


def kernel_is_stride(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel != geometry.stride:
        yield f"the stride {geometry.stride} is not the kernel size {geometry.kernel}"
    for axis, pads in zip(_AXES, geometry.pads, strict=True):
        if pads != (0, 0):
            yield f"{axis} is padded by {pads}"
    for axis, kernel, dilation in zip(_AXES, geometry.kernel, geometry.dilation, strict=True):
        if kernel > 1 and dilation != 1:
            yield f"the kernel is dilated by {dilation} along {axis}"


def spatial(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A kernel that reads one frame at a time: the frames join the batch.

    Domain: kernel (1, kH, kW). Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B·T', C, H, W) -> conv2d -> (B·T', C_out, H', W') -> back``, where a
    temporal stride takes every n-th frame. The input is converted to channels_last_3d, in which
    both folds are views. The result has that layout too (C > 1), so that a chain copies only once.
    """
    x, (_, *inside) = pad(x, geometry, (False, True, True))
    x = channels_last(x[:, :, :: geometry.stride[0]])
    batch, frames = x.shape[0], x.shape[2]
    out = conv2d(
        x.transpose(1, 2).flatten(0, 1),
        weight[:, :, 0],
        bias,
        geometry.stride[1:],
        inside,
        geometry.dilation[1:],
        geometry.groups,
    )
    return torch.unflatten(out, 0, (batch, frames)).transpose(1, 2)


def temporal(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A kernel that reads one pixel through time: the pixels join one axis.

    Domain: kernel (kT, 1, 1). Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B, C, T, H·W) -> conv2d, kernel (kT, 1) -> (B, C_out, T', H·W) ->
    back``, where spatial strides take every n-th row and column. Both folds are views, in the
    contiguous and in the channels_last_3d format, and the result keeps the input's format.
    """
    x, inside = pad(x, geometry, (True, False, False))
    x = every(x, (1, *geometry.stride[1:]))
    height, width = x.shape[3], x.shape[4]
    out = conv2d(
        x.flatten(3),
        weight[..., 0],
        bias,
        (geometry.stride[0], 1),
        (inside[0], 0),
        (geometry.dilation[0], 1),
        geometry.groups,
    )
    return torch.unflatten(out, 3, (height, width))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A kernel of one pixel of one frame: a 1×1 conv2d.

    Domain: kernel (1, 1, 1). Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B, C, T', H'·W') -> conv2d, kernel (1, 1) -> back``, where strides take
    every n-th frame, row and column. The folds are views, and the format of the input is kept, as
    in :func:`conv3d_temporal`. A convolution was measured to be faster than a matrix product here.
    """
    x, _ = pad(x, geometry, (False, False, False))
    x = every(x, geometry.stride)
    height, width = x.shape[3], x.shape[4]
    plain = (1, 1), (0, 0), (1, 1), geometry.groups
    out = conv2d(x.flatten(3), weight[..., 0], bias, *plain)
    return torch.unflatten(out, 3, (height, width))


def full_extent(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A kernel that spans all the frames: they become channels.

    Domain: time is not padded, and T = dilation·(kT - 1) + 1, so that T' = 1. Arguments, result
    and errors as for :func:`conv3d`; the temporal stride has no effect.

    ``(B, C, kT, H, W) -> (B, C·kT, H, W) -> conv2d, weight (C_out, C/groups·kT, kH, kW) -> (B,
    C_out, 1, H', W')``. A group's channels stay together because kT is the faster of the two
    axes. A view of a contiguous input.
    """
    x, (_, *inside) = pad(x, geometry, (False, True, True))
    out = conv2d(
        x[:, :, :: geometry.dilation[0]].flatten(1, 2),
        weight.flatten(1, 2),
        bias,
        geometry.stride[1:],
        inside,
        geometry.dilation[1:],
        geometry.groups,
    )
    return out.unsqueeze(2)


def patchify(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Patches that touch and do not overlap: each becomes one row of a matrix.

    Domain: stride = kernel, no padding, no dilation. Arguments, result and errors as for
    :func:`conv3d`. An incomplete patch at the end of an axis is cropped.

    ``(B, C, T, H, W) -> (B·T'·H'·W', C·kT·kH·kW) -> linear -> (B, C_out, T', H', W')``, in
    channels_last_3d; with groups > 1 a 1×1 conv2d replaces the linear. If the input already is one
    patch a row, (B, C, kT, kH, kW), as in vision-language models, the rows are a view, and this is
    several times as fast as conv3d. For a whole clip they are a copy, which on some machines pays
    for large patches. Two alternatives, folding only time into channels, or one conv2d a tap, were
    tried and gained nothing over conv3d.
    """
    for axis, reach in zip((2, 3, 4), geometry.kernel, strict=True):
        x = x.unfold(axis, reach, reach)
    patches = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)  # (B, T', H', W', C·kT·kH·kW)
    if geometry.groups == 1:
        return F.linear(patches, weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    out = conv2d(
        patches.flatten(0, 3)[..., None, None],
        weight.flatten(1)[..., None, None],
        bias,
        (1, 1),
        (0, 0),
        (1, 1),
        geometry.groups,
    )
    rows = torch.unflatten(out.flatten(1), 0, patches.shape[:4])
    return rows.permute(0, 4, 1, 2, 3)
