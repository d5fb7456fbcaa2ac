"""Finds the unrolled loops of a graph, and the ops of each that can run on all frames at once.

A loop is a region of connected families (:mod:`fxtemporal.analysis.families`). A family is
*planned* if its op folds into the batch (:mod:`fxtemporal.analysis.batching_rules`), and so do the
families it reads; if not, there is a reason. Nothing is changed here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.accumulations import Join, Writes
from fxtemporal.analysis.aliasing import Aliasing, written_by
from fxtemporal.analysis.batching_rules import Batching, Call, How, Origins, batching
from fxtemporal.analysis.families import (
    Families,
    Family,
    Lane,
    Operand,
    Source,
    Uniform,
    families_of,
)
from fxtemporal.analysis.vmap_fallback import runs_mapped
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Attr, Trait
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.ir.values import rank

__all__ = ["Loop", "SourceBatch", "computes", "loops_of"]


@dataclass(frozen=True, eq=False)
class Loop:
    """One unrolled loop: its families, the plans to batch them, and the reasons for those left."""

    families: tuple[Family, ...]
    lanes: Mapping[fx.Node, tuple[Family, int]]
    plans: Mapping[Family, Batching]
    joins: tuple[Join, ...]
    reasons: tuple[Reason, ...]
    aliasing: Aliasing
    allowed: tuple[Reason, ...] = ()
    """Reasons that would have kept a family in the loop, but are allowed."""

    @property
    def frames(self) -> Family:
        """The source that the most frames are read from."""
        return max((f for f in self.families if f.source), key=lambda f: len(f.lanes))


def loops_of(program: Program, allowed: frozenset[Code] = frozenset()) -> Iterator[Loop]:
    """Every loop of ``program``, in graph order; reasons with an ``allowed`` code do not block."""
    families = families_of(program, random=Code.RANDOMNESS in allowed)
    aliasing: Aliasing | None = None
    for region in families.regions():
        aliasing = aliasing or Aliasing(program)
        loop = _analyse(program, families, region, aliasing, allowed)
        if loop is not None:
            yield loop


def _analyse(
    program: Program,
    families: Families,
    region: list[Family],
    aliasing: Aliasing,
    allowed: frozenset[Code],
) -> Loop | None:
    """The loop that ``region`` is; None if nothing in it repeats."""
    reasons: dict[Reason, None] = {}
    plans: dict[Family, Batching] = {}
    origins: dict[Family, Origins] = {}
    passed: list[Reason] = []
    writes = [w for f in region if (w := _visible_write(program, f, aliasing)) is not None]
    late = _LateWrites(program, families, region, aliasing)
    writes += [w for f in region if f.uniform and (w := late.reaching(f)) is not None]
    reasons.update(dict.fromkeys(writes))
    for family in region:
        if (write := late.reaching(family)) is not None:
            reasons[write] = None
            continue
        if family.source:
            origins[family] = {0: SourceBatch.of(family.source)}
            continue
        item = family.op is not None and family.op.name == "item"
        if family.uniform or (len(family.lanes) < 2 and not item):
            continue
        if any(o.family not in origins for o in family.lane_operands()):
            continue
        call = None if family.op is None else _call(program, family, origins)
        found = _batching(program, family, call)
        if isinstance(found, tuple) and (given := [r for r in found if r.code in allowed]):
            passed += given
            found = _batching(program, family, call, allowed)
        if isinstance(found, tuple) and call is not None and runs_mapped(family, call, found):
            found = Batching(call, How.MAPPED, {0: family})
        if isinstance(found, tuple):
            reasons.update(dict.fromkeys(found))
        elif not writes:
            origins[family], plans[family] = found.origins, found
    reasons.update(dict.fromkeys(_differences(program, region)))
    reasons.update(dict.fromkeys(_other_ways(program, region, plans)))
    repeats = any(computes(f) and len(f.lanes) > 1 for f in region)
    if not repeats and not reasons and not _only_moves_data(program, families, region):
        return None
    joins = tuple(
        join
        for join in families.joins
        if families.of[join.parts[0]][0] in plans and _may_move(join, aliasing)
    )
    let = tuple(dict.fromkeys(passed))
    return Loop(tuple(region), families.of, plans, joins, tuple(reasons), aliasing, let)


def _may_move(join: Join, aliasing: Aliasing) -> bool:
    """Whether collecting all frames where the last one was collected cannot be observed."""
    first, last = join.nodes[0], join.nodes[-1]
    state = join.buffer if isinstance(join, Writes) else join.initial
    if not isinstance(state, fx.Node):
        return True
    own = set(join.nodes)
    written = isinstance(join, Writes) or join.inplace
    shared = aliasing.shared_with(state)
    readers = {user for node in shared for user in node.users} - own if written else set()
    writers = {writer for writer, memory in aliasing.writes() if memory in set(shared)} - own
    return not any(first < node < last for node in readers | writers)


@dataclass(frozen=True)
class SourceBatch:
    """Dimension 0 of the frames of a source: ``dim`` of ``base``; None if it is a window of one."""

    base: fx.Node
    frames: int
    dim: int | None

    @classmethod
    def of(cls, source: Source) -> SourceBatch:
        dim: int | None = 0
        if source.dim == 0:
            dim = 1 if source.length is None else None
        return cls(source.base, source.dim, dim)


def _only_moves_data(program: Program, families: Families, region: list[Family]) -> bool:
    """Whether a loop without arithmetic joins its frames again: then it only moves data."""
    if any(map(computes, region)):
        return False  # entries of a small dimension, each for a use of its own: no loop
    if any(families.of[join.parts[0]][0] in region for join in families.joins):
        return True
    for family in region:
        for node in () if family.source and len(family.lanes) == 1 else family.nodes:
            for user in node.users:
                if user.target is operator.setitem:
                    return True
                op = program.op(user) if user.op.startswith("call") else None
                if op is not None and op.name in ("stack", "cat") and not family.source:
                    return True
    return False


def _placed(program: Program, family: Family, reasons: Iterable[Reason]) -> list[Reason]:
    """``reasons`` with the source location of ``family``."""
    location = program.location(family.first)
    return [replace(reason, location=location) for reason in reasons]


def _batching(
    program: Program,
    family: Family,
    call: Call | None,
    allowed: frozenset[Code] = frozenset(),
) -> Batching | tuple[Reason, ...]:
    """How all frames of a family run at once, or the reasons against it, with its source line."""
    if call is None:
        return tuple(_placed(program, family, _unknown(program, family)))
    where = program.called(family.first)
    reasons = []
    if call.op.inplace and call.op.args["input"] not in call.lanes:
        text = f"{where}: the in-place write goes into a tensor that is not one of the frames"
        reasons.append(Reason(Code.VISIBLE_WRITE, text))
    if not family.equal_shapes():
        reasons.append(Reason(Code.UNEQUAL_FRAMES, f"{where}: the frames differ in shape"))
        return tuple(_placed(program, family, reasons))
    found = batching(call, family, rank(family.first) or 0, where, allowed)
    reasons += [] if isinstance(found, Batching) else found
    reasons += _tuple_blockers(program, family, call, where)
    if isinstance(found, Batching) and not reasons:
        return found
    return tuple(_placed(program, family, reasons))


def _unknown(program: Program, family: Family) -> Iterator[Reason]:
    """The reason for an op that is not known."""
    node, where = family.first, program.called(family.first)
    reason = blocked_module(program, node)
    if reason is not None:
        yield Reason(reason.code, f"{where}: {reason.text}")
    else:
        text = f"{where}: {node.target} is not an op that is known here"
        yield Reason(Code.UNSUPPORTED_OP, text)


def _tuple_blockers(program: Program, family: Family, call: Call, where: str) -> Iterator[Reason]:
    """Reasons against batching an op that returns a tuple: only its entries may be read."""
    if isinstance(value_of(family.first), torch.Tensor):
        return
    readers = [program.op(user) for lane in family.nodes for user in lane.users]
    name = call.op.name
    if Trait.RECURRENT in call.op.traits and any(r and r.args.get("index") != 0 for r in readers):
        text = f"{where}: dimension 0 of the state of {name} is the layer, not the batch"
        yield Reason(Code.UNSUPPORTED_OP, text)
    elif any(op is None or op.name not in ("item", "length") for op in readers):
        text = f"{where}: the tuple that {name} gives is used as a whole"
        yield Reason(Code.UNSUPPORTED_OP, text)


def _call(program: Program, family: Family, origins: Mapping[Family, Origins]) -> Call:
    """The family's op, its inputs that are lanes, and the numbers that count their samples."""
    assert family.op is not None
    pairs = list(zip(family.op.nodes(), family.operands, strict=True))
    known = {n: origins[operand.family] for n, operand in pairs if isinstance(operand, Lane)}
    lanes, mine = frozenset(known), {one[0] for one in known.values()}
    samples = frozenset(
        node
        for node, operand in pairs
        if not isinstance(operand, Lane) and mine == {_counts(program, node, operand, origins)}
    )
    made = not all(isinstance(origin, SourceBatch) for origin in mine)
    return Call(family.op, lanes, samples, program, made, known)


def _counts(
    program: Program, node: fx.Node, operand: Operand, origins: Mapping[Family, Origins]
) -> object:
    """The origin whose samples the number ``node`` counts; None if it counts no samples."""
    op = program.op(node)
    if op is None or op.name != "size":
        return None
    if isinstance(operand, Uniform):
        read = operand.family.operands[0]
        if not isinstance(read, Lane) or op.args["dim"] != 0:
            return None
        return origins.get(read.family, {}).get(0)
    counted = (op.args["input"], op.args["dim"])
    for origin in (known[0] for known in origins.values()):
        if isinstance(origin, SourceBatch) and counted == (origin.base, origin.dim):
            return origin
    return None


class _LateWrites:
    """In-place writes, after the loop has begun, into tensors that it reads from outside.

    All frames are computed where the first one was, so they would miss such a write.
    """

    def __init__(
        self, program: Program, families: Families, region: list[Family], aliasing: Aliasing
    ) -> None:
        self._program = program
        self._families = families
        self._aliasing = aliasing
        start = min(family.first for family in region)
        self._writes = [(w, written) for w, written in aliasing.writes() if w > start]

    def reaching(self, family: Family) -> Reason | None:
        """The first such write into a tensor that ``family`` reads."""
        read = family.first.all_input_nodes
        outside = [family.source.base] if family.source else read
        for writer, written in self._writes:
            for node in outside:
                if node in self._families.of or not self._aliasing.share(node, written):
                    continue
                where = self._program.called(writer)
                text = f"{where}: the in-place write reaches {node.name}, which the loop reads"
                return Reason(Code.VISIBLE_WRITE, text, self._program.location(writer))
        return None


def _visible_write(program: Program, family: Family, aliasing: Aliasing) -> Reason | None:
    """The first in-place write among the lanes, or into their memory, that others can see."""
    for node in family.nodes:
        for written in written_by(program, node):
            seen_by = aliasing.visible(node, written)
            if seen_by is not None:
                where = program.called(node)
                text = f"{where}: the in-place write reaches {seen_by}"
                return Reason(Code.VISIBLE_WRITE, text, program.location(node))
    return None


def _differences(program: Program, region: list[Family]) -> Iterator[Reason]:
    """Why frames that run the same ops do not form families."""
    single = [f for f in region if not f.source and not f.uniform and len(f.lanes) == 1]
    reaches: dict[Family, tuple[int, int]] = {}
    before: dict[Family, int] = {}  # the single families that each depends on, a bit for each
    steps: dict[Any, list[tuple[int, tuple[int, int]]]] = {}
    alike: dict[Any, list[tuple[Family, tuple[int, ...]]]] = {}
    lines: dict[Any, list[tuple[Family, tuple[int, ...]]]] = {}
    for number, family in enumerate(single):
        where = program.called(family.first)
        if family.op is not None and family.op.random:
            text = f"{where}: {family.op.name} draws random numbers for each frame"
            yield Reason(Code.RANDOMNESS, text, program.location(family.first))
            return
        lane = next(iter(family.lanes))
        frames: list[int] = []
        known = 0
        for operand in family.lane_operands():
            frames += reaches.get(operand.family, (lane + operand.offset,))
            known |= before.get(operand.family, 0)
        reach = (min(frames, default=lane), max(frames, default=lane))
        same = steps.setdefault(_kind(program, family), [])
        if any(known >> bit & 1 and other != reach for bit, other in same):
            text = f"{where}: it reads a state that another frame left"
            yield Reason(Code.RECURRENCE, text, program.location(family.first))
            return
        same.append((number, reach))
        reaches[family], before[family] = reach, known | 1 << number
        read = [o for o in family.lane_operands() if len(o.family.lanes) > 1]
        if family.op is not None and read:
            key = (family.op.name, tuple(o.family for o in read), rank(family.first))
            entry = family, tuple(lane + o.offset for o in read)
            alike.setdefault(key, []).append(entry)
        if family.op is not None and frames and computes(family):
            line = family.op.name, program.location(family.first)
            lines.setdefault(line, []).append((family, reach))
    found = [members for group in alike.values() if (members := _on_several_frames(group))]
    if not found:  # ops of one source line, which read their frames in different ways
        found = [members for group in lines.values() if (members := _on_several_frames(group))]
    for members in found:
        yield from _placed(
            program, members[0], _difference(members, program.called(members[0].first))
        )


def _on_several_frames(group: list[tuple[Family, tuple[int, ...]]]) -> tuple[Family, ...]:
    """The families of a group; () if they all read the same frames."""
    members, frames = zip(*group, strict=True)
    return members if len(set(frames)) > 1 else ()


def _difference(alike: Sequence[Family], where: str) -> Iterator[Reason]:
    """The difference between families that run the same op on different frames of one source."""
    first, second = alike[0].op, alike[1].op
    assert first is not None
    assert second is not None
    changed = [first.args[k] for k in first.args if first.args[k] != second.args.get(k)]
    if any(isinstance(value, Attr) for value in changed):
        text = f"{where}: each frame has a {first.name} with parameters of its own"
        yield Reason(Code.DIFFERENT_PARAMETERS, text)
    else:
        text = f"{where}: {first.name} is not called in the same way for every frame"
        yield Reason(Code.UNEQUAL_FRAMES, text)


def _other_ways(
    program: Program, region: list[Family], plans: Mapping[Family, Batching]
) -> Iterator[Reason]:
    """Frames that run the batched ops but reach them by a different path."""
    batched = {plan.call.op.static() for family, plan in plans.items() if computes(family)}
    for family in region:
        alone = family not in plans and len(family.lanes) == 1 and computes(family)
        if alone and family.op is not None and family.op.static() in batched:
            where = program.called(family.first)
            text = f"{where}: a frame comes to {family.op.name} by another way than the others"
            yield Reason(Code.UNEQUAL_FRAMES, text, program.location(family.first))
            return


def _kind(program: Program, family: Family) -> Any:
    """A key that is equal for two steps of one recurrence: the op and its source line."""
    op = family.op
    static = op.static() if op is not None else str(family.first.target)
    return static, program.location(family.first)


def computes(family: Family) -> bool:
    """Whether the family does arithmetic, rather than move data or read sizes."""
    if family.source or family.uniform:
        return False
    return family.op is None or Trait.MOVES not in family.op.traits


def owns_memory(family: Family) -> bool:
    """Whether the loop allocates the frames, so that they are no views of its inputs."""
    if family.source or family.op is None:
        return False
    if family.op.owns or (family.op.random and not family.op.inplace):
        return not family.uniform
    operands = tuple(family.lane_operands())
    return bool(operands) and all(owns_memory(lane.family) for lane in operands)
