"""Refuses sizes of 1 and 0 where an exported program differs from its model.

torch.export assumes that a free size is 2 or more: ``if clip.shape[1] == 1`` is always false in the
graph, without a guard. A batch of one is too common to refuse without a reason. So the model and
the exported program both run with one entry, and with none, in each free dimension; a size at which
they differ is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxtemporal.capture.exported_guards import free_sizes, refuse_size
from fxtemporal.ir.outputs import leaves_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.shared_state import seed
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.errors import SpecializationError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree

__all__ = ["refuse_small_sizes"]

_ROUNDING = 1e-3
"""Tolerance, relative to the largest value: both run the same ops, so only rounding differs."""


def refuse_small_sizes(
    program: Program, exported: ExportedProgram, model: nn.Module, example: Any
) -> None:
    """Guard against a free size of 1 or 0 where ``program`` differs from ``model``."""
    free = free_sizes(exported)
    refused = [
        (name, size)
        for name, places in free.items()
        for size in (1, 0)
        if not _agree(model, program.gm, _cut(example, dict.fromkeys(places, size)))
    ]
    singles = [name for name in free if (name, 1) not in refused]
    together = {place: 1 for name in singles for place in free[name]}
    if len(singles) > 1 and not _agree(model, program.gm, _cut(example, together)):
        refused += [(name, 1) for name in singles]
    for name, size in refused:
        refuse_size(program, exported, name, size)
    if refused:
        program.refresh()


def _cut(example: Any, sizes: dict[tuple[int, int], int]) -> Any:
    """``example`` narrowed to ``sizes``: ``{(number of the input, dimension): size}``."""
    leaves, structure = pytree.tree_flatten(example)
    for (number, dim), size in sizes.items():
        leaves[number] = leaves[number].narrow(dim, 0, size)
    return pytree.tree_unflatten(leaves, structure)


def _agree(model: nn.Module, program: nn.Module, example: Any) -> bool:
    """Whether both give the same on ``example``, or the model fails, or ``program`` refuses it."""
    try:
        expected = _outputs(model, example)
    except Exception:  # in any way that a model may
        return True
    try:
        found = _outputs(program, example)
    except SpecializationError:
        return True
    except Exception:
        return False
    return len(found) == len(expected) and all(map(_close, found, expected))


def _outputs(model: nn.Module, example: Any) -> list[Any]:
    args, kwargs = own_inputs(example)
    with stand_in(model) as other, torch.no_grad(), quiet():
        seed(0)
        return leaves_of((other.module(*args, **kwargs), args, kwargs))


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return isinstance(found, Tensor) == isinstance(expected, Tensor)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.dtype.is_floating_point or not expected.numel():
        return torch.equal(found, expected)
    bound = _ROUNDING * float(expected.detach().abs().nan_to_num(posinf=0.0).max())
    return torch.allclose(found, expected, rtol=0.0, atol=bound, equal_nan=True)
