"""The number of rows of a folded tensor, as a term: equal terms are equal at every size.

``flatten(0, 1)`` of (A, B, ...) has A·B rows. A and B are followed through views::

    z = y.unflatten(0, (-1, T)).movedim(1, 2).movedim(2, 1).flatten(0, 1)   # as many rows as y
    x[:, 1:T].flatten(0, 1), x[:, 0:T-1].flatten(0, 1)                      # B·(T-1) both
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxtemporal.ir.program import Program
from fxtemporal.ir.values import rank

__all__ = ["folded_rows"]


def folded_rows(program: Program, rows: Mapping[fx.Node, object], node: fx.Node) -> object:
    """The number of rows of ``node``, a flatten; ``rows`` has that of earlier tensors."""
    op = program.op(node)
    assert op is not None
    source, end = op.args["input"], op.args["end_dim"]
    if end != 1:
        return node
    first, second = _size(program, rows, source, 0), _size(program, rows, source, 1)
    if first[0] == "rows per" and first[2] == second:
        return first[1]
    return first, second


def _size(
    program: Program, rows: Mapping[fx.Node, object], node: fx.Node, dim: int
) -> tuple[Any, ...]:
    """The size of dimension ``dim`` of ``node``, as a term."""
    op = program.op(node) if node.op.startswith("call") else None
    source = op.args.get("input") if op is not None else None
    if op is None or not isinstance(source, fx.Node):
        return "size", node, dim

    def through(there: int) -> tuple[Any, ...]:
        return _size(program, rows, source, there)

    match op.name:
        case "contiguous" | "clone" | "detach" | "identity":
            return through(dim)
        case "slice" if op.args["dim"] != dim:
            return through(dim)
        case "slice" if node.target == "narrow":  # narrow raises where x[a:b] would give fewer
            return "number", node.args[3]
        case "select":
            return through(dim + (dim >= op.args["dim"]))
        case "unflatten" if op.args["dim"] == 0 and source in rows and len(op.args["sizes"]) == 2:
            first, second = op.args["sizes"]
            if first == -1 and dim < 2:
                per = ("number", second)
                return per if dim == 1 else ("rows per", rows[source], per)
        case "movedim":
            start, end = op.args["source"], op.args["destination"]
            if isinstance(start, int) and isinstance(end, int):
                order = [d for d in range(rank(source) or 0) if d != start]
                order.insert(end, start)
                return through(order[dim])
    return "size", node, dim
