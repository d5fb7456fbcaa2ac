"""Runs frames that are folded into the batch in several chunks.

Folding T frames holds the activations of all of them at once. In chunks, only those of one chunk
are alive, and on a CPU they may stay in its cache::

    before                              after, in 2 chunks
    y = x.flatten(0, 1)                 y = x.flatten(0, 1)             # (B·T, C, H, W)
    y = relu(conv(y))                   a, b = cut(y, 2)                # (B·T/2, C, H, W) each
                                        a = relu(conv(a))               # frees all but the result
                                        b = relu(conv(b))
                                        y = joined([a, b], y)           # (B·T, C', H', W')

All chunks use the same parameters. :mod:`fxtemporal.tuning.chunk_counts` decides how many chunks a
region runs in.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.peak_memory import peak
from fxtemporal.analysis.row_regions import Region, regions_of
from fxtemporal.ir.guards import guard
from fxtemporal.ir.node_meta import forget_value, needed_value
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Reason
from fxtemporal.ir.row_chunks import cut, joined, shaped
from fxtemporal.passes.rule import Rule, Site

__all__ = ["FoldInChunks"]


class FoldInChunks(Rule[Region]):
    """Regions that work on folded frames → the same ops on one chunk of the frames at a time.

    ``chunks`` maps the key of a region to its number of chunks; other regions are left alone.
    """

    name = "fold-in-chunks"

    def __init__(self, chunks: Mapping[str, int]) -> None:
        self.chunks = dict(chunks)

    def candidates(self, program: Program) -> Iterable[Region]:
        # Last region first: a rewrite replaces nodes that later regions read, none before it.
        found = [region for region in regions_of(program) if region.key in self.chunks]
        return reversed(found)

    def site(self, program: Program, candidate: Region) -> Site:
        target = _module_path(program, candidate) or candidate.nodes[0].name
        places = (program.location(node) for node in candidate.nodes)
        return Site(self.name, candidate.key, target, next(filter(None, places), None))

    def preconditions(self, program: Program, candidate: Region) -> Iterator[Reason]:
        """None: the analysis returns only regions that may be cut."""
        yield from ()

    def nodes(self, program: Program, candidate: Region) -> Iterable[fx.Node]:
        return candidate.nodes

    def what(self, program: Program, candidate: Region) -> str:
        return f"{candidate.frames} folded frames"

    def becomes(self, program: Program, candidate: Region) -> str:
        count = self.chunks[candidate.key]
        return "one piece" if count == 1 else f"{count} chunks, one after another"

    def rewrite(self, program: Program, candidate: Region) -> Mapping[str, Any]:
        before = peak(program).bytes
        _Chunked(program, candidate, self.chunks[candidate.key]).run()
        program.refresh()
        return {
            "chunks": self.chunks[candidate.key],
            "frames": candidate.frames,
            "peak_bytes_before": before,
            "peak_bytes_after": peak(program).bytes,
        }

    def detail(self, program: Program, candidate: Region) -> Mapping[str, Any]:
        return {"frames": candidate.frames, "peak_bytes_before": peak(program).bytes}


def _module_path(program: Program, region: Region) -> str:
    """The module that holds the whole region."""
    paths = [program.module_path(node).split(".") for node in region.nodes if program.op(node)]
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in alike)


class _Chunked:
    """Inserts n copies of a region, each on a part of the rows, after its last node."""

    def __init__(self, program: Program, region: Region, chunks: int) -> None:
        self.program = program
        self.graph = program.graph
        self.region = region
        self.chunks = chunks
        self.own = sorted((*region.nodes, *region.asked))
        self.behind = self.own[-1].next
        self.rows = region.inputs[0]
        self.asked: dict[fx.Node, fx.Node] = {}
        self.shapes: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        late = self._dependents()
        with self.graph.inserting_before(self.behind):
            pieces = {value: self._pieces(value) for value in self.region.inputs}
            copies = [
                self._chunk({value: parts[i] for value, parts in pieces.items()})
                for i in range(self.chunks)
            ]
            whole = {node: self._joined(node, copies) for node in self.region.outputs}
        for node in late:
            self.behind.prepend(node)
        for node in reversed(self.own):
            if (new := whole.get(node, self.asked.get(node))) is not None:
                node.replace_all_uses_with(new)
            self.graph.erase_node(node)
        for node in reversed([*self.shapes.values(), *self.asked.values()]):
            if not node.users and node.target is not guard:
                self.graph.erase_node(node)

    def _dependents(self) -> list[fx.Node]:
        """Nodes outside the region that stand among its nodes and depend on them."""
        reads = set(self.own)
        late = []
        node = self.own[0]
        while node is not self.behind:
            if node not in reads and any(source in reads for source in node.all_input_nodes):
                late.append(node)
                reads.add(node)
            node = node.next
        return late

    def _pieces(self, value: fx.Node) -> list[fx.Node]:
        pieces = self._new(value, cut, value, self.chunks)
        return [self._new(value, operator.getitem, pieces, i) for i in range(self.chunks)]

    def _chunk(self, rows: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Copy the region for one piece of each input; ``{node of the region: its copy}``."""
        for node in self.own:
            if node in self.region.counted:
                rows[node] = self._counted_view(node, rows)
            elif node not in self.region.asked:
                rows[node] = self._copy(node, {**self.asked, **rows})
            elif node not in self.asked:
                whole = {n: self._shape(n, rows[n]) for n in node.all_input_nodes if n in rows}
                self.asked[node] = self._copy(node, {**self.asked, **whole})
        return {node: self._own_memory(node, rows[node]) for node in self.region.outputs}

    def _counted_view(self, node: fx.Node, rows: dict[fx.Node, fx.Node]) -> fx.Node:
        """Copy a view whose first size counts the rows: it now counts those of the piece."""
        op = self.program.op(node)
        assert op is not None
        number = self.region.counted[node]
        size = self.graph.call_method("size", (rows[op.args["input"]], 0))
        known = {**self.asked, **rows}
        first = iter([size])  # only the first size counts rows, even if another has the same node

        def replaced(n: fx.Node) -> fx.Node:
            return next(first, known.get(n, n)) if n is number else known.get(n, n)

        return self._copy(node, replaced)

    def _shape(self, node: fx.Node, piece: fx.Node) -> fx.Node:
        """A stand-in for the whole of ``node``, for readers that only ask for its shape."""
        if not isinstance(needed_value(node), torch.Tensor):
            return piece  # the length of a tuple
        if node not in self.shapes:
            self.shapes[node] = self._new(node, shaped, piece, self.rows)
        return self.shapes[node]

    def _own_memory(self, node: fx.Node, piece: fx.Node) -> fx.Node:
        """``piece``, copied if it is part of a larger tensor, so that the rest can be freed."""
        value = needed_value(node)
        if value.untyped_storage().nbytes() <= value.numel() * value.element_size():
            return piece
        with self.graph.inserting_before(self.behind):
            return self.graph.call_method("clone", (piece,))

    def _joined(self, node: fx.Node, copies: list[dict[fx.Node, fx.Node]]) -> fx.Node:
        return self._new(node, joined, [copy[node] for copy in copies], self.rows)

    def _copy(self, node: fx.Node, replaced: Any) -> fx.Node:
        given = replaced if callable(replaced) else lambda n: replaced.get(n, n)
        copy = self.graph.node_copy(node, given)
        forget_value(copy)
        return copy

    def _new(self, like: fx.Node, function: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        kept = ("stack_trace", "nn_module_stack", "location")
        node.meta.update({name: like.meta[name] for name in kept if name in like.meta})
        return node
