"""The clock: the time of a call, including the device's work, and deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["Deadline", "milliseconds", "timed"]

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The result of ``call()``, and the seconds that it took.

    A GPU may still work after a call returns: the clock waits for it, before and after.
    """
    _synchronize()
    start = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - start


def milliseconds(call: Callable[[], object]) -> float:
    """Milliseconds of one call, including the device's work."""
    return timed(call)[1] * 1e3


class Deadline:
    """The point in time ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self._end - time.perf_counter())

    @property
    def over(self) -> bool:
        return self.left == 0


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
