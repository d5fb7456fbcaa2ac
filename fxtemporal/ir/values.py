"""The values of nodes on the example inputs: fake tensors, and how to compute them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.ir.node_meta import needed_value, set_writes, value_of
from fxtemporal.ir.shallow_copy import carries_hooks, runs_torch_alone
from fxtemporal.ir.stand_in import StandIn
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import FakeTensorMode

__all__ = ["attribute", "rank", "run_node", "shape"]


def shape(value: Any) -> tuple[int, ...] | None:
    """The shape of a node at capture; None if it is not known.

    ``value`` is an argument of an op: a number or a parameter gives None as well.
    """
    value = value_of(value) if isinstance(value, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def rank(value: Any) -> int | None:
    """The number of dimensions of a node; None if it is not known, as for :func:`shape`."""
    value = value_of(value) if isinstance(value, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def run_node(
    gm: nn.Module,
    node: fx.Node,
    fake_mode: FakeTensorMode,
    inside: AbstractContextManager[Any] | None = None,
    *,
    again: bool = False,
) -> Any:
    """The value of ``node``, computed on fake tensors from the values of its inputs.

    ``inside`` is entered last. ``again``: call a copy of a module whose forward may leave state
    behind; a module with hooks is always copied. Raises whatever the op raises.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: needed_value(n))
    called = gm.get_submodule(str(node.target)) if node.op == "call_module" else nn.Module()
    if _leaves_traces(called) or (again and not runs_torch_alone(called)):
        called = StandIn(called, share_parameters=True).module
    watched = nullcontext() if inside is None else inside
    noting = _noting_writes(node, (args, kwargs))
    with _without_fast_attention(), noting, fake_mode, torch.no_grad(), watched:
        match node.op:
            case "call_module":
                return called(*args, **kwargs)
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case "call_function":
                assert callable(node.target)
                return node.target(*args, **kwargs)
            case "get_attr":
                value = attribute(gm, str(node.target))
                if isinstance(value, torch.Tensor):
                    return fake_mode.from_tensor(value, static_shapes=True)
                return value
    raise AssertionError(f"a {node.op} node has no value of its own")


@contextmanager
def _noting_writes(node: fx.Node, given: Any) -> Iterator[None]:
    """Set ``meta["writes"]`` to whether the call of ``node`` writes one of its input tensors."""
    leaves = pytree.tree_leaves(given)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and not t.is_inference()]
    versions = [tensor._version for tensor in tensors]
    yield
    set_writes(node, versions != [tensor._version for tensor in tensors])


def _leaves_traces(module: nn.Module) -> bool:
    """Whether a call may change state that outlives it: hooks may, and BatchNorm counts calls."""
    parts = module.modules()
    return any(carries_hooks(part) or (part.training and bool(part._buffers)) for part in parts)


_attention = threading.Lock()
_slow: list[bool] = []
"""The setting before each active switch-off; the first is restored after the last one ends."""


@contextmanager
def _without_fast_attention() -> Iterator[None]:
    """Switch attention's fast path off: on fake tensors it returns empty weights instead of None.

    The switch is global to the process: until it is restored, another thread may round differently.
    """
    with _attention:
        _slow.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _attention:
            if len(_slow) == 1:
                torch.backends.mha.set_fastpath_enabled(_slow[0])
            _slow.pop()


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted ``path`` below ``root``."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value
