"""Finds the nodes that gradients of the results flow back to.

::

    y0 = conv(x0);  y1 = conv(x1);  y2 = conv(x2)
    return stack([y1, y2]), y0.detach()               y1 and y2, and not y0

A gradient of zero can still do harm: 0·inf is NaN. So a node that gradients do not reach must not
be computed as a part of one that they reach. Nothing is changed here.
"""

from __future__ import annotations

import torch
from torch import fx

from fxtemporal.analysis.aliasing import of_library, written_by
from fxtemporal.ir.guards import QUESTIONS
from fxtemporal.ir.node_meta import has_value, needed_value, value_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.shallow_copy import runs_torch_alone
from fxtemporal.support.torch_private import pytree

__all__ = ["with_gradients"]


def with_gradients(program: Program) -> set[fx.Node]:
    """The nodes that gradients of a result can reach, whichever inputs require gradients."""
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or _starts(program, node):
            found.add(node)
        if node in found:
            found.update(n for n in node.all_input_nodes if _carries(program, n))
    return found


def _starts(program: Program, node: fx.Node) -> bool:
    """Whether ``node`` may receive a gradient by other ways than its users: it writes, say."""
    if not node.op.startswith("call") or node.target in QUESTIONS:
        return False
    op = program.op(node)
    if op is not None:
        return op.inplace
    gives = [v for v in pytree.tree_leaves(value_of(node)) if isinstance(v, torch.Tensor)]
    if not gives or written_by(program, node):
        return True
    if node.op == "call_module":
        return not runs_torch_alone(program.gm.get_submodule(str(node.target)))
    return not of_library(node)


def _carries(program: Program, node: fx.Node) -> bool:
    """Whether the value of ``node`` can have a gradient: a detached or integer one cannot."""
    op = program.op(node) if node.op.startswith("call") else None
    if op is not None and op.name == "detach":
        return False
    if not has_value(node):
        return node.target not in QUESTIONS
    leaves = pytree.tree_leaves(needed_value(node))
    return any(
        isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        for leaf in leaves
    )
