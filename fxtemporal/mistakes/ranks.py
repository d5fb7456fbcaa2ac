"""Layers that get an input of the wrong kind, but still compute something."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxtemporal.ir.ops import Attr, Op, Trait, ops_with
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import shape
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.mistakes.reading import KEEPS_AXES, calls, made_from, place

__all__ = ["linear_on_map", "map_into_recurrence", "missing_time_axis"]

_RECURRENT = ops_with(Trait.RECURRENT)

_HEAVY = 1 << 20
"""Smallest number of input weights of a recurrent layer for which pooling is suggested."""

_PIXELS = 16
"""Smallest H·W that counts as a feature map."""


def _gives_maps(op: Op) -> bool:
    """Whether the result of ``op`` is (B, C, ..., H, W)."""
    return Trait.SPATIAL in op.traits and not op.name.endswith("1d")


def linear_on_map(program: Program) -> Iterator[Finding]:
    """Find a Linear that works along the width of a map, because no flatten is before it."""
    for node, op in calls(program, ("linear",)):
        source = op.args["input"]
        sizes = shape(source) if isinstance(source, fx.Node) else None
        if sizes is None or len(sizes) < 4:
            continue
        *_, origin = made_from(program, source, KEEPS_AXES)
        made = program.op(origin) if origin.op.startswith("call") else None
        of_a_layer = made is not None and _gives_maps(made)
        if of_a_layer or (origin.op == "placeholder" and len(sizes) == 5):
            yield Finding(
                Mistake.FRAME_LAYER_ON_CLIP,
                *place(program, node),
                f"a Linear is given {_said(sizes)} and runs along its last axis, the width: each "
                "row of pixels by itself",
                f"flatten the map of each frame first, x.flatten({len(sizes) - 3}), or average it, "
                "x.mean((-2, -1))",
            )


def missing_time_axis(program: Program) -> Iterator[Finding]:
    """Find a Conv3d that reads (B, C, H, W) as one clip, or an LSTM (B, features) as a sequence."""
    for node, op in calls(program, {"conv3d", *_RECURRENT}):
        source = op.args["input"]
        sizes = shape(source) if isinstance(source, fx.Node) else None
        if sizes is None:
            continue
        if op.name == "conv3d" and len(sizes) == 4:
            yield Finding(
                Mistake.MISSING_TIME_AXIS,
                *place(program, node),
                f"a Conv3d reads {_said(sizes)} as one clip (C, T, H, W) without a batch: if "
                f"{sizes[0]} is the batch, there is no time axis",
                "give it (B, C, T, H, W): x.unsqueeze(2) for single frames, x.unsqueeze(0) for one "
                "clip",
            )
        if op.name in _RECURRENT and len(sizes) == 2:
            yield Finding(
                Mistake.MISSING_TIME_AXIS,
                *place(program, node),
                f"{_layer(op.name)} reads {_said(sizes)} as one sequence of {sizes[0]} steps "
                f"without a batch: if {sizes[0]} is the batch, there is no time axis",
                "give it (B, T, features): x.unsqueeze(1) for one step, x.unsqueeze(0) for one "
                "sequence",
            )


def map_into_recurrence(program: Program) -> Iterator[Finding]:
    """Find a recurrent layer that reads a flattened map, with weights for each of its pixels."""
    for node, op in calls(program, _RECURRENT):
        source = op.args["input"]
        sizes = shape(source) if isinstance(source, fx.Node) else None
        heavy = sizes is not None and _weights(program, node, sizes[-1]) >= _HEAVY
        if not isinstance(source, fx.Node) or sizes is None or not heavy:
            continue
        for origin in made_from(program, source, KEEPS_AXES | Trait.MOVES_AXES):
            made = program.op(origin) if origin.op.startswith("call") else None
            pixels = shape(origin)
            if made is None or not _gives_maps(made) or pixels is None:
                continue
            if pixels[-1] * pixels[-2] < _PIXELS or sizes[-1] % (pixels[-1] * pixels[-2]):
                break
            channels, area = sizes[-1] // (pixels[-1] * pixels[-2]), pixels[-1] * pixels[-2]
            yield Finding(
                Mistake.MAP_INTO_RECURRENCE,
                *place(program, node),
                f"{_layer(op.name)} reads maps of {pixels[-2]}×{pixels[-1]} pixels, flattened to "
                f"{sizes[-1]:,} features: {_weights(program, node, sizes[-1]) / 1e6:.1f} M weights "
                f"read them, {area} for each channel's one",
                f"average each map first, x.mean((-2, -1)), which leaves {channels:,} features; or "
                "keep the map, with a ConvLSTM",
            )
            break


def _weights(program: Program, node: fx.Node, features: int) -> int:
    """The number of entries of a recurrent layer's weights that read its input."""
    tensors: list[torch.Tensor] = []
    if node.op == "call_module":
        tensors = list(program.gm.get_submodule(str(node.target)).parameters())
    op = program.op(node)
    for value in op.args.values() if op is not None else ():
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, Attr):
                tensors.append(program.tensor(entry.name))
    unique = {id(t): t for t in tensors}.values()
    return max((t.numel() for t in unique if t.dim() == 2 and t.shape[1] == features), default=0)


def _layer(name: str) -> str:
    kind = name.partition("_")[0].upper()
    return f"an {kind}" if kind == "LSTM" or kind == "RNN" else f"a {kind}"


def _said(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))})"
