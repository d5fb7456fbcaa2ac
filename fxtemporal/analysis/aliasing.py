"""Alias analysis: which nodes may share memory, and which in-place writes others can see.

``relu_(bn(x))`` writes memory that nothing else reads: it may be treated as a pure op.
``x[:, t].add_(1)`` writes into the caller's tensor. Storages tell the two apart: fake tensors share
theirs as the real ones would, and ops that may or may not copy (``reshape``, ``contiguous``,
``to``, dropout in eval mode) are assumed to share. :attr:`fxtemporal.ir.ops.Op.owns` marks ops that
never share. An unknown call may share with all its inputs, unless its fake value shows otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import fx

from fxtemporal.ir.guards import QUESTIONS
from fxtemporal.ir.node_meta import has_value, needed_value, seen_writing, value_of
from fxtemporal.ir.ops import Attr, Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.shallow_copy import carries_hooks, runs_torch_alone
from fxtemporal.support.disjoint_sets import DisjointSets
from fxtemporal.support.torch_private import pytree

__all__ = ["Aliasing", "of_library", "written_by"]

_LIBRARIES = frozenset(("torch", "fxtemporal", "einops", "math", "builtins", "_operator"))
"""Packages whose functions write only if their name says so, and hold no code of the user."""


class Aliasing:
    """The nodes of one graph grouped by shared storage, and the writes into each group."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._storages: DisjointSets[object] = DisjointSets()
        self._order = {node: position for position, node in enumerate(program.graph.nodes)}
        for node in program.graph.nodes:
            self._add(node)
        self._roots: dict[fx.Node, frozenset[object]] = {}
        self._members: dict[object, list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            self._roots[node] = self._found(node)
            for root in self._roots[node]:
                self._members[root].append(node)

    def shared_with(self, node: fx.Node) -> list[fx.Node]:
        """Every node that may share memory with ``node``, itself included."""
        return list({m: None for root in self._roots_of(node) for m in self._members[root]})

    def share(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether the two may share memory."""
        return not self._roots_of(one).isdisjoint(self._roots_of(other))

    def writes(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """``(writer, written)`` for every in-place op of the graph."""
        for node in self._program.graph.nodes:
            for written in written_by(self._program, node):
                yield node, written

    def visible(self, writer: fx.Node, written: fx.Node) -> str | None:
        """Who else can see the write, as the end of a sentence; None if nobody can."""
        after = self._order[writer]
        for node in self.shared_with(written):
            if node.op == "placeholder":
                return f"the input {node.name}"
            if node.op == "get_attr":
                return f"{node.target}, which the model keeps"
            if node is writer or self.derives_from(node, writer):
                continue
            for user in node.users:
                if user is not writer and self._order[user] > after:
                    return f"{node.name}, which {user.name} reads later"
        return None

    def derives_from(self, node: fx.Node, writer: fx.Node) -> bool:
        """Whether ``node`` is computed from the result of ``writer``, so must see its write."""
        seen: set[fx.Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current is writer:
                return True
            if current in seen or self._order[current] < self._order[writer]:
                continue
            seen.add(current)
            pending.extend(current.all_input_nodes)
        return False

    def _add(self, node: fx.Node) -> None:
        if not node.op.startswith("call"):
            return
        op = self._program.op(node)
        if op is None and has_value(node):
            return  # an unknown op: its fake output tells whether it shares
        if op is not None and op.owns:
            return
        for source in _shared_inputs(node, op):
            for mine in self._keys(node):
                for theirs in self._keys(source):
                    self._storages.unite(mine, theirs)

    def _roots_of(self, node: fx.Node) -> frozenset[object]:
        known = self._roots.get(node)
        return self._found(node) if known is None else known  # made since

    def _found(self, node: fx.Node) -> frozenset[object]:
        return frozenset(map(self._storages.find, self._keys(node)))

    def _keys(self, node: fx.Node) -> list[object]:
        if not has_value(node):
            return [node]
        if isinstance(value_of(node), torch.Tensor):
            return [_storage(needed_value(node))]
        tensors = [t for t in pytree.tree_leaves(needed_value(node)) if isinstance(t, torch.Tensor)]
        return [_storage(tensor) for tensor in tensors]


def _shared_inputs(node: fx.Node, op: Op | None) -> list[fx.Node]:
    """The inputs whose memory the result may share: the first one of a known op that has one."""
    if op is None or "input" not in op.args:
        return node.all_input_nodes
    first = op.args["input"]
    if isinstance(first, Attr):
        return [source for source in node.all_input_nodes if source.op == "get_attr"]
    return [source for source in op.nodes()[:1] if source is first] or node.all_input_nodes


def _storage(tensor: torch.Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # under vmap: all such tensors are assumed to share
        return "no storage"


def written_by(program: Program, node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory ``node`` writes."""
    op = program.op(node)
    if op is not None:
        written = op.args.get("input") if op.inplace else None
        if isinstance(written, Attr):
            return [source for source in node.all_input_nodes if source.op == "get_attr"]
        return [written] if isinstance(written, fx.Node) else []
    if not node.op.startswith("call") or node.target in QUESTIONS:
        return []
    name = getattr(node.target, "__name__", str(node.target))
    if node.op != "call_module" and (name == "setitem" or _says_so(name)) and node.args:
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    writes = seen_writing(node)
    if writes is not None and has_value(node):  # it was run, on fake tensors
        return node.all_input_nodes if writes else []
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        given = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False))
        given |= node.kwargs
        written = [
            given.get(argument.name)
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return [value for value in written if isinstance(value, fx.Node)]
    return node.all_input_nodes if _may_write(program, node) else []


def _may_write(program: Program, node: fx.Node) -> bool:
    """Whether an unknown call may write its inputs: user code may, torch's only if it says so."""
    if node.op == "call_module":
        module = program.gm.get_submodule(str(node.target))
        says_so = any(getattr(p, "inplace", False) or carries_hooks(p) for p in module.modules())
        return says_so or not runs_torch_alone(module)
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    return node.op == "call_function" and not of_library(node)


def of_library(node: fx.Node) -> bool:
    """Whether a call is to a method, or to a function of a known library: not to user code."""
    home = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_method" or (
        node.op == "call_function" and home.partition(".")[0] in _LIBRARIES
    )


def _says_so(name: str) -> bool:
    """Whether an op of this name writes its first argument, like ``add_``."""
    return name.endswith("_") and not name.endswith("__")
