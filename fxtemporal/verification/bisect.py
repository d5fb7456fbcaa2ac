"""Finds the rewrites that make a comparison fail, by bisecting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["T", "culprits"]

T = TypeVar("T")


def culprits(items: Sequence[T], passes: Callable[[Sequence[T]], bool]) -> list[T]:
    """The items to remove so that the rest ``passes``; takes about log2(n) tries for each of them.

    ``passes(())`` is assumed to be true.
    """
    found: list[T] = []
    remaining = list(items)
    while remaining and not passes(remaining):
        low, high = 0, len(remaining)  # the first `low` pass, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if passes(remaining[:middle]):
                low = middle
            else:
                high = middle
        found.append(remaining.pop(low))
    return found
