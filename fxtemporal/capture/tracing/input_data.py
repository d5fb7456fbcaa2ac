"""The data of inputs that are settings: a tensor with the sizes of each clip, say.

A vision tower reads ``grid_thw.tolist()`` and builds shapes of it, as another model does of Python
numbers. Where the caller gives such a tensor, the graph holds what was read, with a guard on it. A
tensor with an entry for each sample (lengths, masks) is data: another call has other numbers.

The guard is on the node that was read, so a value that another call does not have, whatever made it
(a draw, a write through a view), is refused there. Which ops are computed here is no more than a
choice of what is worth holding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxtemporal.support.torch_private import pytree

__all__ = ["MOST", "InputData"]

MOST = 4096
"""Entries of a tensor that may be settings."""
_HOMES = ("torch", "_operator", "builtins", "math")


class InputData:
    """Computes nodes from the real values of the example inputs, as far as these are settings."""

    def __init__(self, example: Mapping[str, Any] | None) -> None:
        self._example = example or {}
        tensors = [t for t in pytree.tree_leaves(self._example) if isinstance(t, torch.Tensor)]
        largest = max(tensors, key=lambda t: (t.dim(), t.numel()), default=torch.tensor(0))
        self._samples = largest.shape[:1]
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: Any) -> Any:
        """The value of ``node`` on the example; raises ``LookupError`` if it is no setting."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._setting(self._example[str(node.target).lstrip("*")])
        name = str(getattr(node.target, "__name__", node.target))
        home = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
        drawn_or_written = "rand" in name or (name.endswith("_") and not name.endswith("__"))
        if not node.op.startswith("call_") or node.op == "call_module" or home not in _HOMES:
            raise LookupError(node.name)
        if drawn_or_written or "out" in node.kwargs or name in ("normal", "bernoulli", "setitem"):
            raise LookupError(node.name)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _setting(self, value: Any) -> Any:
        for leaf in pytree.tree_leaves(value):
            if not isinstance(leaf, torch.Tensor):
                continue
            whole = not leaf.is_floating_point() and not leaf.is_complex()
            each = leaf.dim() > 0 and leaf.shape[:1] == self._samples
            if not whole or leaf.numel() > MOST or each:
                raise LookupError("not a setting")
        return value
