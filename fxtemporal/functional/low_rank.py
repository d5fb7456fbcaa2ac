"""A form for kernels whose kT taps are combinations of fewer 2-D kernels.

Networks that were inflated from images (I3D) start from one 2-D kernel, repeated over time and
divided by kT, or in the middle tap with zeros around it. In general the kT taps may be combinations
of r < kT kernels, with the same coefficients for all channels::

    W[o, c, t] = Σ_i f[i, t] · K[i, o, c]        constant: f = (1, 1, 1), K = W[:, :, 0]
    conv3d(x, W) = Σ_i conv2d(f[i] * x, K[i])    centred:  f = (0, 1, 0), K = W[:, :, 1]

which costs r conv2d a frame instead of kT, and some additions. The rank is that of the
kT × (C_out·C·kH·kW) matrix of the taps. It depends on the weight's numbers: the form is exact for
the weight it was prepared from, and wrong after the next step of the optimizer.

J. Carreira and A. Zisserman, Quo Vadis, Action Recognition?, CVPR 2017 (arXiv:1705.07750).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxtemporal.functional.geometry import ConvGeometry, pad_space
from fxtemporal.functional.taps import Tap, conv_frames, frames_last, with_base

__all__ = ["low_rank", "low_rank_numbers", "low_rank_weight", "several_taps", "temporal_rank"]

_ROUNDING = torch.finfo(torch.float32).eps  # the coarsest that counts as rounding
_CLEARLY = 1e-10
"""A squared singular value above this share of the largest cannot come from rounding."""


def several_taps(geometry: ConvGeometry) -> Iterator[str]:
    if geometry.kernel[0] == 1:
        yield "the kernel reaches over 1 frame"


def low_rank_numbers(weight: Tensor, geometry: ConvGeometry) -> Iterator[str]:
    """Reasons in the weight's numbers against the form; reads all of them."""
    taps = geometry.kernel[0]
    if weight.requires_grad and torch.is_grad_enabled():
        yield "the weight is being trained, and its rank may change"
    if not bool(torch.isfinite(weight).all()):
        yield "the weight is not finite"
    elif temporal_rank(weight) >= taps > 1:
        yield f"the {taps} taps are of full rank"
    elif weight.dtype in (torch.float16, torch.bfloat16):
        filters, kernels = _factors(weight)
        product = filters.to(weight.dtype).double().T @ kernels.to(weight.dtype).double()
        if not torch.equal(product, _rows(weight)):
            yield f"its factors are no {weight.dtype} numbers"


def temporal_rank(weight: Tensor) -> int:
    """The number of 2-D kernels that span the taps of (C_out, C/groups, kT, kH, kW).

    Counted in float64: the singular values of the kT × rest matrix above the rounding of the
    weight's dtype (at most that of float32), relative to the largest. 0 for a weight of zeros.
    """
    rows = _rows(weight)
    squares = torch.linalg.eigvalsh(rows @ rows.T)
    if squares[0] > _CLEARLY * squares[-1]:  # nearly every weight: no SVD is needed
        return len(rows)
    values = torch.linalg.svdvals(rows)
    tolerance = min(torch.finfo(weight.dtype).eps * len(values), _ROUNDING)
    return int((values > tolerance * values[0]).sum())


def low_rank_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The factors of the weight, (rank, kT + C_out·C/groups·kH·kW): a filter and its kernel a row.

    The largest entry of a filter is 1, so that the factors of a constant or a centred kernel are
    exact. They are computed in float64, and no gradient goes through them. A caller that keeps them
    must prepare them again when the weight changes, which its ``_version`` and identity show, and
    call :func:`low_rank_numbers` again then.

    Raises:
        ValueError: the numbers of the weight are outside the domain.
    """
    blockers = list(low_rank_numbers(weight, geometry))
    if blockers:
        reasons = "; ".join(blockers)
        raise ValueError(f"conv3d_low_rank does not compute this convolution: {reasons}")
    return torch.cat(_factors(weight), dim=1).to(weight.dtype)


def _rows(weight: Tensor) -> Tensor:
    """The taps as rows, (kT, C_out·C/groups·kH·kW), in float64."""
    return weight.detach().double().permute(2, 0, 1, 3, 4).flatten(1)


def _factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Filters (rank, kT) and kernels (rank, C_out·C/groups·kH·kW), in float64."""
    rows = _rows(weight)
    u, _, _ = torch.linalg.svd(rows, full_matrices=False)
    filters = u.T[: max(1, temporal_rank(weight))]
    peaks = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    return filters / peaks, peaks * (filters @ rows)


def low_rank(x: Tensor, prepared: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Taps that are combinations of r < kT kernels: r filters over time, and r conv2d a frame.

    Domain: kT > 1, and a weight of :func:`temporal_rank` r < kT that is not being trained; in
    float16 and bfloat16 only if the factors have no rounding, like those of a constant kernel.
    Arguments, result and errors as for :func:`conv3d`, and ValueError for the weight's numbers,
    which are read at each call unless they are prepared.

    The frames are filtered and stacked as r·C channels of one conv2d. If C_out < C and the temporal
    stride is 1, one conv2d with r·C_out outputs comes first, and its results are filtered.
    The result is in channels_last_3d. Prepared: :func:`low_rank_weight`.
    """
    taps = geometry.kernel[0]
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel[1:])
    filters, kernels = prepared[:, :taps], torch.unflatten(prepared[:, taps:], 1, shape)
    x, missing, inside = pad_space(frames_last(x), geometry)
    frames, parts = with_base(x, geometry, missing)
    groups = geometry.groups
    if geometry.out_channels < geometry.in_channels and geometry.stride[0] == 1:
        weight = torch.unflatten(kernels, 1, (groups, -1)).transpose(0, 1).flatten(0, 2)
        out = conv_frames(frames, weight, None, geometry, inside).permute(0, 1, 3, 4, 2)
        each = torch.unflatten(out, 4, (groups, len(kernels), -1)).unbind(5)
        results = [_filtered(y, f, parts) for y, f in zip(each, filters, strict=True)]
        total = sum(results[1:], results[0]).flatten(4)
        if bias is not None:
            total = total + bias
        return total.to(x.dtype).permute(0, 4, 1, 2, 3)
    grouped = torch.unflatten(frames.permute(0, 1, 3, 4, 2), 4, (groups, -1))
    stack = torch.stack([_filtered(grouped, f, parts) for f in filters], dim=5)
    source = stack.flatten(4).to(x.dtype).permute(0, 1, 4, 2, 3)
    out = conv_frames(source, kernels.transpose(0, 1).flatten(1, 2), bias, geometry, inside)
    return out.transpose(1, 2)


def _filtered(frames: Tensor, coefficients: Tensor, parts: list[Tap]) -> Tensor:
    """Σ coefficient·frame over the taps of (B, T, ...), in float32 or wider."""
    wide = torch.promote_types(frames.dtype, torch.float32)
    base, *others = parts
    total = frames[:, base.source].to(wide) * coefficients[base.index]
    for tap in others:
        total[:, tap.target].addcmul_(frames[:, tap.source].to(wide), coefficients[tap.index])
    return total
