"""Finds calls of one layer that do not depend on each other, behind a recurrence or on any tensors.

::

    for t in range(T):
        h = cell(h, x[:, t])        serial: each call reads the one before
        outs.append(head(h))        T calls of `head`, none of which reads another

Calls of one op with the same parameters, on inputs of the same shape, are *levels*: a call's level
is the number of calls of its kind on the longest way to it. Calls of one level cannot reach each
other, so they can run at once, on their inputs stacked. A recurrence has one call on each level.
This is loop distribution (Allen and Kennedy, *Optimizing Compilers for Modern Architectures*), on
the unrolled graph. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.aliasing import Aliasing, written_by
from fxtemporal.analysis.gradients import with_gradients
from fxtemporal.analysis.interference import mode_switch
from fxtemporal.ir.guards import guard
from fxtemporal.ir.node_meta import needed_value, value_of
from fxtemporal.ir.ops import Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason

__all__ = ["Gathered", "blockers", "gathered_lanes", "sunk"]

_LEAST = 3
"""Fewer calls are left as they are: a stack costs a copy."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Calls of one layer on one level, in order, and the input of each."""

    op: Op
    calls: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


def gathered_lanes(program: Program) -> Iterator[Gathered]:
    """The calls of each layer and level, in graph order of the first one."""
    flows = with_gradients(program)
    kinds: dict[Any, list[tuple[fx.Node, Op]]] = {}
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is not None and op.owns and op.pure and _is_layer(op):
            (source,) = op.nodes()
            value = needed_value(source)
            described = str(value.shape), value.dtype, node in flows, source in flows
            kinds.setdefault((op.static(), described), []).append((node, op))
    found = []
    for calls in kinds.values():
        sources = {node: op.nodes()[0] for node, op in calls}
        for level in _levels(program, [*sources]) if len(calls) >= _LEAST else ():
            inputs = tuple(sources[node] for node in level)
            if len(set(inputs)) == len(level) >= _LEAST:
                found.append(Gathered(calls[0][1], tuple(level), inputs))
    yield from sorted(found, key=lambda gathered: gathered.calls[0])


def _is_layer(op: Op) -> bool:
    """Whether ``op`` computes much from one tensor, whose dimension 0 is the batch, and weights."""
    nodes = op.nodes()
    heavy = op.name == "linear" or "conv" in op.name
    tensor = len(nodes) == 1 and isinstance(value_of(nodes[0]), torch.Tensor)
    return (
        heavy and tensor and nodes[0] is op.args.get("input") and needed_value(nodes[0]).dim() > 1
    )


def _levels(program: Program, calls: list[fx.Node]) -> list[list[fx.Node]]:
    kind, level = set(calls), dict[fx.Node, int]()
    levels: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        known = max((level[source] for source in node.all_input_nodes), default=0)
        if node in kind:
            known += 1
            levels.setdefault(known, []).append(node)
        level[node] = known
    return list(levels.values())


def sunk(program: Program, gathered: Gathered) -> list[fx.Node]:
    """The nodes that have to stand behind the last input: the calls, and what depends on them."""
    last = max(gathered.inputs)
    moved = {call for call in gathered.calls if call < last}
    for node in sorted(moved):
        pending = [node]
        while pending:
            for user in pending.pop().users:
                if user < last and user not in moved:
                    moved.add(user)
                    pending.append(user)
    return sorted(moved)


def blockers(program: Program, gathered: Gathered, aliasing: Aliasing) -> Iterator[Reason]:
    """Why the calls, and what depends on them, may not run behind the last input."""
    last = max(gathered.inputs)
    moved = sunk(program, gathered)
    own = set(moved)
    switch = mode_switch(program, min(gathered.calls), max(*gathered.calls, last))
    if switch is not None:
        text = f"{program.called(switch)} stands between them, and may switch a mode"
        yield Reason(Code.UNSUPPORTED_OP, text, program.location(switch))
        return
    for node in moved:
        op = program.op(node) if node.op.startswith("call") else None
        if node.target is guard:
            continue
        if op is None or op.random or op.updates:
            text = f"{program.called(node)}: it may draw random numbers or keep a state, and would "
            text += f"run after {program.called(last)}"
            code = Code.UNSUPPORTED_OP if op is None else Code.RANDOMNESS
            yield Reason(code, text, program.location(node))
            return
        for written in written_by(program, node):
            if not own.issuperset(aliasing.shared_with(written)):
                text = f"{program.called(node)}: it may write what is read before its new place"
                yield Reason(Code.VISIBLE_WRITE, text, program.location(node))
                return
    # The stack reads all inputs at once: earlier than some calls did, and later than others.
    window = _between(moved[0] if moved else last, max(gathered.calls))
    read = {source for node in moved for source in node.all_input_nodes} | set(gathered.inputs)
    for node in window:
        for written in () if node in own else written_by(program, node):
            if any(aliasing.share(written, source) for source in read):
                text = f"{program.called(node)}: it may write what the calls read"
                yield Reason(Code.VISIBLE_WRITE, text, program.location(node))
                return


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not last:
        yield node
        node = node.next
    yield last
