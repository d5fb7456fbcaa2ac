"""Follows a value through the graph, past ops that do not change the meaning of its axes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.program import Program

__all__ = ["KEEPS_AXES", "before", "calls", "made_from", "place", "tensor"]

KEEPS_AXES = Trait.ELEMENTWISE | Trait.NORMALIZES
"""Traits of ops whose result has the axes of their input."""


def tensor(node: object) -> torch.Tensor | None:
    """The value of ``node`` if it is a tensor, else None."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def calls(program: Program, names: Collection[str]) -> Iterator[tuple[fx.Node, Op]]:
    """Every call of one of these ops, in graph order."""
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is not None and op.name in names:
            yield node, op


def before(program: Program, node: fx.Node) -> fx.Node | None:
    """The one tensor from which ``node`` is computed; None if there is none, or several."""
    op = program.op(node) if node.op.startswith("call") else None
    source = None if op is None else op.args.get("input")
    if source is None:
        sources = [n for n in node.all_input_nodes if tensor(n) is not None]
        source = sources[0] if len(sources) == 1 else None
    return source if isinstance(source, fx.Node) and tensor(source) is not None else None


def made_from(program: Program, node: fx.Node, through: Trait) -> Iterator[fx.Node]:
    """``node``, then its source, and so on, while the ops have one of the traits ``through``."""
    while True:
        yield node
        op = program.op(node) if node.op.startswith("call") else None
        source = before(program, node)
        if op is None or not op.traits & through or source is None:
            return
        node = source


def place(program: Program, node: fx.Node) -> tuple[str, str | None]:
    """The target and the location of a finding about ``node``."""
    return program.module_path(node) or node.name, program.location(node)
