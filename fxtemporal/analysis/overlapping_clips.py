"""Finds work that overlapping clips repeat: a frame is computed again in every clip that holds it.

::

    clips = x.unfold(1, w, s)                      # (B, N, C, H, W, w): N clips, one every s frames
    frames = clips.movedim(-1, 2).flatten(0, 2)    # (B·N·w, C, H, W)
    y = net(frames)                                # N·w frames, of which only T differ

A loop over clips has this form once it is re-rolled; some users write it by hand. The axes of the
clips are followed from ``unfold`` through ops that only move data, up to an *entry*: a tensor whose
dimension 0 runs over clips and frames. From there a *body* grows, of ops that treat each entry of
dimension 0 independently. Nothing is changed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.aliasing import Aliasing
from fxtemporal.analysis.batching_rules import Batching, Call, How, batching
from fxtemporal.ir.node_meta import needed_value, value_of
from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.per_frame import vmapped
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import rank, shape

__all__ = ["Axes", "Windows", "windows_of"]

Axes = tuple[int, ...]
"""Dimensions of the unfolded tensor that one dimension runs over, slowest first."""

Layout = tuple[Axes, ...]


@dataclass(frozen=True, eq=False)
class Windows:
    """Overlapping clips of ``base`` along ``dim``, and the ops on their frames.

    Dimension ``dim`` of the unfolded tensor counts the clips; its last dimension counts the frames
    of a clip. ``order`` gives the axes that dimension 0 of each entry and body tensor runs over.
    """

    unfold: fx.Node
    base: fx.Node
    dim: int
    length: int
    step: int
    entries: Mapping[fx.Node, Layout]
    body: tuple[fx.Node, ...]
    order: Mapping[fx.Node, Axes]
    computing: tuple[fx.Node, ...]
    """The ops of the body that do more than move data."""
    spelled_out: tuple[tuple[int, int], ...]
    """``(dimension, size)`` of ``base`` that a view before the entries has as a constant."""


def windows_of(program: Program) -> Iterator[Windows]:
    """Every group of overlapping clips with a body that computes something."""
    aliasing: Aliasing | None = None
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name != "unfold" or shape(node) is None:
            continue
        base, dim, length, step = (op.args[name] for name in ("input", "dim", "size", "step"))
        fixed = all(type(value) is int for value in (dim, length, step))
        if not isinstance(base, fx.Node) or not fixed or step >= length:
            continue
        aliasing = aliasing or Aliasing(program)
        if any(node < writer and aliasing.share(base, w) for writer, w in aliasing.writes()):
            continue
        paths = _Paths(program, node, dim)
        entries = {n: layout for n, layout in paths.layouts.items() if paths.is_entry(layout)}
        body = _Body(program, aliasing, entries, dict(paths.numbers))
        if body.computing:
            used = {n: entries[n] for n in entries if not body.nodes.isdisjoint(n.users)}
            yield Windows(
                node,
                base,
                dim,
                length,
                step,
                used,
                tuple(sorted(body.nodes)),
                body.order,
                tuple(sorted(body.computing)),
                tuple(sorted(paths.spelled_out)),
            )


class _Paths:
    """The layouts of tensors that hold the moved clips, and the sizes read from them."""

    def __init__(self, program: Program, unfold: fx.Node, dim: int) -> None:
        self._program = program
        self._sizes = tuple(needed_value(unfold).shape)
        self._dim = dim
        self.layouts: dict[fx.Node, Layout] = {unfold: tuple((d,) for d in range(len(self._sizes)))}
        self.numbers: dict[fx.Node, Axes] = {}
        self.spelled_out: set[tuple[int, int]] = set()
        node = unfold.next
        while node.op != "root":
            self._visit(node)
            node = node.next

    @property
    def _frames(self) -> int:
        return len(self._sizes) - 1

    def is_entry(self, layout: Layout) -> bool:
        """Whether dimension 0 alone runs over clips and frames, and no axis is missing.

        (B·N·w, C, H, W) and (N·B·w, C, H, W) are entries; (B·N, C, w, H, W) is not.
        """
        axes = [axis for group in layout for axis in group]
        inside = {self._dim, self._frames} <= set(layout[0])
        return inside and sorted(axes) == list(range(len(self._sizes)))

    def _visit(self, node: fx.Node) -> None:
        if node.target is vmapped:
            layout = self._vmapped(node)
        else:
            op = self._program.op(node) if node.op.startswith("call") else None
            if op is None or op.inplace:
                return
            self._number(node, op)
            source = self.layouts.get(op.args.get("input"))  # type: ignore[arg-type]
            layout = None if source is None else self._moved(node, op, source)
        if layout is not None:
            self.layouts[node] = layout

    def _number(self, node: fx.Node, op: Op) -> None:
        """Record ``node`` if it is a size of a followed tensor, or a product of such sizes."""
        match op.name:
            case "size" if op.args["input"] in self.layouts:
                self.numbers[node] = self.layouts[op.args["input"]][op.args["dim"]]
            case "mul":
                factors = [self.numbers.get(op.args[name]) for name in ("input", "other")]
                if factors[0] is not None and factors[1] is not None:
                    self.numbers[node] = factors[0] + factors[1]

    def _moved(self, node: fx.Node, op: Op, layout: Layout) -> Layout | None:
        """The layout after ``op`` on a tensor with ``layout``; None if ``op`` is no known move."""
        match op.name:
            case "contiguous" | "clone" | "identity":
                return layout
            case "permute":
                return tuple(layout[dim] for dim in op.args["dims"])
            case "transpose":
                dims = list(range(len(layout)))
                one, other = op.args["dim0"], op.args["dim1"]
                dims[one], dims[other] = dims[other], dims[one]
                return tuple(layout[dim] for dim in dims)
            case "movedim":
                places = dict(zip(op.args["destination"], op.args["source"], strict=True))
                rest = iter(d for d in range(len(layout)) if d not in places.values())
                return tuple(
                    layout[places.get(d, -1)] if d in places else layout[next(rest)]
                    for d in range(len(layout))
                )
            case "flatten":
                return _merged(layout, op.args["start_dim"], op.args["end_dim"])
            case "select":
                return layout[: op.args["dim"]] + layout[op.args["dim"] + 1 :]
            case "slice":
                whole = layout[op.args["dim"]] == (self._frames,)
                return layout if whole and shape(node) == shape(op.args["input"]) else None
            case "rearrange":
                return _rearranged(layout, op.args["pattern"])
            case "view" | "reshape":
                return self._reshaped(layout, op.args["shape"])
        return None

    def _vmapped(self, node: fx.Node) -> Layout | None:
        """The layout after a reshape of each clip under vmap: dimension 0 counts the clips."""
        arguments: tuple[Any, ...] = node.args
        name, dims, source, *args = arguments
        layout = self.layouts.get(source)
        if layout is None or dims[0] != 0 or any(dim is not None for dim in dims[1:]):
            return None
        rest: Layout | None = None
        if name in ("Tensor.reshape", "torch.reshape") and not node.kwargs:
            sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
            rest = self._reshaped(layout[1:], tuple(sizes))
        elif name == "einops.rearrange" and len(args) == 1:
            rest = _rearranged(layout[1:], str(args[0]))
        return None if rest is None else (layout[0], *rest)

    def _reshaped(self, layout: Layout, sizes: Any) -> Layout | None:
        """The layout after a reshape that only joins neighbours."""
        if not isinstance(sizes, tuple):
            return None
        result: list[Axes] = []
        rest = layout
        for place, size in enumerate(sizes):
            later = len(sizes) - place - 1
            count = len(rest) - later if size == -1 else self._joined(rest, size)
            if count < 1:
                return None
            result.append(tuple(axis for group in rest[:count] for axis in group))
            rest = rest[count:]
        if rest:
            return None
        for axes, size in zip(result, sizes, strict=True):
            if type(size) is int and size != -1 and axes != (self._frames,):
                self.spelled_out.add((axes[0], size))
        return tuple(result)

    def _joined(self, layout: Layout, size: Any) -> int:
        """Number of leading dimensions that join to one of ``size``; 0 if it is not known."""
        if isinstance(size, fx.Node):
            got: Axes = ()
            for count, group in enumerate(layout, 1):
                got += group
                if got == self.numbers.get(size):
                    return count
            return 0
        (axis, *others) = layout[0] if layout else (self._dim,)
        written = not others and axis != self._dim and self._sizes[axis] == size
        return int(written)


def _rearranged(layout: Layout, pattern: str) -> Layout | None:
    """The layout after an einops pattern that splits nothing: ``"b t c h w -> (b t) c h w"``."""
    left, _, right = pattern.partition("->")
    names = left.split()
    groups = re.findall(r"\(([^()]*)\)|(\S+)", right)
    if len(names) != len(layout) or not all(name.isidentifier() for name in names):
        return None
    axes = dict(zip(names, layout, strict=True))
    result = []
    for several, single in groups:
        parts = (several or single).split()
        if not parts or not set(parts) <= axes.keys():
            return None
        result.append(tuple(axis for part in parts for axis in axes[part]))
    return tuple(result)


def _merged(layout: Layout, start: int, end: int) -> Layout:
    joined = tuple(axis for group in layout[start : end + 1] for axis in group)
    return (*layout[:start], joined, *layout[end + 1 :])


class _Body:
    """The ops after the entries that treat each entry of dimension 0 independently."""

    def __init__(
        self,
        program: Program,
        aliasing: Aliasing,
        entries: Mapping[fx.Node, Layout],
        sizes: Mapping[fx.Node, Axes],
    ) -> None:
        self._program = program
        self._aliasing = aliasing
        self._entries = entries
        self._sizes = sizes
        self._banned: set[fx.Node] = set()
        while True:
            self._grow()
            seen = self._seen()
            if not seen:
                break
            self._banned |= seen

    @property
    def computing(self) -> set[fx.Node]:
        return {
            node
            for node in self.nodes
            if (op := self._program.op(node)) is not None
            and Trait.MOVES not in op.traits
            and isinstance(value_of(node), torch.Tensor)
        }

    def _grow(self) -> None:
        self.nodes: set[fx.Node] = set()
        self.order = {entry: layout[0] for entry, layout in self._entries.items()}
        self._samples = dict(self._sizes)
        for node in self._program.graph.nodes:
            inputs = [n for n in node.all_input_nodes if n in self.order or n in self.nodes]
            if not inputs or node in self._entries or node in self._banned:
                continue
            op = self._program.op(node) if node.op.startswith("call") else None
            if op is None:
                continue
            if op.name in ("size", "shape"):
                self.nodes.add(node)
                if op.args.get("dim") == 0:
                    self._samples[node] = self.order[op.args["input"]]
            elif (order := self._order(node, op)) is not None:
                self.nodes.add(node)
                self.order[node] = order

    def _name(self, value: Any) -> str:
        op = self._program.op(value) if isinstance(value, fx.Node) else None
        return "" if op is None else op.name

    def _order(self, node: fx.Node, op: Op) -> Axes | None:
        """The axes that dimension 0 of ``node`` runs over; None if ``node`` mixes frames."""
        lanes = frozenset(n for n in op.nodes() if n in self.order)
        orders = {self.order[n] for n in lanes}
        if len(orders) != 1 or Trait.RECURRENT in op.traits:
            return None
        order = orders.pop()
        samples = frozenset(n for n, axes in self._samples.items() if axes == order)
        call = Call(op, lanes, samples, self._program)
        found = batching(call, node, rank(node) or 0, "")
        if not isinstance(found, Batching) or found.how is not How.FOLDED:
            return None
        if op.name in ("cat", "stack") and lanes != frozenset(op.nodes()):
            return None
        several = not isinstance(value_of(node), torch.Tensor)
        if several and any(self._name(user) != "item" for user in node.users):
            return None
        return order

    def _seen(self) -> set[fx.Node]:
        """Ops that may not move: they write memory that others see, or read such a write."""
        found: set[fx.Node] = set()
        for writer, written in self._aliasing.writes():
            if writer in self.nodes:
                shared = any(self._aliasing.share(written, entry) for entry in self._entries)
                if shared or self._aliasing.visible(writer, written) is not None:
                    found.add(writer)
                continue
            for node in self.nodes:
                if writer < node and any(
                    n in self.nodes and self._aliasing.share(written, n)
                    for n in node.all_input_nodes
                ):
                    found.add(node)
        return found
