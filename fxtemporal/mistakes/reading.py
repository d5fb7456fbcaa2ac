"""Where a value comes from, and where it goes, past what does not change what its axes mean."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from fxtemporal.analysis.batching_rules import ELEMENTWISE
from fxtemporal.ir.ops import Op
from fxtemporal.ir.program import Program

__all__ = ["KEEPS_AXES", "MOVES_AXES", "before", "calls", "made_from", "place", "tensor"]

KEEPS_AXES = ELEMENTWISE | frozenset(
    "batch_norm group_norm instance_norm layer_norm rms_norm".split()
)
"""Ops whose result has the axes of their input."""

MOVES_AXES = frozenset(
    "contiguous flatten movedim permute reshape rearrange squeeze transpose unflatten unsqueeze "
    "view".split()
)
"""Ops that only put axes in another order, or together, or apart."""


def tensor(node: object) -> torch.Tensor | None:
    """The value of ``node`` where that is a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def calls(program: Program, names: Collection[str]) -> Iterator[tuple[fx.Node, Op]]:
    """Every call of one of these ops, in graph order."""
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is not None and op.name in names:
            yield node, op


def before(program: Program, node: fx.Node) -> fx.Node | None:
    """The one tensor that ``node`` is computed from; None where there is none, or several."""
    op = program.op(node) if node.op.startswith("call") else None
    source = None if op is None else op.args.get("input")
    if source is None:
        sources = [n for n in node.all_input_nodes if tensor(n) is not None]
        source = sources[0] if len(sources) == 1 else None
    return source if isinstance(source, fx.Node) and tensor(source) is not None else None


def made_from(program: Program, node: fx.Node, through: frozenset[str]) -> Iterator[fx.Node]:
    """``node``, then what it was made from, and so on, as long as the ops are ``through``."""
    while True:
        yield node
        op = program.op(node) if node.op.startswith("call") else None
        source = before(program, node)
        if op is None or op.name not in through or source is None:
            return
        node = source


def place(program: Program, node: fx.Node) -> tuple[str, str | None]:
    """The target and the location of a finding about ``node``."""
    return program.module_path(node) or node.name, program.location(node)
