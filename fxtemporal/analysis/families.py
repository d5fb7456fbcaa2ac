"""Unrolled frames, recovered by value numbering in one walk.

::

    x0 = x[:, 0];  y0 = conv(x0);  z0 = relu(y0)        family 0: x[:, t]      lanes 0..T-1
    x1 = x[:, 1];  y1 = conv(x1);  z1 = relu(y1)   →    family 1: conv(0 @ t)  lanes 0..T-1
    ...                                                 family 2: relu(1 @ t)  lanes 0..T-1

Every node is *invariant* or *lane t of family f*. Two nodes are of the same family if their ops,
static arguments and parameters agree, and their inputs are the same invariants, or lanes of the
same families at the same offset from their own. So a computation that reads the frame before it has
an operand at offset −1. A state carried from frame to frame never forms a family: each of its steps
reads another step. Frames that receive gradients, and frames that do not because all their readers
are detached, are of different families: computed together, the second kind would receive gradients
of zero, which may become NaN. The cost is one dictionary look-up a node.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.accumulations import Join, chains_of
from fxtemporal.analysis.gradients import with_gradients
from fxtemporal.ir.guards import guard
from fxtemporal.ir.node_meta import is_clip, is_no_frame, needed_value, value_of
from fxtemporal.ir.ops import WHOLE, Attr, Op, Trait
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import shape
from fxtemporal.support.disjoint_sets import DisjointSets

__all__ = ["Families", "Family", "Lane", "Operand", "Source", "Uniform", "families_of", "is_input"]

_CONSTANTS = frozenset(
    (torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)
)
"""Functions that return the same at every call: one made for each frame is one constant."""

_FILLED = frozenset("new_zeros new_ones new_full zeros_like ones_like full_like".split())
"""Methods that do so, with the shape or dtype of another tensor."""


@dataclass(frozen=True)
class Source:
    """The source of lanes: lane t is ``length`` entries of ``base`` along ``dim``, from t on.

    ``length`` None: one entry, the dimension dropped (``x[:, t]``). ``cut`` names the op that cuts
    lanes out: a slice gives fewer entries at the tensor's end, chunk() cuts by the size at run
    time. ``from_end``: t is negative, and counts from the end of a dimension of any size.
    ``cut`` "list": ``base`` is a list of frames; stacked, they would lie along ``dim``.
    """

    base: fx.Node
    dim: int
    length: int | None
    cut: str
    from_end: bool = False


@dataclass(frozen=True)
class Lane:
    """An input that is lane ``t + offset`` of ``family``, for the node that is lane t."""

    family: Family
    offset: int


@dataclass(frozen=True)
class Uniform:
    """An input that is the same number in every lane (a size of a frame)."""

    family: Family


Operand = Lane | Uniform | fx.Node


@dataclass(eq=False)
class Family:
    """The same computation on several frames; ``lanes`` maps the frame to its node.

    ``op`` and ``operands`` are those of the first lane met, ``operands`` in the order of
    ``op.nodes()``. ``op`` is None for a call that :mod:`fxtemporal.ir.ops` does not know.
    """

    number: int
    op: Op | None
    operands: tuple[Operand, ...]
    source: Source | None = None
    uniform: bool = False
    lanes: dict[int, fx.Node] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def first(self) -> fx.Node:
        """The family's first node in the graph."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        return "frames" if self.source else self.op.name if self.op else str(self.first.target)

    def lane_operands(self) -> Iterator[Lane]:
        return (operand for operand in self.operands if isinstance(operand, Lane))

    def equal_shapes(self) -> bool:
        return len({_shapes(node) for node in self.lanes.values()}) == 1


@dataclass(frozen=True)
class Families:
    """All families of a graph, sources first, in the order in which they can be computed."""

    all: tuple[Family, ...]
    of: dict[fx.Node, tuple[Family, int]]
    joins: tuple[Join, ...]

    def regions(self) -> list[list[Family]]:
        """Connected families that have a source of several lanes."""
        fed: DisjointSets[Family] = DisjointSets()
        for family in self.all:
            for operand in family.operands:
                if not isinstance(operand, fx.Node):
                    fed.unite(family, operand.family)
        return [
            region
            for region in fed.groups(self.all)
            if any(family.source and len(family.lanes) > 1 for family in region)
        ]


def families_of(program: Program, *, random: bool = False) -> Families:
    """Number every node of ``program`` that depends on a frame.

    A first walk finds the joins: ``stack`` and ``cat`` over lanes of one family that are not
    themselves repeated, and :mod:`fxtemporal.analysis.accumulations`. In a second walk the joins
    are invariants. With ``random``, ops that draw random numbers form families too.
    """
    numbering = _Numbering(program, frozenset(), random)
    joins = {f.first for f in numbering.families if _joins(f)}
    chains = tuple(chains_of(program, numbering.repeated, numbering.constant))
    joins.update(node for chain in chains for node in chain.nodes)
    if joins:
        numbering = _Numbering(program, frozenset(joins), random)
    return Families(tuple(numbering.families), numbering.of, chains)


def _joins(family: Family) -> bool:
    if family.op is None or family.op.name not in ("stack", "cat") or len(family.lanes) > 1:
        return False
    lanes = list(family.lane_operands())
    same = len({lane.family for lane in lanes}) == 1 and len(lanes) == len(family.operands)
    return same and len({lane.offset for lane in lanes}) > 1


class _Numbering:
    def __init__(self, program: Program, joins: frozenset[fx.Node], random: bool) -> None:
        self.program = program
        self.random = random
        self.joins = joins
        self.families: list[Family] = []
        self.of: dict[fx.Node, tuple[Family, int]] = {}
        self._keys: dict[Any, Family] = {}
        self._invariants: dict[Any, fx.Node] = {}
        self._held_sizes, self._held_numbers = program.held()
        self._same: dict[fx.Node, fx.Node] = {}
        self._flows = with_gradients(program)
        for node in program.graph.nodes:
            self._visit(node)

    def repeated(self, node: fx.Node) -> Family | None:
        """The family of ``node``; None if it has none, or is the family's only lane."""
        family = self.of[node][0] if node in self.of else None
        return family if family is not None and len(family.lanes) > 1 else None

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr", "output") or node in self.joins or is_clip(node):
            return
        if node.target is operator.setitem and node.args[0] not in self.of:
            return  # frames end there
        op = self.program.op(node)
        if op is not None and (found := self._frame(node, op)) is not None:
            source, index = found
            self._number(node, index, ("source", source), op, (), source)
            return
        inputs = op.nodes() if op is not None else tuple(node.all_input_nodes)
        if not any(source in self.of for source in inputs):
            if op is not None and (Trait.SAME_MEMORY in op.traits or _is_number(node)):
                self._note_invariant(node, op)
            elif _makes_a_constant(node, op) and self._only_read(node):
                arguments = fx.node.map_arg(
                    (node.args, node.kwargs), lambda n: self._same.get(n, n)
                )
                key = (node.target, repr(arguments))
                self._same[node] = self._invariants.setdefault(key, node)
            return
        operands, anchor = self._operands(inputs)
        uniform = anchor is None or (op is not None and Trait.FACT in op.traits)
        if isinstance(value_of(node), torch.Tensor) and not self._only_read(node):
            uniform = False  # a buffer made for each frame, which something writes
        lane = 0 if anchor is None else anchor
        described = node in self._flows, self._key(node, op, operands)
        self._number(node, lane, described, op, operands, None, uniform)

    def _only_read(self, node: fx.Node) -> bool:
        """Whether nothing can write into the memory of ``node``, directly or through a view."""
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                op = self.program.op(user)
                if user.op == "output" or op is None or op.inplace:
                    return False
                if not op.owns and user not in seen:
                    seen.add(user)
                    pending.append(user)
        return True

    def _note_invariant(self, node: fx.Node, op: Op) -> None:
        """Treat equal views or sizes of a tensor, taken again for each frame, as one node."""
        source = op.args.get("input")
        if is_whole(op) and isinstance(source, fx.Node):
            self._same[node] = self._same.get(source, source)
            return
        key = (op.static(), tuple(self._same.get(n, n) for n in op.nodes()))
        self._same[node] = self._invariants.setdefault(key, node)

    def _operands(self, inputs: tuple[fx.Node, ...]) -> tuple[tuple[Operand, ...], int | None]:
        """The operands, with lanes relative to the first one's, and that lane, the node's own."""
        lanes = [self.of[n] for n in inputs if n in self.of]
        anchor = next((lane for family, lane in lanes if not family.uniform), None)
        operands: list[Operand] = []
        for source in inputs:
            if source not in self.of:
                operands.append(self._same.get(source, source))
                continue
            family, lane = self.of[source]
            operands.append(
                Uniform(family) if family.uniform else Lane(family, lane - (anchor or 0))
            )
        return tuple(operands), anchor

    def _key(self, node: fx.Node, op: Op | None, operands: tuple[Operand, ...]) -> Any:
        described = tuple(
            operand
            if isinstance(operand, fx.Node)
            else (operand.family.number, operand.offset if isinstance(operand, Lane) else None)
            for operand in operands
        )
        if node.target is guard:
            return (guard, repr(node.args[1]), node.args[4], described)
        if op is None:
            static = fx.node.map_arg((node.args, node.kwargs), lambda n: "%")
            return (node.op, node.target, repr(static), described)
        if op.random and not self.random:
            return (node,)  # new numbers for every frame: never the same computation
        return (op.static(), op.inplace, described)

    def _number(
        self,
        node: fx.Node,
        lane: int,
        key: Any,
        op: Op | None,
        operands: tuple[Operand, ...],
        source: Source | None = None,
        uniform: bool = False,
    ) -> None:
        family = self._keys.get(key)
        pure = node.target is guard or node.target in _CONSTANTS
        effect = not pure and (op is None or op.inplace)
        if family is not None and lane in family.lanes and effect:
            family = None  # the same call again, and it may have an effect each time
            key = (node,)
        if family is None:
            family = Family(len(self.families), op, operands, source, uniform)
            self._keys[key] = family
            self.families.append(family)
        family.lanes.setdefault(lane, node)
        family.nodes.append(node)
        self.of[node] = family, lane

    def _frame(self, node: fx.Node, op: Op) -> tuple[Source, int] | None:
        """``(source, t)`` if the op takes constant entries of an invariant tensor, else None."""
        if is_no_frame(node):
            return None  # a rewrite added this read of one frame, for ops that stay in the loop
        match op.name:
            case "getitem":  # x[:, [t]]
                listed = [(d, part) for d, part in enumerate(op.args["index"]) if part != WHOLE]
                if len(listed) == 1 and isinstance(listed[0][1], tuple) and len(listed[0][1]) == 1:
                    dim, (index,) = listed[0]
                    if type(index) is int:
                        return self._source(_base(node, op), dim, index, 1, "select")
            case "index_select":
                entries = _listed(op.args["index"])
                if entries is not None and len(entries) == 1:
                    return self._source(_base(node, op), op.args["dim"], entries[0], 1, "select")
            case "select":
                base, dim, index = _base(node, op), op.args["dim"], self.constant(op.args["index"])
                return None if index is None else self._source(base, dim, index, None, "select")
            case "slice":
                base, dim = _base(node, op), op.args["dim"]
                start, end, step = op.args["start"], op.args["end"], op.args["step"]
                start, end = self.constant(start), self.constant(end)
                if step != 1 or start is None or end is None or not 0 <= start < end:
                    return None
                return self._source(base, dim, start, end - start, "slice")
            case "item":
                return self._piece(op.args["input"], op.args["index"])
        return None

    def _piece(self, pieces: Any, index: Any) -> tuple[Source, int] | None:
        """One entry of ``unbind``, ``split`` or ``chunk``, or of a list that is an input."""
        if not isinstance(pieces, fx.Node) or not isinstance(index, int):
            return None
        if is_input(pieces):
            cut = any(self._cuts(user) for entry in pieces.users for user in entry.users)
            return None if cut else self._listed_input(pieces, index)
        op = self.program.op(pieces)
        if op is None or op.name not in ("unbind", "split", "chunk"):
            return None
        values = value_of(pieces)
        if not isinstance(values, list | tuple):
            return None
        base, dim = _base(pieces, op), op.args["dim"]
        if op.name == "unbind":
            return self._source(base, dim, index, None, "select")
        index += len(values) if index < 0 else 0
        lengths = [piece.shape[dim] for piece in values]
        if len(set(lengths)) != 1:
            return None
        return self._source(base, dim, index * lengths[0], lengths[0], op.name)

    def _cuts(self, node: fx.Node) -> bool:
        """Whether ``node`` takes a part of a tensor, so that the tensor is a clip, not a frame."""
        op = self.program.op(node)
        return op is not None and Trait.CUTS in op.traits

    def _listed_input(self, frames: fx.Node, index: int) -> tuple[Source, int] | None:
        value = value_of(frames)
        if not isinstance(value, list | tuple) or not 0 <= index < len(value) > 1:
            return None
        kinds = {(t.shape, t.dtype) if isinstance(t, torch.Tensor) else None for t in value}
        if None in kinds or len(kinds) != 1 or not value[0].dim():
            return None
        return Source(frames, 1, None, "list"), index

    def _source(
        self, base: Any, dim: Any, start: int, length: int | None, cut: str
    ) -> tuple[Source, int] | None:
        if not isinstance(base, fx.Node) or base in self.of:
            return None
        base = self._same.get(base, base)
        sizes = shape(base)
        if not sizes or not isinstance(dim, int):
            return None
        size = sizes[dim]
        if start < 0 and (base, dim) in self._held_sizes:
            start += size
        if length is not None and (length >= size or start + length > size):
            return None  # all of it, or a window that the end cuts short
        return Source(base, dim, length, cut, from_end=start < 0), start

    def constant(self, value: Any) -> int | None:
        """An index as a number: as written, or computed from sizes that guards hold."""
        if isinstance(value, int):
            return value
        if not isinstance(value, fx.Node) or not isinstance(value_of(value), int):
            return None
        op = self.program.op(value)
        arithmetic = op is not None and op.name in ("add", "sub", "mul", "floor_divide", "neg")
        if value in self._held_numbers:
            return int(needed_value(value))
        if op is not None and op.name == "size":
            held = (op.args["input"], op.args["dim"]) in self._held_sizes
            return int(needed_value(value)) if held else None
        if not arithmetic or any(self.constant(n) is None for n in value.all_input_nodes):
            return None
        return int(needed_value(value))


def is_input(node: Any) -> bool:
    """Whether ``node`` is an input, or an entry of one that is a list or dict."""
    while isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
        if not isinstance(node, fx.Node) or isinstance(value_of(node), torch.Tensor):
            return False
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _makes_a_constant(node: fx.Node, op: Op | None) -> bool:
    """Whether ``node`` returns the same at every call with these arguments."""
    return node.target in _CONSTANTS or (op is not None and op.name in _FILLED)


def _listed(index: Any) -> tuple[int, ...] | None:
    """The entries of ``torch.tensor([t])``; None if they are not constants."""
    if not isinstance(index, fx.Node) or index.target is not torch.tensor:
        return None
    listed = index.args[0] if isinstance(index.args[0], list | tuple) else (index.args[0],)
    entries = [entry for entry in listed if type(entry) is int]
    return tuple(entries) if len(entries) == len(listed) else None


def is_whole(op: Op) -> bool:
    """Whether the op slices everything, ``x[:]``, which torch.export writes for ``x[:, t]``."""
    parts = (op.args.get("start"), op.args.get("end"), op.args.get("step"))
    return op.name == "slice" and parts == (0, None, 1)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value_of(node), int | float | torch.Size)


def _base(node: fx.Node, op: Op) -> Any:
    """The node that ``op`` slices, a parameter's get_attr node included."""
    base = op.args["input"]
    return node.all_input_nodes[0] if isinstance(base, Attr) else base


def _shapes(node: fx.Node) -> Any:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in value)
    return value
