"""Allocates ranks to layers: the least predicted output error for a budget.

Each layer has a curve of points: the cost of a number of channels, and the predicted error of its
output. Costs add up. Squared errors are assumed to add up too, weighted by their influence on the
network's output. Starting from no loss, the step with the least loss per cost saved is taken, again
and again. For convex curves that is optimal, except for the rest of the budget, which is then spent
where it reduces the error most.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fxtemporal.functional.factors import Order

__all__ = ["Curve", "Point", "allocate", "frontier"]


@dataclass(frozen=True)
class Point:
    """A choice for one layer: ``rank`` channels in ``order``; None: the unchanged layer."""

    cost: float
    loss: float
    rank: int | None = None
    order: Order = "spatial-temporal"


@dataclass(frozen=True)
class Curve:
    """The points of one layer, the most expensive first.

    ``points`` are those on the lower convex hull, on which each further saving costs more; ``all``
    are all points.
    """

    path: str
    points: tuple[Point, ...]
    all: tuple[Point, ...] = ()

    @classmethod
    def of(cls, path: str, points: Sequence[Point]) -> Curve:
        """The lower convex hull of ``points``."""
        hull: list[Point] = []
        for point in sorted(points, key=lambda p: (-p.cost, p.loss)):
            if hull and point.cost == hull[-1].cost:
                continue
            if hull and point.loss <= hull[-1].loss:
                while hull and point.loss <= hull[-1].loss:
                    hull.pop()
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        return cls(path, tuple(hull), tuple(points))


def _slope(one: Point, other: Point) -> float:
    """The loss per unit of cost saved from ``one`` to ``other``."""
    return (other.loss - one.loss) / max(one.cost - other.cost, 1e-30)


def allocate(curves: Sequence[Curve], budget: float) -> dict[str, Point] | None:
    """The point of each layer, with a total cost of at most ``budget``; None if impossible."""
    for _, points, cost in _steps(curves):
        if cost <= budget:
            return _filled(curves, points, budget - cost)
    return None


def _filled(curves: Sequence[Curve], chosen: dict[str, Point], left: float) -> dict[str, Point]:
    """``chosen`` with the rest of the budget, ``left``, spent where it reduces the loss most."""
    chosen = dict(chosen)
    while True:
        better = [
            (chosen[curve.path].loss - point.loss, curve.path, point)
            for curve in curves
            for point in curve.all
            if 0 < point.cost - chosen[curve.path].cost <= left
        ]
        gain, path, point = max(better, key=lambda entry: entry[0], default=(0.0, "", None))
        if point is None or gain <= 0:
            return chosen
        left -= point.cost - chosen[path].cost
        chosen[path] = point


def frontier(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """(cost, loss) of all layers together, from no loss to the least possible cost."""
    return [(cost, loss) for loss, _, cost in _steps(curves)]


def _steps(curves: Sequence[Curve]) -> list[tuple[float, dict[str, Point], float]]:
    at = {curve.path: 0 for curve in curves}
    known = {curve.path: curve for curve in curves}
    cost = sum(curve.points[0].cost for curve in curves)
    loss = sum(curve.points[0].loss for curve in curves)

    def chosen() -> dict[str, Point]:
        return {path: known[path].points[place] for path, place in at.items()}

    heap = [(_slope(*curve.points[:2]), curve.path) for curve in curves if len(curve.points) > 1]
    heapq.heapify(heap)
    steps = [(loss, chosen(), cost)]
    while heap:
        _, path = heapq.heappop(heap)
        points, place = known[path].points, at[path] + 1
        cost += points[place].cost - points[place - 1].cost
        loss += points[place].loss - points[place - 1].loss
        at[path] = place
        if place + 1 < len(points):
            heapq.heappush(heap, (_slope(points[place], points[place + 1]), path))
        steps.append((loss, chosen(), cost))
    return steps
