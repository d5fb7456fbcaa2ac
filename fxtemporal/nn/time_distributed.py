"""A layer that runs on every frame of a clip."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxtemporal.support.torch_private import pytree

__all__ = ["TimeDistributed"]


class TimeDistributed(nn.Module):
    """Apply a module to every frame: Keras's ``TimeDistributed``.

    Every input tensor, (B, T, ...), is folded to (B·T, ...), the module is called once, and every
    tensor that it returns, (B·T, ...), is unfolded to (B, T, ...). The parameters are the same for
    all frames; B and T are free, and may be 0.

    Tensors may be nested in tuples, lists and dicts, as positional or keyword arguments, and in the
    module's result. Arguments that are not tensors are passed on unchanged.

    In training mode, as in Keras, all frames are one batch. A BatchNorm inside takes its statistics
    over all B·T frames at once, and updates its running statistics, and ``num_batches_tracked``,
    once a call. A loop over frames would take them over the B samples of each frame, and update
    them T times. Dropout draws a separate mask for each frame, all in one call. In evaluation mode
    neither differs from the loop.

    Example::

        net = TimeDistributed(nn.Conv2d(3, 8, 3))
        net(torch.zeros(2, 16, 3, 32, 32)).shape        # (2, 16, 8, 30, 30)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the module on all frames at once.

        Args:
            *args: passed to the module, each tensor folded from (B, T, ...) to (B·T, ...).
            mask: (B, T), or (B, T, ...): the frames that count. If the module's ``forward`` has a
                keyword argument ``mask`` (or ``**kwargs``), the mask is passed as (B·T,), or
                (B·T, ...); otherwise it is ignored, as in Keras.
            **kwargs: as ``*args``.

        Raises:
            ValueError: a tensor has fewer than three dimensions, or another (B, T) than the first;
                no tensor is given; or the module returns a tensor without frames to unfold.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        frames: tuple[int, int] | None = None
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if leaf.dim() < 3:
                raise ValueError(
                    f"TimeDistributed: {_argument(place, args, kwargs)} has shape "
                    f"{tuple(leaf.shape)}; it must be (B, T, ...) with at least three dimensions. "
                    "Give frames of one number a last axis with x.unsqueeze(-1)"
                )
            if frames is None:
                frames = (leaf.shape[0], leaf.shape[1])
            elif (leaf.shape[0], leaf.shape[1]) != frames:
                raise ValueError(
                    f"TimeDistributed: {_argument(place, args, kwargs)} has shape "
                    f"{tuple(leaf.shape)}, but the first tensor has (B, T) = {frames}; all must "
                    "have the same. Expand what is the same for all frames with "
                    "x.unsqueeze(1).expand(-1, T, ...)"
                )
            leaves[place] = leaf.flatten(0, 1)
        if frames is None:
            raise ValueError("TimeDistributed: no tensor is given; hand over one, (B, T, ...)")
        args, kwargs = pytree.tree_unflatten(leaves, spec)

        if mask is not None:
            if mask.dim() < 2 or (mask.shape[0], mask.shape[1]) != frames:
                raise ValueError(
                    f"TimeDistributed: mask has shape {tuple(mask.shape)}; it must begin with "
                    f"(B, T) = {frames}"
                )
            if _takes_mask(self.module):
                kwargs["mask"] = mask.flatten(0, 1)

        leaves, spec = pytree.tree_flatten(self.module(*args, **kwargs))
        return pytree.tree_unflatten([_unfold(leaf, frames) for leaf in leaves], spec)


def _argument(place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The user's name for the ``place``-th leaf of the arguments: ``args[0]``, ``x['a']``."""
    path, _ = pytree.tree_flatten_with_path((args, kwargs))[0][place]
    outer, inner = path[1], pytree.keystr(path[2:])
    name = outer.key if isinstance(outer, pytree.MappingKey) else f"args{pytree.keystr(path[1:2])}"
    return f"{name}{inner}"


def _takes_mask(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == "mask" and p.kind is not p.POSITIONAL_ONLY)
        for p in parameters
    )


def _unfold(leaf: Any, frames: tuple[int, int]) -> Any:
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    batch, time = frames
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"TimeDistributed: the module returns a {type(leaf).__name__}; it must return tensors, "
            "or tuples, lists and dicts of them"
        )
    if leaf.dim() == 0 or leaf.shape[0] != batch * time:
        raise ValueError(
            f"TimeDistributed: the module returns a tensor of shape {tuple(leaf.shape)}; its first "
            f"dimension must be B·T = {batch}·{time}. The module must treat dimension 0 as a batch"
        )
    return torch.unflatten(leaf, 0, (batch, time))
