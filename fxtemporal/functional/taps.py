"""Forms that split a kernel into its taps, with a conv2d for each tap, or one for all.

A tap is one temporal slice of the kernel. With padding of zeros, a frame of the result is the sum
over those taps that meet a real frame; a tap that meets padding adds nothing::

    T = 3, kT = 3, one frame of zeros before and after          source      target
    y[0] =                  w[1]·x[0] + w[2]·x[1]      tap 0    x[0:2]  ->  y[1:3]
    y[1] = w[0]·x[0]      + w[1]·x[1] + w[2]·x[2]      tap 1    x[0:3]  ->  y[0:3]
    y[2] = w[0]·x[1]      + w[1]·x[2]                  tap 2    x[1:3]  ->  y[0:2]

So no padded copy of the clip is made. A tap that meets a real frame at every t' (tap 1 above) is
the base to which the others are added. At any T there is one if padding is at most "same" or causal
padding; if it is more, just enough frames are padded to have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional.geometry import ConvGeometry, Pair, pad_space, pad_time
from fxtemporal.functional.layout import channels_last
from fxtemporal.functional.packed import Weights, conv2d

__all__ = [
    "Tap",
    "conv_frames",
    "frames_last",
    "lay_out",
    "spread",
    "spread_weight",
    "stack_weight",
    "stacked",
    "tap_weights",
    "taps",
    "unstrided",
    "with_base",
]


@dataclass(frozen=True)
class Tap:
    """Tap ``index`` of a kernel, the frames of the clip it meets, and those of the result."""

    index: int
    source: slice
    target: slice


def with_base(x: Tensor, geometry: ConvGeometry, missing: Pair) -> tuple[Tensor, list[Tap]]:
    """The taps, the base first, and the frames of (B, C, T, H, W) that they slice: (B, T, C, H, W).

    ``missing`` is the number of frames of zeros that the clip still lacks before and after. At a
    temporal stride above 1 all are added, so that each tap adds to each frame of the result.
    """
    count, (stride, dilation) = geometry.out_frames, (geometry.stride[0], geometry.dilation[0])
    last = geometry.kernel[0] - 1
    if stride > 1:
        stop = stride * (count - 1) + 1
        end = stop + geometry.reach[0] - 1 - x.shape[2] - missing[0]
        x = pad_time(x, missing[0], end)
        offsets = [dilation * index for index in range(last + 1)]
        return x.transpose(1, 2), [
            Tap(index, slice(offset, offset + stop, stride), slice(None))
            for index, offset in enumerate(offsets)
        ]

    def lacks(tap: int) -> Pair:
        """The frames before and after the clip that the tap meets at some t'."""
        return max(0, missing[0] - dilation * tap), max(0, missing[1] - dilation * (last - tap))

    base = min(range(last + 1), key=lambda tap: sum(lacks(tap)))
    before, after = lacks(base)
    x = pad_time(x, before, after)
    order = [base, *(tap for tap in range(last + 1) if tap != base)]
    missing = (missing[0] - before, missing[1] - after)
    return x.transpose(1, 2), [_tap(tap, x.shape[2], geometry, missing) for tap in order]


def _tap(index: int, frames: int, geometry: ConvGeometry, missing: Pair) -> Tap:
    """The tap at stride 1, where y[t'] reads x[t' + offset]."""
    offset = geometry.dilation[0] * index - missing[0]
    beyond = max(0, missing[1] - geometry.dilation[0] * (geometry.kernel[0] - 1 - index))
    first = max(0, -offset)
    count = max(0, geometry.out_frames - beyond - first)
    return Tap(index, slice(first + offset, first + offset + count), slice(first, first + count))


# ------------------------------------------------------------------------- one conv2d a tap


def tap_weights(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """(C_out, C/groups, kT, kH, kW) -> (kT, C_out, C/groups, kH, kW), in conv2d's layout."""
    return lay_out(weight.permute(2, 0, 1, 3, 4), geometry.groups)


def taps(x: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """One conv2d a tap, and the shifted results added up.

    Domain: everything. Arguments, result and errors as for :func:`conv3d`.

    ``y[t'] = Σ_i conv2d(x[stride·t' + dilation·i - before], weight[:, :, i])``, over real frames
    only: padding costs nothing. The input is converted to channels_last_3d, in which the frames of
    one clip fold into the batch as a view; the result has that layout too. With groups = C each
    conv2d is depthwise. Prepared: the taps, along dimension 0.

    In float16 and bfloat16 each tap's result is rounded before it is added, so that the error is
    larger than that of conv3d: less than twice for up to 5 taps. conv3d_spread has the same error.
    """
    x, missing, inside = pad_space(frames_last(x), geometry)
    frames, (base, *others) = with_base(x, geometry, missing)
    out = conv_frames(frames[:, base.source], prepared[base.index], bias, geometry, inside)
    for tap in others:
        part = conv_frames(frames[:, tap.source], prepared[tap.index], None, geometry, inside)
        out[:, tap.target].add_(part)
    return out.transpose(1, 2)


# -------------------------------------------------------------------- taps as input channels


def stack_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """(C_out, C/groups, kT, kH, kW) -> (C_out, kT·C/groups, kH, kW)."""
    return lay_out(weight.transpose(1, 2).flatten(1, 2), geometry.groups)


def stacked(x: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """One conv2d on kT times as many channels: the frames that the taps meet, stacked.

    Domain: everything. Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B·T', kT·C, H, W) -> conv2d, weight (C_out, kT·C/groups, kH, kW) ->
    (B·T', C_out, H', W') -> back``; a group's channels of all taps stay together. The input is
    copied kT times, which pays if C is small, as in the stem of a network. The result is in
    channels_last_3d. Prepared: the weight in the layout of its conv2d.
    """
    x, (before, _), inside = pad_space(frames_last(x), geometry)
    stride, dilation = geometry.stride[0], geometry.dilation[0]
    stop = stride * (geometry.out_frames - 1) + 1
    end = stop + geometry.reach[0] - 1 - x.shape[2] - before
    x = pad_time(x, before, end)
    offsets = [dilation * index for index in range(geometry.kernel[0])]
    frames = torch.unflatten(x.permute(0, 2, 3, 4, 1), 4, (geometry.groups, -1))
    met = [frames[:, offset : offset + stop : stride] for offset in offsets]
    stack = torch.stack(met, dim=5).flatten(4)  # (B, T', H, W, groups·kT·C/groups)
    out = conv_frames(stack.permute(0, 1, 4, 2, 3), prepared, bias, geometry, inside)
    return out.transpose(1, 2)


# ------------------------------------------------------------------- taps as output channels


def spread_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """(C_out, C/groups, kT, kH, kW) -> (kT·C_out, C/groups, kH, kW).

    The taps of a group's channels stay together: (groups, kT, C_out/groups, ...).
    """
    grouped = torch.unflatten(weight, 0, (geometry.groups, -1)).permute(0, 3, 1, 2, 4, 5)
    return lay_out(grouped.flatten(0, 2), geometry.groups)


def unstrided(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.stride[0] != 1:
        yield f"the temporal stride is {geometry.stride[0]}, not 1"


def spread(x: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """One conv2d with kT times as many outputs: the contribution of each frame to each tap.

    Domain: temporal stride 1. Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B·T, C, H, W) -> conv2d, weight (kT·C_out, C/groups, kH, kW) ->
    (B, T, kT, C_out, H', W')``, then the taps are added, each shifted by its own offset. The mirror
    image of :func:`conv3d_stacked`: the result, not the input, is copied kT times, which pays if
    C_out is small. The result is in channels_last_3d. Prepared: the weight in the layout of its
    conv2d.
    """
    x, missing, inside = pad_space(frames_last(x), geometry)
    frames, (base, *others) = with_base(x, geometry, missing)
    groups, kernel = geometry.groups, geometry.kernel[0]
    if bias is not None:  # only the base adds it
        rows = torch.unflatten(bias, 0, (groups, 1, -1))
        bias = F.pad(rows, (0, 0, base.index, kernel - 1 - base.index)).flatten()
    out = conv_frames(frames, prepared, bias, geometry, inside).permute(0, 1, 3, 4, 2)
    each = torch.unflatten(out, 4, (groups, kernel, -1)).unbind(5)
    total = each[base.index][:, base.source].clone(memory_format=torch.contiguous_format)
    for tap in others:
        total[:, tap.target].add_(each[tap.index][:, tap.source])
    return total.flatten(4).permute(0, 4, 1, 2, 3)


# -------------------------------------------------------------------------- frames and layout


def frames_last(x: Tensor) -> Tensor:
    """(B, C, T, H, W) in channels_last_3d, in which each frame is contiguous in memory."""
    return channels_last(x)


def conv_frames(
    frames: Tensor, weight: Weights, bias: Tensor | None, geometry: ConvGeometry, inside: Pair
) -> Tensor:
    """One conv2d on each frame: (B, T, C, H, W) -> (B, T, C_out, H', W'), padded by ``inside``."""
    assert isinstance(weight, Tensor)
    pixels = frames.permute(0, 1, 3, 4, 2).contiguous()  # so that a copy is channels_last
    out = conv2d(
        pixels.flatten(0, 1).permute(0, 3, 1, 2),
        weight,
        bias,
        geometry.stride[1:],
        inside,
        geometry.dilation[1:],
        geometry.groups,
    )
    return torch.unflatten(out, 0, frames.shape[:2])


def lay_out(weight: Tensor, groups: int) -> Tensor:
    """(..., C_out, C/groups, kH, kW), dense in the layout in which its conv2d computes.

    That is channels_last, but contiguous for a grouped conv2d: with a grouped channels_last weight
    in float64 and one frame sliced from a clip, its gradients were wrong (torch 2.13, on a CPU).
    """
    if groups > 1:
        return weight.contiguous()
    return weight.movedim(-3, -1).contiguous().movedim(-1, -3)
