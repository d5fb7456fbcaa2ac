"""Plans a factorization: from the user's settings to the factors of each layer.

::

    curves of all layers  →  a rank and an order for each  →  factors, one layer after the other,
    each fitted to its inputs in the factorized network, and to the layer's output in the original
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxtemporal.factorization.activations import Arguments, Data, run
from fxtemporal.factorization.candidates import Points
from fxtemporal.factorization.fitting import Fitter, named
from fxtemporal.factorization.latency import Times, milliseconds
from fxtemporal.factorization.layers import Layer, layers_of, put_in
from fxtemporal.factorization.ranks import Curve, Point, allocate, frontier
from fxtemporal.factorization.settings import Factorize
from fxtemporal.functional.factors import ORDERS, Decomposition, Order, decomposed
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.nn.conv2plus1d import Conv2Plus1d
from fxtemporal.support.errors import PassError
from fxtemporal.support.torch_private import pytree

__all__ = ["FactorizationPlan", "LayerPlan", "plan"]

Tick = Callable[[str], None]

_BYTES = 2**30
"""Most bytes of second moments that are summed in one pass over the data."""

_PROBE = 0.3
"""The error of a layer at which its influence on the output is measured."""


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer: its factors, or the reasons why it is left."""

    factors: Conv2Plus1d | None
    reasons: tuple[Reason, ...] = ()
    error: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FactorizationPlan:
    """The plan of every layer, by the name of its weight, and the errors of other budgets.

    ``curve`` has pairs (share of the budgeted quantity that is left, predicted output error).
    """

    layers: Mapping[str, LayerPlan]
    curve: tuple[tuple[float, float], ...] = ()


def plan(
    program: Program,
    settings: Factorize,
    example: Arguments | None,
    tick: Tick,
    times: Callable[..., Times] = milliseconds,
) -> FactorizationPlan:
    """Choose, and compute, the factors of every Conv3d of ``program``.

    ``times`` times a layer and its factors, for a budget of latency.

    Raises:
        PassError: the budget cannot be met, or the calibration data does not fit the model.
    """
    return _Planner(program, settings, example, tick, times).plan()


class _Planner:
    def __init__(
        self,
        program: Program,
        settings: Factorize,
        example: Arguments | None,
        tick: Tick,
        times: Callable[..., Times],
    ) -> None:
        self.program = program
        self.settings = settings
        self.example = example
        self.tick = tick
        self.data: Data | None = None
        if settings.calibration is not None:
            if example is None:
                raise PassError("Factorize: calibration needs example inputs as well; give them")
            self.data = Data(settings.calibration, example)
        self.fitter = Fitter(program, self.data, tick)
        self.layers = layers_of(program)
        self.left: dict[str, LayerPlan] = {}
        self.open: list[Layer] = []
        self.points = Points(settings, None if example is None else times, tick)
        self.points.check([layer for layer in self.layers if not any(layer.blockers(program))])
        for layer in self.layers:
            reasons = tuple(layer.blockers(program))
            rank = None if layer.geometry is None else self.points.refusal(layer)
            if reasons or rank is not None:
                self._leave(layer, *reasons, *(() if rank is None else (rank,)))
            elif (error := self._unusable(layer)) is not None:
                self.left[layer.name] = LayerPlan(None, (), error, self._described(layer))
            else:
                self.open.append(layer)

    def plan(self) -> FactorizationPlan:
        if not self.open:
            return FactorizationPlan(self.left)
        decompositions = self._decompositions()
        curve: tuple[tuple[float, float], ...] = ()
        if self.settings.budget is not None:
            chosen, curve = self._shared_out(decompositions)
        else:
            chosen = self._each_by_itself(decompositions)
        factors = self._fitted(chosen, decompositions)
        return FactorizationPlan({**self.left, **factors}, curve)

    @staticmethod
    def _described(layer: Layer) -> dict[str, Any]:
        if layer.geometry is None:
            return {}
        return {"kernel": layer.kernel, "full_rank": layer.full_rank(ORDERS[0])}

    # the error of each layer

    def _decompositions(self) -> dict[str, dict[Order, Decomposition]]:
        """Decompositions of each layer, by order; weighted by its inputs if there is data."""
        found: dict[str, dict[Order, Decomposition]] = {layer.name: {} for layer in self.open}
        wanted = [(layer, order) for layer in self.open for order in self.points.orders(layer)]
        while wanted:
            batch: list[tuple[Layer, Order]] = []
            size = 0
            while wanted and (not batch or size + _moment_bytes(*wanted[0]) <= _BYTES):
                size += _moment_bytes(*wanted[0])
                batch.append(wanted.pop(0))
            moments = self.fitter.moments(batch)
            for layer, order in batch:
                self.tick(f"decomposing {layer.path}")
                assert layer.geometry is not None
                weight = self._weight(layer)
                moment = moments.get((layer.name, order))
                found[layer.name][order] = decomposed(weight, layer.geometry.groups, order, moment)
        return found

    def _weight(self, layer: Layer) -> Tensor:
        return layer.weight(self.program)

    def _unusable(self, layer: Layer) -> str | None:
        """Why the layer's weight cannot be factorized; None if it can."""
        weight = self._weight(layer)
        if weight.is_meta:
            return f"{layer.name} is on the meta device and has no values"
        return None if bool(torch.isfinite(weight).all()) else f"{layer.name} is not finite"

    # the choice of ranks

    def _each_by_itself(
        self, decompositions: Mapping[str, Mapping[Order, Decomposition]]
    ) -> dict[str, Point]:
        chosen = {}
        for layer in self.open:
            found = self.points.one(layer, decompositions[layer.name])
            if isinstance(found, Reason):
                self._leave(layer, found)
            else:
                chosen[layer.name] = found
        return chosen

    def _leave(self, layer: Layer, *reasons: Reason) -> None:
        self.left[layer.name] = LayerPlan(None, reasons, detail=self._described(layer))

    def _shared_out(
        self, decompositions: Mapping[str, Mapping[Order, Decomposition]]
    ) -> tuple[dict[str, Point], tuple[tuple[float, float], ...]]:
        assert self.settings.budget is not None
        kind, share = self.settings.budget
        influence = self._influences(decompositions)
        curves = []
        for layer in self.open:
            points = self.points.all(layer, decompositions[layer.name], self._weight(layer))
            weight = influence.get(layer.name, 1.0)
            weighted = [replace(point, loss=point.loss * weight) for point in points]
            curves.append(Curve.of(layer.name, weighted))
        total = self._total(kind) or sum(curve.points[0].cost for curve in curves)
        rest = total - sum(curve.points[0].cost for curve in curves)
        chosen = allocate(curves, share * total - rest)
        steps = [((cost + rest) / total, max(loss, 0.0) ** 0.5) for cost, loss in frontier(curves)]
        if chosen is None:
            raise PassError(
                f"Factorize: {kind}={share} cannot be met: with one channel between the factors of "
                f"each Conv3d, {steps[-1][0]:.3f} of the model's {kind} are left"
            )
        kept = {}
        for layer in self.open:
            point = chosen[layer.name]
            if point.rank is None:
                text = f"within the {kind} that may be left, the layer is best kept as it is"
                self._leave(layer, Reason(Code.NOTHING_SAVED, text))
            else:
                kept[layer.name] = point
        return kept, tuple(steps)

    def _total(self, kind: str) -> float:
        """The whole model's amount of the budgeted quantity ``kind``."""
        if kind == "latency":  # only the layers' times count
            return 0.0
        if kind == "params":
            return float(sum(p.numel() for p in self.program.gm.parameters()))
        if self.example is None:
            raise PassError(f"Factorize: {kind}=... needs example inputs; give them")
        with FlopCounterMode(display=False) as counter:
            run(self.program, self.example)
        return float(counter.get_total_flops())

    def _influences(
        self, decompositions: Mapping[str, Mapping[Order, Decomposition]]
    ) -> dict[str, float]:
        """The squared error of the network's output for a squared error of 1 in each layer.

        Measured for one layer at a time: it is cut until its error is about ``_PROBE``, and the
        network runs on the first batch of data.
        """
        if self.data is None:
            return {}
        arguments = next(iter(self.data))
        exact = _leaves(run(self.program, arguments))
        found = {}
        for layer in self.open:
            self.tick(f"the influence of {layer.path}")
            order = ORDERS[0]
            decomposition = decompositions[layer.name][order]
            errors = decomposition.errors()
            kept = max(1, sum(error > _PROBE for error in errors))
            kept = min(kept, len(errors) - 1)
            if errors[kept] == 0:
                continue
            program = self.program.copy()
            factors = self.fitter.cut(layer, decomposition, kept)
            put_in(program, named(program, layer.name), factors)
            program.refresh()
            off = _leaves(run(program, arguments))
            error = sum(
                float((a - b).double().square().sum()) for a, b in zip(off, exact, strict=True)
            )
            norm = sum(float(b.double().square().sum()) for b in exact)
            found[layer.name] = error / max(norm, 1e-30) / errors[kept] ** 2
        return found

    # the factors

    def _fitted(
        self,
        chosen: Mapping[str, Point],
        decompositions: Mapping[str, Mapping[Order, Decomposition]],
    ) -> dict[str, LayerPlan]:
        """The factors of each layer, in order, each fitted to inputs from the layers cut before."""
        working = self.program.copy()
        found = {}
        for layer in self.open:
            if layer.name not in chosen:
                continue
            point = chosen[layer.name]
            assert point.rank is not None
            assert layer.geometry is not None
            decomposition = decompositions[layer.name][point.order]
            exact = point.rank >= decomposition.rank
            output_error = None
            if self.data is None or exact:
                kept = point.rank // layer.geometry.groups
                biased = self.points.bias(layer)
                factors = self.fitter.cut(layer, decomposition, kept, biased)
            else:
                factors, output_error = self.fitter.regressed(
                    layer, point.order, point.rank, working
                )
            detail = self._detail(layer, point, factors, exact, output_error)
            found[layer.name] = LayerPlan(factors, detail=detail)
            put_in(working, named(working, layer.name), factors)
            working.refresh()
        return found

    def _detail(
        self,
        layer: Layer,
        point: Point,
        factors: Conv2Plus1d,
        exact: bool,
        output_error: float | None,
    ) -> dict[str, Any]:
        weight = self._weight(layer).double()
        off = float(
            (factors.product().to(weight.device) - weight).norm() / weight.norm().clamp_min(1e-30)
        )
        assert layer.op is not None
        assert layer.geometry is not None
        biases = 0 if layer.op.args["bias"] is None else layer.geometry.out_channels
        before = layer.parameters(None) + biases
        after = sum(parameter.numel() for parameter in factors.parameters())
        detail: dict[str, Any] = {
            "weight": layer.name,
            "rank": point.rank,
            "full_rank": layer.full_rank(point.order),
            "kernel": layer.kernel,
            "order": point.order,
            "bias": any(conv.bias is not None for conv in (factors.spatial, factors.temporal)),
            "parameters": f"{before} → {after}",
            "weight_error": off,
        }
        if whole := layer.flops(None):
            detail["flops_before"] = whole
            detail["flops_after"] = layer.flops(point.rank, point.order)
        if exact:
            detail["exact"] = True
        if output_error is not None:
            detail["output_error"] = output_error
        return detail


def _moment_bytes(layer: Layer, order: Order) -> int:
    g = layer.geometry
    assert g is not None
    taps = g.kernel[1] * g.kernel[2] if order == ORDERS[0] else g.kernel[0]
    return 8 * g.groups * (g.in_channels // g.groups * taps) ** 2


def _leaves(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
