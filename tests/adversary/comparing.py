"""Comparison of two results: nesting, dtypes, shapes, layout, and numbers up to rounding."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# An error below so many units of rounding of the largest value needs no second opinion.
FREE = 64.0


def leaves(value: Any, path: str = "out") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values with their paths; a container is a leaf of its type and size."""
    if isinstance(value, Mapping):
        yield path, (type(value).__name__, list(map(str, value)))
        for key, part in value.items():
            yield from leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield path, (type(value).__name__, len(value))
        for index, part in enumerate(value):
            yield from leaves(part, f"{path}[{index}]")
    else:
        yield path, value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def form(want: Any, got: Any, *, strides: bool) -> tuple[str, str] | None:
    """(aspect, sentence) where two results differ in anything but numbers."""
    ours, theirs = list(leaves(want)), list(leaves(got))
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        return "nesting", f"{_outline(want)} became {_outline(got)}"
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor) or (
            not isinstance(a, torch.Tensor) and type(a) is not type(b)
        ):
            return "nesting", f"{path}: {type(a).__name__} became {type(b).__name__}"
        if not isinstance(a, torch.Tensor):
            if isinstance(a, tuple) and a != b:
                return "nesting", f"{path}: {a} became {b}"
            if isinstance(a, int | str) and a != b:
                return "number", f"{path}: {a!r} became {b!r}"
            if isinstance(a, float) and a == a and abs(a - b) > 1e-4 * (1 + abs(a)):
                return "number", f"{path}: {a!r} became {b!r}"
            continue
        if a.dtype != b.dtype:
            return "dtype", f"{path}: {a.dtype} became {b.dtype}"
        if a.shape != b.shape:
            return "shape", f"{path}: {tuple(a.shape)} became {tuple(b.shape)}"
        if _has_gradients(a) != _has_gradients(b):
            return "requires_grad", f"{path}: {a.requires_grad} became {b.requires_grad}"
        if strides and a.layout == torch.strided and not _lies_alike(a, b):
            return "layout", f"{path}: strides {a.stride()} of {tuple(a.shape)} became {b.stride()}"
    return None


def _lies_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal strides; of a view with gaps, each ``.view()`` that ``a`` takes is one of ``b``."""
    ours, theirs = _steps(a), _steps(b)
    if ours == theirs:
        return True
    dense = sorted(ours) == sorted(_steps(torch.empty_like(a)))
    joined = zip(_joins(a), _joins(b), strict=True)
    return not dense and all(other for mine, other in joined if mine)


def _steps(a: torch.Tensor) -> list[int]:
    if not a.numel():
        return []
    return [step for step, size in zip(a.stride(), a.shape, strict=True) if size > 1]


def _joins(a: torch.Tensor) -> list[bool]:
    """Whether a dimension and the next one can be viewed as one."""
    dims = [(step, size) for step, size in zip(a.stride(), a.shape, strict=True) if size > 1]
    return [step == after * size for (step, _), (after, size) in itertools.pairwise(dims)]


def _outline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_outline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_outline, value))})"
    return type(value).__name__


def error(
    want: torch.Tensor, got: torch.Tensor, *, loosely: bool = False
) -> tuple[float, float] | None:
    """(largest error, largest finite value), or None where NaN or Inf stand elsewhere.

    ``loosely``: NaN may stand for Inf.
    """
    if want.dtype.is_complex:
        want, got = torch.view_as_real(want.resolve_conj()), torch.view_as_real(got.resolve_conj())
    if want.is_sparse or want.is_quantized:
        want, got = want.to_dense(), got.to_dense()
    a, b = want.detach().double(), got.detach().double()
    if not a.numel() or torch.equal(a, b):
        return 0.0, 1.0
    fine = torch.isfinite(a)
    if not torch.equal(fine, torch.isfinite(b)):
        return None
    if not fine.all():
        odd_a, odd_b = a[~fine], b[~fine]
        alike = (odd_a == odd_b) | (odd_a.isnan() & odd_b.isnan())
        if not loosely and not alike.all():
            return None
        a, b = a[fine], b[fine]
        if not a.numel():
            return 0.0, 1.0
    return float((a - b).abs().max()), float(a.abs().max())


def _has_gradients(value: torch.Tensor) -> bool:
    """Whether a backward goes on from ``value``: a view made under ``no_grad`` only says so."""
    return value.requires_grad and not (value._is_view() and _function_of(value) is None)


def _function_of(value: torch.Tensor) -> object:
    try:
        return value.grad_fn
    except RuntimeError:  # a view that was written later
        return value


def rounding(dtype: torch.dtype) -> float:
    """The unit of rounding of a dtype; 0 for whole numbers."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.finfo(dtype).eps
    return 0.0


def beyond_rounding(want: torch.Tensor, got: torch.Tensor, *, loosely: bool = False) -> str | None:
    """A sentence where two tensors differ by more than rounding that needs no second opinion."""
    measured = error(want, got, loosely=loosely)
    if measured is None:
        return "NaN or Inf stand at other places"
    off, largest = measured
    if off > FREE * rounding(want.dtype) * largest:
        return f"off by {off:.3g} of {largest:.3g}"
    return None
