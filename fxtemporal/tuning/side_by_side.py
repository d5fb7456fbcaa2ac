"""Times functions side by side: in turn, round after round, in one process.

Rounds are compared one by one, so that a machine that slows down for a while has no effect.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fxtemporal.support.clock import Deadline, milliseconds

__all__ = ["Durations", "interleaved", "quartiles", "speedup"]


def quartiles(values: tuple[float, ...]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@dataclass(frozen=True)
class Durations:
    """The times of one function, in milliseconds, round by round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        lower, _, upper = quartiles(self.values)
        return lower, upper

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "spread": self.spread, "rounds": len(self.values)}


def speedup(before: Durations, after: Durations) -> tuple[float, float, float]:
    """How many times faster ``after`` is: lower quartile, median, upper quartile over rounds.

    Rounds are compared one by one, so a machine that slows down for a while does not count.
    """
    pairs = zip(before.values, after.values, strict=True)
    return quartiles(tuple(b / a for b, a in pairs))


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 200,
    warmup: int = 2,
    budget: float = 8.0,
) -> dict[str, Durations]:
    """Time functions in turn, round after round, in this process.

    Every other round runs in reverse, so that no function always follows the same one. Stops after
    ``rounds`` rounds, or once ``budget`` seconds are spent and 3 rounds are done.
    """
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()

    taken: dict[str, list[float]] = {name: [] for name in names}
    deadline = Deadline(budget)
    for done in range(rounds):
        if done >= 3 and deadline.over:
            break
        for name in names if done % 2 == 0 else reversed(names):
            taken[name].append(milliseconds(functions[name]))
    return {name: Durations(tuple(values)) for name, values in taken.items()}
