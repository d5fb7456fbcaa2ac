"""Times a layer, and its factors at some ranks, on this machine: milliseconds in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from fxtemporal.factorization.layers import Layer
from fxtemporal.functional import FORMS, conv3d_spatial, conv3d_temporal
from fxtemporal.functional.factors import Decomposition, Order
from fxtemporal.ir.node_meta import value_of
from fxtemporal.nn.conv2plus1d import Conv2Plus1d
from fxtemporal.tuning.timing import interleaved

__all__ = ["Times", "milliseconds"]

_WHOLE = ("conv3d", "conv3d_channels_last_3d", "conv3d_taps", "conv3d_winograd_4")
"""Forms that a dense layer is likely to get; its time is that of the fastest."""


Times: TypeAlias = dict[tuple[Order, int] | None, float]
"""Milliseconds of a layer, key None, and of its factors, key (order, rank)."""


def milliseconds(
    layer: Layer,
    weight: Tensor,
    ranks: Sequence[tuple[Decomposition, int]],
    clock: Callable[[Mapping[str, Callable[[], object]], str], dict[str, float]] = interleaved,
) -> Times:
    """The times of the layer and of its factors, as ``clock`` measures them side by side."""
    g = layer.geometry
    assert g is not None
    value = value_of(layer.nodes[0])
    assert isinstance(value, Tensor)
    assert g.frames is not None
    assert g.size is not None
    batch = value.shape[0] if value.dim() == 5 else 1
    x = weight.new_ones((batch, g.in_channels, g.frames, *g.size))
    x = x.contiguous(memory_format=torch.channels_last_3d)
    calls: dict[str, Callable[[], object]] = {}
    for name in _WHOLE:
        if not any(FORMS[name].blockers(g)):
            prepared = FORMS[name].prepare(weight, g)
            calls[name] = partial(FORMS[name].run, x, prepared, None, g)
    keys: dict[str, tuple[Order, int]] = {}
    for found, kept in ranks:
        rank = kept * g.groups
        right, left = found.right[:, :kept], found.left[..., :kept]
        pair = layer.factors(weight, None, found.order, right, left)
        name = f"{found.order} {rank}"
        keys[name] = found.order, rank
        calls[name] = partial(_run, pair, x)
    with torch.no_grad():
        times = clock(calls, "conv3d")
    whole = min(ms for name, ms in times.items() if name not in keys)
    return {None: whole, **{key: times[name] for name, key in keys.items()}}


def _run(pair: Conv2Plus1d, x: Tensor) -> Tensor:
    spatial, temporal = pair.spatial, pair.temporal
    order = (spatial, temporal) if pair.order == "spatial-temporal" else (temporal, spatial)
    for conv in order:
        function = conv3d_spatial if conv.kernel_size[0] == 1 else conv3d_temporal
        x = function(
            x,
            conv.weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.padding_mode,
        )
    return x
