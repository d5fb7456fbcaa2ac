"""The exact forms of 3-D pooling: cheaper ways to compute the same numbers.

A 3-D pooling whose window is flat along some axis equals a 2-D pooling::

    F.max_pool3d(x, (1, 3, 3), (1, 2, 2))        # x (B, C, T, H, W)
    max_pool3d_spatial(x, (1, 3, 3), (1, 2, 2))  # F.max_pool2d over (B, C·T, H, W)

Every form takes the arguments of the function it replaces, and equals it on the form's domain::

    form                          domain                          computed as
    ----------------------------  ------------------------------  ----------------------------------
    max_pool3d_spatial            window (1, kH, kW)              max_pool2d on each frame
    max_pool3d_temporal           window (kT, 1, 1)               max_pool2d on (B, C, T, H·W)
    avg_pool3d_spatial            window (1, kH, kW)              avg_pool2d on each frame
    avg_pool3d_temporal           window (kT, 1, 1)               avg_pool2d on (B, C, T, H·W)
    adaptive_avg_pool3d_mean      each size 1 or None, one 1      mean
    adaptive_avg_pool3d_spatial   size (None or 1, h, w)          adaptive_avg_pool2d on each frame
    adaptive_avg_pool3d_temporal  size (t, None, None), (t, 1, 1) adaptive_avg_pool2d over T

:data:`POOL_FORMS` is that table. It alone decides where a form is exact: a pass asks
``POOL_FORMS[name].blockers(window)``, and so does the form itself, which raises ``ValueError``
outside its domain. The maximum is exact to the bit, averages are exact within rounding.

The folds are views of contiguous and of channels_last_3d tensors. The result of a pooling by
windows has the format of the input (``F.avg_pool3d`` gives a contiguous one on a CPU). No form
branches on a size, so that ``torch.export`` keeps sizes free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional.layout import plain_strides
from fxtemporal.ir.leaf import leaf_function

__all__ = [
    "POOL_FORMS",
    "PoolForm",
    "PoolWindow",
    "adaptive_avg_pool3d_mean",
    "adaptive_avg_pool3d_spatial",
    "adaptive_avg_pool3d_temporal",
    "avg_pool3d_spatial",
    "avg_pool3d_temporal",
    "max_pool3d_spatial",
    "max_pool3d_temporal",
]

Triple: TypeAlias = tuple[int, int, int]
Sizes: TypeAlias = Sequence[int | None]


@dataclass(frozen=True)
class PoolWindow:
    """All facts about a 3-D pooling that decide its forms. Triples are in the order (T, H, W).

    ``sizes`` are the output sizes of an adaptive pooling; None for an axis that keeps its size.
    """

    kernel: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    sizes: tuple[int | None, int | None, int | None] | None = None


@dataclass(frozen=True)
class PoolForm:
    """One exact way to compute the 3-D pooling ``op``.

    ``blockers(window)`` yields a sentence for each precondition that fails.
    """

    name: str
    op: str
    function: Callable[..., Tensor]
    blockers: Callable[[PoolWindow], Iterator[str]]


# ------------------------------------------------------------------------------- the domains


def _one_frame(window: PoolWindow) -> Iterator[str]:
    if window.kernel[0] != 1:
        yield f"the window reaches over {window.kernel[0]} frames, not 1"
    if window.padding[0] != 0:
        yield f"time is padded by {window.padding[0]}"


def _one_pixel(window: PoolWindow) -> Iterator[str]:
    if window.kernel[1:] != (1, 1):
        height, width = window.kernel[1:]
        yield f"the window reaches over {height}×{width} pixels, not 1×1"
    if window.padding[1:] != (0, 0):
        yield f"space is padded by {window.padding[1:]}"


def _whole_axes(window: PoolWindow) -> Iterator[str]:
    sizes = window.sizes or ()
    if any(size not in (1, None) for size in sizes):
        yield f"the sizes {sizes} are not all 1 or None"
    if 1 not in sizes:
        yield f"no axis is averaged to one entry by the sizes {sizes}"


def _no_windows_in_time(window: PoolWindow) -> Iterator[str]:
    if window.sizes is None or window.sizes[0] not in (1, None):
        yield f"time is averaged in windows by the sizes {window.sizes}"


def _no_windows_in_space(window: PoolWindow) -> Iterator[str]:
    if window.sizes is None or window.sizes[1:] not in ((1, 1), (None, None)):
        yield f"space is averaged in windows by the sizes {window.sizes}"


# --------------------------------------------------------------------------------- the forms


@leaf_function
def max_pool3d_spatial(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool3d`` with a window (1, kH, kW), on (B, C, T, H, W) or (C, T, H, W).

    Raises:
        ValueError: outside its domain.
    """
    _require("max_pool3d_spatial", PoolWindow(_triple(kernel_size), _triple(padding)))
    pool = partial(
        F.max_pool2d,
        kernel_size=tuple(kernel_size[1:]),
        stride=tuple(stride[1:]),
        padding=tuple(padding[1:]),
        dilation=tuple(dilation[1:]),
        ceil_mode=ceil_mode,
    )
    return _on_frames(input, stride[0], pool)


@leaf_function
def max_pool3d_temporal(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool3d`` with a window (kT, 1, 1). Arguments and errors as for the spatial one."""
    _require("max_pool3d_temporal", PoolWindow(_triple(kernel_size), _triple(padding)))
    pool = partial(
        F.max_pool2d,
        kernel_size=(kernel_size[0], 1),
        stride=(stride[0], 1),
        padding=(padding[0], 0),
        dilation=(dilation[0], 1),
        ceil_mode=ceil_mode,
    )
    return _through_time(input, stride, pool)


@leaf_function
def avg_pool3d_spatial(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``F.avg_pool3d`` with a window (1, kH, kW), on (B, C, T, H, W) or (C, T, H, W).

    Raises:
        ValueError: outside its domain.
    """
    _require("avg_pool3d_spatial", PoolWindow(_triple(kernel_size), _triple(padding)))
    pool = partial(
        F.avg_pool2d,
        kernel_size=tuple(kernel_size[1:]),
        stride=tuple(stride[1:]),
        padding=tuple(padding[1:]),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    return _on_frames(input, stride[0], pool)


@leaf_function
def avg_pool3d_temporal(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``F.avg_pool3d`` with a window (kT, 1, 1). Arguments and errors as for the spatial one."""
    _require("avg_pool3d_temporal", PoolWindow(_triple(kernel_size), _triple(padding)))
    pool = partial(
        F.avg_pool2d,
        kernel_size=(kernel_size[0], 1),
        stride=(stride[0], 1),
        padding=(padding[0], 0),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    return _through_time(input, stride, pool)


@leaf_function
def adaptive_avg_pool3d_mean(input: Tensor, output_size: Sizes) -> Tensor:
    """``F.adaptive_avg_pool3d`` to one entry along some axes, all entries along the others.

    Args:
        input: (B, C, T, H, W) or (C, T, H, W).
        output_size: three sizes, each 1 or None, one of them 1.

    Raises:
        ValueError: outside its domain.
        RuntimeError: an axis is empty, as in torch.
    """
    _require("adaptive_avg_pool3d_mean", PoolWindow(sizes=_sizes(output_size)))
    return _averaged(input, output_size)


@leaf_function
def adaptive_avg_pool3d_spatial(input: Tensor, output_size: Sizes) -> Tensor:
    """``F.adaptive_avg_pool3d`` to sizes (None or 1, h, w); the frames are averaged first."""
    _require("adaptive_avg_pool3d_spatial", PoolWindow(sizes=_sizes(output_size)))
    x = _averaged(input, (output_size[0], None, None))
    pool = partial(F.adaptive_avg_pool2d, output_size=(output_size[1], output_size[2]))
    return _on_frames(x, 1, pool)


@leaf_function
def adaptive_avg_pool3d_temporal(input: Tensor, output_size: Sizes) -> Tensor:
    """``F.adaptive_avg_pool3d`` to sizes (t, None, None) or (t, 1, 1); space is averaged first."""
    _require("adaptive_avg_pool3d_temporal", PoolWindow(sizes=_sizes(output_size)))
    x = _averaged(input, (None, *output_size[1:]))
    pool = partial(F.adaptive_avg_pool2d, output_size=(output_size[0], None))
    return _through_time(x, (1, 1, 1), pool)


POOL_FORMS: Mapping[str, PoolForm] = MappingProxyType(
    {
        form.name: form
        for form in (
            PoolForm("max_pool3d_spatial", "max_pool3d", max_pool3d_spatial, _one_frame),
            PoolForm("max_pool3d_temporal", "max_pool3d", max_pool3d_temporal, _one_pixel),
            PoolForm("avg_pool3d_spatial", "avg_pool3d", avg_pool3d_spatial, _one_frame),
            PoolForm("avg_pool3d_temporal", "avg_pool3d", avg_pool3d_temporal, _one_pixel),
            *(
                PoolForm(function.__name__, "adaptive_avg_pool3d", function, blockers)
                for function, blockers in (
                    (adaptive_avg_pool3d_mean, _whole_axes),
                    (adaptive_avg_pool3d_spatial, _no_windows_in_time),
                    (adaptive_avg_pool3d_temporal, _no_windows_in_space),
                )
            ),
        )
    }
)
"""Every form by name, in order of preference: the only place that says where each is exact."""


# ------------------------------------------------------------------------- shared by the forms


def _triple(values: Sequence[int]) -> Triple:
    first, second, third = values
    return (first, second, third)


def _sizes(values: Sizes) -> tuple[int | None, int | None, int | None]:
    first, second, third = values
    return (first, second, third)


def _require(name: str, window: PoolWindow) -> None:
    blockers = list(POOL_FORMS[name].blockers(window))
    if blockers:
        raise ValueError(f"{name} does not compute this pooling: {'; '.join(blockers)}")


def _batched(input: Tensor) -> Tensor:
    if input.dim() not in (4, 5):
        raise ValueError(
            f"the input has shape {tuple(input.shape)}; it must be (B, C, T, H, W) or (C, T, H, W)"
        )
    return plain_strides(input if input.dim() == 5 else input.unsqueeze(0))


def _like(input: Tensor, output: Tensor) -> Tensor:
    output = plain_strides(output)
    return output if input.dim() == 5 else output.squeeze(0)


def _on_frames(input: Tensor, step: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """``pool`` on each ``step``-th frame. Frames join the batch in channels_last_3d, else channels.

    For a window of one frame ``ceil_mode`` makes no difference: it adds no frame.
    """
    whole = _batched(input)
    x = whole[:, :, ::step]
    batch, channels, frames = x.shape[:3]
    if frames == 0:  # a 2-D pooling would accept this as an empty batch
        raise RuntimeError(f"the input {tuple(input.shape)} has no frames")
    if _is_channels_last(whole):
        out = pool(x.transpose(1, 2).flatten(0, 1))
        return _like(input, torch.unflatten(out, 0, (batch, frames)).transpose(1, 2))
    out = pool(x.flatten(1, 2))
    return _like(input, torch.unflatten(out, 1, (channels, frames)))


def _through_time(input: Tensor, stride: Sequence[int], pool: Callable[[Tensor], Tensor]) -> Tensor:
    """``pool`` on (B, C, T, H·W), for every n-th row and column."""
    x = _batched(input)
    if tuple(stride[1:]) != (1, 1):
        x = x[..., :: stride[1], :: stride[2]].clone()
    height, width = x.shape[3], x.shape[4]
    return _like(input, torch.unflatten(pool(x.flatten(3)), 3, (height, width)))


def _averaged(input: Tensor, sizes: Sizes) -> Tensor:
    x = _batched(input)
    if tuple(sizes) != (1, 1, 1) and 0 in x.shape[2:]:  # to (1, 1, 1) torch takes the mean too
        raise RuntimeError(f"the input {tuple(input.shape)} has an empty axis")
    axes = [axis for axis, size in zip((2, 3, 4), sizes, strict=True) if size == 1]
    return _like(input, x.mean(axes, keepdim=True) if axes else x)


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory; true for slices of such tensors."""
    return x.stride(1) < x.stride(4)
