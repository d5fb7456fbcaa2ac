"""The exact forms of conv3d: cheaper ways to compute the same numbers.

A 3-D convolution is a sum of 2-D convolutions, and often equals a single one; 2-D convolutions are
what every engine does best. For example, a stem that reads one frame at a time::

    F.conv3d(x, weight)                # x (B, 3, T, 112, 112), weight (45, 3, 1, 7, 7)
    conv3d_spatial(x, weight)          # F.conv2d over (B·T, 3, 112, 112), weight (45, 3, 7, 7)

Every form has the signature of :func:`conv3d`, takes the original 5-D weight (so that gradients
reach the same parameter), and equals it within rounding on the form's domain::

    form                     domain                             computed as
    -----------------------  ---------------------------------  ----------------------------------
    conv3d                   everything                         itself
    conv3d_spatial           kernel (1, kH, kW)                 conv2d on (B·T, C, H, W)
    conv3d_temporal          kernel (kT, 1, 1)                  conv2d on (B, C, T, H·W)
    conv3d_pointwise         kernel (1, 1, 1)                   conv2d on (B, C, T, H·W)
    conv3d_full_extent       the kernel spans all T frames      conv2d on (B, C·kT, H, W)
    conv3d_patchify          kernel = stride, no padding, no    linear on (patches, C·kT·kH·kW)
                             dilation
    conv3d_channels_last_3d  everything                         itself, in channels_last_3d
    conv3d_taps              everything                         kT conv2d on (B·T', C, H, W)
    conv3d_stacked           everything                         conv2d on (B·T', kT·C, H, W)
    conv3d_spread            temporal stride 1                  conv2d to (B·T, kT·C_out, H', W')
    conv3d_toeplitz          the kernel reaches over T frames   conv2d of (B, C·T, H, W) to
                             or more                            (B, C_out·T', H', W')
    conv3d_winograd_2, 3, 4  at least float32; kT ≤ 5, 4, 3     m + kT - 1 conv2d for m frames
                             (times the stride)
    conv3d_low_rank          the kT taps are combinations of    filters over time, and conv2d on
                             r < kT kernels                     (B·T', r·C, H, W)

:data:`FORMS` is that table. It alone decides where a form is exact: a pass asks
``FORMS[name].blockers(geometry)``, and so does the form itself, which raises ``ValueError`` outside
its domain. Padding, in all modes, never blocks a form whose domain does not mention it: padding
that the lower-dimensional convolution cannot do is applied first, as in ``nn.Conv3d``.

A form that transforms the weight, or changes its layout, can do so once for many calls: see
:class:`Form`. :func:`conv3d_in_form` is for a graph that is called with other inputs than those it
was built for: it takes a prepared weight or none, and uses conv3d outside the domain.

If a clip has NaN or infinite values, conv3d_toeplitz and conv3d_winograd_3 and 4 spread them to
frames that conv3d computes without them: their :attr:`Form.confined` is False. In half precision on
a CPU conv2d itself (oneDNN in torch 2.13) spreads NaN to the next pixel.

No form branches on the batch size, and only conv3d_full_extent and conv3d_toeplitz on T, so that
``torch.export`` and ``torch.compile`` keep sizes free; all require an input at least as large as
the kernel, as conv3d does. The tiles of conv3d_winograd take any T, but an export with a free T
cannot prove it, and refuses. Which form is faster depends on the machine and on the layout of the
input: nothing here decides that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional import flat, low_rank, taps, toeplitz, winograd
from fxtemporal.functional.form import ConvFunction, Form
from fxtemporal.functional.geometry import ConvGeometry, Padding, pad
from fxtemporal.functional.layout import channels_last
from fxtemporal.functional.low_rank import temporal_rank
from fxtemporal.functional.packed import Weights, pack_each, pack_one
from fxtemporal.functional.winograd import winograd_weight
from fxtemporal.ir.leaf import leaf_function
from fxtemporal.support.torch_private.fake_tensors import is_fake

__all__ = [
    "FORMS",
    "ConvFunction",
    "ConvGeometry",
    "Form",
    "conv3d",
    "conv3d_channels_last_3d",
    "conv3d_full_extent",
    "conv3d_in_form",
    "conv3d_low_rank",
    "conv3d_packed",
    "conv3d_patchify",
    "conv3d_pointwise",
    "conv3d_spanning",
    "conv3d_spatial",
    "conv3d_spread",
    "conv3d_stacked",
    "conv3d_taps",
    "conv3d_temporal",
    "conv3d_toeplitz",
    "conv3d_weight",
    "conv3d_winograd_2",
    "conv3d_winograd_3",
    "conv3d_winograd_4",
    "temporal_rank",
    "winograd_weight",
]


def _direct(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """The reference: what ``nn.Conv3d`` computes, ``padding_mode`` included.

    Args:
        input: (B, C, T, H, W), or (C, T, H, W) without a batch.
        weight: (C_out, C / groups, kT, kH, kW).
        bias: (C_out,), or None.
        stride: three integers, for T, H and W; likewise ``dilation``.
        padding: three integers, ``"same"`` (stride 1 only) or ``"valid"``.
        groups: number of groups that the channels are split into.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        time_padding: frames of zeros added first, (before, after) the clip, as by
            ``F.pad(input, (0, 0, 0, 0, before, after))``; causal networks have them.

    Returns:
        (B, C_out, T', H', W'), or the same without B, where
        ``T' = (T + pads - dilation·(kT - 1) - 1) // stride + 1``, and H', W' likewise.

    Raises:
        ValueError: no convolution has this geometry, or (the other forms) it is outside the
            form's domain.
        RuntimeError: as in torch: the input is smaller than the kernel, channels do not match.
    """
    x, inside = pad(x, geometry, (True, True, True))
    return F.conv3d(x, weight, bias, geometry.stride, inside, geometry.dilation, geometry.groups)


def _last(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    return channels_last(weight)


def _channels_last_3d(
    x: Tensor, prepared: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """The same convolution, with its input and its weight in channels_last_3d.

    Domain: everything. Arguments, result and errors as for :func:`conv3d`. Engines that compute in
    this layout otherwise convert to it and back at each layer; a chain of these forms converts
    once. The result is in channels_last_3d. Prepared: the weight in that layout.
    """
    return _direct(channels_last(x), prepared, bias, geometry)


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            Form("conv3d", _direct, confined=True),
            Form("conv3d_spatial", flat.spatial, flat.one_frame_kernel, confined=True),
            Form("conv3d_temporal", flat.temporal, flat.one_pixel_kernel, confined=True),
            Form("conv3d_pointwise", flat.pointwise, flat.pointwise_kernel, confined=True),
            Form("conv3d_full_extent", flat.full_extent, flat.spans_all_frames, confined=True),
            Form("conv3d_patchify", flat.patchify, flat.kernel_is_stride, confined=True),
            Form("conv3d_channels_last_3d", _channels_last_3d, prepare=_last, confined=True),
            Form(
                "conv3d_taps",
                taps.taps,
                prepare=taps.tap_weights,
                pack=pack_each,
                confined=True,
            ),
            Form(
                "conv3d_stacked",
                taps.stacked,
                prepare=taps.stack_weight,
                pack=pack_one,
                confined=True,
            ),
            Form(
                "conv3d_spread",
                taps.spread,
                taps.unstrided,
                taps.spread_weight,
                pack=pack_one,
                confined=True,
            ),
            Form(
                "conv3d_toeplitz",
                toeplitz.toeplitz,
                toeplitz.clip_within_reach,
                toeplitz.toeplitz_weight,
                fits=toeplitz.made_for,
                pack=pack_one,
                confined=False,
            ),
            *(
                Form(
                    f"conv3d_winograd_{m}",
                    winograd.winograd(m),
                    winograd.winograd_domain(m),
                    winograd.winograd_taps(m),
                    pack=pack_each,
                    confined=m == 2,
                )
                for m in (2, 3, 4)
            ),
            Form(
                "conv3d_low_rank",
                low_rank.low_rank,
                low_rank.several_taps,
                low_rank.low_rank_weight,
                low_rank.low_rank_numbers,
                confined=True,
            ),
        )
    }
)
"""Every form by name, the reference first: the only place that says where each is exact."""

conv3d = FORMS["conv3d"].function
conv3d_spatial = FORMS["conv3d_spatial"].function
conv3d_temporal = FORMS["conv3d_temporal"].function
conv3d_pointwise = FORMS["conv3d_pointwise"].function
conv3d_full_extent = FORMS["conv3d_full_extent"].function
conv3d_patchify = FORMS["conv3d_patchify"].function
conv3d_channels_last_3d = FORMS["conv3d_channels_last_3d"].function
conv3d_taps = FORMS["conv3d_taps"].function
conv3d_stacked = FORMS["conv3d_stacked"].function
conv3d_spread = FORMS["conv3d_spread"].function
conv3d_toeplitz = FORMS["conv3d_toeplitz"].function
conv3d_winograd_2 = FORMS["conv3d_winograd_2"].function
conv3d_winograd_3 = FORMS["conv3d_winograd_3"].function
conv3d_winograd_4 = FORMS["conv3d_winograd_4"].function
conv3d_low_rank = FORMS["conv3d_low_rank"].function


@leaf_function
def conv3d_in_form(
    form: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
    time_padding: Sequence[int] = (0, 0),
    prepared: Weights | None = None,
) -> Tensor:
    """The form of that name if this call is in its domain, else :func:`conv3d`.

    Domain: everything. For a graph that was built for one T and one dtype, and is called with
    others. The remaining arguments, result and errors as for :func:`conv3d`.

    Args:
        form: a name in :data:`FORMS`.
        prepared: the value that :func:`conv3d_weight` made from the present ``weight``, or None. A
            value prepared for another T is ignored.

    Raises:
        ValueError: no convolution has this geometry.
    """
    geometry = ConvGeometry.of(
        input, weight, stride, padding, dilation, groups, padding_mode, time_padding
    )
    chosen = FORMS[form]
    unknown = prepared is None and chosen.reads_numbers
    if unknown or any(chosen.blockers(geometry)):
        chosen, prepared = FORMS["conv3d"], None
    if prepared is None or not chosen.fits(prepared, geometry):
        prepared = chosen.prepare(weight, geometry)
    return chosen.run(input, prepared, bias, geometry)


@leaf_function
def conv3d_weight(
    weight: Tensor,
    form: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    time_padding: Sequence[int],
    frames: int,
    size: Sequence[int],
) -> Tensor | None:
    """The prepared weight of a form, for clips of ``frames`` frames of ``size`` (H, W).

    None if the form is exact for some weights only, and not for this one, or if its numbers cannot
    be read: while it is traced or trained. :func:`conv3d_in_form` then uses conv3d.
    """
    chosen = FORMS[form]
    geometry = ConvGeometry.of_weight(
        weight, stride, padding, dilation, groups, padding_mode, time_padding
    )
    geometry = replace(geometry, frames=frames, size=(size[0], size[1]), dtype=weight.dtype)
    if chosen.reads_numbers:
        hidden = torch.compiler.is_compiling() or is_fake(weight) or weight.is_meta
        if hidden or any(chosen.weight_blockers(weight, geometry)):
            return None
    return chosen.prepare(weight, geometry)


def conv3d_packed(
    prepared: Tensor | None, form: str, groups: int, **options: Any
) -> Weights | None:
    """A weight of :func:`conv3d_weight` in this machine's layout: to be kept, not to be traced."""
    pack = FORMS[form].pack
    return prepared if prepared is None or pack is None else pack(prepared, groups)


@leaf_function
def conv3d_spanning(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Padding = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
    time_padding: Sequence[int] = (0, 0),
) -> Tensor:
    """:func:`conv3d_full_extent` if the kernel spans all T frames, else :func:`conv3d`.

    Domain: everything. Arguments, result and errors as for :func:`conv3d`. For a network that was
    captured with as many frames as the kernel has, and is called with any number.
    """
    rest = (stride, padding, dilation, groups, padding_mode, time_padding)
    return conv3d_in_form("conv3d_full_extent", input, weight, bias, *rest)
