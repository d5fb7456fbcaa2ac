"""Mistakes with the time axis: mixed with other axes, permuted needlessly, or not needed."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator

from torch import fx

from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import shape
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.mistakes.reading import KEEPS_AXES, calls, made_from, place

__all__ = ["axes_mixed", "flattened_2plus1d", "squeezed_conv3d"]

_VIEWS = frozenset(("view", "reshape"))


def axes_mixed(program: Program) -> Iterator[Finding]:
    """Find a view that cuts across axes: (B, C, T, H, W) as (B·T, C, H, W) without a permutation.

    A view may join adjacent axes, and split an axis. If its sizes are those of whole axes in
    another order, as here B·T and C, or cannot come from adjacent axes at all, each row of the
    result holds parts of several rows.
    """
    for node, op in calls(program, _VIEWS):
        source = op.args["input"]
        given = shape(source) if isinstance(source, fx.Node) else None
        made = shape(node)
        if given is None or made is None or 0 in given or max(len(given), len(made)) < 3:
            continue
        if len(made) < 2 or _regroups_neighbours(_wide(given), _wide(made)):
            continue
        yield Finding(
            Mistake.AXES_MIXED,
            *place(program, node),
            f"{_said(given)} is read as {_said(made)} without moving an axis: what it calls one "
            "row is made of parts of several",
            "bring the axes together first: x.transpose(1, 2).flatten(0, 1) folds the frames of "
            "(B, C, T, H, W), x.unflatten(0, (B, T)).transpose(1, 2) takes them apart",
        )


def _wide(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """``sizes`` without axes of size 1, whose position does not matter."""
    return tuple(size for size in sizes if size != 1)


def _regroups_neighbours(given: tuple[int, ...], made: tuple[int, ...]) -> bool:
    for parts, wholes in ((given, made), (made, given)):
        if _in_order(parts, wholes):
            return True
        if _in_any_order(parts, wholes):
            return False
    ends = sorted({*_ends(given), *_ends(made)})
    return all(b % a == 0 for a, b in itertools.pairwise(ends))


def _in_order(parts: tuple[int, ...], wholes: tuple[int, ...]) -> bool:
    """Whether each of ``wholes`` is a product of adjacent ``parts``: (2, 3, 4) gives (6, 4)."""
    return set(_ends(wholes)) <= set(_ends(parts))


def _in_any_order(parts: tuple[int, ...], wholes: tuple[int, ...]) -> bool:
    """Whether each of ``wholes`` is a product of some ``parts``, each used once."""
    if not wholes:
        return not parts
    for count in range(1, len(parts) + 1):
        for chosen in itertools.combinations(range(len(parts)), count):
            if math.prod(parts[k] for k in chosen) == wholes[0]:
                rest = tuple(size for k, size in enumerate(parts) if k not in chosen)
                if _in_any_order(rest, wholes[1:]):
                    return True
    return False


def _ends(sizes: tuple[int, ...]) -> list[int]:
    """The running products of the sizes, slowest first: (2, 3, 4) → 2, 6, 24."""
    return list(itertools.accumulate(sizes, operator.mul))


def flattened_2plus1d(program: Program) -> Iterator[Finding]:
    """Find a Conv1d over time after a Conv2d over space, with permutations between them."""
    for node, op in calls(program, ("conv1d",)):
        if not isinstance(op.args["input"], fx.Node) or not _kernel(program, op) > 1:
            continue
        way = list(made_from(program, op.args["input"], KEEPS_AXES | Trait.MOVES_AXES))
        spatial = program.op(way[-1]) if way[-1].op.startswith("call") else None
        if spatial is None or spatial.name != "conv2d":
            continue
        if not any(_permutes(program, step) for step in way):
            continue
        line = program.location(way[-1])
        yield Finding(
            Mistake.FLATTENED_2PLUS1D,
            *place(program, node),
            "a (2+1)D layer by hand: the Conv2d" + (f" at {line}" if line else "") + " runs on "
            "frames folded into the batch, this Conv1d on pixels folded into it, and the clip is "
            "copied between the two",
            "write two Conv3d, with kernels (1, k, k) and (k, 1, 1), or fxtemporal.nn.Conv2Plus1d",
        )


def _kernel(program: Program, op: Op) -> int:
    weight = op.args["weight"]
    sizes = shape(weight) if isinstance(weight, fx.Node) else program.tensor(weight.name).shape
    return 1 if sizes is None else int(sizes[-1])


def _permutes(program: Program, node: fx.Node) -> bool:
    op = program.op(node) if node.op.startswith("call") else None
    return op is not None and op.name in ("permute", "transpose", "movedim", "rearrange")


def squeezed_conv3d(program: Program) -> Iterator[Finding]:
    """Find a Conv3d that reduces several frames to one, whose time axis is then dropped."""
    for node, op in calls(program, ("conv3d",)):
        source = op.args["input"]
        given = shape(source) if isinstance(source, fx.Node) else None
        made = shape(node)
        if given is None or made is None or len(made) != len(given) or made[-3] != 1:
            continue  # other ranks: squeeze_ or as_strided_ changed the result in place
        squeezed = next((u for u in _behind(program, node) if _drops_time(program, u)), None)
        if squeezed is None:
            continue
        if given[-3] == 1:
            cure = "use a Conv2d: there is one frame"
        else:
            cure = (
                f"use a Conv2d over the {given[-3]} frames as channels: "
                "conv2d(x.flatten(1, 2), weight.flatten(1, 2))"
            )
        line = program.location(squeezed)
        yield Finding(
            Mistake.SQUEEZED_CONV3D,
            *place(program, node),
            f"of {given[-3]} frames this Conv3d leaves one, which is squeezed away"
            + (f" at {line}" if line else ""),
            cure,
        )


def _behind(program: Program, node: fx.Node) -> Iterator[fx.Node]:
    """The single reader of ``node``, then its single reader, and so on, while axes are kept."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or not op.traits & KEEPS_AXES:
            return


def _drops_time(program: Program, node: fx.Node) -> bool:
    op = program.op(node) if node.op.startswith("call") else None
    source = op.args.get("input") if op is not None else None
    given, made = (shape(source) if isinstance(source, fx.Node) else None), shape(node)
    if op is None or given is None or made is None:
        return False
    drops = op.name in ("squeeze", "select", "getitem", "slice", "mean", "flatten", "reshape")
    without = (*given[:-3], *given[-2:])
    return drops and op.name not in ("flatten", "slice") and made == without


def _said(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))})"
