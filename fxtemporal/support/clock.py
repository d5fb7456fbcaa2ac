"""The one clock: how long a call takes, the device's work included, and when time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["Deadline", "milliseconds", "timed"]

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What ``call()`` gives, and the seconds that it took.

    A GPU works on after a call came back: it is waited for, before and after.
    """
    _synchronize()
    start = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - start


def milliseconds(call: Callable[[], object]) -> float:
    """The time of one call, the device's work included."""
    return timed(call)[1] * 1e3


class Deadline:
    """``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds until then; 0 when it is over."""
        return max(0.0, self._end - time.perf_counter())

    @property
    def over(self) -> bool:
        return self.left == 0


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
