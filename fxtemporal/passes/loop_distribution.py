"""Runs what only reads the states of a recurrence once, behind it.

::

    for t in range(T):                          for t in range(T):
        h = cell(h, x[:, t])                        h = cell(h, x[:, t]);  states.append(h)
        outs.append(head(h))                    outs = head(torch.stack(states, 1)), once

The cycle stays serial, and is all that stays. :mod:`fxtemporal.analysis.gathered_lanes` finds the
calls of a layer that do not read each other. Their inputs are stacked, which makes a clip of them,
and the loop over this clip is re-rolled as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import fx

from fxtemporal.analysis.aliasing import Aliasing
from fxtemporal.analysis.effects import may_end_at
from fxtemporal.analysis.gathered_lanes import Gathered, blockers, gathered_lanes, sunk
from fxtemporal.analysis.loops import Loop, computes, loops_of
from fxtemporal.ir.guards import stacked
from fxtemporal.ir.node_meta import copy_meta, mark_clip
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.ir.values import rank
from fxtemporal.passes.rule import Rule, Site
from fxtemporal.passes.time_distribute import TimeDistribute

__all__ = ["LoopDistribution"]


class LoopDistribution(Rule[Gathered]):
    """Calls of a layer on states of a recurrence, or on other tensors → one call behind them."""

    name = "loop-distribution"
    moves_others = True
    folds_loops = True

    def candidates(self, program: Program) -> Iterable[Gathered]:
        found = list(gathered_lanes(program))
        loops = loops_of(program) if found else ()
        # What TimeDistribute can do, and left as it is, was not faster, or takes too much memory.
        planned = {node for loop in loops for family in loop.plans for node in family.nodes}
        return (gathered for gathered in found if not planned.issuperset(gathered.calls))

    def site(self, program: Program, candidate: Gathered) -> Site:
        first = candidate.calls[0]
        return Site(self.name, first.name, program.module_path(first), program.location(first))

    def preconditions(self, program: Program, candidate: Gathered) -> Iterator[Reason]:
        found = list(blockers(program, candidate, Aliasing(program)))
        yield from found
        if found:
            return
        trial = program.copy()
        copies = dict(zip(program.graph.nodes, trial.graph.nodes, strict=True))
        calls = tuple(copies[call] for call in candidate.calls)
        inputs = tuple(copies[source] for source in candidate.inputs)
        stack, loop = _gathered(trial, Gathered(candidate.op, calls, inputs))
        if loop is None or not any(map(computes, loop.plans)):
            yield from (loop and loop.reasons) or (
                Reason(Code.NOTHING_TO_BATCH, "the stacked calls are no loop"),
            )
        elif not may_end_at(trial, stack):
            text = "the forward writes or draws before it, so that a call in which they have other "
            text += "shapes could not run the original instead"
            yield Reason(Code.VISIBLE_WRITE, text, program.location(candidate.calls[0]))

    def nodes(self, program: Program, candidate: Gathered) -> Iterable[fx.Node]:
        return candidate.calls

    def what(self, program: Program, candidate: Gathered) -> str:
        return f"{len(candidate.calls)} calls of {candidate.op.name} that do not read each other"

    def becomes(self, program: Program, candidate: Gathered) -> str:
        return "one call on their stacked inputs, and what follows it once"

    def detail(self, program: Program, candidate: Gathered) -> Mapping[str, Any]:
        return {"frames": len(candidate.calls)}

    def rewrite(self, program: Program, candidate: Gathered) -> Mapping[str, Any]:
        _, loop = _gathered(program, candidate)
        assert loop is not None
        return TimeDistribute().rewrite(program, loop)


def _gathered(program: Program, gathered: Gathered) -> tuple[fx.Node, Loop | None]:
    """Stack the inputs of the calls, and have each call read its entry: the stack and the loop."""
    graph, last = program.graph, max(gathered.inputs)
    moved = sunk(program, gathered)
    with graph.inserting_after(last):
        where = program.location(gathered.calls[0])
        read = list(gathered.inputs)
        stack = graph.call_function(stacked, (read, rank(last), where))
    mark_clip(stack)
    place = stack
    for number, call in enumerate(gathered.calls):
        with graph.inserting_after(place):
            place = graph.call_method("select", (stack, 1, number))
        copy_meta(place, call)
        call.replace_input_with(gathered.inputs[number], place)
    for node in moved:
        place.append(node)
        place = node
    program.fill_in()
    first = gathered.calls[0]
    loops = (loop for loop in loops_of(program) if any(first in f.nodes for f in loop.families))
    return stack, next(loops, None)
