"""Replaces the steps of a recurrent cell by one call of the recurrent net.

Models that read a clip frame by frame often call ``nn.LSTMCell`` in a loop. The state goes from
step to step, so the steps cannot share a batch, but one op computes them all::

    before                                        after
    for t in range(T):                            y = x.movedim(1, 0)                # (T, B, F)
        h, c = cell(x[:, t], (h, c))              y, h, c = torch.lstm(y, (h, c), weights, ...)
        outs.append(h)
    out = torch.stack(outs, dim=1)                out = y.movedim(0, 1)              # (B, T, H)

which multiplies all inputs by the weights at once, and returns to Python once instead of T times.
:mod:`fxtemporal.analysis.cell_chains` finds such loops. The weights stay those of the cell. The
inputs of all steps move up to the first step, if :mod:`fxtemporal.analysis.effects` allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from fxtemporal.analysis.aliasing import Aliasing
from fxtemporal.analysis.cell_chains import CELLS, CellStep, Chain, chains_of, item_of
from fxtemporal.analysis.effects import Mover, needed_by
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Attr
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.building.sequence_op import Sequenced
from fxtemporal.passes.rule import Rule, Site

__all__ = ["RecurrentCells"]


class RecurrentCells(Rule[Chain]):
    """T calls of a recurrent cell → one call over (T, B, F)."""

    name = "recurrent-cells"
    moves_others = True  # the outputs of one chain are the inputs of the next layer's chain

    def candidates(self, program: Program) -> Iterable[Chain]:
        return chains_of(program)

    def site(self, program: Program, candidate: Chain) -> Site:
        first = candidate.nodes[0]
        target = program.module_path(first) or first.name
        return Site(self.name, first.name, target, program.location(first))

    def preconditions(self, program: Program, candidate: Chain) -> Iterator[Reason]:
        yield from candidate.reasons
        if not candidate.steps:
            return
        yield from _unlike(program, candidate.steps)
        yield from _cells_read(program, candidate.steps)
        aliasing = Aliasing(program)
        written = list(_written(program, candidate.nodes, aliasing))
        yield from written
        if not written:  # else the same writes would be reported twice
            first = candidate.nodes[0]
            inputs = needed_by((step.op.args["input"] for step in candidate.steps), first)
            yield from Mover(program, aliasing).blockers(inputs, frozenset(candidate.nodes), first)

    def detail(self, program: Program, candidate: Chain) -> Mapping[str, Any]:
        if not candidate.steps:
            return {"steps": len(candidate.nodes)}
        return {"kind": CELLS[candidate.steps[0].op.name], "steps": len(candidate.steps)}

    def nodes(self, program: Program, candidate: Chain) -> Iterable[fx.Node]:
        return candidate.nodes

    def what(self, program: Program, candidate: Chain) -> str:
        first, name = candidate.nodes[0], "recurrent cell"
        if first.op == "call_module":
            name = type(program.gm.get_submodule(str(first.target))).__name__
        return f"{len(candidate.nodes)} calls of a {name}"

    def becomes(self, program: Program, candidate: Chain) -> str:
        if not candidate.steps:
            return ""
        kind = CELLS[candidate.steps[0].op.name].partition("_")[0].upper()
        return f"one {kind} over {len(candidate.steps)} steps"

    def rewrite(self, program: Program, candidate: Chain) -> Mapping[str, Any]:
        detail = self.detail(program, candidate)
        Sequenced(program, candidate).run()
        return detail


# -- blockers --------------------------------------------------------------------------------------


def _unlike(program: Program, steps: Sequence[CellStep]) -> Iterator[Reason]:
    """Reasons if the steps do not fit into one call, or it would have another precision."""
    where = program.called(steps[0].node)
    op = steps[0].op
    if (op.args["b_ih"] is None) != (op.args["b_hh"] is None):
        text = f"{where}: {CELLS[op.name]} has two biases or none, and this cell has one"
        yield Reason(Code.UNSUPPORTED_OP, text)
    tensors = [t for step in steps for t in _tensors(program, step)]
    if any(t is None for t in tensors):
        text = f"{where}: whether its steps have a batch dimension needs example inputs"
        yield Reason(Code.SHAPES_UNKNOWN, text)
        return
    known = [t for t in tensors if t is not None]
    weights = [program.tensor(w.name) for w in steps[0].weights if isinstance(w, Attr)]
    if len({t.dim() for t in known}) > 1:
        text = f"{where}: only some of its inputs and states have a batch dimension"
        yield Reason(Code.UNEQUAL_FRAMES, text)
    if len({(t.dtype, t.device) for t in (*known, *weights)}) > 1:
        text = f"{where}: its inputs, states and weights differ in dtype or device"
        yield Reason(Code.UNEQUAL_FRAMES, text)
    elif _rounds_to_tf32(known[0]):
        text = (
            f"{where}: cuDNN may round to TF32 what the cells compute in float32; set "
            "torch.backends.cudnn.allow_tf32 = False, or allow it for matrix products too"
        )
        yield Reason(Code.UNSUPPORTED_OP, text)


def _tensors(program: Program, step: CellStep) -> list[Tensor | None]:
    """The values of a step's input, of the states that it reads and of those that it returns."""
    state = step.op.args["hx"]
    given = state if isinstance(state, tuple) else () if state is None else (state,)
    found: list[Tensor | None] = []
    for value in (step.op.args["input"], *given, step.node):
        known = program.tensor(value.name) if isinstance(value, Attr) else value_of(value)
        parts = known if isinstance(known, list | tuple) else (known,)
        found += [part if isinstance(part, Tensor) else None for part in parts]
    return found


def _rounds_to_tf32(value: Tensor) -> bool:
    """Whether a recurrent net on this device rounds more coarsely than its cell would."""
    if value.device.type != "cuda" or value.dtype != torch.float32:
        return False
    recurrent = getattr(torch.backends.cudnn, "rnn", None)
    if recurrent is None:  # before PyTorch 2.9
        return torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    products = torch.backends.cuda.matmul.fp32_precision
    return bool(recurrent.fp32_precision == "tf32" and products != "tf32")


def _cells_read(program: Program, steps: Sequence[CellStep]) -> Iterator[Reason]:
    """Reasons if c of an earlier step is read: the net gives h of every step, but c of the last."""
    if steps[0].op.name != "lstm_cell":
        return
    for step, after in pairwise(steps):
        passing = {after.node, *after.links}
        for node in (step.node, *after.links):
            for reader in node.users:
                if reader in passing or not _reads_cell(program, step, node, reader):
                    continue
                where = program.called(step.node)
                line = program.location(reader) or reader.name
                text = f"{where}: the cell state of a step before the last is read ({line}), and "
                text += "lstm gives only that of the last"
                yield Reason(Code.UNSUPPORTED_OP, text)
                return


def _reads_cell(program: Program, step: CellStep, node: fx.Node, reader: fx.Node) -> bool:
    """Whether ``reader`` gets c of ``step`` from ``node``: its tuple, or a part of it."""
    if node is not step.node:
        return not _from_hidden(program, step, node)
    if item_of(program, reader) in (0, -2):
        return False
    return bool(reader.users) or item_of(program, reader) is None


def _from_hidden(program: Program, step: CellStep, node: fx.Node) -> bool:
    """Whether a link carries h, not c."""
    while (op := program.op(node)) is not None and op.args["input"] is not step.node:
        node = op.args["input"]
    return item_of(program, node) in (0, -2)


def _written(program: Program, cells: Sequence[fx.Node], aliasing: Aliasing) -> Iterator[Reason]:
    """A reason if a state is written in place: the states would share memory in one output."""
    for writer, written in aliasing.writes():
        if any(aliasing.share(written, cell) for cell in cells):
            text = f"{program.called(writer)}: the in-place write reaches a state of the cell"
            yield Reason(Code.VISIBLE_WRITE, text)
            return
