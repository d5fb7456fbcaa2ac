"""The algebra of a (2+1)D factorization.

The weight of a Conv3d is a matrix: a row for each channel of the result and tap of the second
factor, a column for each number that the first factor sees. For the order spatial, then temporal::

    W (C_out, C, kT, kH, kW)  ->  M (C_out·kT, C·kH·kW)  ≈  left (C_out·kT, m) · right (m, C·kH·kW)

``right`` is a (1, kH, kW) convolution into m channels, ``left`` a (kT, 1, 1) convolution out of
them. The truncated SVD of M is nearest to the weight; that of M·L, where L·Lᵀ is the second moment
of the patches that the first factor sees, is nearest to what the layer gives (but for what frames
have in common, which :mod:`moments` sees to).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxtemporal.factorization.layers import Order
from fxtemporal.functional import ConvGeometry
from fxtemporal.nn import Conv2Plus1d

__all__ = ["Decomposition", "build", "decomposed", "matrix", "product"]

_FLOOR = 1e-6
"""Of the mean moment: what the data has not shown counts so much, and is kept at full rank."""


@dataclass(frozen=True)
class Decomposition:
    """``left · right`` at full rank, (groups, R, K) and (groups, K, D), the most important first.

    ``energy`` (K,) is what each of the K adds to the squared norm, of all groups together.
    """

    order: Order
    left: Tensor
    right: Tensor
    energy: Tensor

    @property
    def groups(self) -> int:
        return int(self.left.shape[0])

    def error(self, rank: int) -> float:
        """The relative error of the norm, where ``rank`` channels are left of all groups."""
        kept = rank // self.groups
        total = float(self.energy.sum())
        return (float(self.energy[kept:].sum()) / total) ** 0.5 if total else 0.0

    def errors(self) -> list[float]:
        """:meth:`error` of 0, 1, 2, ... channels a group."""
        total = self.energy.sum()
        if not total:
            return [0.0] * (len(self.energy) + 1)
        tails = torch.cat([self.energy.flip(0).cumsum(0).flip(0), self.energy.new_zeros(1)])
        return [float(error) for error in (tails / total).clamp_min(0).sqrt()]

    @property
    def rank(self) -> int:
        """Of the matrix, in numbers: with so many channels nothing is lost."""
        least = float(self.energy[0]) * len(self.energy) * torch.finfo(torch.float32).eps ** 2
        return self.groups * max(1, int((self.energy > least).sum()))


def matrix(weight: Tensor, groups: int, order: Order) -> Tensor:
    """(C_out, C/groups, kT, kH, kW) -> (groups, R, D), in float64."""
    blocks = torch.unflatten(weight.double(), 0, (groups, -1))
    axes = (0, 1, 3, 2, 4, 5) if order == "spatial-temporal" else (0, 1, 4, 5, 2, 3)
    rows = 3 if order == "spatial-temporal" else 4
    return blocks.permute(axes).flatten(rows).flatten(1, rows - 1)


def decomposed(
    weight: Tensor, groups: int, order: Order, moment: Tensor | None = None
) -> Decomposition:
    """The SVD of the weight, weighted by the (groups, D, D) second moment of what it sees."""
    rows = matrix(weight.cpu(), groups, order)
    if moment is None:
        u, s, right = torch.linalg.svd(rows, full_matrices=False)
    else:
        values, vectors = torch.linalg.eigh(moment.double())
        floor = _FLOOR * values.mean(1, keepdim=True).clamp_min(1e-30)
        roots = (values.clamp_min(0) + floor).sqrt()
        u, s, vh = torch.linalg.svd(rows @ (vectors * roots[:, None]), full_matrices=False)
        right = (vh / roots[:, None]) @ vectors.transpose(1, 2)
    share = s.sqrt()
    return Decomposition(order, u * share[:, None], share[:, :, None] * right, s.square().sum(0))


def first_weight(right: Tensor, geometry: ConvGeometry, order: Order) -> Tensor:
    """(groups, m, D) -> the weight of the first factor, (groups·m, C/groups, ...)."""
    kt, kh, kw = geometry.kernel
    taps = (1, kh, kw) if order == "spatial-temporal" else (kt, 1, 1)
    return right.reshape(-1, geometry.in_channels // geometry.groups, *taps)


def second_weight(left: Tensor, geometry: ConvGeometry, order: Order) -> Tensor:
    """(groups, R, m) -> the weight of the second factor, (C_out, m, ...)."""
    kt, kh, kw = geometry.kernel
    taps = (kt, 1, 1) if order == "spatial-temporal" else (1, kh, kw)
    count = taps[0] * taps[1] * taps[2]
    rows = torch.unflatten(left, 1, (geometry.out_channels // geometry.groups, count))
    return rows.transpose(2, 3).reshape(geometry.out_channels, -1, *taps)


def build(
    like: nn.Parameter | Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    order: Order,
    right: Tensor,
    left: Tensor,
) -> Conv2Plus1d:
    """The module of two factors, in the dtype, and on the device, of ``like``."""
    result = Conv2Plus1d(
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        bias is not None,
        geometry.padding_mode,  # type: ignore[arg-type]
        mid_channels=right.shape[0] * right.shape[1],
        order=order,
        device="meta",
    )

    def parameter(values: Tensor) -> nn.Parameter:
        values = values.to(device=like.device, dtype=like.dtype, copy=True).contiguous()
        return nn.Parameter(values, requires_grad=like.requires_grad)

    spatial, temporal = result.spatial, result.temporal
    first, second = (spatial, temporal) if order == "spatial-temporal" else (temporal, spatial)
    first.weight = parameter(first_weight(right, geometry, order))
    second.weight = parameter(second_weight(left, geometry, order))
    if bias is not None:
        second.bias = parameter(bias)
    return result


def product(factors: Conv2Plus1d) -> Tensor:
    """The (C_out, C/groups, kT, kH, kW) weight that two factors multiply to, in float64."""
    groups = factors.spatial.groups
    spatial = factors.spatial.weight.detach().double()
    temporal = factors.temporal.weight.detach().double()
    first, second = (spatial, temporal)
    if factors.order != "spatial-temporal":
        first, second = temporal, spatial
    inner = torch.unflatten(first, 0, (groups, -1))  # (g, m, C/g, ...)
    outer = torch.unflatten(second, 0, (groups, -1))  # (g, C_out/g, m, ...)
    if factors.order == "spatial-temporal":
        whole = torch.einsum("gomt,gmchw->gocthw", outer[..., 0, 0], inner[:, :, :, 0])
    else:
        whole = torch.einsum("gomhw,gmct->gocthw", outer[:, :, :, 0], inner[..., 0, 0])
    return whole.flatten(0, 1)
