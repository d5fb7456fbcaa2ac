"""Which in-place writes something else can see.

``relu_(bn(x))`` writes memory that only it has: it may be treated as a pure op. ``x[:, t].add_(1)``
writes into the caller's tensor. The difference is told from storage: fake tensors share theirs as
the real ones would, and ops that may or may not copy (``reshape``, ``contiguous``, ``to``) are
taken to share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxtemporal.graph import Program

__all__ = ["MAY_SHARE", "Aliasing", "written_by"]

MAY_SHARE = frozenset(
    """
        contiguous detach expand expand_as flatten identity permute rearrange reshape squeeze to
        transpose type_as unflatten unsqueeze view movedim select slice getitem item unbind split
        chunk dropout narrow unfold
    """.split()
)


class Aliasing:
    """The storage classes of one graph, and the writes into them."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._parent: dict[object, object] = {}
        self._order = {node: position for position, node in enumerate(program.graph.nodes)}
        for node in program.graph.nodes:
            self._add(node)
        self._members: dict[object, list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            for key in self._keys(node):
                self._members[self._find(key)].append(node)

    def shared_with(self, node: fx.Node) -> list[fx.Node]:
        """Every node that may share memory with ``node``, itself included."""
        found = {m: None for key in self._keys(node) for m in self._members[self._find(key)]}
        return list(found)

    def share(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether the two may share memory."""
        mine = {self._find(key) for key in self._keys(one)}
        return any(self._find(key) in mine for key in self._keys(other))

    def writes(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """``(writer, written)`` for every in-place op of the graph."""
        for node in self._program.graph.nodes:
            for written in written_by(self._program, node):
                yield node, written

    def visible(self, writer: fx.Node, written: fx.Node) -> str | None:
        """Who else can see the write, as the end of a sentence; None where nobody can."""
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
        """Whether ``node`` is a view taken after the write, so that it is meant to see it."""
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
        op = self._program.op(node)
        shares = op is None or op.inplace or op.name in MAY_SHARE
        if op is None and node.op not in ("call_module", "call_function", "call_method"):
            return
        if not shares:
            return
        sources = node.all_input_nodes
        known = "val" in node.meta and op is None
        if known:
            return  # an unknown op: its fake output tells whether it shares
        for source in sources[:1]:
            for mine in self._keys(node):
                for theirs in self._keys(source):
                    self._union(mine, theirs)

    def _keys(self, node: fx.Node) -> list[object]:
        if "val" not in node.meta:
            return [node]
        tensors = [t for t in pytree.tree_leaves(node.meta["val"]) if isinstance(t, torch.Tensor)]
        return [_storage(tensor) for tensor in tensors]

    def _find(self, key: object) -> object:
        while (above := self._parent.get(key, key)) != key:
            self._parent[key] = self._parent.get(above, above)
            key = above
        return key

    def _union(self, one: object, other: object) -> None:
        self._parent[self._find(one)] = self._find(other)


def _storage(tensor: torch.Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # under vmap: all of these are taken to share
        return "no storage"


def written_by(program: Program, node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory ``node`` writes."""
    op = program.op(node)
    if op is not None:
        written = op.args.get("input")
        return [written] if op.inplace and isinstance(written, fx.Node) else []
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return []
    if node.op == "call_method":
        name = str(node.target)
        return [first] if name.endswith("_") and not name.endswith("__") else []
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            return [
                value
                for argument, value in zip(schema.arguments, node.args, strict=False)
                if argument.alias_info is not None
                and argument.alias_info.is_write
                and isinstance(value, fx.Node)
            ]
        name = getattr(node.target, "__name__", "")
        inplace = node.kwargs.get("inplace") or name == "setitem"
        inplace = inplace or (name.endswith("_") and not name.endswith("__"))
        return [first] if inplace else []
    if node.op == "call_module":
        module = program.gm.get_submodule(str(node.target))
        return [first] if getattr(module, "inplace", False) else []
    return []
