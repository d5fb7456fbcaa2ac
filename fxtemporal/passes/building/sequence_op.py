"""Replaces the steps of a recurrent cell by one call, and their readers' inputs by its outputs.

==============  =============================  =========================================
value read      from the cells                 from the sequence op
==============  =============================  =========================================
h of step t     (B, H)                         entry t of the outputs, (T, B, H)
all h, joined   stack: (B, T, H), (T, B, H)    the outputs, with T moved there
last state      h, and c of an LSTM            the last states, (1, B, H), without the 1
==============  =============================  =========================================
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument

from fxtemporal.analysis.aliasing import Aliasing
from fxtemporal.analysis.cell_chains import CELLS, CellStep, Chain, item_of, whole
from fxtemporal.analysis.effects import needed_by
from fxtemporal.ir.node_meta import copy_meta, needed_value
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import shape
from fxtemporal.passes.building.batched_frames import pick

__all__ = ["Sequenced"]

_SEQUENCES = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}


class Sequenced:
    """Inserts one call before the first step, and makes the readers of the steps read its parts."""

    def __init__(self, program: Program, chain: Chain) -> None:
        self.program = program
        self.graph = program.graph
        self.steps = chain.steps
        self.first = self._origin = chain.nodes[0]
        self.nested = chain.steps[0].op.name == "lstm_cell"
        self.batched = len(_hidden_sizes(chain.steps[0])) == 2
        self.aliasing = Aliasing(program)
        self.owned = [self._leaves(step.node) for step in chain.steps]

    def run(self) -> None:
        for node in needed_by((step.op.args["input"] for step in self.steps), self.first):
            self.first.prepend(node)
        with self.graph.inserting_before(self.first):
            self._call()
        read = [number for node, number in self._hidden().items() if self._is_read(node, number)]
        self.last_alone = set(read) <= {len(self.steps) - 1}
        for reader in sorted({user for node in self._hidden() for user in node.users}):
            self._join(reader)
        for number in reversed(range(len(self.steps))):
            self._replace(number)
        for part in self.parts:
            if not part.users:
                self.graph.erase_node(part)
        for value in dict.fromkeys(step.op.args["input"] for step in self.steps):
            self._erase(value)

    # the call

    def _call(self) -> None:
        """Insert the sequence op and its parts: ``outputs`` (T, B, H) or (T, H), and last states.

        It is called in training mode. Without dropout that gives the same numbers, and it gives
        gradients: cuDNN has none in eval mode.
        """
        op = self.steps[0].op
        sequence = self._sequence()
        weights = [op.args[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
        arguments: tuple[Argument, ...] = (
            sequence,
            self._state(sequence),
            [self.program.argument(w) for w in weights if w is not None],
            op.args["b_ih"] is not None,
            *(1, 0.0, True, False, False),  # layers, dropout, training, bidirectional, batch_first
        )
        result = self._new(_SEQUENCES[CELLS[op.name]], *arguments)
        self.parts = [self._new(operator.getitem, result, i) for i in range(2 + self.nested)]
        self.outputs, *self.last = self.parts
        if not self.batched:
            squeezed = [self._method("squeeze", part, 1) for part in self.parts]
            self.outputs, *self.last = squeezed
            self.parts = [*squeezed, *self.parts]

    def _sequence(self) -> fx.Node:
        """The inputs of all steps, (T, B, F): a view if they are lanes of one tensor."""
        inputs = [step.op.args["input"] for step in self.steps]
        lanes = [_lane(self.program, value) for value in inputs]
        bases = {lane[:2] if lane else None for lane in lanes}
        entries = tuple(lane[2] for lane in lanes if lane)
        base, dim = bases.pop() or (None, 0)
        if bases or base is None or _step(entries) is None:
            value = self._new(torch.stack, [self.program.argument(x) for x in inputs], 0)
        else:
            value = self._parts(self.program.argument(base), dim, entries)
            value = self._method("movedim", value, dim, 0) if dim else value
        return value if self.batched else self._method("unsqueeze", value, 1)

    def _parts(self, base: fx.Node, dim: int, entries: tuple[int, ...]) -> fx.Node:
        """Only those ``entries``; ``base`` itself if a guard fixes its size to their number."""
        rising = entries if entries[0] < entries[-1] else entries[::-1]
        check = self.program.held()[0].get((base, dim))
        sizes = shape(base)
        every = sizes is not None and rising == tuple(range(sizes[dim]))
        if not (every and check is not None and check < self.first):
            base = pick(self.graph, base, dim, rising)
        return base if rising is entries else self._method("flip", base, (dim,))

    def _state(self, sequence: fx.Node) -> Argument:
        """The state before the first step, (1, B, H) each; zeros if none is given."""
        given = self.steps[0].op.args["hx"]
        if given is None:
            batch = self._method("size", sequence, 1)
            hidden = _hidden_sizes(self.steps[0])[-1]
            zeros = self._method("new_zeros", sequence, (1, batch, hidden))
            return (zeros, zeros) if self.nested else zeros
        if self.nested and not isinstance(given, tuple):
            given = tuple(self._new(operator.getitem, given, i) for i in range(2))
        parts = []
        for state in given if self.nested else (given,):
            value = self._method("unsqueeze", self.program.argument(state), 0)
            value = value if self.batched else self._method("unsqueeze", value, 0)
            parts.append(self._method("contiguous", value))
        return tuple(parts) if self.nested else parts[0]

    # the readers of the steps

    def _hidden(self) -> dict[fx.Node, int]:
        """``{node that is h of a step: number of the step}``."""
        found: dict[fx.Node, int] = {}
        for number, step in enumerate(self.steps):
            if not self.nested:
                found[step.node] = number
                continue
            halves = [user for user in step.node.users if item_of(self.program, user) in (0, -2)]
            found.update(dict.fromkeys(halves, number))
        return found

    def _is_read(self, node: fx.Node, number: int) -> bool:
        """Whether anything but the next step reads h of a step."""
        after = self.steps[number + 1] if number + 1 < len(self.steps) else None
        passing = {after.node, *after.links} if after is not None else set()
        return any(user not in passing for user in node.users)

    def _join(self, reader: fx.Node) -> None:
        """Replace a stack or cat over steps by a view of the outputs, copied where needed."""
        op = self.program.op(reader) if reader.op.startswith("call") else None
        if op is None or op.name not in ("stack", "cat"):
            return
        hidden = self._hidden()
        entries = tuple(hidden.get(part, -1) for part in op.args["tensors"])
        if -1 in entries or _step(entries) is None:
            return
        dim = op.args["dim"]
        self._origin = reader
        with self.graph.inserting_before(reader):
            rising = entries if entries[0] < entries[-1] else entries[::-1]
            value = self.outputs
            if rising != tuple(range(len(self.steps))):
                value = pick(self.graph, value, 0, rising)
            value = value if rising is entries else self._method("flip", value, (0,))
            value = self._method("movedim", value, 0, dim) if dim else value
            value = self._method("flatten", value, dim, dim + 1) if op.name == "cat" else value
            value = self._own(value, self._leaves(reader))
        reader.replace_all_uses_with(value)
        self.graph.erase_node(reader)

    def _replace(self, number: int) -> None:
        """Make the readers of a step read the outputs of the sequence op, and erase the step."""
        step = self.steps[number]
        self._origin = step.node
        for half in [user for user in step.node.users if item_of(self.program, user) is not None]:
            if half.users:
                index = item_of(self.program, half)
                half.replace_all_uses_with(self._part(number, 0 if index in (0, -2) else 1))
            self.graph.erase_node(half)
        if step.node.users and not self.nested:
            step.node.replace_all_uses_with(self._part(number, 0))
        for reader in list(step.node.users):  # the state as a whole, of the last step
            both = (self._part(number, 0), self._part(number, 1))
            _put(reader, step.node, both)
        self.graph.erase_node(step.node)
        for link in reversed(step.links):
            if not link.users:
                self.graph.erase_node(link)

    def _part(self, number: int, half: int) -> fx.Node:
        """h of a step, or c of the last step.

        If other steps are read too, h of the last is taken from the outputs like theirs: then the
        readers of all steps can be batched.
        """
        with self.graph.inserting_before(self.first):
            if half == 1 or self.last_alone:
                value = self._method("select", self.last[half], 0, 0)
            else:
                value = self._method("select", self.outputs, 0, number)
            return self._method("clone", value) if self.owned[number] else value

    def _own(self, value: fx.Node, leaves: bool) -> fx.Node:
        """``value`` made contiguous; always a copy if its memory ``leaves``: :meth:`_leaves`."""
        if not leaves:
            return self._method("contiguous", value)
        node = self._method("clone", value)
        node.kwargs = {"memory_format": torch.contiguous_format}
        return node

    def _leaves(self, node: fx.Node) -> bool:
        """Whether the memory of ``node`` is written, returned, or passed to an unknown call."""
        shared = set(self.aliasing.shared_with(node))
        if any(written in shared for _, written in self.aliasing.writes()):
            return True
        readers = {user for one in shared for user in one.users}
        return any(self.program.op(user) is None for user in readers)

    # nodes

    def _erase(self, value: Any) -> None:
        """Erase an input without readers, and the nodes that cut it out of its source."""
        if not isinstance(value, fx.Node) or value.users or _lane(self.program, value) is None:
            return
        sources = value.all_input_nodes
        self.graph.erase_node(value)
        for source in sources:
            op = self.program.op(source) if source.op.startswith("call") else None
            cuts = op is not None and (op.name == "unbind" or whole(self.program, source) != source)
            if cuts and not source.users:
                self.graph.erase_node(source)

    def _new(self, function: Any, *args: Any) -> fx.Node:
        return self._placed(self.graph.call_function(function, args))

    def _method(self, name: str, *args: Any) -> fx.Node:
        return self._placed(self.graph.call_method(name, args))

    def _placed(self, node: fx.Node) -> fx.Node:
        copy_meta(node, self._origin)
        return node


def _hidden_sizes(step: CellStep) -> tuple[int, ...]:
    """The shape of h, (B, H) or (H,)."""
    value = needed_value(step.node)
    return tuple((value[0] if isinstance(value, list | tuple) else value).shape)


def _put(reader: fx.Node, node: fx.Node, value: Any) -> None:
    """Make ``reader`` read ``value``, a tuple of nodes, instead of ``node``."""
    reader.args = fx.node.map_arg(reader.args, lambda n: value if n is node else n)
    reader.kwargs = fx.node.map_arg(reader.kwargs, lambda n: value if n is node else n)


def _lane(program: Program, value: Any) -> tuple[Any, int, int] | None:
    """``(base, dim, t)`` if ``value`` is entry t of dimension ``dim`` of ``base``, else None."""
    op = program.op(value) if isinstance(value, fx.Node) and value.op.startswith("call") else None
    if op is None:
        return None
    index = op.args.get("index")
    if op.name == "item" and isinstance(op.args["input"], fx.Node):
        op = program.op(op.args["input"])
        if op is None or op.name != "unbind":
            return None
    elif op.name != "select":
        return None
    dim = op.args["dim"]
    if type(index) is not int or not isinstance(dim, int) or dim < 0:
        return None
    return whole(program, op.args["input"]), dim, index


def _step(entries: tuple[int, ...]) -> int | None:
    """The distance between entries counted from the same end, if it is constant; else None."""
    steps = {b - a for a, b in pairwise(entries)}
    one_end = len({entry < 0 for entry in entries}) == 1
    return steps.pop() if len(steps) == 1 and 0 not in steps and one_end else None
