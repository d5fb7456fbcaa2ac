"""Outputs that a graph cannot hold: dataclasses, ``ModelOutput``s, plain objects with tensors.

A graph returns tensors and numbers in tuples, lists and dicts. What else a forward returns is taken
apart, and put together again after each call::

    AutoencoderKLOutput(latent_dist=Gaussian(mean, std))    take_apart →    [[mean, std]], Layout
                                                            put_together ←
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.support.torch_private import pytree

__all__ = ["Layout", "leaves_of", "put_together", "take_apart"]

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, Tensor, fx.Proxy, fx.Node)
_NESTED = (list, tuple, dict)


@dataclass(frozen=True)
class Layout:
    """How an object is made of its ``parts``, of which those with None are as in the graph.

    ``names`` are the attributes of a plain object; None for a class that torch's pytree knows,
    which makes its objects of the parts and ``context``.
    """

    kind: Any
    names: tuple[str, ...] | None
    context: Any
    parts: tuple[Layout | None, ...]


def take_apart(value: Any, met: dict[int, Any] | None = None) -> tuple[Any, Layout | None]:
    """``value`` in lists that a graph can hold, and its layout; ``(value, None)`` if it fits so.

    ``met`` gets the objects that were taken apart, by identity; without it, none is looked up.

    Raises:
        ValueError: an object is there twice, so that two would come back.
    """
    entry = _Entry.of(value)
    if entry is None:
        return value, None
    found = [take_apart(part, met) for part in entry.parts]
    layouts = tuple(layout for _, layout in found)
    if type(value) in _NESTED and not any(layouts):
        return value, None
    if met is not None and hasattr(value, "__dict__"):
        if id(value) in met:
            raise ValueError(f"a {type(value).__name__} is returned at two places")
        met[id(value)] = value
    return [piece for piece, _ in found], Layout(entry.kind, entry.names, entry.context, layouts)


def put_together(value: Any, layout: Layout | None) -> Any:
    """The inverse of :func:`take_apart`: new objects of the same classes."""
    if layout is None:
        return value
    parts = [put_together(p, below) for p, below in zip(value, layout.parts, strict=True)]
    if layout.kind is torch.Size:
        return torch.Size(parts)
    if layout.names is None:
        leaf = pytree.tree_structure(0)
        spec = pytree.TreeSpec(layout.kind, layout.context, [leaf] * len(parts))
        return pytree.tree_unflatten(parts, spec)
    made = object.__new__(layout.kind)
    made.__dict__.update(zip(layout.names, parts, strict=True))
    return made


def leaves_of(outputs: Any) -> list[Any]:
    """The leaves of outputs, those in the attributes of objects too, in the order of a graph's."""
    return _leaves(outputs, set())


def _leaves(value: Any, around: set[int]) -> list[Any]:
    entry = None if id(value) in around else _Entry.of(value)
    if entry is None:
        return [value]
    around = {*around, id(value)}
    return [leaf for part in entry.parts for leaf in _leaves(part, around)]


@dataclass(frozen=True)
class _Entry:
    """An object with contents, one level of it."""

    kind: Any
    names: tuple[str, ...] | None
    context: Any
    parts: Sequence[Any]

    @classmethod
    def of(cls, value: Any) -> _Entry | None:
        """None for a leaf."""
        if isinstance(value, _SIMPLE):
            return None
        if isinstance(value, torch.Size):
            return cls(torch.Size, None, None, tuple(value))
        parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        if not spec.is_leaf():
            return cls(spec.type, None, spec.context, parts)
        if _is_plain(value) and vars(value):
            return cls(type(value), tuple(vars(value)), None, tuple(vars(value).values()))
        return None


def _is_plain(value: Any) -> bool:
    """Whether the attributes of ``value`` are all that it holds."""
    kind = type(value)
    if isinstance(value, type | nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return False
    if any(base.__dict__.get("__slots__") for base in kind.__mro__):
        return False
    try:
        object.__new__(kind)
    except TypeError:  # a subclass of dict, say
        return False
    return True
