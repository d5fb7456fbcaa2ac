"""Chains that collect the frames of a loop, other than ``stack`` and ``cat``.

::

    total = total + y_t                 reduction: add, maximum, minimum over all frames
    out[:, t] = y_t                     written into a tensor made before

Each is a chain of T nodes that only collect frames. The body of the loop ends there, and one op
over all frames replaces the chain.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import rank, shape

__all__ = ["REDUCTIONS", "Join", "Reduction", "Writes", "chains_of"]

REDUCTIONS = frozenset(("add", "maximum", "minimum"))
"""Ops on two frames; a chain of them can be replaced by one op over all frames."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """A chain of ``nodes`` that reduces ``parts``, frames of one family, to one tensor.

    It starts from ``initial``, a node or a number; None: from the first part. ``inplace``: every
    step writes into ``initial``.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    parts: tuple[fx.Node, ...]
    initial: fx.Node | float | None
    inplace: bool


@dataclass(frozen=True, eq=False)
class Writes:
    """``nodes`` that write ``parts``, frames of one family, to ``entries`` of ``buffer``.

    The entries are along ``dim``, at a constant distance, in rising order; parts are in that order.
    """

    nodes: tuple[fx.Node, ...]
    parts: tuple[fx.Node, ...]
    buffer: fx.Node
    dim: int
    entries: tuple[int, ...]


Join = Reduction | Writes
FamilyOf = Callable[[fx.Node], object | None]
"""The family that a node is a frame of; None if it is no frame, or the family's only one."""
Constant = Callable[[Any], int | None]
"""The number that an index is, as written or by a guard; None if it is not constant."""


def chains_of(program: Program, family_of: FamilyOf, constant: Constant) -> Iterator[Join]:
    """Every chain of ``program`` that only collects the frames of one family."""
    yield from _reductions(program, family_of)
    yield from _writes(program, family_of, constant)


# -- reductions ------------------------------------------------------------------------------------


def _reductions(program: Program, family_of: FamilyOf) -> Iterator[Reduction]:
    open_chains: dict[fx.Node, Reduction] = {}
    for node in program.graph.nodes:
        op = program.op(node)
        if op is None or op.name not in REDUCTIONS or op.args.get("alpha", 1) != 1:
            continue
        if family_of(node) is not None:
            continue  # done to every frame: it belongs to the body
        step = _extended(node, op, open_chains, family_of) or _begun(node, op, family_of)
        if step is not None and _of_one_kind(step):
            open_chains[node] = step
    yield from (chain for chain in open_chains.values() if len(chain.nodes) > 1)


def _extended(
    node: fx.Node, op: Op, chains: dict[fx.Node, Reduction], family_of: FamilyOf
) -> Reduction | None:
    """An open chain, extended by ``node``; None if ``node`` extends none."""
    left, right = op.args["input"], op.args["other"]
    for state, part in ((left, right), (right, left)):
        chain = chains.get(state) if isinstance(state, fx.Node) else None
        if chain is None or not isinstance(part, fx.Node) or list(state.users) != [node]:
            continue
        same = op.name == chain.name and op.inplace == chain.inplace
        if op.inplace and state is not left:
            continue
        if same and part not in chain.parts and family_of(part) is family_of(chain.parts[-1]):
            del chains[state]
            nodes, parts = (*chain.nodes, node), (*chain.parts, part)
            return Reduction(op.name, nodes, parts, chain.initial, op.inplace)
    return None


def _begun(node: fx.Node, op: Op, family_of: FamilyOf) -> Reduction | None:
    """A new chain that begins with ``node``; None if none does."""
    left, right = op.args["input"], op.args["other"]
    mine = family_of(left) if isinstance(left, fx.Node) else None
    theirs = family_of(right) if isinstance(right, fx.Node) else None
    if mine is not None and mine is theirs and left is not right and not op.inplace:
        return Reduction(op.name, (node,), (left, right), None, False)
    if (mine is None) == (theirs is None):
        return None
    part, initial = (left, right) if mine is not None else (right, left)
    if op.inplace and (initial is not left or not isinstance(initial, fx.Node)):
        return None
    if not isinstance(initial, fx.Node | int | float) or isinstance(initial, bool):
        return None
    return Reduction(op.name, (node,), (part,), initial, op.inplace)


def _of_one_kind(chain: Reduction) -> bool:
    """Whether the frames agree in shape, and frames and result in a floating-point dtype."""
    values = [value_of(node) for node in (*chain.parts, chain.nodes[-1])]
    dtypes = {v.dtype if isinstance(v, torch.Tensor) else None for v in values}
    dtype = dtypes.pop()
    if dtypes or dtype is None or not dtype.is_floating_point:
        return False
    return len({shape(part) for part in chain.parts}) == 1


# -- writes ----------------------------------------------------------------------------------------


def _writes(program: Program, family_of: FamilyOf, constant: Constant) -> Iterator[Writes]:
    groups: dict[tuple[fx.Node, int, object], dict[int, tuple[fx.Node, fx.Node]]] = {}
    for node in program.graph.nodes:
        entry = _written_entry(node, constant)
        part = node.args[2] if entry is not None else None
        if entry is None or not isinstance(part, fx.Node):
            continue
        buffer, dim, index = entry
        family = family_of(part)
        if family is None or family_of(buffer) is not None:
            continue
        if (rank(part) or 0) != (rank(buffer) or 0) - 1:
            continue
        group = groups.setdefault((buffer, dim, family), {})
        if index in group:
            group[index] = (node, node)  # written twice: the order counts
        else:
            group[index] = (node, part)
    for (buffer, dim, _), group in groups.items():
        entries = tuple(sorted(group))
        steps = {b - a for a, b in itertools.pairwise(entries)}
        nodes = tuple(group[entry][0] for entry in entries)
        parts = tuple(group[entry][1] for entry in entries)
        if len(steps) == 1 and not set(nodes) & set(parts):
            yield Writes(tuple(sorted(nodes)), parts, buffer, dim, entries)


def _written_entry(node: fx.Node, constant: Constant) -> tuple[fx.Node, int, int] | None:
    """``(buffer, dim, index)`` where ``node`` is ``buffer[..., index] = value``."""
    if node.target is not operator.setitem:
        return None
    buffer, index = node.args[0], node.args[1]
    sizes = shape(buffer) if isinstance(buffer, fx.Node) else None
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if sizes is None or not isinstance(buffer, fx.Node):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        whole = (slice(None),) * (len(sizes) - len(parts) + 1)
        parts = (*parts[:at], *whole, *parts[at + 1 :])
    single = [(dim, part) for dim, part in enumerate(parts) if part != slice(None)]
    if len(single) != 1 or isinstance(single[0][1], bool):
        return None
    dim, entry = single[0][0], constant(single[0][1])
    return (buffer, dim, entry) if entry is not None and entry >= 0 else None
