"""A cache of the shapes that ops gave before.

A body that is called once a frame computes the same shapes T times, a model that is traced at
another number of frames computes most of them again, and a fake convolution costs more than tracing
it. An op that allocated its result gives the same shape again for inputs of the same shapes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxtemporal.ir.node_meta import needed_value, seen_writing
from fxtemporal.ir.shallow_copy import carries_hooks
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import FakeTensorMode

__all__ = ["ShapeMemo", "Shapes"]

Shapes: TypeAlias = dict[Hashable, tuple[Any, ...]]
"""Sizes, strides, dtype and device by the key of a node."""

_LIBRARIES = ("torch", "_operator", "builtins", "math", "einops", "fxtemporal")
_DEVICES = ("cpu", "cuda")
_SETTINGS = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)


class ShapeMemo:
    """Shapes of nodes, keyed by their op, static arguments and the shapes of their inputs.

    ``known`` holds those of library code, which are the same in every graph: the memos of several
    captures may share it. Those of other code hold for one root module.
    """

    def __init__(self, fake_mode: FakeTensorMode, known: Shapes | None = None) -> None:
        self._fake_mode = fake_mode
        self.known = {} if known is None else known
        self._of_root: Shapes = {}

    def key(self, node: fx.Node, root: nn.Module, *, anywhere: bool = False) -> Hashable | None:
        """All that decides the shape of ``node``; None if it must be computed each time.

        ``anywhere``: also None if it holds for this root only.
        """
        if node.op not in ("call_module", "call_function", "call_method"):
            return None
        code = _code(node, root)
        if code is None and anywhere:
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
        return code is not None, node.op, code or node.target, str(layout), *described, *_mode()

    def recall(self, key: Any) -> torch.Tensor | None:
        """A new tensor of the remembered shape, in its own memory; None if none is remembered."""
        known = (self.known if key[0] else self._of_root).get(key)
        if known is None:
            return None
        sizes, strides, dtype, device = known
        with self._fake_mode:
            return torch.empty_strided(sizes, strides, dtype=dtype, device=device)

    def remember(self, key: Any, node: fx.Node, value: Any) -> None:
        """Keep the shape of ``node`` if it writes nothing and is one tensor in its own memory."""
        if not isinstance(value, torch.Tensor) or value.storage_offset() or value.is_complex():
            return
        if seen_writing(node):
            return
        mine = value.untyped_storage()._cdata
        inputs = pytree.tree_leaves([needed_value(source) for source in node.all_input_nodes])
        if any(isinstance(t, torch.Tensor) and t.untyped_storage()._cdata == mine for t in inputs):
            return
        (self.known if key[0] else self._of_root)[key] = _memory(value)


def _memory(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _mode() -> tuple[Hashable, ...]:
    """The settings of torch that decide a dtype or a device."""
    autocast = [(d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d)]
    return torch.get_default_dtype(), torch.get_default_device(), tuple(autocast)


def _code(node: fx.Node, root: nn.Module) -> Hashable | None:
    """What ``node`` runs, in any graph: a library's function, or a layer of torch by its settings.

    None for other code, which may do something else elsewhere.
    """
    if node.op == "call_module":
        return _layer(root.get_submodule(str(node.target)))
    home = getattr(node.target, "__module__", None) or "torch"
    return node.target if str(home).partition(".")[0] in _LIBRARIES else None


def _layer(module: nn.Module) -> Hashable | None:
    of_torch = type(module).__module__.startswith("torch.nn.modules.")
    if not of_torch or module._modules or carries_hooks(module):
        return None
    settings: list[Any] = [type(module)]
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            tensors = ((key, None if t is None else _memory(t)) for key, t in value.items())
            settings.append((name, *tensors))
        elif isinstance(value, _SETTINGS):
            settings.append((name, type(value), repr(value)))
        elif value:
            return None  # a forward of its own, say
    return tuple(settings)
