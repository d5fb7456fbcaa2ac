"""Recurrent cells written by hand: a layer reads a frame concatenated with a state.

::

    for t in range(T):                                step t: conv(cat([x_t, h]))
        gates = conv(torch.cat([x[:, t], h], 1))      parts   frame, state
        h = update(gates, h)

The steps of a cell are calls of one layer, with the same weights, each on its own ``cat`` along the
channels. A part of the ``cat`` is a *frame* if every step reads there a lane of one family
(:mod:`fxtemporal.analysis.families`) that depends on no step of the cell; all other parts are
*state*. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.analysis.batching_rules import Batching
from fxtemporal.analysis.families import Family, families_of
from fxtemporal.analysis.loops import Loop, loops_of
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Attr, Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module

__all__ = ["Cell", "ConvStep", "Part", "cells_of"]

_EXTENTS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Number of dimensions after the channels, of each op that is linear in its input channels."""

_LAYERS = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

Part = fx.Node | Attr
Lanes = Mapping[fx.Node, tuple[Family, int]]
Places = Mapping[fx.Node, tuple[Loop, Family]]
"""``{first node of a family: (its loop, the family)}``."""
Reading = tuple[tuple[Family, int] | None, ...]
"""For each part: its family, and its lane relative to the first frame's; None for a state."""


@dataclass(frozen=True, eq=False)
class ConvStep:
    """One call, ``layer(cat(parts))``; ``op`` is None for a module that must stay a call."""

    layer: fx.Node
    op: Op | None
    join: fx.Node
    parts: tuple[Part, ...]
    dim: int
    channels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Cell:
    """The steps of one cell, in graph order.

    ``frames`` and ``state`` hold positions of parts. The frames of one tuple may be joined before
    they are batched. ``blockers`` say why the frames cannot be batched.
    """

    steps: tuple[ConvStep, ...]
    frames: tuple[tuple[int, ...], ...]
    state: tuple[int, ...]
    blockers: tuple[Reason, ...]

    @property
    def first(self) -> ConvStep:
        return self.steps[0]


def cells_of(program: Program) -> Iterator[Cell]:
    """Every cell of ``program`` that reads both frames and a state, in graph order."""
    groups = [steps for steps in _calls(program) if len(steps) > 1]
    if not groups:
        return
    lanes = families_of(program).of
    found = [cell for steps in groups for cell in _readings(program, steps, lanes)]
    if not found:
        return
    places = {f.first: (loop, f) for loop in loops_of(program) for f in loop.families}
    for reading, steps in sorted(found, key=lambda cell: cell[1][0].layer):
        if all(step.join in lanes and _plan(lanes[step.join][0], places) for step in steps):
            continue  # no state in it: the join itself can be batched
        read = {i: lane[0] for i, lane in enumerate(reading) if lane is not None}
        blockers = dict.fromkeys(r for f in read.values() for r in _unbatched(f, places))
        state = tuple(i for i, lane in enumerate(reading) if lane is None)
        yield Cell(tuple(steps), _together(steps[0], read, places), state, tuple(blockers))


# -- steps -----------------------------------------------------------------------------------------


def _calls(program: Program) -> Iterable[list[ConvStep]]:
    """All calls of a layer on a ``cat`` along its channels, one list for the same weights."""
    calls: dict[Any, list[ConvStep]] = {}
    key: Any
    for node in program.graph.nodes:
        if not node.op.startswith("call"):
            continue
        op = program.op(node)
        if op is None:
            extent, joined = _blocked_layer(program, node)
            key = node.target
        elif op.name in _EXTENTS:
            extent, joined = _EXTENTS[op.name], op.args["input"]
            key = (op.static(), tuple(n for n in op.nodes() if n is not joined))
        else:
            continue
        if isinstance(joined, fx.Node) and (parts := _parts(program, joined, extent)) is not None:
            step = ConvStep(node, op, joined, *parts)
            calls.setdefault((key, step.channels), []).append(step)
    return calls.values()


def _blocked_layer(program: Program, node: fx.Node) -> tuple[int, Any]:
    """Extent and input of a layer without a description (it has hooks, say); else (0, None)."""
    if blocked_module(program, node) is None:
        return 0, None
    module = program.gm.get_submodule(str(node.target))
    extent = next((n for kind, n in _LAYERS.items() if isinstance(module, kind)), None)
    given = node.args[0] if node.args else node.kwargs.get("input")
    return (0, None) if extent is None else (extent, given)


def _parts(
    program: Program, node: fx.Node, extent: int
) -> tuple[tuple[Part, ...], int, tuple[int, ...]] | None:
    """The parts that ``node`` joins along the channels, that dimension, and each one's channels."""
    op = program.op(node)
    if op is None or op.name != "cat" or not isinstance(op.args["tensors"], tuple):
        return None
    parts, dim = op.args["tensors"], op.args["dim"]
    values = [_value(program, part) for part in parts]
    if len(parts) < 2 or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    ranks = {value.dim() for value in values}  # cat() skips an empty tensor of another rank
    if len(ranks) > 1 or dim != ranks.pop() - 1 - extent:
        return None
    return parts, dim, tuple(int(value.shape[dim]) for value in values)


def _value(program: Program, part: Any) -> Any:
    if isinstance(part, Attr):
        return program.tensor(part.name)
    return value_of(part) if isinstance(part, fx.Node) else None


# -- frames and states -----------------------------------------------------------------------------


def _readings(
    program: Program, steps: list[ConvStep], lanes: Lanes
) -> Iterator[tuple[Reading, list[ConvStep]]]:
    """Groups of steps that read frames of the same families, and a state as well."""
    op, join = steps[0].op, steps[0].join
    if op is not None and any(node in lanes for node in op.nodes() if node is not join):
        return  # the weights come from a frame
    carried = _behind(program, {step.layer for step in steps})
    alike: dict[Reading, list[ConvStep]] = {}
    frames: dict[Reading, set[int]] = {}
    for step in steps:
        homes = [_home(part, lanes, carried) for part in step.parts]
        first = next((home[1] for home in homes if home is not None), 0)
        reading = tuple(home and (home[0], home[1] - first) for home in homes)
        alike.setdefault(reading, []).append(step)
        frames.setdefault(reading, set()).add(first)
    for reading, members in alike.items():
        if None in reading and any(reading) and len(frames[reading]) > 1:
            yield reading, members


def _home(part: Part, lanes: Lanes, carried: set[fx.Node]) -> tuple[Family, int] | None:
    """The family and lane of a frame; None for a state."""
    if isinstance(part, Attr) or part not in lanes or part in carried:
        return None
    family, lane = lanes[part]
    return None if family.uniform or len(family.lanes) < 2 else (family, lane)


def _behind(program: Program, layers: set[fx.Node]) -> set[fx.Node]:
    """Every node that depends on one of ``layers``."""
    found = set(layers)
    for node in program.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _unbatched(family: Family, places: Places) -> Iterator[Reason]:
    """Why the frames of ``family`` cannot be batched."""
    loop, _ = places.get(family.first, (None, family))
    reasons = () if loop is None else loop.reasons
    writes = [reason for reason in reasons if reason.code is Code.VISIBLE_WRITE]
    if writes:
        yield from writes
    elif family.source is None and _plan(family, places) is None:
        others = [reason for reason in reasons if reason.code is not Code.RECURRENCE]
        text = f"{family.name} of the frames cannot be batched"
        yield from others or (Reason(Code.UNEQUAL_FRAMES, text),)


def _plan(family: Family, places: Places) -> Batching | None:
    """How ``family`` is batched, in the loop that it is part of."""
    if family.first not in places:
        return None
    loop, same = places[family.first]
    return loop.plans.get(same)


def _together(
    step: ConvStep, read: Mapping[int, Family], places: Places
) -> tuple[tuple[int, ...], ...]:
    """Groups of frames that may be joined before they are batched: those of the same samples."""
    groups: dict[Any, list[int]] = {}
    for position, family in read.items():
        plan, source = _plan(family, places), family.source
        samples: Any = position if plan is None else plan.origin
        if source is not None:
            samples = source.base, source.dim, source.length is None
        groups.setdefault(samples if step.dim > 0 else position, []).append(position)
    return tuple(map(tuple, groups.values()))
