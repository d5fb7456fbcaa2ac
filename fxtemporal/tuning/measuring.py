"""Functions timed side by side, and how far results are from a reference.

They are timed in turn, round after round, in one process; rounds are compared one by one, so that a
machine that slows down for a while counts for nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Samples", "interleaved", "quartiles", "relative_error", "speedup"]

_CHUNK = 1 << 24
"""Elements compared at once: a float64 copy of a whole output may not fit."""


def quartiles(values: tuple[float, ...]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@dataclass(frozen=True)
class Samples:
    """What one function took, in milliseconds, a sample a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        lower, _, upper = quartiles(self.samples)
        return lower, upper

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "spread": self.spread, "rounds": len(self.samples)}


def speedup(before: Samples, after: Samples) -> tuple[float, float, float]:
    """How many times faster ``after`` is: lower quartile, median, upper quartile over rounds.

    Rounds are compared one by one, so a machine that slows down for a while does not count.
    """
    pairs = zip(before.samples, after.samples, strict=True)
    return quartiles(tuple(b / a for b, a in pairs))


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 200,
    warmup: int = 2,
    budget: float = 8.0,
) -> dict[str, Samples]:
    """Time functions in turn, round after round, in this process.

    Every other round runs in reverse, so that no function always follows the same one. Stops after
    ``rounds`` rounds, or once ``budget`` seconds are spent and 3 rounds are done.
    """
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()

    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name in names if done % 2 == 0 else reversed(names):
            start = time.perf_counter()
            functions[name]()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: Samples(tuple(values)) for name, values in samples.items()}


def _tensor_error(result: Tensor, reference: Tensor) -> float:
    if result.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(result.shape)} and {tuple(reference.shape)}")
    if result.numel() == 0:
        return 0.0
    difference = scale = 0.0
    for a, b in zip(
        torch.split(result.detach().flatten(), _CHUNK),
        torch.split(reference.detach().flatten(), _CHUNK),
        strict=True,
    ):
        worst = (a.double() - b.double()).abs().max().item()
        difference = math.inf if math.isnan(worst) else max(difference, worst)
        scale = max(scale, b.double().abs().max().item())
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


def relative_error(result: Any, reference64: Any) -> float:
    """max|a - b| / max|b|, the largest over all tensors in ``result``.

    Both may be nested tuples, lists and dicts, of one structure. A NaN on either side is an
    infinite error.

    Raises:
        ValueError: the two differ in structure or in shape.
    """
    results, structure = pytree.tree_flatten(result)
    references, expected = pytree.tree_flatten(reference64)
    if structure != expected:
        raise ValueError(f"structures differ: {structure} and {expected}")
    worst = 0.0
    for a, b in zip(results, references, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            worst = max(worst, _tensor_error(a, b))
        elif a != b:
            raise ValueError(f"values differ: {a!r} and {b!r}")
    return worst
