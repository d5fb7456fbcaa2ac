"""The candidates for a layer: ranks and orders, with the cost and the error of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fxtemporal.factorization.latency import Times
from fxtemporal.factorization.layers import Layer
from fxtemporal.factorization.ranks import Point
from fxtemporal.factorization.settings import Cut, Factorize
from fxtemporal.functional.factors import ORDERS, Decomposition, Order
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.nn.conv2plus1d import paper_rank
from fxtemporal.support.errors import PassError

__all__ = ["Points"]

Decompositions = Mapping[Order, Decomposition]
Ranks = Sequence[tuple[Decomposition, int]]

_STEPS = 64
"""The most ranks to consider for a layer and an order."""

_WIDTHS = (8, 16)
"""Channels that convolutions compute together: 17 channels take nearly as long as 32. Narrow layers
get multiples of the first number, which costs them less accuracy."""

_NARROW = 64
"""Ranks below this are narrow."""

_TIMED = (0.08, 0.15, 0.25, 0.4, 0.6)
"""Shares of the full rank whose time is measured."""


class Points:
    """The candidate points of each layer, for one :class:`Factorize`.

    ``times`` times a layer and its factors at the sizes of the example inputs; None without them.
    """

    def __init__(
        self,
        settings: Factorize,
        times: Callable[[Layer, Tensor, Ranks], Times] | None,
        tick: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._times = times
        self._tick = tick

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse settings that fit none of ``layers``, the layers that can be factorized.

        Raises:
            PassError: a rank that is out of range for all of them, or for one that has a name;
                a name that no layer has.
        """
        ranks = self._settings.rank
        if isinstance(ranks, Mapping):
            there = {name for layer in layers for name in (layer.path, layer.name)}
            for name in ranks:
                if name not in there:
                    known = ", ".join(layer.path or layer.name for layer in layers)
                    raise PassError(
                        f"Factorize: rank names {name!r}, which is no Conv3d that can be "
                        f"factorized; there are {known}"
                    )
        refused = [(layer, reason) for layer in layers if (reason := self.refusal(layer))]
        refused = [entry for entry in refused if entry[1].code is Code.RANK_OUT_OF_RANGE]
        if refused and (isinstance(ranks, Mapping) or len(refused) == len(layers)):
            layer, reason = refused[0]
            raise PassError(f"Factorize: {layer.path or layer.name}: {reason.text}")

    def refusal(self, layer: Layer) -> Reason | None:
        """Why the layer cannot have the rank that was asked for; None if it can."""
        if self._settings.rank is None:
            return None
        asked = self._asked(layer)
        if asked is None:
            return Reason(Code.NOT_REQUESTED, "ranks were given by name, and not for this layer")
        rank = asked.rank
        g, full = layer.geometry, layer.full_rank(asked.order)
        assert g is not None
        if not isinstance(rank, int):
            return None
        if rank > full:
            text = f"rank {rank} was asked for, and the kernel has {full} at most"
            return Reason(Code.RANK_OUT_OF_RANGE, text)
        if rank % g.groups:
            text = f"rank {rank} was asked for, which its {g.groups} groups cannot share"
            return Reason(Code.RANK_OUT_OF_RANGE, text)
        return None

    def orders(self, layer: Layer) -> Sequence[Order]:
        """The orders that may be chosen for the layer."""
        asked = self._asked(layer)
        return ORDERS if asked is None else (asked.order,)

    def bias(self, layer: Layer) -> bool:
        """Whether the factors get a bias even if the layer has none."""
        asked = self._asked(layer)
        return asked is not None and asked.bias

    def _asked(self, layer: Layer) -> Cut | None:
        asked = self._settings.rank
        if isinstance(asked, Mapping):
            cut = asked.get(layer.name, asked.get(layer.path))
            assert cut is None or isinstance(cut, Cut)
            return cut
        return None if asked is None else Cut(asked)

    def one(self, layer: Layer, found: Decompositions) -> Point | Reason:
        """The point without a budget: the rank asked for, or the cheapest within the bound."""
        asked, g = self._asked(layer), layer.geometry
        assert g is not None
        if asked is not None:
            rank, order = asked.rank, asked.order
            if rank == "paper":
                rank = paper_rank(g.in_channels, g.out_channels, g.kernel, groups=g.groups)
            elif isinstance(rank, float):
                full = layer.full_rank(order)
                rank = g.groups * max(1, round(rank * full / g.groups))
            return Point(0.0, found[order].error(rank), rank, order)
        bound = self._settings.error
        if bound is None:
            assert self._settings.energy is not None
            bound = (1 - self._settings.energy) ** 0.5
        points = self.all(layer, found, step=1)
        enough = [p for p in points if p.rank is not None and p.loss <= bound**2]
        best = min(enough, key=lambda p: (p.cost, p.loss), default=None)
        if best is None or best.cost >= self._cost(layer, None, ORDERS[0]):
            text = f"two factors with an error of at most {bound:.3g} cost more than the layer"
            return Reason(Code.NOTHING_SAVED, text)
        return best

    def all(
        self,
        layer: Layer,
        found: Decompositions,
        weight: Tensor | None = None,
        step: int | None = None,
    ) -> list[Point]:
        """Costs and squared relative errors of every ``step``-th rank in each order.

        ``weight`` is the layer's; only a budget of time needs it.
        """
        g = layer.geometry
        assert g is not None
        if self._settings.latency is not None:
            assert weight is not None
            return self._timed(layer, found, weight)
        points = [Point(self._cost(layer, None, ORDERS[0]), 0.0)]
        for order, decomposition in found.items():
            errors = decomposition.errors()
            full = len(errors) - 1
            for kept in _kept(full, g.groups) if step is None else range(step, full + 1, step):
                rank = kept * g.groups
                cost = self._cost(layer, rank, order)
                points.append(Point(cost, errors[kept] ** 2, rank, order))
        return points

    def _cost(self, layer: Layer, rank: int | None, order: Order) -> float:
        if self._settings.params is not None:
            return layer.parameters(rank, order)
        return layer.flops(rank, order) or layer.parameters(rank, order)

    def _timed(self, layer: Layer, found: Decompositions, weight: Tensor) -> list[Point]:
        g = layer.geometry
        assert g is not None
        if self._times is None:
            raise PassError("Factorize: latency=... needs example inputs; give them")
        self._tick(f"timing {layer.path}")
        wanted = [
            (decomposition, kept)
            for decomposition in found.values()
            for kept in sorted({max(1, round(f * len(decomposition.energy))) for f in _TIMED})
        ]
        times = self._times(layer, weight, wanted)
        points = [Point(times[None], 0.0)]
        for decomposition, kept in wanted:
            rank, order = kept * g.groups, decomposition.order
            loss = decomposition.error(rank) ** 2
            points.append(Point(times[order, rank], loss, rank, order))
        return points


def _kept(full: int, groups: int) -> list[int]:
    """The ranks per group to consider: multiples of a vector's width, if there are several."""
    narrow, wide = (width // math.gcd(width, groups) for width in _WIDTHS)
    if full < 4 * narrow:
        return [*range(1, full + 1)]
    wide *= max(1, round(full / _STEPS / wide))
    edge = max(1, _NARROW // groups)
    least = [1 << power for power in range(narrow.bit_length()) if 1 << power < narrow]
    ranks = {*least, *range(narrow, min(edge, full), narrow), *range(wide, full, wide), full}
    return sorted(ranks)
