"""Sizes that are constants in the forward, so that its graph is right for these only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.guards import TRIP_COUNT, guard
from fxtemporal.ir.node_meta import set_value, value_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import run_node, shape
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.mistakes.reading import place
from fxtemporal.support.errors import SpecializationError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree

__all__ = ["fixed_batch_size", "fixed_frames"]

_CURE_FRAMES = (
    "where the loop can be re-rolled, fxtemporal.optimize leaves any number of frames; else export "
    "with the number that is deployed"
)
_CURE_BATCH = "write -1 for the batch, or read it: x.view(x.size(0), ...)"


def fixed_frames(program: Program) -> Iterator[Finding]:
    """Find loops over time that a trace or an export unrolls."""
    for check, value, text, where, why in _checks(program):
        held = program.held_size(check)
        if why.startswith(TRIP_COUNT) and held is not None and held[1] > 0 and value > 1:
            yield Finding(
                Mistake.FIXED_FRAMES,
                program.module_path(check) or text,
                where,
                f"a loop runs {value} times because {text} is {value}: traced or exported, the "
                f"graph holds {value} copies of its body, and takes {value} frames alone",
                _CURE_FRAMES,
            )


def fixed_batch_size(program: Program) -> Iterator[Finding]:
    """Find a constant batch size in a view, and loops over the samples."""
    for check, value, text, where, why in _checks(program):
        held = program.held_size(check)
        if held is not None and held[1] == 0 and held[0].op == "placeholder" and value > 1:
            yield Finding(
                Mistake.FIXED_BATCH_SIZE,
                program.module_path(check) or text,
                where,
                f"{text} is read as a number ({why}): the graph takes a batch of {value} alone",
                "leave the batch to the layers, which take any: they treat dimension 0 as a batch",
            )
            return
    failed = _fails_at_another_batch(program)
    if failed is not None:
        node, size = failed
        yield Finding(
            Mistake.FIXED_BATCH_SIZE,
            *place(program, node),
            f"it spells out the batch: right for {size} samples, it fails, or mixes samples, for "
            f"{size + 1}",
            _CURE_BATCH,
        )


def _checks(program: Program) -> Iterator[tuple[fx.Node, Any, str, str | None, str]]:
    for node in program.graph.nodes:
        if node.target is guard:
            value, text, where, why = node.args[1:]
            yield node, value, text, where, why


def _fails_at_another_batch(program: Program) -> tuple[fx.Node, int] | None:
    """The view that fails if every input has one more sample, and the size it is right for."""
    sizes = {
        value.shape[0]
        for node in program.graph.nodes
        if node.op == "placeholder"
        for value in pytree.tree_leaves(value_of(node))
        if isinstance(value, torch.Tensor) and value.dim() > 1
    }
    if len(sizes) != 1:
        return None
    (size,) = sizes

    def grown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != size:
            return value
        with program.fake_mode:
            return torch.cat([value, value[:1]])

    other = _Elsewhere(program)
    with quiet():
        return _first_failure(program, other, grown, size)


def _first_failure(
    program: Program, other: _Elsewhere, grown: Callable[[Any], Any], size: int
) -> tuple[fx.Node, int] | None:
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = pytree.tree_map(grown, value_of(node))
        elif node.op in ("get_attr", "output"):
            values[node] = value_of(node)
        elif all(source in values for source in node.all_input_nodes):
            try:
                values[node] = other.run(node, values)
            except SpecializationError:
                continue
            except Exception:  # an op may refuse the size by any exception
                op = program.op(node)
                return (node, size) if op is not None and op.name in _SPELLS_SIZES else None
            if _keeps_size(program, node, values):
                return node, size
    return None


_SPELLS_SIZES = frozenset(("expand", "reshape", "unflatten", "view"))


def _keeps_size(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether a view keeps its batch size for more samples, because its -1 takes in the rest."""
    op = program.op(node)
    if op is None or op.name not in ("reshape", "view"):
        return False
    source = op.args["input"]
    if not isinstance(source, fx.Node):
        return False  # a parameter has no samples
    known, grown = shape(source), values.get(source)
    made, after = shape(node), values[node]
    if not known or not made or not isinstance(grown, torch.Tensor) or known[0] == 0:
        return False
    return bool(grown.shape[0] > known[0] and after.shape[0] == made[0] and made[0] % known[0] == 0)


class _Elsewhere:
    """Runs nodes of a program on other values than the captured ones."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        given = {source: value_of(source) for source in node.all_input_nodes}
        try:
            for source in given:
                set_value(source, values[source])
            return run_node(self.program.gm, node, self.program.fake_mode, again=True)
        finally:
            for source, value in given.items():
                set_value(source, value)
