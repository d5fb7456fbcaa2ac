"""Detects active transforms of ``torch.func``. Required: forms must be right under them."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "enters_transforms",
    "in_forward_mode",
    "in_more_than_vmap",
    "in_transform",
    "is_wrapped",
    "leaving_transforms",
    "unwrapped",
]


def in_transform() -> bool:
    """Whether any transform is active, such as ``torch.vmap``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_more_than_vmap() -> bool:
    """Whether a transform other than ``torch.vmap`` is active, which may differentiate."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(t.key() is not torch._C._functorch.TransformType.Vmap for t in transforms)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def is_wrapped(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a transform's wrapper around another tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers of transforms."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def enters_transforms(target: object) -> bool:
    """Whether a node of that target, which torch.export made, enters or leaves a transform."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


@contextmanager
def leaving_transforms() -> Iterator[None]:
    """Leave at the end whatever was entered inside, by code that an error cut short."""
    functorch = torch._C._functorch
    depth, outside = functorch.get_dynamic_layer_stack_depth(), not in_forward_mode()
    try:
        yield
    except BaseException:
        if outside:  # a graph enters forward mode without telling forward_ad
            with suppress(RuntimeError):
                torch._C._exit_dual_level(level=0)
            forward_ad._current_level = -1
        raise
    finally:
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
