"""Geometry of a conv3d node: kernel, stride, padding and sizes."""

from __future__ import annotations

import torch
from torch import fx

from fxtemporal.functional import ConvGeometry
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import Attr, Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import shape
from fxtemporal.support.torch_private import pytree

__all__ = ["conv3d_geometry"]


def conv3d_geometry(program: Program, op: Op) -> ConvGeometry | None:
    """The geometry of a described conv3d; None if its weight's shape or a setting is not known."""
    weight = op.args["weight"]
    kernel = shape(weight) if isinstance(weight, fx.Node) else None
    if isinstance(weight, Attr):
        kernel = tuple(program.tensor(weight.name).shape)
    settings = [op.args[name] for name in ("groups", "stride", "padding", "dilation")]
    if kernel is None or any(isinstance(v, fx.Node) for v in pytree.tree_leaves(settings)):
        return None
    source = op.args["input"]
    sizes = shape(source) if isinstance(source, fx.Node) else None
    value = value_of(source) if isinstance(source, fx.Node) else None
    return ConvGeometry(
        in_channels=kernel[1] * op.args["groups"],
        out_channels=kernel[0],
        kernel=(kernel[2], kernel[3], kernel[4]),
        stride=op.args["stride"],
        padding=op.args["padding"],
        dilation=op.args["dilation"],
        groups=op.args["groups"],
        padding_mode=op.args["padding_mode"],
        frames=None if sizes is None else sizes[-3],
        size=None if sizes is None else (sizes[-2], sizes[-1]),
        dtype=value.dtype if isinstance(value, torch.Tensor) else None,
    )
