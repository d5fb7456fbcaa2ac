"""Regions of a graph that share one memory layout.

A convolution's output has the layout of its input. So have those of BatchNorm, poolings,
element-wise ops and joins along channels. Tensors (B, C, T, H, W) that such ops connect form a
region: all of it is contiguous, or all of it channels_last_3d, with copies only at its edges.
Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import rank
from fxtemporal.support.disjoint_sets import DisjointSets

__all__ = ["LayoutRegion", "keeps_layout", "layout_regions"]


@dataclass(frozen=True, eq=False)
class LayoutRegion:
    """Nodes of one layout, in graph order, and the tensors that another layout must copy.

    ``entering`` are tensors from outside that the region reads; ``leaving`` are its own tensors
    that nodes outside read.
    """

    nodes: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]


def keeps_layout(op: Op) -> bool:
    """Whether the result has the memory layout of the inputs."""
    return bool(op.traits & (Trait.ELEMENTWISE | Trait.KEEPS_LAYOUT))


def layout_regions(program: Program) -> tuple[LayoutRegion, ...]:
    """Every region with a conv3d in it."""
    joined: DisjointSets[fx.Node] = DisjointSets()
    kept: dict[fx.Node, None] = {}
    convolutions = []
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or not keeps_layout(op) or rank(node) != 5:
            continue
        kept[node] = None
        if op.name == "conv3d":
            convolutions.append(node)
        for source in _tensors(node):
            if source in kept:
                joined.unite(source, node)
    holding = {joined.find(node) for node in convolutions}
    groups = joined.groups(kept)
    return tuple(_region(nodes) for nodes in groups if joined.find(nodes[0]) in holding)


def _region(nodes: list[fx.Node]) -> LayoutRegion:
    inside = set(nodes)
    entering = {s: None for node in nodes for s in _tensors(node) if s not in inside}
    leaving = [node for node in nodes if any(user not in inside for user in node.users)]
    return LayoutRegion(tuple(nodes), tuple(entering), tuple(leaving))


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of rank 5, parameters apart: those that have a layout."""
    for source in node.all_input_nodes:
        tensor = isinstance(value_of(source), torch.Tensor) and source.op != "get_attr"
        if tensor and rank(source) == 5:
            yield source
