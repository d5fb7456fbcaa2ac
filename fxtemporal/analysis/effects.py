"""Checks whether nodes may move to an earlier place in the graph.

Moving a node up changes nothing if it passes no node that writes what it reads or reads what it
writes, and if draws of random numbers, updates of statistics and unknown calls keep their order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.analysis.aliasing import Aliasing, of_library, written_by
from fxtemporal.ir.admitted import AdmittedFrames
from fxtemporal.ir.guards import QUESTIONS, guard, stacked
from fxtemporal.ir.node_meta import has_value, value_of
from fxtemporal.ir.prepared import Prepared
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.ir.shallow_copy import runs_torch_alone
from fxtemporal.ir.values import run_node
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.dispatch import TorchDispatchMode
from fxtemporal.support.torch_private.operators import OpOverload

__all__ = ["Mover", "is_checked_first", "leaves_no_trace", "may_end_at", "needed_by"]


def needed_by(nodes: Iterable[Any], start: fx.Node) -> list[fx.Node]:
    """``nodes`` and all that they depend on, limited to nodes after ``start``, in graph order."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in found and start < node:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(found)


def is_checked_first(program: Program) -> bool:
    """Whether all guards stand before whatever a caller could see of a call that a guard ends.

    That is a write into an input, a parameter or a buffer, and a draw of random numbers.
    """
    first = next(_traces(program), None)
    ends = [node for node in program.graph.nodes if _ends_a_call(program, node)]
    return first is None or not ends or ends[-1] < first


def leaves_no_trace(program: Program) -> bool:
    """Whether a call only gives its outputs: it writes into nothing that outlives it."""
    return next(_traces(program), None) is None


def may_end_at(program: Program, node: fx.Node) -> bool:
    """Whether a call that ends at ``node`` leaves no trace, so that another module can run it."""
    first = next(_traces(program), None)
    return first is None or node < first


def _ends_a_call(program: Program, node: fx.Node) -> bool:
    return node.target in (guard, stacked) or isinstance(_module_of(program, node), AdmittedFrames)


def _traces(program: Program) -> Iterator[fx.Node]:
    """The nodes whose calls may show after the call of the graph."""
    aliasing = Aliasing(program)
    for node in program.graph.nodes:
        if _ends_a_call(program, node):
            continue
        written = written_by(program, node)
        reached = {other.op for tensor in written for other in aliasing.shared_with(tensor)}
        if reached & {"placeholder", "get_attr"} or _may_be_seen(program, node):
            yield node


def _may_be_seen(program: Program, node: fx.Node) -> bool:
    """Whether a call may draw random numbers or change a module: one that is not known may."""
    if not node.op.startswith("call") or node.target in QUESTIONS:
        return False
    if getattr(node.target, "__module__", "").startswith("fxtemporal."):
        return False  # a form
    if (op := program.op(node)) is not None:
        return op.random or op.updates
    if (module := _module_of(program, node)) is not None:
        still = not any(part.training for part in module.modules())
        return not isinstance(module, Prepared) and not (still and runs_torch_alone(module))
    gives = pytree.tree_leaves(value_of(node))
    if of_library(node) and not any(isinstance(value, torch.Tensor) for value in gives):
        return False
    return not _is_pure(program, node)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an op of torch draws random numbers or writes, in a call on fake tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= not isinstance(func, OpOverload) or _draws_or_writes(func)
        return func(*args, **(kwargs or {}))


def _is_pure(program: Program, node: fx.Node) -> bool:
    """Whether all ops that a call of a library's function runs draw and write nothing."""
    if not of_library(node) or not all(map(has_value, node.all_input_nodes)):
        return False
    watch = _Watch()
    try:
        run_node(program.gm, node, program.fake_mode, watch)
    except Exception:  # its size depends on the data, say
        return False
    return not watch.seen


def _draws_or_writes(overload: OpOverload) -> bool:
    schema = overload._schema
    statistics = any(argument.name.startswith("running_") for argument in schema.arguments)
    random = torch.Tag.nondeterministic_seeded in overload.tags
    return random or statistics or schema.is_mutable


def _module_of(program: Program, node: fx.Node) -> nn.Module | None:
    return program.gm.get_submodule(str(node.target)) if node.op == "call_module" else None


class Mover:
    """Finds the reasons against moving nodes up in the graph."""

    def __init__(self, program: Program, aliasing: Aliasing) -> None:
        self._program = program
        self._aliasing = aliasing

    def blockers(
        self, moved: list[fx.Node], replaced: Collection[fx.Node], start: fx.Node
    ) -> Iterator[Reason]:
        """Reasons against moving ``moved``, in order, to ``start``, with ``replaced`` after them.

        One node takes the place of all ``replaced``; ``start`` is one of them, and they must write
        nothing.
        """
        goes = {*moved, *replaced}
        if len(goes) == 1:
            return
        last = max(goes)
        window = [start]
        while window[-1] is not last:
            window.append(window[-1].next)
        delicate = {node for node in window if self._delicate(node)}
        passed: list[fx.Node] = []
        passed_delicate: list[fx.Node] = []
        hoisted = set(moved)
        for node in window:
            if node in goes and node is not start:
                for other in passed if node in delicate else passed_delicate:
                    if node in replaced and other in replaced:
                        continue
                    reason = self._conflict(node, other)
                    if reason is not None:
                        yield reason
                        return
            if node not in hoisted:
                passed.append(node)
                passed_delicate += [node] if node in delicate else []

    def _conflict(self, node: fx.Node, other: fx.Node) -> Reason | None:
        """Why ``node`` cannot be moved before ``other``, an earlier node; None if it can."""
        where = self._program.called(node)
        if self._barrier(node) or self._barrier(other):
            text = f"{where}: {self._what(other)} may change how it is computed"
            return Reason(Code.UNSUPPORTED_OP, text)
        if self._effect(node) and self._effect(other):
            text = f"{where}: it would be called before {self._what(other)}, which may draw random "
            text += "numbers or keep a state too"
            op = self._program.op(node)
            random = op is not None and op.random
            return Reason(Code.RANDOMNESS if random else Code.UNSUPPORTED_OP, text)
        for writer, reader in ((node, other), (other, node)):
            for written in self._written(writer):
                if self._reads(reader, written):
                    where = self._program.called(writer)
                    text = f"{where}: it may write what {self._what(reader)} reads"
                    return Reason(Code.VISIBLE_WRITE, text)
        return None

    def _reads(self, reader: fx.Node, written: fx.Node) -> bool:
        if any(node.op == "get_attr" for node in self._aliasing.shared_with(written)):
            return True  # modules read their parameters, and no node shows it
        return any(
            self._aliasing.share(written, node) for node in (reader, *reader.all_input_nodes)
        )

    def _written(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if self._unknown(node) else written_by(self._program, node)

    def _delicate(self, node: fx.Node) -> bool:
        return self._effect(node) or bool(written_by(self._program, node))

    def _effect(self, node: fx.Node) -> bool:
        """Whether a call may do more than compute its value; unknown calls may."""
        op = self._program.op(node) if node.op.startswith("call") else None
        if op is None:
            return self._unknown(node)
        return op.random or op.updates

    def _unknown(self, node: fx.Node) -> bool:
        if not node.op.startswith("call") or node.target in QUESTIONS:
            return False
        return self._program.op(node) is None

    def _barrier(self, node: fx.Node) -> bool:
        """Whether an unknown call may set a mode (gradients, autocast): it returns no tensor."""
        if not self._unknown(node):
            return False
        values = pytree.tree_leaves(value_of(node))
        return not any(isinstance(value, torch.Tensor) for value in values)

    def _what(self, node: fx.Node) -> str:
        op = self._program.op(node)
        return node.name if op is None else op.name
