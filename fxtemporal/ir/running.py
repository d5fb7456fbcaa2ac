"""A running maximum or minimum over frames, in one op if no derivative is asked for.

``h = torch.maximum(h, y_t)``, frame by frame, gives the numbers of ``y.amax(dim)``, but not its
gradients: for equal frames, each step of the chain splits the gradient in halves, while amax
divides it evenly among all. If a derivative may be asked for, the chain itself runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxtemporal.ir.leaf import leaf_function
from fxtemporal.support.torch_private.dispatch import is_traced
from fxtemporal.support.torch_private.transforms import (
    in_forward_mode,
    in_more_than_vmap,
    in_transform,
    unwrapped,
)

__all__ = ["running_maximum", "running_minimum"]


@leaf_function
def running_maximum(input: Tensor, dim: int, initial: Tensor | None = None) -> Tensor:
    """The maximum of ``initial`` and all frames, as a chain of ``torch.maximum`` gives it.

    Args:
        input: (B, T, ...) or (T, B, ...), with the T frames along ``dim``.
        initial: (B, ...), the start of the chain; None: the first frame.
    """
    if _derived(input, initial):
        return _chain(torch.maximum, input, dim, initial)
    total = input.amax(dim)
    return total if initial is None else torch.maximum(initial, total)


@leaf_function
def running_minimum(input: Tensor, dim: int, initial: Tensor | None = None) -> Tensor:
    """The minimum of ``initial`` and all frames. Arguments as for :func:`running_maximum`."""
    if _derived(input, initial):
        return _chain(torch.minimum, input, dim, initial)
    total = input.amin(dim)
    return total if initial is None else torch.minimum(initial, total)


def _chain(
    step: Callable[[Tensor, Tensor], Tensor], frames: Tensor, dim: int, initial: Tensor | None
) -> Tensor:
    parts = frames.unbind(dim)
    state, *rest = parts if initial is None else (initial, *parts)
    for part in rest:
        state = step(state, part)
    return state


def _derived(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for: backward, forward, or by a transform of torch.func.

    An exported program and a jit trace only compute numbers, and with amax their T stays free.
    """
    if torch.compiler.is_exporting() or is_traced():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    if torch.compiler.is_compiling():
        return False
    if in_more_than_vmap() or in_forward_mode():
        return True
    asked = any(unwrapped(tensor).requires_grad for tensor in given)
    return in_transform() and torch.is_grad_enabled() and asked
