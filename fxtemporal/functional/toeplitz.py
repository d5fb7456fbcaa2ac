"""A form for a clip no longer than the kernel: all its frames are channels of one conv2d.

Once T is known, it is known which tap of the kernel meets which frame. So the whole convolution
over time is one matrix of taps: row t', column t, the tap that meets frame t at t', or none.
Matrices that are constant along their diagonals are called Toeplitz. For two frames, kernel 3, one
frame of zeros before and after::

    y[0]   | w[1] w[2] |  x[0]
    y[1] = | w[0] w[1] |  x[1]           4 conv2d of C to C_out channels, of the 6 of conv3d

A single frame meets only the middle tap: conv2d with ``weight[:, :, 1]``, a third of the work.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional.geometry import ConvGeometry, pad_space
from fxtemporal.functional.layout import channels_last
from fxtemporal.functional.packed import conv2d
from fxtemporal.functional.taps import lay_out

__all__ = ["clip_within_reach", "made_for", "toeplitz", "toeplitz_weight"]


def clip_within_reach(geometry: ConvGeometry) -> Iterator[str]:
    reach, frames = geometry.reach[0], geometry.frames
    if frames is None:
        yield f"the kernel reaches over {reach} frames, and how many there are is not known"
    elif frames > reach:
        yield f"the kernel reaches over {reach} frames, fewer than the {frames} there are"


def _table(geometry: ConvGeometry) -> list[list[int]]:
    """For each t' and each t, the tap that meets frame t at t'; kT if none does.

    In modes other than zeros the frames that padding adds count as real frames.
    """
    assert geometry.frames is not None
    before, after = geometry.pads[0]
    frames = geometry.frames
    if geometry.padding_mode != "zeros":
        frames, before = frames + before + after, 0
    taps, dilation = geometry.kernel[0], geometry.dilation[0]

    def tap(out: int, frame: int) -> int:
        index, rest = divmod(frame + before - geometry.stride[0] * out, dilation)
        return index if rest == 0 and 0 <= index < taps else taps

    return [[tap(out, frame) for frame in range(frames)] for out in range(geometry.out_frames)]


def toeplitz_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """(C_out, C/groups, kT, kH, kW) -> (C_out·T', C/groups·T, kH, kW), for one T."""
    table = _table(geometry)
    flat = torch.tensor([tap for row in table for tap in row], device=weight.device)
    blocks = F.pad(weight, (0, 0, 0, 0, 0, 1)).index_select(2, flat)  # the last tap is zeros
    blocks = torch.unflatten(blocks, 2, (len(table), -1))  # (C_out, C/groups, T', T, kH, kW)
    return lay_out(blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1), geometry.groups)


def made_for(prepared: Tensor, geometry: ConvGeometry) -> bool:
    """Whether ``prepared`` is the weight of a clip of as many frames as ``geometry`` has."""
    rows, columns = len(_table(geometry)), len(_table(geometry)[0])
    channels = geometry.in_channels // geometry.groups * columns
    return prepared.shape[:2] == (geometry.out_channels * rows, channels)


def toeplitz(x: Tensor, prepared: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A clip no longer than the kernel: its frames become channels, and so do those of the result.

    Domain: T is known, and no more than dilation·(kT - 1) + 1. Arguments, result and errors as for
    :func:`conv3d`.

    ``(B, C, T, H, W) -> (B, C·T, H, W) -> conv2d, weight (C_out·T', C/groups·T, kH, kW) -> (B,
    C_out·T', H', W') -> back``, where the weight holds the tap that meets frame t at t', or zeros.
    For one frame under "same" padding that is the middle tap. A group's channels stay together, as
    in :func:`conv3d_full_extent`, which is the case T' = 1 without padding. Prepared: that weight,
    for one T; a clip of another T raises ValueError. The zeros are multiplied with real frames, so
    a NaN or infinite value spreads to frames of the result that conv3d computes without it.
    """
    x, _, inside = pad_space(x, geometry)
    if not made_for(prepared, geometry):
        raise ValueError(
            f"conv3d_toeplitz: the prepared weight {tuple(prepared.shape)} is for another number "
            f"of frames than the {geometry.frames} of this clip; prepare it for that number"
        )
    out = conv2d(
        channels_last(x.flatten(1, 2)),
        prepared,
        None if bias is None else bias.repeat_interleave(geometry.out_frames),
        geometry.stride[1:],
        inside,
        geometry.dilation[1:],
        geometry.groups,
    )
    return torch.unflatten(out, 1, (geometry.out_channels, geometry.out_frames))
