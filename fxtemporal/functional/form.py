"""A form: its domain, the weight that it prepares, and the computation.

A form computes in two steps, so that the first can be done once for many calls::

    prepared = form.prepare(weight, geometry)            # in another layout, transformed, or as is
    form.run(x, prepared, bias, geometry)                # == form.function(x, weight, bias, ...)

Both steps can be differentiated, so that gradients reach the 5-D weight through either path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxtemporal.functional.geometry import ConvGeometry, Padding, product_dtype
from fxtemporal.functional.layout import plain_strides, plain_weight
from fxtemporal.functional.packed import Weights
from fxtemporal.ir.leaf import leaf_function

__all__ = ["ConvFunction", "Form", "anywhere", "as_it_is"]


class ConvFunction(Protocol):
    """The signature of every form."""

    __name__: str

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1, 1),
        padding: Padding = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1),
        groups: int = 1,
        padding_mode: str = "zeros",
        time_padding: Sequence[int] = (0, 0),
    ) -> Tensor: ...


Blockers: TypeAlias = Callable[[ConvGeometry], Iterator[str]]
Compute: TypeAlias = Callable[[Tensor, Any, Tensor | None, ConvGeometry], Tensor]
"""Computes the convolution. The weight is the result of the form's ``prepare`` or ``pack``."""


def anywhere(geometry: ConvGeometry) -> Iterator[str]:
    """The domain of a form that is exact everywhere."""
    yield from ()


def as_it_is(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """``prepare`` of a form that takes views of the original weight."""
    return weight


def _always(prepared: Tensor, geometry: ConvGeometry) -> bool:
    return True


def _any_numbers(weight: Tensor, geometry: ConvGeometry) -> Iterator[str]:
    yield from ()


_REMEMBERED = 1024
"""Geometries that a form remembers."""


@dataclass(frozen=True)
class Form:
    """One exact way to compute a conv3d.

    ``blockers(geometry)`` yields a sentence for each precondition that fails; if it yields nothing,
    ``function`` equals :func:`conv3d` there. A form that is exact for some weights only also has
    ``weight_blockers(weight, geometry)``. It reads the weight's numbers, which costs time and
    cannot be traced, so it is called when a form is chosen. ``prepare`` calls it too, and raises
    ValueError; so it is safe to prepare a changed weight again.

    ``pack(prepared, groups)`` converts a prepared weight to the layout in which this machine
    computes. It is for a weight that is kept, not for one in a graph.

    ``fits(prepared, geometry)`` is False if ``prepared`` was made for another T.

    ``confined``: where conv3d gives a finite number, the form does too, even for a clip with NaN or
    infinite values. A form that is not confined multiplies these by zeros, or adds and subtracts
    them again, and so spreads them to entries that conv3d computes without them.

    ``compute`` takes a batched input, a prepared weight and a geometry that knows T, (H, W) and the
    dtype; other code calls :meth:`run`.
    """

    name: str
    compute: Compute
    blockers: Blockers = anywhere
    prepare: Callable[[Tensor, ConvGeometry], Tensor] = as_it_is
    weight_blockers: Callable[[Tensor, ConvGeometry], Iterator[str]] = _any_numbers
    fits: Callable[[Any, ConvGeometry], bool] = _always
    pack: Callable[[Tensor, int], Weights] | None = None
    confined: bool = False

    @property
    def prepares(self) -> bool:
        """Whether :attr:`prepare` makes a new tensor, which is worth keeping."""
        return self.prepare is not as_it_is

    @property
    def reads_numbers(self) -> bool:
        """Whether the form is exact for some weights only."""
        return self.weight_blockers is not _any_numbers

    def require(self, geometry: ConvGeometry) -> None:
        """Raise ValueError, with every blocker, if ``geometry`` is outside the domain.

        Raises RuntimeError, as torch does, if the input is smaller than the kernel.
        """
        blockers = list(self.blockers(geometry))
        if blockers:
            reasons = "; ".join(blockers)
            raise ValueError(f"{self.name} does not compute this convolution: {reasons}")
        geometry.require_room()

    def run(
        self, input: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        """The convolution of ``input``, (B, C, T, H, W) or (C, T, H, W), with a prepared weight.

        ``geometry`` is that of the original weight; T, (H, W) and dtype are taken from ``input``.

        Raises:
            ValueError: the input is outside the domain, or ``prepared`` was made for another T.
            RuntimeError: as in torch: the input is smaller than the kernel, channels do not match.
        """
        geometry = geometry.at(input)
        self.require(geometry)
        return self._run(input, prepared, bias, geometry)

    def _run(
        self, input: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        clip = plain_strides(input if input.dim() == 5 else input.unsqueeze(0))
        if clip.shape[2] == 0 and geometry.time_padding != (0, 0):  # conv3d refuses such a clip
            clip = F.pad(clip, (0, 0, 0, 0, *geometry.time_padding))
            geometry = replace(geometry, time_padding=(0, 0), frames=clip.shape[2])
        if isinstance(prepared, Tensor):
            prepared = plain_weight(prepared)
        out = plain_strides(self.compute(clip, prepared, bias, geometry))
        return out if input.dim() == 5 else out.squeeze(0)

    @cached_property
    def _known(self) -> dict[Any, ConvGeometry]:
        """The geometries of earlier calls, by what they depend on."""
        return {}

    def _checked(self, input: Tensor, weight: Tensor, *settings: Any) -> ConvGeometry:
        """The geometry of a call, in the domain: working it out takes longer than a small call."""
        key = None
        if type(input) is Tensor and not torch.compiler.is_compiling():
            plain = (value if isinstance(value, str | int) else tuple(value) for value in settings)
            key = weight.shape, input.shape[-3:], input.dim(), product_dtype(input), *plain
            if (known := self._known.get(key)) is not None:
                return known
        geometry = ConvGeometry.of(input, weight, *settings)
        self.require(geometry)
        if key is not None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = geometry
        return geometry

    @cached_property
    def function(self) -> ConvFunction:
        """The form as a function of the original weight: a leaf function, one node in a graph."""
        form = self

        def function(
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
            geometry = form._checked(
                input, weight, stride, padding, dilation, groups, padding_mode, time_padding
            )
            return form._run(input, form.prepare(weight, geometry), bias, geometry)

        function.__name__ = function.__qualname__ = self.name
        function.__module__ = "fxtemporal.functional"
        function.__doc__ = self.compute.__doc__
        return leaf_function(function)
