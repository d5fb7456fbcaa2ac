"""Replaces the joins of a loop (stack, cat, chains) by one op on all frames."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.node import Argument

from fxtemporal.analysis.accumulations import Join, Reduction, Writes
from fxtemporal.analysis.families import Family
from fxtemporal.analysis.loops import Loop, owns_memory
from fxtemporal.ir.node_meta import forget_value
from fxtemporal.ir.program import Program
from fxtemporal.ir.running import running_maximum, running_minimum
from fxtemporal.passes.building.batched_frames import Stacked, moved, pick, step_of

__all__ = ["Joiner"]


class Joiner:
    """Replaces the joins of ``loop`` by views and reductions of the batched ``values``."""

    def __init__(self, program: Program, loop: Loop, values: Mapping[Family, Stacked]) -> None:
        self.program = program
        self.graph = program.graph
        self.loop = loop
        self.values = values
        self._made: dict[fx.Node, fx.Node] = {}  # last node of a chain: its replacement

    def collect(self, join: Join) -> None:
        """Replace a chain of T nodes by one op."""
        homes = [self.loop.lanes[part] for part in join.parts]
        family = homes[0][0]
        if any(home is not family for home, _ in homes) or family not in self.values:
            return
        last = join.nodes[-1]
        with self.graph.inserting_before(last):
            frames = self.values[family].take(tuple(lane for _, lane in homes))
            if isinstance(join, Writes):
                self._write(join, frames)
            else:
                self._made[last] = self._reduce(join, frames)
                last.replace_all_uses_with(self._made[last])
        for node in reversed(join.nodes):
            self.graph.erase_node(node)

    def _reduce(self, join: Reduction, frames: Stacked) -> fx.Node:
        initial = join.initial
        if isinstance(initial, fx.Node):  # the chain before this one may be collected already
            initial = self._made.get(initial, initial)
        if join.name != "add":
            function = running_maximum if join.name == "maximum" else running_minimum
            start = () if initial is None else (initial,)
            return self.graph.call_function(function, (frames.unfolded(), frames.axis, *start))
        total = self.graph.call_method("sum", (frames.unfolded(), frames.axis))
        if initial is None or (not isinstance(initial, fx.Node) and initial == 0):
            return total
        if join.inplace:
            return self.graph.call_method("add_", (initial, total))
        return self.graph.call_function(torch.add, (initial, total))

    def _write(self, join: Writes, frames: Stacked) -> None:
        entries = pick(self.graph, join.buffer, join.dim, join.entries)
        value = moved(self.graph, frames.unfolded(), frames.axis, join.dim)
        self.graph.call_method("copy_", (entries, value))

    def stack_or_cat(self, reader: fx.Node) -> bool:
        """Replace a stack or cat over frames by a view of the batched value."""
        op = self.program.op(reader)
        if op is None or op.name not in ("stack", "cat") or reader in self.loop.lanes:
            return False
        homes = [self.loop.lanes.get(part) for part in op.args["tensors"]]
        families = {None if home is None else home[0] for home in homes}
        family = families.pop()
        wanted = tuple(home[1] for home in homes if home is not None)
        if families or family not in self.values:
            return False
        if step_of(wanted) is None and step_of(wanted[::-1]) is None:
            return False
        assert family is not None
        dim = op.args["dim"]
        with self.graph.inserting_before(reader):
            part = self.values[family].take(wanted)
            joined = moved(self.graph, part.unfolded(), part.axis, dim)
            if op.name == "cat":
                joined = self.graph.call_method("flatten", (joined, dim, dim + 1))
            own = not self._may_share(family, reader)
            method = "contiguous" if own else "clone"  # stack and cat give new, contiguous memory
            contiguous: dict[str, Argument] = {"memory_format": torch.contiguous_format}
            joined = self.graph.call_method(method, (joined,), {} if own else contiguous)
        reader.replace_all_uses_with(joined)
        forget_value(joined)
        self.graph.erase_node(reader)
        return True

    def _may_share(self, family: Family, join: fx.Node) -> bool:
        """Whether the joined frames, as a view of the batched value, could share memory visibly."""
        if not owns_memory(family):
            return True
        shared = set(self.loop.aliasing.shared_with(join))
        written = any(written in shared for _, written in self.loop.aliasing.writes())
        others = {user for node in family.nodes for user in node.users} - {join}
        escapes = any(user.op == "output" for node in shared for user in node.users)
        return written or (escapes and any(user not in self.loop.lanes for user in others))
