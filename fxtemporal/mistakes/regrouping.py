"""Axes of time that are mixed with others, or copied to and fro, or not needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import fx

from fxtemporal.graph import Program, shape
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.mistakes.reading import KEEPS_AXES, MOVES_AXES, made_from, place
from fxtemporal.ops import Op

__all__ = ["axes_mixed", "flattened_2plus1d", "squeezed_conv3d"]

_VIEWS = frozenset(("view", "reshape"))


def axes_mixed(program: Program) -> Iterator[Finding]:
    """A view that cuts across axes: (B, C, T, H, W) as (B·T, C, H, W) without a permutation.

    Where each axis of one side is made of whole neighbours of the other, a view regroups. Where it
    is not, each row of the result holds parts of several rows, unless the two only differ in where
    they cut one axis in two.
    """
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name not in _VIEWS:
            continue
        source = op.args["input"]
        given = shape(source) if isinstance(source, fx.Node) else None
        made = shape(node)
        if given is None or made is None or 0 in given or max(len(given), len(made)) < 4:
            continue
        if len(made) < 2 or _aligned(given, made):
            continue
        yield Finding(
            Mistake.AXES_MIXED,
            *place(program, node),
            f"{_said(given)} is read as {_said(made)} without moving an axis: what it calls one "
            "frame is made of parts of several",
            "bring the axes together first: x.transpose(1, 2).flatten(0, 1) folds the frames of "
            "(B, C, T, H, W), x.unflatten(0, (B, T)).transpose(1, 2) takes them apart",
        )


def _aligned(given: tuple[int, ...], made: tuple[int, ...]) -> bool:
    """Whether ``made`` regroups whole neighbours of ``given``, or splits of them."""
    if _swapped(given, made) or _swapped(made, given):
        return False
    ends = sorted({*_ends(given), *_ends(made)})
    return all(b % a == 0 for a, b in itertools.pairwise(ends))


def _ends(sizes: tuple[int, ...]) -> list[int]:
    """How many entries lie before the end of each axis, slowest first: (2, 3, 4) → 2, 6, 24."""
    return list(itertools.accumulate(sizes, lambda a, b: a * b))


def _swapped(five: tuple[int, ...], four: tuple[int, ...]) -> bool:
    """Whether ``four`` is (B·T, C, H, W), and ``five`` (B, C, T, H, W): powers of two hide it."""
    if len(five) != 5 or len(four) != 4 or five[1] == five[2] or 1 in five[:3]:
        return False
    return four == (five[0] * five[2], five[1], *five[3:])


def flattened_2plus1d(program: Program) -> Iterator[Finding]:
    """A Conv1d over time behind a Conv2d over space, with permutations between them."""
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name != "conv1d" or not isinstance(op.args["input"], fx.Node):
            continue
        if not _kernel(program, op) > 1:
            continue
        way = list(made_from(program, op.args["input"], KEEPS_AXES | MOVES_AXES))
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
    """A Conv3d that leaves one frame of several, which is dropped."""
    for node in program.graph.nodes:
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name != "conv3d":
            continue
        source = op.args["input"]
        given = shape(source) if isinstance(source, fx.Node) else None
        made = shape(node)
        if given is None or made is None or made[-3] != 1:
            continue
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
    """The readers of ``node``, and of what keeps its axes, as long as there is one."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name not in KEEPS_AXES:
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
