"""What a forward leaves behind on its modules.

A graph is a function of its inputs, parameters and buffers. A forward that counts its calls, or
keeps a tensor for the next one, is not; it must be refused, or shown to be harmless.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx.proxy import Proxy

from fxtemporal.tracing.errors import StatefulError
from fxtemporal.tracing.shape_tracer import is_leaf
from fxtemporal.twins import twin, unchanged

__all__ = ["ModuleState"]

_OWN = frozenset(vars(nn.Module()))
"""The attributes that every module has."""

_ABSENT = object()


@dataclass(frozen=True)
class _Change:
    module: nn.Module
    name: str
    called: str
    old: Any
    new: Any


class ModuleState:
    """The attributes of every module of ``root``, as they were before a trace of it."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._before = _attributes(root)

    def settle(self, model: nn.Module, example: Any | None) -> str | None:
        """Put back what the trace changed; return what there is to say of it.

        A tensor may be kept if no later call reads it. Any other change makes the next call
        another function, which no graph can be.

        Raises:
            StatefulError: the next call may depend on this one.
        """
        kept: list[_Change] = []
        for change in self._changes():
            if is_leaf(change.module):  # it runs as it is, and sets the same at each call
                vars(change.module)[change.name] = change.old
            elif change.name in change.module._buffers:
                text = f"the forward puts another tensor in place of the buffer {change.called}"
                raise StatefulError(text, exportable=True)
            elif isinstance(change.new, Proxy):
                kept.append(change)
            else:
                text = f"the forward changes {change.called}, which its next call may read"
                raise StatefulError(text)
        if not kept:
            return None
        names = ", ".join(change.called for change in kept)
        if example is None or not _repeats(model, example):
            raise StatefulError(f"the forward keeps {names}, which its next call may read")
        for change in kept:
            if change.old is _ABSENT:
                delattr(change.module, change.name)
            else:
                vars(change.module)[change.name] = change.old
        return f"the forward keeps {names}; the optimized module does not"

    def _changes(self) -> Iterator[_Change]:
        after = _attributes(self._root)
        for key, (module, value, inside) in after.items():
            path, name = key
            if not path and name.startswith("_tensor_constant"):
                continue  # where fx keeps tensors that are neither parameters nor buffers
            _, old, old_inside = self._before.get(key, (module, _ABSENT, ()))
            if old is not value or old_inside != inside:
                called = f"self.{path}.{name}" if path else f"self.{name}"
                yield _Change(module, name, called, old, value)


def _attributes(root: nn.Module) -> dict[tuple[str, str], tuple[nn.Module, Any, tuple[int, ...]]]:
    """Every attribute of every module; of containers also what is in them."""
    found: dict[tuple[str, str], tuple[nn.Module, Any, tuple[int, ...]]] = {}
    for path, module in root.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _OWN}
        for name, value in (*own.items(), *module._buffers.items()):
            inside = pytree.tree_leaves(value) if isinstance(value, list | dict | set) else ()
            found[path, name] = module, value, tuple(map(id, inside))
    return found


def _repeats(model: nn.Module, example: Any) -> bool:
    """Whether two calls of one and the same module give the same."""
    results = []
    with unchanged(model), torch.no_grad(), torch.random.fork_rng():
        callee = twin(model)
        for _ in range(2):
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, example)
            torch.manual_seed(0)
            results.append(pytree.tree_leaves(callee(*args, **kwargs)))
    return len(results[0]) == len(results[1]) and all(map(_same, *results))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)
