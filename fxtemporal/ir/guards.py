"""Guards: checks, on every call, of what the trace took for granted.

A Python ``range(x.size(1))`` reads a number while the model is traced, so the graph is right for
that number only. Each such read leaves a guard node in the graph::

    size = x.size(1)
    guard(size, 10, "x.size(1)", "model.py:12", "range() or int() read it")

and a call at another size raises :class:`SpecializationError` before anything is computed from it.
The nodes are the only record; :func:`specializations` reads them for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect

from fxtemporal.ir.leaf import leaf_function
from fxtemporal.support.errors import SpecializationError
from fxtemporal.support.torch_private import pytree

__all__ = [
    "QUESTIONS",
    "TRIP_COUNT",
    "Specialization",
    "dimensions",
    "given",
    "guard",
    "length",
    "one_shape",
    "specializations",
    "stacked",
    "structure",
]


TRIP_COUNT = "range() or an index"
"""Marks a read of a size that only gives the number of trips of a loop."""


@dataclass(frozen=True)
class Specialization:
    """``expression`` must have ``value``, because the code at ``location`` read it (``why``).

    ``sets``: it always has it, since the forward itself sets the value before any read.
    """

    expression: str
    value: Any
    location: str | None
    why: str
    sets: bool = False

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        return f"{self.expression} == {self.value!r} ({self.why}{where})"

    def to_dict(self) -> dict[str, Any]:
        plain = self.value if isinstance(self.value, int | float | str | bool) else str(self.value)
        return {
            "expression": self.expression,
            "value": plain,
            "location": self.location,
            "why": self.why,
        }


@leaf_function
def guard(actual: Any, value: Any, expression: str, location: str | None, why: str) -> None:
    """Raise :class:`SpecializationError` unless ``actual == value``; NaN equals NaN."""
    # In torch.jit.trace sizes are tensors, and a guard cannot be recorded.
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    if actual != value and not (value != value and actual != actual):
        fixed = Specialization(expression, value, location, why)
        raise SpecializationError(
            f"this module was traced where {fixed}; it was called with {actual}. "
            "Call fxtemporal.optimize again with example inputs of this kind.",
            str(fixed),
        )


@leaf_function
def structure(value: Any) -> str:
    """The nesting of lists, tuples and dicts in ``value``, as text."""
    return str(pytree.tree_structure(value))


@leaf_function
def dimensions(value: Any) -> int | None:
    """``value.dim()``; None if ``value`` is not a tensor."""
    return value.dim() if isinstance(value, torch.Tensor) else None


@leaf_function
def given(value: Any) -> bool:
    """Whether an argument is not None."""
    return value is not None


@leaf_function
def length(pieces: Any) -> int:
    """``len``, as a function that fx can record."""
    return len(pieces)


@leaf_function
def one_shape(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all ``tensors`` have the same shape."""
    return len({tuple(tensor.shape) for tensor in tensors}) <= 1


@leaf_function
def stacked(tensors: Sequence[torch.Tensor], rank: int, location: str | None) -> torch.Tensor:
    """``torch.stack(tensors, 1)``, if all have one shape of ``rank`` dimensions.

    Raises:
        SpecializationError: they have others in this call: a first state of batch 1, say.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return torch.stack(list(tensors), 1)
    first = tensors[0].shape  # compared one by one: sizes may be symbols, which have no hash
    if len(first) != rank or any(tensor.shape != first for tensor in tensors):
        where = f" at {location}" if location else ""
        text = f"what the calls{where} read has one shape, of {rank} dimensions"
        raise SpecializationError(f"this module is right only where {text}", text)
    return torch.stack(list(tensors), 1)


has_side_effect(guard)  # dead-code elimination must not drop a check


QUESTIONS = frozenset((guard, dimensions, given, length, one_shape, structure))
"""Functions that only ask a graph's values for facts, and change none."""


def specializations(graph: fx.Graph) -> tuple[Specialization, ...]:
    """Every guard in ``graph``, in order, without repeats."""
    found: dict[Specialization, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is guard:
            value, text, location, why = node.args[1:]
            found[Specialization(text, value, location, why)] = None
    return tuple(found)
