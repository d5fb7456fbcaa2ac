"""A cache of the shapes that ops gave before.

A body that is called once a frame computes the same shapes T times, and a fake convolution costs
more than tracing it. An op that allocated its result gives the same shape again for inputs of the
same shapes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.node_meta import needed_value, seen_writing
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import FakeTensorMode

__all__ = ["ShapeMemo"]


class ShapeMemo:
    """Shapes of nodes, keyed by their op, static arguments and the shapes of their inputs."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._known: dict[Hashable, tuple[Any, ...]] = {}

    def key(self, node: fx.Node) -> Hashable | None:
        """All that decides the shape of ``node``; None if it must be computed each time."""
        if node.op not in ("call_module", "call_function", "call_method"):
            return None
        leaves, layout = pytree.tree_flatten((node.args, node.kwargs))
        described = []
        for leaf in leaves:
            value = needed_value(leaf) if isinstance(leaf, fx.Node) else leaf
            if isinstance(value, torch.Tensor):
                if value.layout != torch.strided:
                    return None
                described.append(_memory(value))
            elif isinstance(value, list | tuple | dict):
                return None
            else:
                described.append((type(value), repr(value)))
        return node.op, node.target, str(layout), tuple(described)

    def recall(self, key: Hashable) -> torch.Tensor | None:
        """A new tensor of the remembered shape, in its own memory; None if none is remembered."""
        known = self._known.get(key)
        if known is None:
            return None
        sizes, strides, dtype, device = known
        with self._fake_mode:
            return torch.empty_strided(sizes, strides, dtype=dtype, device=device)

    def remember(self, key: Hashable, node: fx.Node) -> None:
        """Keep the shape of ``node`` if it writes nothing and is one tensor in its own memory."""
        value = needed_value(node)
        if not isinstance(value, torch.Tensor) or value.storage_offset() or value.is_complex():
            return
        if seen_writing(node):
            return
        mine = value.untyped_storage()._cdata
        inputs = pytree.tree_leaves([needed_value(source) for source in node.all_input_nodes])
        if any(isinstance(t, torch.Tensor) and t.untyped_storage()._cdata == mine for t in inputs):
            return
        self._known[key] = _memory(value)


def _memory(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.stride(), value.dtype, value.device
