"""Disjoint sets that can be united: union-find.

::

    sets = DisjointSets()
    sets.unite("a", "b")
    sets.find("a") == sets.find("b")      True
    sets.groups("abc")                    [["a", "b"], ["c"]]
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["DisjointSets"]

T = TypeVar("T", bound=Hashable)


class DisjointSets(Generic[T]):
    """Disjoint sets of items; each item is its own set until it is united with another."""

    def __init__(self) -> None:
        self._above: dict[T, T] = {}

    def find(self, item: T) -> T:
        """The representative of the set of ``item``."""
        while (above := self._above.get(item, item)) != item:
            self._above[item] = self._above.get(above, above)
            item = above
        return item

    def unite(self, one: T, other: T) -> None:
        """Unite the sets of two items; the representative of ``other``'s set is that of both."""
        if (mine := self.find(one)) != (theirs := self.find(other)):
            self._above[mine] = theirs

    def groups(self, items: Iterable[T]) -> list[list[T]]:
        """``items`` grouped by their sets, in their given order."""
        found: dict[T, list[T]] = {}
        for item in items:
            found.setdefault(self.find(item), []).append(item)
        return list(found.values())
