"""A result in the place of the method that it was made of: see :func:`put_in_place`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["is_in_place", "put_in_place"]


class _Placed:
    """Runs ``result`` for a model, in the modes that the model's parts have at each call."""

    def __init__(self, model: nn.Module, result: nn.Module, source: nn.Module) -> None:
        own = dict(result.named_modules())
        parts = [(path, module) for path, module in model.named_modules() if path in own]
        self._modes = [(weakref.ref(module), own[path]) for path, module in parts]
        self._result = result
        self._source = source  # the result watches its tensors, and holds it by weak references

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for part, mine in self._modes:
            if (module := part()) is not None:
                mine.training = module.training
        return self._result(*args, **kwargs)


_placed: weakref.WeakKeyDictionary[nn.Module, dict[str, _Placed]] = weakref.WeakKeyDictionary()
"""The results in place of methods, by model and name. A copy of a model has none."""


def put_in_place(model: nn.Module, name: str, result: nn.Module, source: nn.Module) -> None:
    """Make ``model.name(...)`` run ``result``, until ``del model.name``.

    The attribute is a method bound to the model, so a copy of the model runs its own method.
    ``source`` is the model that ``result`` was made of.
    """
    _placed.setdefault(model, {})[name] = _Placed(model, result, source)
    vars(model)[name] = MethodType(_runs_result(name, getattr(type(model), name)), model)


def is_in_place(value: Any) -> bool:
    """Whether an attribute of a model was set by :func:`put_in_place`."""
    return getattr(value, "fxtemporal_in_place", False) is True


def _runs_result(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        placed = _placed.get(self, {}).get(name)
        if placed is None:
            return getattr(type(self), name)(self, *args, **kwargs)
        return placed(*args, **kwargs)

    run.fxtemporal_in_place = True  # type: ignore[attr-defined]
    return run
