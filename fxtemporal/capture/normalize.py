"""Rewrites of a captured graph that leave one spelling of each computation."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.node_meta import copy_meta, forget_value, value_of
from fxtemporal.ir.ops import WHOLE, Op, Trait
from fxtemporal.ir.program import Program

__all__ = ["normalize"]

_TURNED = (
    "as_strided_",
    "detach_",
    "squeeze_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "transpose_",
    "unsqueeze_",
)
"""Methods that turn a tensor into a view of its memory, in place."""


def normalize(program: Program) -> None:
    """Reduce the spellings that later rules must match, by the functions below."""
    _views_out_of_place(program)
    _one_index_a_node(program)
    _reads_after_writes(program)
    _one_cat(program)
    program.hoist_checks()
    program.refresh()


def _views_out_of_place(program: Program) -> None:
    """Rewrite ``y.squeeze_()``, which turns the tensor itself into a view, as ``y.squeeze()``.

    It is done where the forward made ``y``, and no earlier node may be the same tensor object.
    """
    for node in list(program.graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not node.op.startswith("call_") or name not in _TURNED:
            continue
        same = _same_objects(program, node)
        if same is None:
            continue
        with program.graph.inserting_before(node):
            view = program.graph.call_method(name[:-1], node.args, dict(node.kwargs))
        copy_meta(view, node)
        for older in same:
            later = {user for user in older.users if user > node}
            older.replace_all_uses_with(view, delete_user_cb=later.__contains__)
            forget_value(older)
        node.replace_all_uses_with(view)
        program.graph.erase_node(node)


def _same_objects(program: Program, node: fx.Node) -> list[fx.Node] | None:
    """The nodes before ``node`` whose value is its input, the same object; None if unknown."""
    same: list[fx.Node] = []
    source: Any = node.args[0] if node.args else None
    while isinstance(source, fx.Node):
        same.append(source)
        readers = [user for user in source.users if user < node and user not in same]
        if not all(_is_new_object(program, reader, source) for reader in readers):
            return None
        op = program.op(source)
        first = op.args.get("input") if op is not None else None
        if _is_new_object(program, source, first):
            return same
        source = first if op is not None and op.inplace else None
    return None


def _is_new_object(program: Program, node: fx.Node, source: Any) -> bool:
    """Whether ``node`` can never return the tensor object ``source`` itself."""
    op = program.op(node)
    if op is None or op.inplace:
        return False
    if op.owns or Trait.FACT in op.traits:
        return True
    before = value_of(source) if isinstance(source, fx.Node) else None
    after = value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.shape != after.shape


def _one_index_a_node(program: Program) -> None:
    """Rewrite ``x[:, v, t]`` as ``x[:, v][:, t]``, so that each index belongs to one loop.

    Rows and columns of a tile, ``x[..., i:j, k:l]``, are separated in the same way.
    """
    for node in list(program.graph.nodes):
        op = program.op(node) if node.op == "call_function" else None
        if op is None or op.name != "getitem" or not isinstance(op.args["input"], fx.Node):
            continue
        index = op.args["index"]
        if any(part != WHOLE and type(part) is not int and not _is_window(part) for part in index):
            continue
        source, dim = node.args[0], 0
        with program.graph.inserting_before(node):
            for part in index:
                if part == WHOLE:
                    dim += 1
                    continue
                entry = part if type(part) is int else slice(*part[1:])
                where = (*[slice(None)] * dim, entry)
                source = program.graph.call_function(operator.getitem, (source, where))
                copy_meta(source, node)
                dim += type(part) is not int
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)


def _is_window(part: Any) -> bool:
    """Whether a described index is a slice with constant bounds."""
    sliced = isinstance(part, tuple) and part[:1] == ("slice",)
    return sliced and all(bound is None or type(bound) is int for bound in part[1:])


def _reads_after_writes(program: Program) -> None:
    """Make later reads of a tensor written in place read the op's result, the same tensor."""
    for node in program.graph.nodes:
        op = program.op(node)
        if op is None or not op.inplace:
            continue
        written = op.args.get("input")
        if isinstance(written, fx.Node) and written.op != "get_attr":
            later = {user for user in written.users if user > node}
            written.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _one_cat(program: Program) -> None:
    """Rewrite ``out = cat([out, y_t])``, once a frame, as one cat of all its parts."""
    absorbed: set[fx.Node] = set()
    for node in reversed(list(program.graph.nodes)):
        op = program.op(node)
        if op is None or op.name != "cat" or node in absorbed:
            continue
        parts = _parts_of_cat(program, node, op, absorbed)
        if parts is None or len(parts) == len(op.nodes()):
            continue
        with program.graph.inserting_before(node):
            joined = program.graph.call_function(torch.cat, (parts, op.args["dim"]))
        copy_meta(joined, node)
        node.replace_all_uses_with(joined)
        program.graph.erase_node(node)
    for node in sorted(absorbed, reverse=True):
        if not node.users:
            program.graph.erase_node(node)


def _parts_of_cat(
    program: Program, node: fx.Node, op: Op, absorbed: set[fx.Node]
) -> list[fx.Node] | None:
    """The tensors that ``node`` joins, those of a cat inside it included; empty ones left out."""
    tensors, dim = op.args["tensors"], op.args["dim"]
    value = value_of(node)
    if not isinstance(tensors, tuple) or not isinstance(value, torch.Tensor):
        return None
    if not all(isinstance(part, fx.Node) for part in tensors):
        return None
    parts: list[fx.Node] = []
    pending = list(reversed(tensors))
    while pending:
        part = pending.pop()
        inner = program.op(part)
        if inner is not None and inner.name == "cat" and len(part.users) == 1:
            within, whole = inner.args["tensors"], inner.args["dim"] == dim
            if whole and isinstance(within, tuple) and all(isinstance(t, fx.Node) for t in within):
                absorbed.add(part)
                pending.extend(reversed(within))
                continue
        known = value_of(part)
        nothing = isinstance(known, torch.Tensor) and tuple(known.shape) == (0,)
        if not nothing or value.dim() == 1 or known.dtype != value.dtype:
            parts.append(part)
    return parts
