"""Mistakes of memory layout: changes that a later op undoes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import rank
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.mistakes.reading import KEEPS_AXES, calls, made_from, place, tensor

__all__ = ["layout_destroyed", "permutes_undone"]

_FORMATS = {
    4: ("channels_last", torch.channels_last),
    5: ("channels_last_3d", torch.channels_last_3d),
}


def permutes_undone(program: Program) -> Iterator[Finding]:
    """Find a permutation that is undone after element-wise ops only."""
    for node in program.graph.nodes:
        second = _order(program, node)
        if second is None:
            continue
        back = _undone(program, node, second)
        if back is not None:
            line = program.location(back)
            yield Finding(
                Mistake.PERMUTES_UNDONE,
                *place(program, node),
                f"it undoes {back.name}" + (f" ({line})" if line else "") + "; what stands "
                "between the two works on each element by itself, in any order of the axes",
                "leave both out",
            )


def _undone(program: Program, node: fx.Node, second: tuple[int, ...]) -> fx.Node | None:
    """The permutation that ``node`` undoes, if nothing between the two needs it; else None."""
    source = node.all_input_nodes[0]
    for earlier in made_from(program, source, Trait.ELEMENTWISE):
        if len(earlier.users) > 1 or any(
            tensor(other) is not None and (rank(other) or 0) > 0
            for other in earlier.all_input_nodes[1:]
        ):
            return None
        first = _order(program, earlier)
        if first is not None:
            restored = [first[axis] for axis in second] if len(first) == len(second) else []
            return earlier if restored == sorted(first) else None
    return None


def _order(program: Program, node: fx.Node) -> tuple[int, ...] | None:
    """The order of axes after a permutation; None if ``node`` is none."""
    op = program.op(node) if node.op.startswith("call") else None
    if op is None or op.name not in ("permute", "transpose", "movedim"):
        return None
    source = op.args["input"]
    known = tensor(source)
    if known is None or known.dim() < 2:
        return None
    return _permuted(op, known.dim())


def _permuted(op: Op, dims: int) -> tuple[int, ...] | None:
    axes = torch.arange(dims)
    probe = torch.empty(tuple(range(2, dims + 2)), device="meta")
    rest = {name: value for name, value in op.args.items() if name != "input"}
    try:
        result = getattr(probe, op.name)(*rest.values())
    except (TypeError, RuntimeError, IndexError):  # an axis that is computed
        return None
    order = tuple(int(size) - 2 for size in result.shape)
    return None if order == tuple(axes.tolist()) else order


def layout_destroyed(program: Program) -> Iterator[Finding]:
    """Find ``contiguous()`` on a channels_last tensor, before a convolution or a pooling."""
    for node, op in calls(program, ("contiguous",)):
        given, made = tensor(op.args["input"]), tensor(node)
        if given is None or made is None or given.dim() not in _FORMATS:
            continue
        name, layout = _FORMATS[given.dim()]
        destroyed = (
            given.is_contiguous(memory_format=layout)
            and not given.is_contiguous()
            and made.is_contiguous()
        )
        if destroyed and _reaches(program, node):
            yield Finding(
                Mistake.LAYOUT_DESTROYED,
                *place(program, node),
                f"contiguous() copies a {name} tensor {tuple(given.shape)} out of its layout, and "
                "what comes next runs faster on it",
                f"leave it out, or write contiguous(memory_format=torch.{name})",
            )


def _reaches(program: Program, node: fx.Node) -> bool:
    """Whether a convolution or a pooling reads ``node``, perhaps after ops that keep its axes."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            op = program.op(user) if user.op.startswith("call") else None
            if op is None or user in seen:
                continue
            if Trait.SPATIAL in op.traits and not op.name.endswith("1d"):
                return True
            if op.traits & KEEPS_AXES:
                seen.add(user)
                pending.append(user)
    return False
