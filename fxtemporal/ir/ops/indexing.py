"""Describes ``x[...]`` and ``x.attribute`` as ops.

``x[:, t]`` is ``select(x, 1, t)``; ``x[:, a:b]`` is ``slice(x, 1, a, b)``; ``x[:, None]`` is
``unsqueeze(x, 1)``. An index with several such entries is ``getitem(x, index)``. An item of a tuple
is ``item(x, index)``, except that ``x.shape[1]`` is ``size(x, 1)``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.ops.canonical import Context
from fxtemporal.ir.ops.signature import Arguments, UndescribedError

__all__ = ["attribute", "getitem", "index_tensor"]

Entry = Any
"""An int, a node, a tuple of ints (an index list), or one of the markers."""

ELLIPSIS = ("ellipsis",)
NEW_AXIS = ("newaxis",)
WHOLE = ("slice", 0, None, 1)

FIELDS = {"values": 0, "indices": 1}
NAMED_TUPLES = ("max", "min", "sort", "topk")


def getitem(raw_input: Any, raw_index: Any, context: Context) -> tuple[str, Arguments]:
    """``operator.getitem(raw_input, raw_index)``"""
    value = context.value(raw_input)
    nature = context.nature(value)
    if nature == "sequence":
        return item(value, context.value(raw_index), context)
    entries = tuple(_entry(part, context) for part in _parts(raw_index))
    only_tensors = isinstance(raw_index, tuple) or raw_index is None or raw_index is Ellipsis
    if nature != "tensor" and not only_tensors:
        raise UndescribedError("an item of something unknown")
    return _of_tensor(value, _trimmed(entries, context.rank(value)), context)


def item(value: Any, index: Any, context: Context) -> tuple[str, Arguments]:
    """One item of a tuple or list, or a part of it."""
    if isinstance(index, int):
        cut = False  # the number of pieces depends on a size: keep a negative index as it is
        if isinstance(value, fx.Node):
            op = context.describe(value)
            cut = op is not None and op.name in ("unbind", "split", "chunk")
            if op is not None and op.name == "shape":
                return "size", {"input": op.args["input"], "dim": index}
        length = context.length(value)
        if index < 0 and length is not None and not cut:
            index += length
    elif isinstance(index, tuple):
        index = _slice(*index[1:])
    return "item", {"input": value, "index": index}


def index_tensor(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """``aten.index.Tensor(x, [None, i])`` is ``x[:, i]``."""
    entries = tuple(WHOLE if entry is None else entry for entry in args["indices"])
    return "getitem", {"input": args["input"], "index": _trimmed(entries, None)}


def attribute(raw_input: Any, name: Any, context: Context) -> tuple[str, Arguments]:
    """``getattr(raw_input, name)``"""
    value = context.value(raw_input)
    args = {"input": value}
    if context.nature(value) == "sequence":
        op = context.describe(value) if isinstance(value, fx.Node) else None
        if op is not None and op.name in NAMED_TUPLES and name in FIELDS:
            return "item", {**args, "index": FIELDS[name]}
        raise UndescribedError(f"the {name} of a tuple")
    if name in ("shape", "dtype", "device"):
        return name, args
    if name == "ndim":
        return "dim", args
    if name == "mT":
        return "transpose", {**args, "dim0": -2, "dim1": -1}
    if name == "T" and context.rank(value) == 2:
        return "transpose", {**args, "dim0": 0, "dim1": 1}
    raise UndescribedError(f"the attribute {name}")


def _parts(index: Any) -> tuple[Any, ...]:
    """The entries of an index: ``x[a, b]`` gives a tuple, ``x[[a, b]]`` a list, one index."""
    return index if isinstance(index, tuple) else (index,)


def _entry(part: Any, context: Context) -> Entry:
    if part is Ellipsis:
        return ELLIPSIS
    if part is None:
        return NEW_AXIS
    if isinstance(part, slice):
        return _slice(*(context.value(end) for end in (part.start, part.stop, part.step)))
    return context.value(part)


def _slice(start: Any, end: Any, step: Any) -> Entry:
    open_end = end is None or (isinstance(end, int) and end >= sys.maxsize)
    return (
        "slice",
        0 if start is None else start,
        None if open_end else end,
        1 if step is None else step,
    )


def _trimmed(entries: tuple[Entry, ...], rank: int | None) -> tuple[Entry, ...]:
    """``entries`` without whole slices at the end, and with the ellipsis expanded if possible."""
    dots = [position for position, entry in enumerate(entries) if entry == ELLIPSIS]
    if len(dots) == 1 and (rank is not None or dots[0] == len(entries) - 1):
        (position,) = dots
        masked = any(isinstance(entry, fx.Node | bool) for entry in entries)
        taken = sum(entry != NEW_AXIS for entry in entries) - 1
        if position == len(entries) - 1:
            entries = entries[:-1]
        elif rank is not None and not masked:
            missing = max(rank - taken, 0)
            entries = entries[:position] + (WHOLE,) * missing + entries[position + 1 :]
    while entries and entries[-1] == WHOLE:
        entries = entries[:-1]
    return entries


def _of_tensor(value: Any, entries: tuple[Entry, ...], context: Context) -> tuple[str, Arguments]:
    args = {"input": value}
    if not entries:
        if context.rank(value) == 0:
            return "getitem", {**args, "index": ()}
        return "slice", {**args, "dim": 0}
    working = [p for p, entry in enumerate(entries) if entry not in (WHOLE, ELLIPSIS)]
    if len(working) != 1:
        return "getitem", {**args, "index": entries}
    (position,) = working
    entry, before, after = entries[position], entries[:position], entries[position + 1 :]
    dim = -1 - len(after) if ELLIPSIS in before else position
    if entry == NEW_AXIS:
        return "unsqueeze", {**args, "dim": dim}
    if isinstance(entry, tuple) and entry[:1] == ("slice",):
        _, start, end, step = entry
        return "slice", {**args, "dim": dim, "start": start, "end": end, "step": step}
    scalar_node = isinstance(entry, fx.Node) and context.nature(entry) == "scalar"
    if scalar_node and isinstance(context.val(entry), bool | torch.SymBool):
        scalar_node = False
    if scalar_node or (isinstance(entry, int) and not isinstance(entry, bool)):
        return "select", {**args, "dim": dim, "index": entry}
    return "getitem", {**args, "index": entries}
