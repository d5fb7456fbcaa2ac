"""Runs one op on all frames through ``torch.vmap``: for ops that mix the samples of a batch.

``y.softmax(0)`` compares the clips of a batch, frame by frame; on folded frames it would compare
frames too. ``vmapped("Tensor.softmax", (0, None), frames, 0)`` runs it on each frame separately.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import einops
import torch
from torch import fx

from fxtemporal.ir import running
from fxtemporal.ir.leaf import leaf_function

__all__ = ["single", "spelled", "vmapped"]

_SPACES = {
    "Tensor": torch.Tensor,
    "torch": torch,
    "functional": torch.nn.functional,
    "einops": einops,
    "running": running,
}
_EXTREMES: dict[Any, str] = {
    torch.max: "torch.amax",
    torch.min: "torch.amin",
    "max": "torch.amax",
    "min": "torch.amin",
}


@leaf_function
def vmapped(name: str, dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> Any:
    """``torch.vmap`` of the op called ``name``.

    Args:
        name: ``"torch.softmax"``, ``"functional.normalize"`` or ``"Tensor.std"``.
        dims: for each of ``args``, 0 if its dimension 0 is the frames, None if it is the same for
            all frames.

    Returns:
        (T, ...), the results of all frames.
    """
    return torch.vmap(partial(single(name), **kwargs), in_dims=dims)(*args)


def single(name: str) -> Callable[..., Any]:
    """The op called ``name``, which runs on one frame."""
    space, _, op = name.partition(".")
    function: Callable[..., Any] = getattr(_SPACES[space], op)
    return function


def spelled(node: fx.Node) -> str | None:
    """The name under which :func:`vmapped` finds the op that ``node`` calls; None if it cannot.

    ``max()`` of a whole frame is ``amax()``, whose gradient is the same under ``torch.vmap``.
    """
    if len(node.args) == 1 and not node.kwargs and node.target in _EXTREMES:
        return _EXTREMES[node.target]
    if node.op == "call_method":
        name = "reshape" if node.target == "view" else str(node.target)  # strides may differ
        return f"Tensor.{name}" if hasattr(torch.Tensor, name) else None
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    for space in ("torch", "functional", "einops", "running"):
        if name and getattr(_SPACES[space], name, None) is node.target:
            return f"{space}.{name}"
    return "torch.matmul" if node.target is operator.matmul else None
