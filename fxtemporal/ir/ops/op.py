"""The meaning of a graph node: :class:`Op`, and :class:`Attr` for the parameters it reads."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import fx

__all__ = ["WHOLE", "Attr", "Op", "Trait"]

WHOLE = ("slice", 0, None, 1)
"""The index entry that takes a whole dimension, ``x[:]``."""


class Trait(enum.Flag):
    """A fact about every call of an op. An unknown op has no trait: the safe case."""

    ELEMENTWISE = enum.auto()
    """Works on each element independently, and broadcasts."""
    SPATIAL = enum.auto()
    """A convolution or a pooling of (B, C, ...): dimension 0 is the batch."""
    NORMALIZES = enum.auto()
    """A normalization: the result has the axes of the input."""
    RECURRENT = enum.auto()
    """A recurrent layer: returns its outputs, and then its states."""
    MOVES = enum.auto()
    """Only moves data: a loop of such ops has no computation to share."""
    MOVES_AXES = enum.auto()
    """Only permutes, joins or splits axes."""
    SAME_MEMORY = enum.auto()
    """The result is a view of the input if possible: two such calls give the same memory."""
    CUTS = enum.auto()
    """Takes entries out of a dimension."""
    FACT = enum.auto()
    """Returns the shape, dtype or device of a tensor, independent of its data."""
    COUNTS = enum.auto()
    """A fact that counts the entries of dimension 0, possibly with others (numel)."""
    PASSES_ON = enum.auto()
    """Returns the input's numbers unchanged, if it draws no random numbers."""
    PER_CHANNEL = enum.auto()
    """Draws a random number for each channel, in the order of the channels."""
    KEEPS_LAYOUT = enum.auto()
    """The result has the memory layout of the input."""
    MAKES_CONTIGUOUS = enum.auto()
    """The result is contiguous if the input is."""
    RESTRIDES = enum.auto()
    """The strides of the result follow from those of the input."""
    REFORMATS = enum.auto()
    """May put the result in a memory layout that an argument names."""
    DENSE = enum.auto()
    """The memory layout of the result does not depend on that of the input."""
    PICKS_LAYOUTS = enum.auto()
    """Takes tensors in some memory layouts only, and raises an error for the others."""
    WRITES_SIZES = enum.auto()
    """Sizes of the result are arguments."""


NOTHING = Trait(0)


@dataclass(frozen=True)
class Attr:
    """A parameter or buffer of the root module, by qualified name: ``"layer1.0.conv1.weight"``.

    A tensor with several names is called by the first of them, parameters before buffers, so that
    tied weights compare equal.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Op:
    """One call of one op, every argument bound by name, defaults filled in.

    Two ops are equal when they compute the same thing from the same nodes. Scalars compare with
    their type (``x + 1`` and ``x + 1.0`` promote differently), and NaN equals itself.
    """

    name: str
    """The ATen name: ``"conv3d"``, ``"max_pool2d"``, ``"select"``, ..."""
    args: Mapping[str, Any]
    """``fx.Node``, :class:`Attr`, plain hashable values, and tuples of those."""
    inplace: bool = False
    """Writes its ``input`` and returns it (``relu_``, ``inplace=True``, ``+=``)."""
    random: bool = False
    """Draws random numbers, as called."""
    owns: bool = False
    """Whether the result never shares memory with an input. False if it may, or is not known."""
    traits: Trait = NOTHING

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", MappingProxyType(dict(self.args)))

    @property
    def updates(self) -> bool:
        """Updates running statistics, as called."""
        batch = self.args.get("training") or self.args.get("use_input_stats")
        return bool(batch) and self.args.get("running_mean") is not None

    @property
    def pure(self) -> bool:
        """Only computes its value: a call whose result nothing reads may be dropped."""
        return not (self.inplace or self.random or self.updates)

    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node among the arguments, nested ones too, in order, with repeats."""
        return tuple(node for value in self.args.values() for node in _nodes(value))

    def static(self) -> tuple[Any, ...]:
        """A hashable key of the op, with ``"%"`` for each node."""
        return self._key(lambda node: "%")

    def _key(self, replace: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
        return self.name, *((name, _exact(value, replace)) for name, value in self.args.items())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Op):
            return NotImplemented
        if (self.name, self.inplace, self.random) != (other.name, other.inplace, other.random):
            return False
        return self._key(lambda node: node) == other._key(lambda node: node)

    def __hash__(self) -> int:
        return hash((self.inplace, self.random, self._key(lambda node: node)))


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _nodes(item)


def _exact(value: Any, replace: Callable[[fx.Node], Any]) -> Any:
    """A key under which 1, 1.0 and True differ, 0.0 and -0.0 differ, and NaN equals itself."""
    if isinstance(value, fx.Node):
        return replace(value)
    if isinstance(value, tuple):
        return tuple(_exact(item, replace) for item in value)
    if isinstance(value, str | bool | float | complex):
        return type(value), repr(value)
    return value
