"""A method of a model as a model of its own: ``vae.decode``, ``model.encode_video``.

:func:`method_of` makes a module with the model's own contents, so that both have the same
parameters, buffers, submodules, hooks and mode, and whose forward is the method.
"""

from __future__ import annotations

import functools
import threading
from types import MethodType
from typing import Any

from torch import nn

from fxtemporal.ir.in_place import is_in_place
from fxtemporal.ir.shallow_copy import forget_hooks
from fxtemporal.support.errors import CaptureError

__all__ = ["method_of", "owner_of"]

_FORWARD = "forward"


class _Entered(threading.local):
    """The modules whose method this thread runs as their forward, by identity."""

    def __init__(self) -> None:
        self.modules: set[int] = set()


_entered = _Entered()


def owner_of(model: Any) -> tuple[Any, str | None]:
    """``(vae, "decode")`` for ``vae.decode``; ``(model, None)`` for all that is no such method."""
    if not isinstance(model, MethodType) or not isinstance(model.__self__, nn.Module):
        return model, None
    if is_in_place(model):
        return model.__self__, model.__func__.__name__
    name = model.__func__.__name__
    named = getattr(type(model.__self__), name, None)
    if named is not model.__func__:  # a decorator may leave another name
        kinds = type(model.__self__).__mro__
        found = [n for kind in kinds for n, f in vars(kind).items() if f is model.__func__]
        name = found[0] if found else name
    return model.__self__, name


def method_of(model: Any, name: str) -> nn.Module:
    """A module that shares all contents with ``model``, and whose forward is its method ``name``.

    Inside the method, ``self.forward`` is the model's own forward. Hooks of the model itself are
    left out: they belong to calls of the model, not of a method.

    Raises:
        CaptureError: ``model`` has no such method in its class.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"method={name!r} needs an nn.Module, got {type(model).__name__}")
    kind = type(model)
    method = getattr(kind, name, None)
    if not callable(method) or isinstance(method, type):
        raise CaptureError(f"{kind.__name__} has no method {name!r}")
    if name in vars(model) and not is_in_place(vars(model)[name]):
        raise CaptureError(
            f"{name} was replaced on this {kind.__name__} itself: delete that attribute first"
        )

    @functools.wraps(method)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = _entered.modules
        if id(self) in inside:
            return kind.forward(self, *args, **kwargs)
        inside.add(id(self))
        try:
            return method(self, *args, **kwargs)
        finally:
            inside.discard(id(self))

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    view: nn.Module = object.__new__(type(kind.__name__, (kind,), {_FORWARD: forward, **named}))
    vars(view).update((key, v) for key, v in vars(model).items() if not is_in_place(v))
    forget_hooks(view)
    return view
