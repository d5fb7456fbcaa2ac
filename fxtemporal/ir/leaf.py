"""Leaf functions: functions that any fx trace records as one call.

Tracing a graph module again (unpickling does, and so do fx's own quantization passes) runs its code
on proxies, and a function that reads a size would raise an error. A leaf function puts a call of
itself into the new graph instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import fx

__all__ = ["leaf_function"]

P = ParamSpec("P")
R = TypeVar("R")


def leaf_function(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` a leaf function: torch.fx records a call of it as one node.

    ``torch.fx.wrap`` does the same, but it keeps the namespace of every graph module that was ever
    compiled, and goes through all of them at every trace.
    """

    @wraps(function)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
        for given in (*args, *kwargs.values()):
            for value in given if isinstance(given, tuple | list) else (given,):
                if isinstance(value, fx.Proxy) and not getattr(value.tracer, "knows_sizes", False):
                    return value.tracer.create_proxy(  # type: ignore[return-value]
                        "call_function", recorded, args, kwargs
                    )
        return function(*args, **kwargs)

    return recorded
