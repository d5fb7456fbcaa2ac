"""Inputs to compare on: fresh inputs of other sizes, and the example with bad frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fxtemporal.support.torch_private import pytree

__all__ = ["POISONED", "Example", "FreshInputs", "fresh_inputs", "is_float", "poisoned", "resized"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
POISONED = "the example with "
_MANY, _RUN = 2**18, 16
"""An input with this many entries gets fresh values in runs: drawing one by one takes longer than
a forward."""


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


@dataclass(frozen=True)
class FreshInputs:
    """Inputs whose sizes differ from the example's in the dimensions ``dims``; none: NaN or Inf."""

    name: str
    inputs: Example
    dims: frozenset[int] = frozenset()


def fresh_inputs(example: Example, *, together: bool) -> Iterator[FreshInputs]:
    """Inputs of other sizes: another batch, one more entry in dimension 1 or 2.

    ``together``: before them, fewer entries in another batch, for models that take long to run.
    """
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, torch.Tensor) and t.dim()]
    if not tensors:
        return
    batch = tensors[0].shape[0]
    other = 3 if batch == 2 else 2
    longest = max(tensors, key=torch.Tensor.dim)
    small = {0: (batch, 1)} if batch > 2 else {}
    alone = [(f"a batch of {other}", {0: (batch, other)})]
    both = []
    for dim in (1, 2) if longest.dim() >= 3 else ():
        size = longest.shape[dim]
        more, less = size + 1, size // 4 * 3 + 1 if size > 4 else size + 1
        alone.append((f"{more} entries in dimension {dim}", {**small, dim: (size, more)}))
        name = f"a batch of {other}, {less} entries in dimension {dim}"
        both.append((name, {0: (batch, other), dim: (size, less)}))
    generator = torch.Generator().manual_seed(0)
    tries = [(*one, frozenset(set(one[1]) - {0} or {0})) for one in alone]
    if together:
        tries = [*((*one, frozenset(one[1])) for one in both), *tries]
    for name, change, dims in tries:
        yield FreshInputs(name, resized(example, change, generator), dims)
        flat = [t for t in tensors if t.dim() == 2 and 1 in dims and t.shape[1] == change[1][0]]
        if flat and longest.dim() >= 3:  # a mask (B, T)
            masked = resized(example, change, generator, least_rank=2)
            yield FreshInputs(f"{name}, masks too", masked, dims)


def poisoned(example: Example) -> Iterator[FreshInputs]:
    """The example with a frame of NaN, or of Inf, in its longest inputs."""
    tensors = [t for t in pytree.tree_leaves(example) if is_float(t)]
    rank = max((t.dim() for t in tensors), default=0)
    for what, dim in ((float("nan"), 1), (float("nan"), 2), (float("inf"), 2)):
        if not any(t.dim() == rank >= 3 and t.shape[dim] > 1 for t in tensors):
            continue

        def poison(tensor: torch.Tensor, what: float = what, dim: int = dim) -> torch.Tensor:
            if not is_float(tensor) or tensor.dim() != rank or tensor.shape[dim] < 2:
                return tensor
            index = torch.tensor([tensor.shape[dim] // 2], device=tensor.device)
            return tensor.index_fill(dim, index, what)

        text = f"{POISONED}{what} at entry {{}} of dimension {dim}"
        middle = next(t.shape[dim] // 2 for t in tensors if t.dim() == rank)
        bad = pytree.tree_map_only(torch.Tensor, poison, example)
        yield FreshInputs(text.format(middle), bad)


def resized(
    example: Example,
    change: dict[int, tuple[int, int]],
    generator: torch.Generator | None = None,
    *,
    least_rank: int = 3,
) -> Example:
    """Inputs like ``example`` of other sizes: ``change`` is ``{dimension: (old, new)}``.

    Dimension 0 changes in all tensors, another one in those of ``least_rank`` dimensions or more.
    """
    generator = generator or torch.Generator().manual_seed(0)
    draw = partial(_fresh, change=change, generator=generator, least_rank=least_rank)
    changed: Example = pytree.tree_map_only(torch.Tensor, draw, example)
    return changed


def _fresh(
    like: torch.Tensor,
    change: dict[int, tuple[int, int]],
    generator: torch.Generator,
    least_rank: int,
) -> torch.Tensor:
    """A tensor with values drawn from ``like``; ``change`` gives its sizes as (old, new)."""
    sizes = list(like.shape)
    for dim, (old, new) in change.items():
        if (dim == 0 or like.dim() >= least_rank) and dim < like.dim() and sizes[dim] == old:
            sizes[dim] = new
    count = int(torch.Size(sizes).numel())
    if like.numel() == 0 or count == 0:
        return like.new_zeros(sizes)
    flat = like.detach().flatten()
    run = 1 if flat.numel() < _MANY else _RUN
    runs = flat[: flat.numel() // run * run].view(-1, run)
    picks = torch.randint(len(runs), (-(-count // run),), generator=generator).to(like.device)
    return runs.index_select(0, picks).flatten()[:count].reshape(sizes)
