"""A running maximum or minimum over frames, in one op where no derivative is asked for.

``h = torch.maximum(h, y_t)``, frame by frame, gives the numbers of ``y.amax(dim)``, but not its
gradients: where frames are equal, each step of the chain parts the gradient in halves, and amax
among all of them alike. Where a derivative may be asked for, the chain itself runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxtemporal.ir.leaf import opaque

__all__ = ["running_maximum", "running_minimum"]


@opaque
def running_maximum(input: Tensor, dim: int, initial: Tensor | None = None) -> Tensor:
    """The maximum of ``initial`` and all frames, as a chain of ``torch.maximum`` gives it.

    Args:
        input: (B, T, ...) or (T, B, ...), with the T frames along ``dim``.
        initial: (B, ...), what the chain starts from; None: the first frame.
    """
    if _derived(input, initial):
        return _chain(torch.maximum, input, dim, initial)
    total = input.amax(dim)
    return total if initial is None else torch.maximum(initial, total)


@opaque
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

    An exported program and a jit trace compute numbers alone, and amax leaves T free in them.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any(entry.key() is not torch._C._functorch.TransformType.Vmap for entry in transforms):
        return True
    inside = bool(transforms) and torch.is_grad_enabled() and any(map(_requires_inside, given))
    return inside or forward_ad._current_level >= 0


def _requires_inside(tensor: Tensor) -> bool:
    """Whether the tensor under the wrappers of ``torch.vmap`` requires a gradient."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad
