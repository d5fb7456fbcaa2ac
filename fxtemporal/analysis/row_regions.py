"""Regions of a graph that work on each row of a folded tensor independently.

Once a loop is re-rolled, its body runs on frames folded into dimension 0::

    x.flatten(0, 1)  →  conv  →  relu  →  pool  →  unflatten(0, (-1, T))
     (B·T, ...)         └─────── a region ──────┘

Nothing in a region mixes rows: an op that :func:`fxtemporal.analysis.batching_rules.batching` folds
for frames works on any part of the rows. So a region may run on a few rows at a time, if nothing
between its first and last node writes memory or sets a mode, and if no path leaves it and enters
again. A node that breaks one of these conditions ends the region; the nodes after it begin another.

Nodes that ask for shapes of its values, ``y.shape`` or ``len(y.chunk(2, 1))``, belong to it too.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxtemporal.analysis.aliasing import Aliasing, written_by
from fxtemporal.analysis.batching_rules import Batching, Call, How, batching
from fxtemporal.analysis.row_counts import folded_rows
from fxtemporal.functional import FORMS, conv3d_spanning
from fxtemporal.ir.guards import QUESTIONS, length
from fxtemporal.ir.node_meta import frames_of, has_value, value_of
from fxtemporal.ir.ops import Attr, Op, Trait
from fxtemporal.ir.per_frame import vmapped
from fxtemporal.ir.program import Program
from fxtemporal.ir.row_chunks import cut, joined, shaped
from fxtemporal.ir.values import rank, shape
from fxtemporal.support.disjoint_sets import DisjointSets
from fxtemporal.support.torch_private import pytree

__all__ = ["Region", "regions_of"]

_CONV3D = frozenset((*(form.function for form in FORMS.values()), conv3d_spanning))
_PURE = frozenset((*QUESTIONS, *_CONV3D, cut, joined, shaped, vmapped, getattr, operator.getitem))
"""Functions without a description that are known to be pure."""

_PYTHON = frozenset(("builtins", "math", "_operator"))

_FOLDING = frozenset(("flatten", "view", "reshape", "rearrange"))
_MOVES = frozenset(("unflatten", "select", "movedim", "slice", "transpose", "permute"))
_SIZED = {"view": "shape", "reshape": "shape", "expand": "size"}
"""Views whose first size may count the rows, and the argument that holds it."""


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that work on rows, in graph order.

    ``key`` names the region among those of its graph. ``frames`` is T if the rows are B·T.
    ``inputs`` are folded tensors from outside that it reads; ``outputs`` are its nodes that are
    read outside. ``asked`` are nodes that ask for shapes or compute with them. ``counted`` maps a
    view to the node that counts the rows of its input.
    """

    key: str
    frames: int
    nodes: tuple[fx.Node, ...]
    asked: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    counted: Mapping[fx.Node, fx.Node]


def regions_of(program: Program) -> tuple[Region, ...]:
    """Every region of ``program`` that computes anything, in graph order."""
    apart: set[fx.Node] = set()
    while True:
        scan = _Scan(program, apart)
        regions = scan.regions()
        unfit = _unfit(program, regions)
        if not unfit:
            return regions
        apart |= unfit


@dataclass(frozen=True)
class _Place:
    """Nodes of one place may share a region: no path leaves it and returns, no write is between."""

    depth: int
    epoch: int


class _Scan:
    """One walk over the graph; the nodes of ``apart`` stay outside of every region.

    ``rows`` maps every folded tensor to its number of rows, as a term; ``places`` has those that
    belong to a region, ``asked`` the nodes that ask for their shapes.
    """

    def __init__(self, program: Program, apart: Collection[fx.Node]) -> None:
        self.program = program
        self.rows: dict[fx.Node, object] = {}
        self.places: dict[fx.Node, _Place] = {}
        self.asked: dict[fx.Node, _Place] = {}
        self._lanes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._counted: dict[fx.Node, fx.Node] = {}
        self._frames: dict[object, tuple[int, int]] = {}
        self._same: DisjointSets[object] = DisjointSets()
        self._depth: dict[fx.Node, int] = {}
        self._rows_asked: dict[fx.Node, object] = {}
        self._epoch = 0
        self._only_asked = _only_asked(program)
        for node in program.graph.nodes:
            if node in apart or not (
                self._starts(node) or self._asks(node) or self._works_on_rows(node)
            ):
                self._passes(node)

    def regions(self) -> tuple[Region, ...]:
        joined: DisjointSets[fx.Node] = DisjointSets()
        own = {**self.places, **self.asked}
        for node in own:
            for source in node.all_input_nodes:
                if own.get(source) == own[node] and self._rows_of(source) == self._rows_of(node):
                    joined.unite(source, node)
        computing = [g for g in joined.groups(sorted(own)) if any(map(self._computes, g))]
        return tuple(self._region(str(n), group) for n, group in enumerate(computing))

    def _region(self, key: str, group: list[fx.Node]) -> Region:
        nodes = tuple(node for node in group if node in self.places)
        inside = set(group)
        read = dict.fromkeys(lane for node in nodes for lane in self._lanes[node])
        return Region(
            key=key,
            frames=self._frames[self._rows_of(nodes[0])][1],
            nodes=nodes,
            asked=tuple(node for node in group if node in self.asked),
            inputs=tuple(lane for lane in read if lane not in inside),
            outputs=tuple(n for n in nodes if any(user not in inside for user in n.users)),
            counted={n: self._counted[n] for n in nodes if n in self._counted},
        )

    def _computes(self, node: fx.Node) -> bool:
        op = self.program.op(node)
        return node in self.places and (op is None or Trait.MOVES not in op.traits)

    # the kinds of nodes

    def _passes(self, node: fx.Node) -> None:
        """Record ``node`` as outside of all regions."""
        self._depth[node] = max((self._out_of(n) for n in node.all_input_nodes), default=0)
        self._epoch += not _is_pure(self.program, node)

    def _starts(self, node: fx.Node) -> bool:
        """Whether ``node`` folds its first dimensions into rows."""
        op = self.program.op(node) if node.op.startswith("call") else None
        source = op.args.get("input") if op is not None and op.name in _FOLDING else None
        if op is None or not isinstance(source, fx.Node) or source in self.rows:
            return False
        sizes, folded = shape(source), shape(node)
        if not sizes or not folded or folded[0] <= sizes[0] or folded[0] % sizes[0]:
            return False
        plain = op.name == "flatten" and op.args["start_dim"] == 0
        rows = self._same.find(folded_rows(self.program, self.rows, node) if plain else node)
        self.rows[node] = rows
        frames = frames_of(node) or folded[0] // sizes[0]
        self._frames[rows] = folded[0], max(self._frames.get(rows, (0, 1))[1], frames)
        self._passes(node)
        return True

    def _asks(self, node: fx.Node) -> bool:
        """Whether ``node`` asks for the shape of a region's value, or computes with the answer."""
        op = self.program.op(node) if node.op.startswith("call") else None
        if op is None and not _is_pure(self.program, node):
            return False
        if node not in self._only_asked and _holds_tensors(node):
            return False
        found = set()
        asks = node in self._only_asked or _asks(op)
        for source in node.all_input_nodes:
            if source in self.places:
                several = not isinstance(value_of(source), torch.Tensor)
                if not (node.target is length if several else asks):
                    return False
            if (place := self._place(source)) is not None:
                found.add((place, self._rows_of(source)))
        if len(found) != 1:
            return False
        place, rows = found.pop()
        if place != _Place(self._depth_within(node, rows), self._epoch):
            return False
        self.asked[node] = place
        self._rows_asked[node] = rows
        self._depth[node] = place.depth
        return True

    def _works_on_rows(self, node: fx.Node) -> bool:
        """Whether ``node`` works on each row of its inputs independently."""
        op = self.program.op(node) if node.op.startswith("call") else None
        lanes = tuple(source for source in node.all_input_nodes if source in self.rows)
        if not lanes:
            return False
        if op is None:
            alone = node.target in _CONV3D and lanes == (node.args[0],)
            if not alone or rank(lanes[0]) != 5:
                return False
        elif not self._folds(node, op, lanes):
            return False
        keys = [self._rows_of(lane) for lane in lanes]
        if not _keeps_rows(node, op, self._frames[keys[0]][0]):
            return False
        if any(key != keys[0] for key in keys):
            if op is None or op.name not in ("cat", "stack"):
                return False
            for key in keys:  # all have the same number of rows, or the op would raise an error
                self._unite(key, keys[0])
        rows = self._same.find(keys[0])
        self.rows[node] = rows
        if (op is None or not op.inplace) and self._views_outside(node):
            self._passes(node)
            return True
        depth = self._depth_within(node, rows)
        self._lanes[node] = lanes
        self._depth[node] = depth
        self.places[node] = _Place(depth, self._epoch)
        return True

    def _folds(self, node: fx.Node, op: Op, lanes: tuple[fx.Node, ...]) -> bool:
        """Whether the op maps rows to rows independently, so that they can be cut anywhere."""
        counts = frozenset(number for number in op.nodes() if self._counts(number, lanes))
        call = Call(op, frozenset(lanes), counts, self.program)
        if op.inplace and op.args["input"] not in self.places:
            return False
        if op.name == "item":
            producer = self.program.op(lanes[0])
            recurrent = producer is not None and Trait.RECURRENT in producer.traits
            return lanes == (op.args["input"],) and not (recurrent and op.args["index"] != 0)
        if any(not isinstance(value_of(lane), torch.Tensor) for lane in lanes):
            return False
        found = batching(call, node, rank(node) or 0, "")
        if not isinstance(found, Batching) or found.how is How.IN_FRONT:
            return False
        if op.name in ("cat", "stack"):
            return all(tensor in lanes for tensor in op.args["tensors"])
        if Trait.ELEMENTWISE in op.traits:
            return self._broadcasts_no_rows(node, call)
        if op.name in _SIZED and op.args[_SIZED[op.name]][0] in counts:
            self._counted[node] = op.args[_SIZED[op.name]][0]
        return True

    def _broadcasts_no_rows(self, node: fx.Node, call: Call) -> bool:
        dimensions = rank(node) or 0
        if dimensions == 0 or any(rank(lane) != dimensions for lane in call.lanes):
            return False
        for value in call.op.args.values():
            if isinstance(value, fx.Node) and value in call.lanes:
                continue
            dims = call.dims(value)
            if dims is None or dims > dimensions:
                return False
            one = isinstance(value, Attr) and self.program.tensor(value.name).shape[:1] == (1,)
            if dims == dimensions and not one:
                return False
        return True

    def _counts(self, number: fx.Node, lanes: tuple[fx.Node, ...]) -> bool:
        """Whether ``number`` counts the rows of ``lanes``."""
        op = self.program.op(number) if number.op.startswith("call") else None
        if op is None or op.name != "size" or op.args["dim"] != 0:
            return False
        counted = op.args["input"]
        return counted in self.rows and all(
            self._rows_of(lane) == self._rows_of(counted) for lane in lanes
        )

    def _views_outside(self, node: fx.Node) -> bool:
        """Whether ``node`` is only a view of a tensor made outside every region."""
        (source,) = sources if len(sources := node.all_input_nodes) == 1 else (node,)
        mine = storages(node)
        return source is not node and source not in self.places and mine <= storages(source)

    # the places of nodes

    def _place(self, node: fx.Node) -> _Place | None:
        return self.places.get(node) or self.asked.get(node)

    def _out_of(self, source: fx.Node) -> int:
        return self._depth[source] + (self._place(source) is not None)

    def _depth_within(self, node: fx.Node, rows: object) -> int:
        """Depth of ``node`` in a region of ``rows``: how often a path to it has left a region."""
        return max(
            self._depth[n] if self._place(n) and self._rows_of(n) == rows else self._out_of(n)
            for n in node.all_input_nodes
        )

    # the rows of nodes

    def _rows_of(self, node: fx.Node) -> object:
        return self._same.find(self.rows.get(node) or self._rows_asked[node])

    def _unite(self, one: object, other: object) -> None:
        one, other = self._same.find(one), self._same.find(other)
        if one != other:
            (count, mine), (_, theirs) = self._frames[one], self._frames[other]
            self._same.unite(one, other)
            self._frames[other] = count, max(mine, theirs)


def _asks(op: Op | None) -> bool:
    """Whether ``op`` asks for a fact other than a count that would include rows (numel)."""
    return op is not None and Trait.FACT in op.traits and Trait.COUNTS not in op.traits


def _unfit(program: Program, regions: Iterable[Region]) -> set[fx.Node]:
    """Nodes that must leave their region: others would see its writes, or share its memory."""
    aliasing = Aliasing(program)
    return {node for region in regions for node in _visible(program, region, aliasing)}


def _visible(program: Program, region: Region, aliasing: Aliasing) -> Iterator[fx.Node]:
    inside = {*region.nodes, *region.asked}
    leaving = set(region.outputs)
    for node in region.nodes:
        for written in written_by(program, node):
            for other in aliasing.shared_with(written):
                private = other in inside and other not in leaving
                if not private and not aliasing.derives_from(other, node):
                    yield node
    for node in region.outputs:
        several = not isinstance(value_of(node), torch.Tensor)
        shared = any(other < node and aliasing.share(other, node) for other in leaving)
        if several or shared or _trails(program, node, inside):
            yield node


def _trails(program: Program, node: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Whether ``node`` is a view at the region's exit, at least as large as its source."""
    op = program.op(node)
    if (op is not None and op.inplace) or any(user in inside for user in node.users):
        return False
    sources = [n for n in node.all_input_nodes if n in inside and storages(node) <= storages(n)]
    return any(_smaller(source, node) for source in sources)


def _smaller(one: fx.Node, other: fx.Node) -> bool:
    """Whether ``one`` has no more elements than ``other``."""
    sizes = shape(one), shape(other)
    return all(sizes) and torch.Size(sizes[0] or ()).numel() <= torch.Size(sizes[1] or ()).numel()


def _keeps_rows(node: fx.Node, op: Op | None, rows: int) -> bool:
    """Whether the value of ``node`` has ``rows`` rows."""
    leaves = pytree.tree_leaves(value_of(node))
    if op is not None and Trait.RECURRENT in op.traits:
        leaves = leaves[:1]
    return bool(leaves) and all(
        isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (rows,) for leaf in leaves
    )


def _only_asked(program: Program) -> set[fx.Node]:
    """Views of which only the shape is used."""
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name not in _MOVES:
            continue
        readers = [(user, program.op(user)) for user in node.users]
        if all(user in found or _asks(asks) for user, asks in readers):
            found.add(node)
    return found


def _is_pure(program: Program, node: fx.Node) -> bool:
    """Whether ``node`` is pure: it computes its value and has no effect."""
    if not node.op.startswith("call"):
        return True
    op = program.op(node)
    if op is None:
        of_python = getattr(node.target, "__module__", None) in _PYTHON
        return node.target in _PURE or (of_python and not written_by(program, node))
    return op.pure


def _holds_tensors(node: fx.Node) -> bool:
    if node.target in QUESTIONS:
        return False
    leaves = pytree.tree_leaves(value_of(node))
    return not has_value(node) or any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def storages(node: fx.Node) -> set[int]:
    """The storages that hold the value of ``node``."""
    leaves = pytree.tree_leaves(value_of(node))
    return {x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor)}
