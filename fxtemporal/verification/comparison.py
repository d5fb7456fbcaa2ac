"""Errors between two outputs, and the tolerance for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fxtemporal.support.torch_private import pytree

__all__ = ["Comparison", "Sample", "Tolerance", "distance", "relative_error"]

_PIECE = 2**22


@dataclass(frozen=True)
class Tolerance:
    """The allowed error of a result against the float64 reference, relative to the largest value.

    ``times`` the original's own error, but at least ``ulps`` units in the last place of the dtype.
    ``alone``: the units allowed if there is no reference, so that neither result is the better one.
    """

    times: float = 4.0
    ulps: float = 16.0
    alone: float = 128.0

    def bound(self, dtype: torch.dtype, original_error: float | None) -> float:
        eps = torch.finfo(dtype).eps
        if original_error is None:
            return (self.alone * 32 if dtype == torch.float64 else self.alone) * eps
        return max(self.times * original_error, self.ulps * eps)


@dataclass(frozen=True)
class Sample:
    """One comparison: its inputs and its errors.

    Errors are relative to the largest absolute value of the reference. ``original_error`` is the
    original's own error against float64; None if there is no float64 reference.
    """

    inputs: str
    max_abs_error: float
    relative_error: float
    original_error: float | None
    bound: float
    problem: str | None = None
    asked: Literal["bits", "nan"] | None = field(default=None, repr=False)
    """The promise beyond rounding that failed, if one did: equal bits, or confined NaN."""

    @property
    def equal(self) -> bool:
        return self.problem is None and self.relative_error <= self.bound


@dataclass(frozen=True)
class Comparison:
    """The comparison of a result with the original, on every set of inputs tried."""

    samples: tuple[Sample, ...]
    exact: bool = True

    @property
    def equal(self) -> bool:
        return all(sample.equal for sample in self.samples)

    @property
    def max_abs_error(self) -> float:
        return max((sample.max_abs_error for sample in self.samples), default=0.0)

    @property
    def relative_error(self) -> float:
        return max((sample.relative_error for sample in self.samples), default=0.0)

    @property
    def original_error(self) -> float | None:
        errors = [s.original_error for s in self.samples if s.original_error is not None]
        return max(errors, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "equal": self.equal if self.exact else None,
            "exact": self.exact,
            "max_abs_error": _finite(self.max_abs_error),
            "relative_error": _finite(self.relative_error),
            "original_error": self.original_error,
            "samples": [
                {n: _finite(value) for n, value in vars(sample).items() if n != "asked"}
                for sample in self.samples
            ],
        }


def _finite(value: Any) -> Any:
    """``value``; None for an infinite or NaN number, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def distance(value: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest absolute difference, largest finite absolute value); NaN equals NaN.

    Computed piece by piece: a float64 copy of a large output may not fit into memory.
    """
    error = largest = 0.0
    if value.numel() == 0:
        return error, largest
    flat, flat_reference = value.detach().flatten(), reference.detach().flatten()
    for start in range(0, value.numel(), _PIECE):
        mine = flat[start : start + _PIECE].double()
        theirs = flat_reference[start : start + _PIECE].to(mine.device).double()
        difference = (mine - theirs).abs_()
        furthest = float(difference.max())
        if not math.isfinite(furthest):
            same = (mine == theirs) | (mine.isnan() & theirs.isnan())
            furthest = float(difference.nan_to_num(nan=math.inf).masked_fill(same, 0.0).max())
            theirs = theirs.masked_fill(~theirs.isfinite(), 0.0)
        error = max(error, furthest)
        largest = max(largest, float(theirs.abs().max()))
    return error, largest


def relative_error(result: Any, reference: Any) -> float:
    """max|a - b| / max|b|, the largest over all tensors in ``result``; NaN equals NaN.

    Both may be nested tuples, lists and dicts of the same structure.

    Raises:
        ValueError: the two differ in structure, in shape, or in a value that is not a tensor.
    """
    results, structure = pytree.tree_flatten(result)
    references, expected = pytree.tree_flatten(reference)
    if structure != expected:
        raise ValueError(f"structures differ: {structure} and {expected}")
    worst = 0.0
    for a, b in zip(results, references, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if a != b:
                raise ValueError(f"values differ: {a!r} and {b!r}")
        elif a.shape != b.shape:
            raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
        else:
            error, largest = distance(a, b)
            worst = max(worst, error / largest if largest else math.inf if error else 0.0)
    return worst
