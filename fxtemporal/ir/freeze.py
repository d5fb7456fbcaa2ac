"""The memory that prepared weights take, and freezing: deploying without their sources.

A folded convolution keeps the model's own weight, for the state dict and for training, and the
folded weight as well. :func:`freeze` is for a model that will only be run: prepared values become
buffers, and parameters that nothing reads any more are dropped::

    before   self.conv.weight, self.norm.*  →  self._prepared_0(...)  →  F.conv3d
    after    self.frozen_0, self.frozen_1                             →  F.conv3d
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.ir.leaf import leaf_function
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.prepared import Prepared
from fxtemporal.ir.values import attribute
from fxtemporal.support.torch_private import pytree

__all__ = ["Memory", "freeze", "memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes of parameters and buffers.

    ``original``: those of the model. ``result``: those of the optimized module, the same tensors
    among them. ``prepared``: values that it keeps in addition, from the first call without
    gradients on. ``frozen``: parameters and buffers left with ``freeze=True``.
    """

    original: int
    result: int
    prepared: int
    frozen: int

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def __str__(self) -> str:
        def megabytes(count: int) -> str:
            return f"{count / 1e6:.1f} MB"

        beside = f", and {megabytes(self.prepared)} prepared beside them" if self.prepared else ""
        text = f"{megabytes(self.result)} of parameters and buffers{beside}"
        if self.result != self.original:
            return f"{text} ({megabytes(self.original)} in the model)"
        return f"{text}; with freeze=True {megabytes(self.frozen)}"


def memory(original: nn.Module, result: fx.GraphModule) -> Memory:
    """The memory of ``original`` and of ``result``."""
    kept = [value for value in _read_beside_prepared(result) if isinstance(value, Tensor)]
    derived = [value_of(node) for node in _prepared_tensors(result)]
    needed = [value_of(node) for node in _prepared_tensors(result) if _read(result, node)]
    return Memory(
        original=_bytes(_tensors(original)),
        result=_bytes(_tensors(result)),
        prepared=_bytes(derived),
        frozen=_bytes(kept) + _bytes(needed),
    )


def freeze(gm: fx.GraphModule) -> None:
    """Store the prepared values of ``gm`` as buffers, and drop tensors that nothing reads any more.

    This changes the state dict, and no gradient reaches the sources of prepared weights. The
    numbers are the same.
    """
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                values[node] = attribute(gm, str(node.target))
            elif (module := _prepared(gm, node)) is not None:
                sources = fx.node.map_arg(node.args, values.__getitem__)
                values[node] = module.function(*sources, **module.options)
            elif node.target is operator.getitem and _prepared(gm, node.args[0]) is not None:
                values[node] = values[node.args[0]][node.args[1]]
    names: dict[int, str] = {}
    for node in _prepared_tensors(gm):
        if not _read(gm, node):
            continue
        value = values[node]
        if id(value) not in names:
            names[id(value)] = name = _free_name(gm)
            gm.register_buffer(name, value)
        with gm.graph.inserting_before(node):
            frozen = gm.graph.get_attr(names[id(value)])
            frozen = _kept_as(gm, frozen, value, _prepared(gm, node))
        frozen.meta.update(node.meta)
        node.replace_all_uses_with(frozen)
    gone = set()
    for node in reversed(gm.graph.nodes):
        derived = node in values and not node.users
        if derived:
            if _prepared(gm, node) is not None:
                gone.add(str(node.target))
            gm.graph.erase_node(node)
    for path in gone:
        gm.delete_submodule(path)
    _drop_unread(gm)
    gm.graph.lint()
    gm.recompile()


def _kept_as(gm: fx.GraphModule, frozen: fx.Node, value: Any, module: Prepared | None) -> fx.Node:
    """The frozen value, in this machine's faster layout if ``module`` kept it so."""
    if module is None or module.keep is None:
        return frozen
    if module.keep(value, **module.options) is value:
        return frozen
    path = f"{frozen.target}_kept"
    gm.add_module(path, Prepared(as_it_is, module.keep, **module.options))
    return gm.graph.call_module(path, (frozen,))


@leaf_function
def as_it_is(value: Tensor, **options: Any) -> Tensor:
    """``value``, the function of a module that only changes the layout."""
    return value


def _drop_unread(gm: fx.GraphModule) -> None:
    read = {id(value) for value in _read_beside_prepared(gm)}
    for module in gm.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if id(value) not in read:
                    held[name] = None


def _read_beside_prepared(gm: fx.GraphModule) -> Iterator[Tensor]:
    """Every parameter and buffer that the graph reads other than as a source of prepared values."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and _read(gm, node):
            yield attribute(gm, str(node.target))
        elif node.op == "call_module" and _prepared(gm, node) is None:
            yield from _tensors(gm.get_submodule(str(node.target)))


def _prepared_tensors(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that give prepared tensors: entries of a tuple, or the value itself."""
    found = []
    for node in gm.graph.nodes:
        if _prepared(gm, node) is None:
            continue
        parts = [user for user in node.users if user.target is operator.getitem]
        found += parts or [node]
    return found


def _read(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether anything reads ``node`` other than as a source of a prepared value."""
    modules = [_prepared(gm, user) for user in node.users]
    return any(module is None or module.function is as_it_is for module in modules)


def _prepared(gm: fx.GraphModule, node: Any) -> Prepared | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return module if isinstance(module, Prepared) else None


def _free_name(gm: fx.GraphModule) -> str:
    number = 0
    while hasattr(gm, f"frozen_{number}"):
        number += 1
    return f"frozen_{number}"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(values: Any) -> int:
    """The bytes of all tensors among ``values``, each counted once."""
    leaves = pytree.tree_leaves(list(values))
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
