"""Nodes that keep two nodes of a graph from becoming one: mode switches and writes between them."""

from __future__ import annotations

import torch
from torch import fx

from fxtemporal.analysis.aliasing import Aliasing
from fxtemporal.ir.guards import QUESTIONS
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Attr
from fxtemporal.ir.prepared import is_prepared
from fxtemporal.ir.program import Program
from fxtemporal.support.torch_private import pytree

__all__ = ["attributes_written", "mode_switch", "written_between"]


def mode_switch(program: Program, first: fx.Node, last: fx.Node) -> fx.Node | None:
    """A call between the two that may switch a mode (gradients, autocast); None if there is none.

    Any unknown call that returns no tensor may.
    """
    node = first.next
    while node is not last and node.op != "root":
        if node.op.startswith("call") and node.target not in QUESTIONS:
            values = pytree.tree_leaves(value_of(node))
            silent = not any(isinstance(value, torch.Tensor) for value in values)
            if silent and program.op(node) is None and not is_prepared(program, node):
                return node
        node = node.next
    return None


def written_between(
    aliasing: Aliasing, value: fx.Node, first: fx.Node, last: fx.Node
) -> fx.Node | None:
    """A write, after ``first`` and before ``last``, into memory that ``value`` may share."""
    for writer, written in aliasing.writes():
        if first < writer < last and aliasing.share(written, value):
            return writer
    return None


def attributes_written(program: Program) -> frozenset[str]:
    """The parameters and buffers, by name, that the graph writes in place."""
    aliasing = Aliasing(program)
    found = {
        str(node.target)
        for _, written in aliasing.writes()
        for node in aliasing.shared_with(written)
        if node.op == "get_attr"
    }
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is not None and op.inplace and isinstance(op.args.get("input"), Attr):
            found.add(op.args["input"].name)
    return frozenset(found)
