"""Computes the factors of a layer from its weight, or from the network's activations on data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxtemporal.factorization.activations import Data, record
from fxtemporal.factorization.layers import Layer, layers_of
from fxtemporal.factorization.moments import Regression, SecondMoment
from fxtemporal.functional.factors import ORDERS, Decomposition, Order, decomposed
from fxtemporal.ir.program import Program
from fxtemporal.nn.conv2plus1d import Conv2Plus1d

__all__ = ["Fitter", "named"]


class Fitter:
    """Makes factors for the layers of ``program``."""

    def __init__(self, program: Program, data: Data | None, tick: Callable[[str], None]) -> None:
        self._program = program
        self._data = data
        self._tick = tick

    def moments(
        self, wanted: Sequence[tuple[Layer, Order]], program: Program | None = None
    ) -> dict[tuple[str, Order], Tensor]:
        """The second moments of the layers' inputs in ``program``, by name and order.

        All in one pass over the data; {} without data.
        """
        if self._data is None:
            return {}
        program = program or self._program
        sums: dict[tuple[str, Order], SecondMoment] = {}
        for layer, order in wanted:
            assert layer.geometry is not None
            sums[layer.name, order] = SecondMoment(layer.geometry, order)
        calls = {name: named(program, name).nodes for name, _ in sums}
        for share, arguments in self._data.counted():
            self._tick(f"what layers see, batch {share}")
            watched = {node: _adds(name, sums) for name in calls for node in calls[name]}
            record(program, arguments, watched)
        return {key: moment.sum for key, moment in sums.items() if moment.sum is not None}

    def cut(
        self, layer: Layer, decomposition: Decomposition, kept: int, biased: bool = False
    ) -> Conv2Plus1d:
        """Factors from the first ``kept`` channels per group of a decomposition, and the bias.

        With ``biased``, a layer without a bias gets one of zeros.
        """
        assert layer.op is not None
        bias = layer.op.args["bias"]
        numbers = None if bias is None else self._program.tensor(bias.name)
        if numbers is None and biased:
            weight = self._program.tensor(layer.name)
            numbers = weight.new_zeros(weight.shape[0])
        right, left = decomposition.right[:, :kept], decomposition.left[..., :kept]
        weight = self._program.tensor(layer.name)
        return layer.factors(weight, numbers, decomposition.order, right, left)

    def regressed(
        self, layer: Layer, order: Order, rank: int, working: Program
    ) -> tuple[Conv2Plus1d, float]:
        """Factors for the layer's inputs in ``working``, and the relative error of their output.

        The first factor is that of the weighted decomposition. The second, with a bias, is
        regressed on the layer's output in the original. So the mean of the output is right too, and
        the statistics of a later BatchNorm stay right.
        """
        assert self._data is not None
        geometry = layer.geometry
        assert geometry is not None
        weight = self._program.tensor(layer.name)
        moment = self.moments([(layer, order)], working)[layer.name, order]
        found = decomposed(weight.detach(), geometry.groups, order, moment)
        kept = rank // geometry.groups
        factors = self.cut(layer, found, kept)
        first = factors.spatial if order == ORDERS[0] else factors.temporal
        regression = Regression(geometry, order)
        there, here = named(self._program, layer.name), named(working, layer.name)
        for share, arguments in self._data.counted():
            self._tick(f"fitting {layer.path}, batch {share}")
            wanted: list[Tensor] = []

            def keep(_: Tensor, y: Tensor, wanted: list[Tensor] = wanted) -> None:
                wanted.append(y.clone())  # the next op may write into it

            def add(x: Tensor, _: Tensor, wanted: list[Tensor] = wanted) -> None:
                regression.add(first(x), wanted.pop(0))

            record(self._program, arguments, dict.fromkeys(there.nodes, keep))
            record(working, arguments, dict.fromkeys(here.nodes, add))
        left, bias, error = regression.solve()
        return layer.factors(weight, bias, order, found.right[:, :kept], left), error


def named(program: Program, name: str) -> Layer:
    """The layer of ``program`` whose weight has that name."""
    return next(layer for layer in layers_of(program) if layer.name == name)


def _adds(
    name: str, sums: dict[tuple[str, Order], SecondMoment]
) -> Callable[[Tensor, Tensor], None]:
    moments = [moment for (layer, _), moment in sums.items() if layer == name]

    def seen(x: Tensor, _: Tensor) -> None:
        for moment in moments:
            moment.add(x)

    return seen
