"""Which ops that do not fold into the batch run on each frame apart, through ``torch.vmap``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.batching import Call
from fxtemporal.analysis.families import Family
from fxtemporal.rules import Code, Reason
from fxtemporal.vmapped import spelled, vmapped

__all__ = ["mapped_dims", "runs_apart"]

_CURABLE = (Code.UNSUPPORTED_OP, Code.FIXED_BATCH)


def runs_apart(family: Family, call: Call, blockers: Sequence[Reason]) -> bool:
    """Whether ``torch.vmap`` has a rule for the op, as the first lane calls it.

    The rule is tried, on fake tensors, since only that tells.
    """
    node, op = family.first, call.op
    if op.inplace or op.random or any(reason.code not in _CURABLE for reason in blockers):
        return False
    value, name = node.meta.get("val"), spelled(node)
    dims = mapped_dims(node, call.lanes)
    if not isinstance(value, torch.Tensor) or name is None or dims is None:
        return False
    if not family.equal_shapes():
        return False
    frames = len(family.lanes)

    def stacked(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        known = argument.meta["val"]
        if argument not in call.lanes:
            return known
        return known.new_empty((frames, *known.shape))

    try:
        with call.program.fake_mode, torch.no_grad():
            args, kwargs = _map((node.args, node.kwargs), stacked)
            result = vmapped(name, dims, *args, **kwargs)
    except Exception:  # torch.vmap refuses in many ways
        return False
    return isinstance(result, torch.Tensor) and tuple(result.shape) == (frames, *value.shape)


def mapped_dims(node: fx.Node, lanes: frozenset[fx.Node]) -> tuple[int | None, ...] | None:
    """For each argument of ``node`` 0 if it is a lane; None where a lane is not an argument."""
    dims = tuple(0 if argument in lanes else None for argument in node.args)
    found = {argument for argument in node.args if isinstance(argument, fx.Node)}
    return dims if lanes and lanes <= found and not lanes & set(node.kwargs.values()) else None


def _map(arguments: Any, function: Any) -> Any:
    return torch.utils._pytree.tree_map(function, arguments)
