"""Calls of modules, as a traceback shows them. Without the frames of torch, none is found."""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import Any

from torch import nn

__all__ = ["innermost_call"]

_CALL = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)


def innermost_call(
    raised: TracebackType | None,
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The module that raised, with the arguments of the call: the last one that was entered."""
    found = None
    for frame, _ in traceback.walk_tb(raised):
        held = frame.f_locals
        if frame.f_code is _CALL and isinstance(held["self"], nn.Module):
            found = held["self"], tuple(held["args"]), dict(held["kwargs"])
    return found
