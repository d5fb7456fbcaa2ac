"""Chains of recurrent cells: each call reads the state that the call before it returned.

::

    h0 = cell(x[:, 0], h);  h1 = cell(x[:, 1], h0);  h2 = cell(x[:, 2], h1)      one chain, 3 steps

A chain ends where a step's *input* depends on a step of the same chain: a decoder that reads its
own output gives chains of one step each. An op that changes the state between two steps ends a
chain too. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxtemporal.analysis.families import is_whole
from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module

__all__ = ["CELLS", "CellStep", "Chain", "chains_of", "item_of", "whole"]

CELLS = {
    "lstm_cell": "lstm",
    "gru_cell": "gru",
    "rnn_tanh_cell": "rnn_tanh",
    "rnn_relu_cell": "rnn_relu",
}
"""``{op of one step: op of a sequence}``."""


@dataclass(frozen=True, eq=False)
class CellStep:
    """One call of a cell. ``before`` is the call whose state it reads unchanged.

    ``links`` are the nodes from ``before`` to this call: items of its tuple, copies.
    """

    node: fx.Node
    op: Op
    before: fx.Node | None = None
    links: tuple[fx.Node, ...] = ()

    @property
    def weights(self) -> tuple[Any, ...]:
        return self.op.name, *(self.op.args[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh"))


@dataclass(frozen=True, eq=False)
class Chain:
    """Calls of one cell in graph order; ``reasons`` say why they do not form a chain, if so."""

    nodes: tuple[fx.Node, ...]
    steps: tuple[CellStep, ...] = ()
    reasons: tuple[Reason, ...] = ()


def chains_of(program: Program) -> list[Chain]:
    """Every chain of two or more steps, and calls that ``reasons`` keep from forming one.

    In graph order.
    """
    cells = _cells(program)
    groups: dict[tuple[Any, ...], list[CellStep]] = {}
    for step in cells.values():
        groups.setdefault(step.weights, []).append(step)
    found = list(_blocked(program))
    for group in groups.values():
        runs = [run for chain in _linked(group) for run in _runs(program, chain)]
        found += [Chain(tuple(s.node for s in run), run) for run in runs if len(run) > 1]
        single = [run[0] for run in runs if len(run) == 1]
        reasons = _why_single(program, single)
        if reasons:
            found.append(Chain(tuple(s.node for s in single), reasons=reasons))
    return sorted(found, key=lambda chain: chain.nodes[0])


def whole(program: Program, value: Any) -> Any:
    """``value`` without slices that take everything, which torch.export writes for ``x[:, t]``."""
    while isinstance(value, fx.Node) and (op := program.op(value)) is not None and is_whole(op):
        value = op.args["input"]
    return value


def item_of(program: Program, node: fx.Node) -> int | None:
    """The index that ``node`` takes of a cell's tuple; None if it is no such item."""
    op = program.op(node) if node.op.startswith("call") else None
    index = op.args["index"] if op is not None and op.name == "item" else None
    return index if isinstance(index, int) else None


def _cells(program: Program) -> dict[fx.Node, CellStep]:
    cells: dict[fx.Node, CellStep] = {}
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is not None and op.name in CELLS:
            before, links = _before(program, op, cells)
            cells[node] = CellStep(node, op, before, links)
    return cells


def _before(
    program: Program, op: Op, cells: dict[fx.Node, CellStep]
) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The call whose state ``op`` reads, and the nodes that pass it on."""
    state = op.args["hx"]
    parts = state if isinstance(state, tuple) else (state,)
    ends, links = [], []
    for part in parts:
        end, path = _carried(program, part)
        ends.append(end)
        links += path
    first = ends[0] if ends else None
    if op.name == "lstm_cell" and isinstance(state, tuple):
        first = _halves(program, ends)
    if first not in cells or first is None or cells[first].op.name != op.name:
        return None, ()
    return first, tuple(sorted(set(links)))


def _carried(program: Program, value: Any) -> tuple[Any, list[fx.Node]]:
    """The node that computed the numbers of ``value``, and the nodes that passed them on."""
    path: list[fx.Node] = []
    while isinstance(value, fx.Node) and (op := program.op(value)) is not None:
        passes = Trait.PASSES_ON in op.traits and not op.random and not op.inplace
        if not passes and not is_whole(op):
            if op.name == "item":
                path.append(value)
            break
        path.append(value)
        value = op.args["input"]
    return value, path


def _halves(program: Program, ends: Sequence[Any]) -> fx.Node | None:
    """The call whose ``(h, c)`` the two ``ends`` are, in this order; None if there is none."""
    sources = []
    for position, end in enumerate(ends):
        op = program.op(end) if isinstance(end, fx.Node) else None
        if op is None or op.name != "item" or op.args["index"] not in (position, position - 2):
            return None
        sources.append(op.args["input"])
    same = len(sources) == 2 and sources[0] is sources[1] and isinstance(sources[0], fx.Node)
    return sources[0] if same else None


def _linked(group: list[CellStep]) -> Iterator[list[CellStep]]:
    """The calls of one cell, sorted into lines; a state that two calls read goes to the first."""
    line: dict[fx.Node, list[CellStep]] = {}
    for step in group:
        if step.before in line and line[step.before][-1].node is step.before:
            steps = line[step.before]
            steps.append(step)
            line[step.node] = steps
        else:
            line[step.node] = [step]
    yield from {id(steps): steps for steps in line.values()}.values()


def _runs(program: Program, line: list[CellStep]) -> Iterator[tuple[CellStep, ...]]:
    """``line``, cut before each step whose input depends on the steps since the last cut."""
    if len(line) == 1:
        yield (replace(line[0], before=None),)
        return
    order = {step.node: number for number, step in enumerate(line)}
    latest: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        inputs = (latest.get(source, -1) for source in node.all_input_nodes)
        latest[node] = order.get(node, max(inputs, default=-1))
    start = 0
    for number, step in enumerate(line):
        source = step.op.args["input"]
        if number and isinstance(source, fx.Node) and latest[source] >= start:
            yield tuple(line[start:number])
            start = number
    yield tuple(line[start:])


def _why_single(program: Program, single: list[CellStep]) -> tuple[Reason, ...]:
    """Why calls of one cell that depend on one another form no chain; () if they do not depend."""
    if len(single) < 2:
        return ()
    mine = {step.node for step in single}
    depends: set[fx.Node] = set()
    for node in program.graph.nodes:
        if any(source in mine or source in depends for source in node.all_input_nodes):
            depends.add(node)
    reasons: dict[Reason, None] = {}
    for step in single:
        where = program.called(step.node)
        source, state = step.op.args["input"], step.op.args["hx"]
        if source in depends or source in mine:
            text = f"{where}: its input depends on what an earlier step gave"
            reasons[Reason(Code.RECURRENCE, text, program.location(step.node))] = None
        elif step.before is None and step.node in depends:
            last, _ = _carried(program, state[0] if isinstance(state, tuple) else state)
            text = f"{where}: its state is not just what the step before left"
            if isinstance(last, fx.Node) and last not in mine:
                line = program.location(last)
                text += f": {_what(program, last)} made it" + (f" ({line})" if line else "")
            reasons[Reason(Code.RECURRENCE, text, program.location(step.node))] = None
    return tuple(reasons)


def _what(program: Program, node: fx.Node) -> str:
    op = program.op(node)
    return node.name if op is None else op.name


def _blocked(program: Program) -> Iterator[Chain]:
    """Cells called more than once that must stay calls: hooks, for example, change what they do."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and program.op(node) is None:
            module = program.gm.get_submodule(str(node.target))
            if isinstance(module, nn.RNNCellBase):
                calls.setdefault(module, []).append(node)
    for nodes in calls.values():
        reason = blocked_module(program, nodes[0])
        if reason is not None and len(nodes) > 1:
            yield Chain(tuple(nodes), reasons=(reason,))
