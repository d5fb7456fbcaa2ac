"""Estimate of the peak bytes of activations in one call of a program.

A graph module runs node by node, and drops each value after its last use. The estimate sums the
storages alive at once, each one once, however many views share it: inputs live for the whole call,
results until its end, all else from the node that makes it to the last that reads it. Not counted
are parameters, buffers, a kernel's workspace and the inside of a layer: an LSTM counts by what it
returns. Sizes are those at which the program was captured, without gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.node_meta import has_value, needed_value, set_value, value_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import run_node
from fxtemporal.support.torch_private import pytree

__all__ = ["Peak", "peak"]


@dataclass(frozen=True)
class Peak:
    """The most ``bytes`` alive at once, and the node that runs then; None for an empty graph."""

    bytes: int
    node: fx.Node | None


def peak(program: Program, among: Collection[fx.Node] | None = None) -> Peak:
    """The peak of ``program`` at the sizes it was captured with.

    Args:
        program: nodes whose value is not known (their sizes depend on the data) count as 0 bytes.
        among: count only the results of these nodes.
    """
    _renew_views(program)
    nodes = list(program.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    last = len(nodes) - 1
    lives: dict[int, _Life] = {}
    kept: set[int] = set()
    for node in nodes:
        given = node.op == "placeholder"
        until = last if given else max((order[user] for user in node.users), default=order[node])
        for storage in _storages(value_of(node)):
            key = storage._cdata
            if node.op == "get_attr":
                kept.add(key)
            if key not in lives:
                counts = among is None or node in among
                start = 0 if given else order[node]
                lives[key] = _Life(int(storage.nbytes()) if counts else 0, start, start)
            lives[key].end = max(lives[key].end, until)
    changes = [0] * (last + 2)
    for key, life in lives.items():
        if key not in kept:
            changes[life.start] += life.bytes
            changes[life.end + 1] -= life.bytes
    alive = list(accumulate(changes[:-1]))
    if not alive:
        return Peak(0, None)
    where = max(range(len(alive)), key=alive.__getitem__)
    return Peak(alive[where], nodes[where])


@dataclass
class _Life:
    bytes: int
    start: int
    end: int


def _renew_views(program: Program) -> None:
    """Recompute the values of views whose source a rewrite replaced: they share its memory now."""
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.owns or not has_value(node):
            continue
        before = {s._cdata for n in node.all_input_nodes for s in _storages(value_of(n))}
        if before and not {s._cdata for s in _storages(needed_value(node))} <= before:
            with suppress(Exception):  # an op may refuse fake tensors: the node keeps its value
                set_value(node, run_node(program.gm, node, program.fake_mode))


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()
