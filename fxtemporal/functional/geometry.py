"""The geometry of a 3-D convolution: kernel, strides, padding, and sizes of its input.

Every form takes a :class:`ConvGeometry`, and every domain is a condition on one. Only this module
computes padding: a form says which axes its lower-dimensional convolution can pad, and the rest is
padded before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ConvGeometry",
    "Padding",
    "Pair",
    "Triple",
    "every",
    "pad",
    "pad_space",
    "pad_time",
    "product_dtype",
]

Pair: TypeAlias = tuple[int, int]
Triple: TypeAlias = tuple[int, int, int]
Padding: TypeAlias = Sequence[int] | str

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvGeometry:
    """All facts about a 3-D convolution that decide its forms: everything but the numbers.

    Triples are in the order (T, H, W). ``padding`` is a triple, ``"same"`` or ``"valid"``, and
    ``padding_mode`` one of ``nn.Conv3d``'s. ``time_padding`` is the number of frames of zeros
    added first, before and after the clip: the input is ``F.pad(x, (0, 0, 0, 0, before, after))``,
    as causal networks write it. ``frames`` and ``size`` are T and (H, W) of the input, ``dtype`` is
    that of its products; None if unknown.

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
    time_padding: Pair = (0, 0)
    frames: int | None = None
    size: tuple[int, int] | None = None
    dtype: torch.dtype | None = None

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
        if min(self.time_padding) < 0:
            raise ValueError(f"time_padding {self.time_padding} is negative")
        # A kernel of 1 cannot be dilated. With a dilation, torch 2.13 reads beyond its memory in a
        # grouped 1×1 conv2d in channels_last.
        pairs = zip(self.kernel, self.dilation, strict=True)
        dilation = tuple(1 if kernel == 1 else given for kernel, given in pairs)
        object.__setattr__(self, "dilation", dilation)

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Padding,
        dilation: Sequence[int],
        groups: int,
        padding_mode: str,
        time_padding: Sequence[int],
    ) -> ConvGeometry:
        """The geometry of a call. Raises ValueError if no convolution has it."""
        rest = (stride, padding, dilation, groups, padding_mode, time_padding)
        return cls.of_weight(weight, *rest).at(input)

    @classmethod
    def of_weight(
        cls,
        weight: Tensor,
        stride: Sequence[int],
        padding: Padding,
        dilation: Sequence[int],
        groups: int,
        padding_mode: str,
        time_padding: Sequence[int],
    ) -> ConvGeometry:
        """The geometry without an input: T, (H, W) and dtype are unknown."""
        if weight.dim() != 5:
            shape = tuple(weight.shape)
            raise ValueError(
                f"the weight has shape {shape}; it must be (C_out, C/groups, kT, kH, kW)"
            )
        if len(time_padding) != 2:
            raise ValueError(f"time_padding is {tuple(time_padding)}; it must be (before, after)")
        return cls(
            in_channels=weight.shape[1] * groups,
            out_channels=weight.shape[0],
            kernel=_triple("the kernel", weight.shape[2:]),
            stride=_triple("stride", stride),
            padding=padding if isinstance(padding, str) else _triple("padding", padding),
            dilation=_triple("dilation", dilation),
            groups=groups,
            padding_mode=padding_mode,
            time_padding=(time_padding[0], time_padding[1]),
        )

    def at(self, input: Tensor) -> ConvGeometry:
        """This geometry with the T, (H, W) and dtype of ``input``.

        Raises:
            ValueError: ``input`` is neither (B, C, T, H, W) nor (C, T, H, W).
        """
        if input.dim() not in (4, 5):
            shape = tuple(input.shape)
            raise ValueError(
                f"the input has shape {shape}; it must be (B, C, T, H, W) or (C, T, H, W)"
            )
        size = (input.shape[-2], input.shape[-1])
        return replace(self, frames=input.shape[-3], size=size, dtype=product_dtype(input))

    @property
    def layer_pads(self) -> tuple[Pair, Pair, Pair]:
        """The amounts that ``padding`` alone adds to each axis, (before, after).

        ``"same"`` adds dilation·(kernel − 1) in total; if odd, one more after, as ``nn.Conv3d``.
        """
        if self.padding == "valid":
            return ((0, 0), (0, 0), (0, 0))
        if isinstance(self.padding, str):
            t, h, w = (d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))
            return ((t // 2, t - t // 2), (h // 2, h - h // 2), (w // 2, w - w // 2))
        t, h, w = self.padding
        return ((t, t), (h, h), (w, w))

    @property
    def pads(self) -> tuple[Pair, Pair, Pair]:
        """The total padding of each axis, (before, after)."""
        (before, after), height, width = self.layer_pads
        return ((before + self.time_padding[0], after + self.time_padding[1]), height, width)

    @property
    def reach(self) -> Triple:
        """The frames, rows and columns that the kernel spans: dilation·(k − 1) + 1."""
        t, h, w = (d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return (t, h, w)

    @property
    def out_frames(self) -> int:
        """T', the number of frames of the result; T must be known."""
        assert self.frames is not None
        return (self.frames + sum(self.pads[0]) - self.reach[0]) // self.stride[0] + 1

    def require_room(self) -> None:
        """Raise RuntimeError, as torch does, if an axis is shorter than the kernel."""
        assert self.frames is not None
        assert self.size is not None
        given = (self.frames + sum(self.time_padding), *self.size)
        for extent, around, pads, reach in zip(
            (self.frames, *self.size), given, self.pads, self.reach, strict=True
        ):
            if around == 0 or extent + sum(pads) < reach:
                raise RuntimeError(
                    f"the input has (T, H, W) = {(self.frames, *self.size)}, padded by "
                    f"{self.pads}: smaller than the kernel, which reaches over {self.reach}"
                )


def every(x: Tensor, steps: Triple) -> Tensor:
    """Every n-th frame, row and column of (B, C, T, H, W), dense and in the format of ``x``."""
    if steps == (1, 1, 1):
        return x
    return x[:, :, :: steps[0], :: steps[1], :: steps[2]].clone()


def pad(
    x: Tensor, geometry: ConvGeometry, by_convolution: tuple[bool, bool, bool]
) -> tuple[Tensor, Triple]:
    """Apply the padding that the convolution cannot do; return ``x`` and the padding left to it.

    A convolution pads zeros, as many before as after, along the axes in ``by_convolution``. All
    other padding is applied here: in modes other than zeros to all axes at once, as ``nn.Conv3d``
    does.
    """
    if geometry.padding_mode == "zeros":
        inside, outside = _share(geometry.pads, by_convolution)
        return _padded(x, outside, "constant"), (inside[0], inside[1], inside[2])
    x = _padded(x, (0, 0, 0, 0, *geometry.time_padding), "constant")
    _, outside = _share(geometry.layer_pads, (False, False, False))
    return _padded(x, outside, geometry.padding_mode), (0, 0, 0)


def pad_space(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Pair, Pair]:
    """Apply the spatial padding that a conv2d over (H, W) cannot do, but add no frames of zeros.

    Returns ``x``, the number of frames of zeros still missing before and after it, and the padding
    left to the conv2d. In modes other than zeros the added frames are not zeros, so they are added
    here, and none is missing.
    """
    if geometry.padding_mode != "zeros":
        x, _ = pad(x, geometry, (False, False, False))
        return x, (0, 0), (0, 0)
    inside, outside = _share(geometry.pads[1:], (True, True))
    return _padded(x, outside, "constant"), geometry.pads[0], (inside[0], inside[1])


def pad_time(x: Tensor, before: int, after: int) -> Tensor:
    """Frames of zeros before and after (B, C, T, H, W); a negative number of them crops."""
    if type(after) is int and before == after == 0:  # a free T must not be compared
        return x
    return F.pad(x, (0, 0, 0, 0, before, after))


def _share(pads: Sequence[Pair], by_convolution: Sequence[bool]) -> tuple[list[int], list[int]]:
    """The padding that a convolution does, one number an axis, and the rest in F.pad's order."""
    inside: list[int] = []
    outside: list[int] = []
    for (before, after), able in zip(pads, by_convolution, strict=True):
        shared = before if able and before == after else 0
        inside.append(shared)
        outside = [before - shared, after - shared, *outside]
    return inside, outside


def _padded(x: Tensor, amounts: Sequence[int], mode: str) -> Tensor:
    return F.pad(x, list(amounts), mode=mode) if any(amounts) else x


def _triple(name: str, values: Sequence[int]) -> Triple:
    if len(values) != 3:
        raise ValueError(f"{name} is {tuple(values)}; it must have three entries, for T, H and W")
    return (values[0], values[1], values[2])


def product_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a convolution of ``input`` multiplies: autocast lowers all but float64."""
    device = input.device.type
    if input.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return input.dtype
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else input.dtype
