"""Builds a call of a convolution or a linear with other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from fxtemporal.ir.node_meta import needed_value
from fxtemporal.ir.ops import Op
from fxtemporal.ir.program import Program

__all__ = ["FUNCTIONS", "layer_call"]

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        **{f"conv{n}d": getattr(F, f"conv{n}d") for n in (1, 2, 3)},
        **{f"conv_transpose{n}d": getattr(F, f"conv_transpose{n}d") for n in (1, 2, 3)},
        "linear": F.linear,
    }
)
"""The layers whose weight can be replaced: ``{op name: function}``."""


def layer_call(program: Program, op: Op, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """A node that computes ``op``, in whatever spelling, with other weights.

    For a padding mode other than zeros the input is padded first, as ``nn.Conv3d`` does.
    """
    args = dict(op.args)
    source = program.argument(args.pop("input"))
    mode = args.pop("padding_mode", "zeros")
    if mode != "zeros":
        pads = _pads(weight_kernel(program, op), args["padding"], args["dilation"])
        source = program.graph.call_function(F.pad, (source, pads), {"mode": mode})
        args["padding"] = (0,) * (len(pads) // 2)
    rest: dict[str, Any] = {k: v for k, v in args.items() if k not in ("weight", "bias")}
    return program.graph.call_function(FUNCTIONS[op.name], (source, weight, bias), rest)


def weight_kernel(program: Program, op: Op) -> tuple[int, ...]:
    """The sizes of a convolution's kernel: (kT, kH, kW) of a conv3d."""
    weight = op.args["weight"]
    val = needed_value(weight) if isinstance(weight, fx.Node) else program.tensor(weight.name)
    return tuple(val.shape[2:])


def _pads(
    kernel: tuple[int, ...], padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> list[int]:
    """Padding in the order of F.pad: from the last axis on, before and after."""
    pads: list[int] = []
    for axis in reversed(range(len(kernel))):
        if isinstance(padding, str):
            total = dilation[axis] * (kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [padding[axis], padding[axis]]
    return pads
