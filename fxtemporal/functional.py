"""The exact forms of conv3d: cheaper ways to compute the very same numbers.

A 3-D convolution whose kernel is flat along some axis is a 2-D convolution in disguise, and 2-D
convolutions are what every engine is best at. A stem that looks at one frame at a time, say::

    F.conv3d(x, weight)                # x (B, 3, T, 112, 112), weight (45, 3, 1, 7, 7)
    conv3d_spatial(x, weight)          # F.conv2d over (B·T, 3, 112, 112), weight (45, 3, 7, 7)

Every form has the signature of :func:`conv3d`, takes the original 5-D weight (and views it, so
that gradients reach the same parameter), and equals it within rounding on the form's domain::

    form                  domain                                    computed as
    --------------------  ----------------------------------------  ------------------------------
    conv3d                everything                                itself
    conv3d_spatial        kernel (1, kH, kW)                        conv2d on (B·T, C, H, W)
    conv3d_temporal       kernel (kT, 1, 1)                         conv2d on (B, C, T, H·W)
    conv3d_pointwise      kernel (1, 1, 1)                          conv2d on (B, C, T, H·W)
    conv3d_full_extent    the kernel spans all T frames             conv2d on (B, C·kT, H, W)
    conv3d_patchify       kernel = stride, no padding, no dilation  linear on (patches, C·kT·kH·kW)

:data:`FORMS` is that table. What it says of a :class:`ConvGeometry` is all that decides: a pass
asks ``FORMS[name].blockers(geometry)``, and so does the form itself, which raises ``ValueError``
outside its domain. Padding, in all its modes, never blocks a form that could do without: what
the lower-dimensional convolution cannot pad itself is padded first, as ``nn.Conv3d`` would.

No form branches on the batch size, and only conv3d_full_extent on T, so that ``torch.export`` and
``torch.compile`` keep sizes free; that the input is no smaller than the kernel is asked, as conv3d
itself asks it. Which form is the faster depends on the machine and on the layout of the input:
nothing here decides that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.opaque import opaque

__all__ = [
    "FORMS",
    "ConvGeometry",
    "Form",
    "conv3d",
    "conv3d_full_extent",
    "conv3d_patchify",
    "conv3d_pointwise",
    "conv3d_spanning",
    "conv3d_spatial",
    "conv3d_temporal",
]

Triple: TypeAlias = tuple[int, int, int]
Padding: TypeAlias = Sequence[int] | str

_AXES = ("time", "height", "width")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvGeometry:
    """All that decides which forms a 3-D convolution has: everything about it but the numbers.

    Triples are in the order (T, H, W). ``padding`` is a triple, ``"same"`` or ``"valid"``, and
    ``padding_mode`` one of ``nn.Conv3d``'s. ``frames`` and ``size`` are the T and the (H, W) of
    the input, None where unknown.

    Raises:
        ValueError: no convolution has this geometry.
    """

    in_channels: int
    out_channels: int
    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple | str = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    frames: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"padding_mode is {self.padding_mode!r}; it must be one of {_PADDING_MODES}"
            )
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise ValueError(
                    f"padding is {self.padding!r}; it must be 'same', 'valid' or three integers"
                )
            if self.padding == "same" and self.stride != (1, 1, 1):
                raise ValueError(f"padding 'same' needs stride (1, 1, 1), not {self.stride}")
        elif min(self.padding) < 0:
            raise ValueError(f"padding {self.padding} is negative")

    @property
    def pads(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """What each axis is padded by, (before, after).

        ``"same"`` adds dilation·(kernel − 1) in all, the odd one after, as ``nn.Conv3d`` does.
        """
        if self.padding == "valid":
            return ((0, 0), (0, 0), (0, 0))
        if isinstance(self.padding, str):
            t, h, w = (d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))
            return ((t // 2, t - t // 2), (h // 2, h - h // 2), (w // 2, w - w // 2))
        t, h, w = self.padding
        return ((t, t), (h, h), (w, w))


ConvFunction: TypeAlias = Callable[..., Tensor]
"""``(input, weight, bias, stride, padding, dilation, groups, padding_mode) -> Tensor``"""


@dataclass(frozen=True)
class Form:
    """One exact way to compute a conv3d.

    ``blockers(geometry)`` yields a sentence for each precondition that fails; nothing yielded
    means that ``function`` equals :func:`conv3d` there.
    """

    name: str
    function: ConvFunction
    blockers: Callable[[ConvGeometry], Iterator[str]]


# ------------------------------------------------------------------------------- the domains


def _always(geometry: ConvGeometry) -> Iterator[str]:
    yield from ()


def _one_frame_kernel(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel[0] != 1:
        yield f"the kernel reaches over {geometry.kernel[0]} frames, not 1"


def _one_pixel_kernel(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel[1:] != (1, 1):
        height, width = geometry.kernel[1:]
        yield f"the kernel reaches over {height}×{width} pixels, not 1×1"


def _pointwise_kernel(geometry: ConvGeometry) -> Iterator[str]:
    yield from _one_frame_kernel(geometry)
    yield from _one_pixel_kernel(geometry)


def _spans_all_frames(geometry: ConvGeometry) -> Iterator[str]:
    reach = geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
    if geometry.pads[0] != (0, 0):
        yield f"time is padded by {geometry.pads[0]}"
    if geometry.frames is None:
        yield f"the kernel reaches over {reach} frames, and how many there are is not known"
    elif geometry.frames != reach:
        yield f"the kernel reaches over {reach} frames, and there are {geometry.frames}"


def _kernel_is_stride(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel != geometry.stride:
        yield f"the stride {geometry.stride} is not the kernel size {geometry.kernel}"
    for axis, pads in zip(_AXES, geometry.pads, strict=True):
        if pads != (0, 0):
            yield f"{axis} is padded by {pads}"
    for axis, kernel, dilation in zip(_AXES, geometry.kernel, geometry.dilation, strict=True):
        if kernel > 1 and dilation != 1:
            yield f"the kernel is dilated by {dilation} along {axis}"


# --------------------------------------------------------------------------------- the forms


@opaque
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The reference: what ``nn.Conv3d`` computes, ``padding_mode`` included.

    Args:
        input: (B, C, T, H, W), or (C, T, H, W) without a batch.
        weight: (C_out, C / groups, kT, kH, kW).
        bias: (C_out,), or None.
        stride: three integers, for T, H and W; likewise ``dilation``.
        padding: three integers, ``"same"`` (stride 1 only) or ``"valid"``.
        groups: how many groups the channels are split into.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        (B, C_out, T', H', W'), or the same without B, where
        ``T' = (T + pads - dilation·(kT - 1) - 1) // stride + 1``, and H', W' likewise.

    Raises:
        ValueError: no convolution has this geometry, or (the other forms) it is outside the
            form's domain.
        RuntimeError: as torch: the input is smaller than the kernel, channels do not match.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    x, pad = _pad(_batched(input), geometry, (True, True, True))
    out = F.conv3d(x, weight, bias, geometry.stride, pad, geometry.dilation, groups)
    return _like(input, out)


@opaque
def conv3d_spatial(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """A kernel that sees one frame at a time: the frames join the batch.

    Domain: kernel (1, kH, kW). Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B·T', C, H, W) -> conv2d -> (B·T', C_out, H', W') -> back``, where a
    temporal stride takes every n-th frame. The input is brought to channels_last_3d, in which
    both folds are views, and the result is in it too (C > 1), so that a chain copies once.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    _require("conv3d_spatial", geometry)
    x, (_, *pad) = _pad(_batched(input), geometry, (False, True, True))
    x = x[:, :, :: geometry.stride[0]].contiguous(memory_format=torch.channels_last_3d)
    batch, frames = x.shape[0], x.shape[2]
    if frames == 0:  # which conv2d would take for an empty batch
        raise RuntimeError(f"conv3d_spatial: the input {tuple(input.shape)} has no frames")
    out = F.conv2d(
        x.transpose(1, 2).flatten(0, 1),
        weight[:, :, 0],
        bias,
        geometry.stride[1:],
        pad,
        geometry.dilation[1:],
        groups,
    )
    return _like(input, torch.unflatten(out, 0, (batch, frames)).transpose(1, 2))


@opaque
def conv3d_temporal(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """A kernel that sees one pixel through time: the pixels join one axis.

    Domain: kernel (kT, 1, 1). Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B, C, T, H·W) -> conv2d, kernel (kT, 1) -> (B, C_out, T', H·W) ->
    back``, where spatial strides take every n-th row and column. Both folds are views in the
    contiguous and in the channels_last_3d format alike, and the result keeps the input's format.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    _require("conv3d_temporal", geometry)
    x, pad = _pad(_batched(input), geometry, (True, False, False))
    x = _every(x, (1, *geometry.stride[1:]))
    height, width = x.shape[3], x.shape[4]
    out = F.conv2d(
        x.flatten(3),
        weight[..., 0],
        bias,
        (geometry.stride[0], 1),
        (pad[0], 0),
        (geometry.dilation[0], 1),
        groups,
    )
    return _like(input, torch.unflatten(out, 3, (height, width)))


@opaque
def conv3d_pointwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """A kernel of one pixel of one frame: a 1×1 conv2d.

    Domain: kernel (1, 1, 1). Arguments, result and errors as for :func:`conv3d`.

    ``(B, C, T, H, W) -> (B, C, T', H'·W') -> conv2d, kernel (1, 1) -> back``, where strides take
    every n-th frame, row and column. A view, and the format of the input is kept, as in
    :func:`conv3d_temporal`. The convolution engine was measured ahead of a matrix product here.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    _require("conv3d_pointwise", geometry)
    x, _ = _pad(_batched(input), geometry, (False, False, False))
    x = _every(x, geometry.stride)
    height, width = x.shape[3], x.shape[4]
    out = F.conv2d(x.flatten(3), weight[..., 0], bias, groups=groups)
    return _like(input, torch.unflatten(out, 3, (height, width)))


@opaque
def conv3d_full_extent(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """A kernel that spans all the frames: they become channels.

    Domain: time is not padded, and T = dilation·(kT - 1) + 1, so that T' = 1. Arguments, result
    and errors as for :func:`conv3d`; the temporal stride has nothing left to decide.

    ``(B, C, kT, H, W) -> (B, C·kT, H, W) -> conv2d, weight (C_out, C/groups·kT, kH, kW) -> (B,
    C_out, 1, H', W')``. A group's channels stay together because kT is the faster of the two
    axes. A view of a contiguous input.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    _require("conv3d_full_extent", geometry)
    x, (_, *pad) = _pad(_batched(input), geometry, (False, True, True))
    out = F.conv2d(
        x[:, :, :: geometry.dilation[0]].flatten(1, 2),
        weight.flatten(1, 2),
        bias,
        geometry.stride[1:],
        pad,
        geometry.dilation[1:],
        groups,
    )
    return _like(input, out.unsqueeze(2))


@opaque
def conv3d_spanning(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """:func:`conv3d_full_extent` where the kernel spans all T frames, else :func:`conv3d`.

    Domain: everything. Arguments, result and errors as for :func:`conv3d`. For a network that was
    looked at with as many frames as the kernel has, and is called with any number of them.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    spans = not any(_spans_all_frames(geometry))
    function = conv3d_full_extent if spans else conv3d
    return function(input, weight, bias, stride, padding, dilation, groups, padding_mode)


@opaque
def conv3d_patchify(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Patches that touch and do not overlap: each becomes one row of a matrix.

    Domain: stride = kernel, no padding, no dilation. Arguments, result and errors as for
    :func:`conv3d`. What does not fill a whole patch at the end of an axis is cropped.

    ``(B, C, T, H, W) -> (B·T'·H'·W', C·kT·kH·kW) -> linear -> (B, C_out, T', H', W')``, in
    channels_last_3d; with groups > 1 a 1×1 conv2d stands for the linear. Where the input already
    is one patch a row, (B, C, kT, kH, kW), as vision-language models hand it over, the rows are a
    view, and this is several times as fast as conv3d. Of a whole clip they are a copy, which large
    patches repay on some machines; folding only the time axis into channels, or one conv2d a tap,
    was tried instead and gained nothing over conv3d.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups, padding_mode)
    _require("conv3d_patchify", geometry)
    x = _batched(input)
    for axis, reach in zip((2, 3, 4), geometry.kernel, strict=True):
        x = x.unfold(axis, reach, reach)
    patches = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)  # (B, T', H', W', C·kT·kH·kW)
    if groups == 1:
        return _like(input, F.linear(patches, weight.flatten(1), bias).permute(0, 4, 1, 2, 3))
    out = F.conv2d(
        patches.flatten(0, 3)[..., None, None],
        weight.flatten(1)[..., None, None],
        bias,
        groups=groups,
    )
    rows = torch.unflatten(out.flatten(1), 0, patches.shape[:4])
    return _like(input, rows.permute(0, 4, 1, 2, 3))


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            Form("conv3d", conv3d, _always),
            Form("conv3d_spatial", conv3d_spatial, _one_frame_kernel),
            Form("conv3d_temporal", conv3d_temporal, _one_pixel_kernel),
            Form("conv3d_pointwise", conv3d_pointwise, _pointwise_kernel),
            Form("conv3d_full_extent", conv3d_full_extent, _spans_all_frames),
            Form("conv3d_patchify", conv3d_patchify, _kernel_is_stride),
        )
    }
)
"""Every form by name, the reference first: the one place that says where each is exact."""


# ------------------------------------------------------------------------- what they share


def _triple(name: str, values: Sequence[int]) -> Triple:
    if len(values) != 3:
        raise ValueError(f"{name} is {tuple(values)}; it must have three entries, for T, H and W")
    return (values[0], values[1], values[2])


def _geometry(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> ConvGeometry:
    if input.dim() not in (4, 5):
        raise ValueError(
            f"the input has shape {tuple(input.shape)}; it must be (B, C, T, H, W) or (C, T, H, W)"
        )
    if weight.dim() != 5:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}; it must be (C_out, C/groups, kT, kH, kW)"
        )
    return ConvGeometry(
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        kernel=_triple("the kernel", weight.shape[2:]),
        stride=_triple("stride", stride),
        padding=padding if isinstance(padding, str) else _triple("padding", padding),
        dilation=_triple("dilation", dilation),
        groups=groups,
        padding_mode=padding_mode,
        frames=input.shape[-3],
        size=(input.shape[-2], input.shape[-1]),
    )


def _require(name: str, geometry: ConvGeometry) -> None:
    blockers = list(FORMS[name].blockers(geometry))
    if blockers:
        raise ValueError(f"{name} does not compute this convolution: {'; '.join(blockers)}")


def _batched(input: Tensor) -> Tensor:
    return input if input.dim() == 5 else input.unsqueeze(0)


def _like(input: Tensor, output: Tensor) -> Tensor:
    """``output`` without its batch axis if ``input`` had none."""
    return output if input.dim() == 5 else output.squeeze(0)


def _every(x: Tensor, steps: Triple) -> Tensor:
    """Every n-th frame, row and column of (B, C, T, H, W), dense and in the format of ``x``."""
    if steps == (1, 1, 1):
        return x
    return x[:, :, :: steps[0], :: steps[1], :: steps[2]].clone()


def _pad(
    x: Tensor, geometry: ConvGeometry, by_convolution: tuple[bool, bool, bool]
) -> tuple[Tensor, Triple]:
    """Pad what the convolution cannot; return the rest as the triple of what it shall pad.

    A convolution pads zeros, as many before as after, along the axes that ``by_convolution`` says
    it has. Everything else is padded here: in modes other than zeros all axes at once, as
    ``nn.Conv3d`` does.
    """
    zeros = geometry.padding_mode == "zeros"
    inside = [0, 0, 0]
    outside: list[int] = []  # as F.pad takes it: the last axis first
    for axis in (2, 1, 0):
        before, after = geometry.pads[axis]
        if zeros and before == after and by_convolution[axis]:
            inside[axis] = before
            before = after = 0
        outside += [before, after]
    if any(outside):
        x = F.pad(x, outside, mode="constant" if zeros else geometry.padding_mode)
    return x, (inside[0], inside[1], inside[2])
