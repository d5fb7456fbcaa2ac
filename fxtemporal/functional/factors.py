"""The algebra of a (2+1)D factorization.

The weight of a Conv3d is a matrix: a row for each output channel and tap of the second factor, a
column for each number that the first factor reads. For the order spatial, then temporal::

    W (C_out, C, kT, kH, kW)  ->  M (C_out·kT, C·kH·kW)  ≈  left (C_out·kT, m) · right (m, C·kH·kW)

``right`` is a (1, kH, kW) convolution into m channels, ``left`` a (kT, 1, 1) convolution out of
them. The truncated SVD of M is nearest to the weight. The truncated SVD of M·L, where L·Lᵀ is the
second moment of the patches that the first factor reads, is nearest to the layer's output (except
for what frames have in common, which :mod:`fxtemporal.factorization.moments` handles).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["ORDERS", "Decomposition", "Order", "decomposed", "matrix", "weights"]

Order: TypeAlias = Literal["spatial-temporal", "temporal-spatial"]
ORDERS: tuple[Order, ...] = ("spatial-temporal", "temporal-spatial")

_FLOOR = 1e-6
"""Share of the mean moment that directions absent from the data count, so that full rank keeps
them."""


@dataclass(frozen=True)
class Decomposition:
    """``left · right`` at full rank, (groups, R, K) and (groups, K, D), the most important first.

    ``energy`` (K,) is what each of the K components adds to the squared norm, over all groups.
    """

    order: Order
    left: Tensor
    right: Tensor
    energy: Tensor

    @property
    def groups(self) -> int:
        return int(self.left.shape[0])

    def error(self, rank: int) -> float:
        """The relative error in the norm if ``rank`` channels, of all groups together, are kept."""
        kept = rank // self.groups
        total = float(self.energy.sum())
        return (float(self.energy[kept:].sum()) / total) ** 0.5 if total else 0.0

    def errors(self) -> list[float]:
        """:meth:`error` for 0, 1, 2, ... channels per group."""
        total = self.energy.sum()
        if not total:
            return [0.0] * (len(self.energy) + 1)
        tails = torch.cat([self.energy.flip(0).cumsum(0).flip(0), self.energy.new_zeros(1)])
        return [float(error) for error in (tails / total).clamp_min(0).sqrt()]

    @property
    def rank(self) -> int:
        """The numerical rank: the number of channels with which nothing is lost."""
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
    """The SVD of the weight, weighted by the (groups, D, D) second moment of its inputs."""
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


def weights(
    right: Tensor, left: Tensor, kernel: tuple[int, int, int], order: Order
) -> tuple[Tensor, Tensor]:
    """The factors (groups, m, D) and (groups, R, m) as weights of two convolutions.

    (groups·m, C/groups, ...) for the first convolution, and (C_out, m, ...) for the second.
    """
    (kt, kh, kw), groups = kernel, right.shape[0]
    space, time = (1, kh, kw), (kt, 1, 1)
    first, second = (space, time) if order == "spatial-temporal" else (time, space)
    taps = second[0] * second[1] * second[2]
    rows = torch.unflatten(left, 1, (-1, taps)).transpose(2, 3)  # (groups, C_out/groups, m, taps)
    inputs = right.shape[2] // (first[0] * first[1] * first[2])
    return (
        right.reshape(groups * right.shape[1], inputs, *first),
        rows.reshape(groups * rows.shape[1], left.shape[2], *second),
    )
