"""Why a layer refused its input, and a cure: it is tried on the failing call before it is told.

::

    nn.Linear(8, 5) on (2, 8, 1, 1, 1)     x.flatten(2) fails too;  x.flatten(1) goes on
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.nn.time_distributed import TimeDistributed
from fxtemporal.support.errors import ForwardError
from fxtemporal.support.quiet import quiet

__all__ = ["failing", "telling_cure"]

_FRAMES = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d)
_FRAME_OPS = ("conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d")
_CLIPS = (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d, nn.BatchNorm3d)
_CLIP_OPS = ("conv3d", "conv_transpose3d", "max_pool3d", "avg_pool3d")

_Changes: TypeAlias = dict[str, str]
"""``{what to write for the input x: what it is for}``."""

_FRAME_CHANGES: tuple[_Changes, ...] = (
    {"x.flatten(0, 1)": "to fold time into the batch"},
    {"x.transpose(1, 2).flatten(0, 1)": "to fold the time of (B, C, T, H, W) into the batch"},
    {"x.permute(0, 1, 4, 2, 3).flatten(0, 1)": "to fold the time of (B, T, H, W, C)"},
)
_CLIP_CHANGES: tuple[_Changes, ...] = (
    {"x.unsqueeze(2)": "for single frames", "x.unsqueeze(0)": "for one clip"},
    {"x.transpose(0, 1).unsqueeze(0)": "for one clip of (T, C, H, W)"},
    {"x.unsqueeze(1)": "for clips of one channel"},
)
_FRAME_ORDERS: tuple[_Changes, ...] = ({"x.permute(0, 3, 1, 2)": "for frames of (B, H, W, C)"},)
_CLIP_ORDERS: tuple[_Changes, ...] = (
    {"x.transpose(1, 2)": "for clips of (B, T, C, H, W)"},
    {"x.permute(0, 4, 1, 2, 3)": "for clips of (B, T, H, W, C)"},
)
_FEATURE_CHANGES: tuple[_Changes, ...] = (
    {
        "x.flatten(2)": "to flatten the map of each frame",
        "x.mean((-2, -1))": "to average the map of each frame",
    },
    {"x.flatten(1)": "to flatten each sample", "x.mean((-3, -2, -1))": "to average its channels"},
    {"x.permute(0, 2, 1, 3, 4).flatten(2)": "to flatten each frame of (B, C, T, H, W)"},
    {"x.mean((-2, -1)).transpose(1, 2)": "to average each frame of (B, C, T, H, W)"},
)
_OTHER_INPUTS: tuple[_Changes, ...] = (
    {"torch.from_numpy(x)": "to make a tensor of it"},
    {"torch.stack(x)": "to stack its tensors", "torch.cat(x)": "to join its tensors"},
)


def failing(error: ForwardError) -> Finding | None:
    """The common mistake that made the forward fail; None if the cause is another one."""
    mistake, cure = _mistake(error)
    if mistake is None or cure is None:
        return None
    target = error.module_path or "the model"
    return Finding(mistake, target, error.location, f"the forward fails here: {error.text}", cure)


@contextmanager
def telling_cure() -> Iterator[None]:
    """Append a cure to the message of a :class:`ForwardError`, if one is known that goes on."""
    try:
        yield
    except ForwardError as error:
        _, cure = _mistake(error)
        if cure is not None:
            error.args = (f"{error}. To mend it: {cure}",)
        raise


def _mistake(error: ForwardError) -> tuple[Mistake | None, str | None]:
    """The common mistake in the call that failed, and a cure; None for what is not known."""
    if error.call is None:
        return None, None
    layer, x = error.call[0], _input(error)
    if not isinstance(x, Tensor):
        return None, _first(error, _OTHER_INPUTS)
    if (of_type := _first(error, _types(layer, x))) is not None:
        return None, of_type
    rank, op = x.dim(), getattr(layer, "__name__", "")
    if isinstance(layer, _FRAMES) or op in _FRAME_OPS:
        if rank == 5:
            return Mistake.FRAME_LAYER_ON_CLIP, _per_frame(error) or _takes(layer, x)
        return None, _first(error, _FRAME_ORDERS) or _takes(layer, x)
    if isinstance(layer, _CLIPS) or op in _CLIP_OPS:
        if rank == 4:
            return Mistake.MISSING_TIME_AXIS, _first(error, _CLIP_CHANGES) or _takes(layer, x)
        return None, _first(error, _CLIP_ORDERS) or _takes(layer, x)
    if isinstance(layer, nn.Linear | nn.RNNBase) or op == "linear":
        if rank <= 3:
            return None, _takes(layer, x)
        recurrent = isinstance(layer, nn.RNNBase)
        mistake = Mistake.MAP_INTO_RECURRENCE if recurrent else Mistake.FRAME_LAYER_ON_CLIP
        return mistake, _first(error, _FEATURE_CHANGES) or _takes(layer, x)
    return None, None


def _input(error: ForwardError) -> Any:
    assert error.call is not None
    _, args, kwargs = error.call
    return args[0] if args else kwargs.get("input")


def _types(layer: Any, x: Tensor) -> tuple[_Changes, ...]:
    """Changes of the dtype or the device of ``x`` to those of the layer's weights."""
    changes: dict[str, str] = {}
    if x.layout is not torch.strided:
        changes["x.to_dense()"] = "to be dense"
    for weight in layer.parameters(recurse=False) if isinstance(layer, nn.Module) else ():
        if weight.dtype != x.dtype:
            changes[f"x.to({weight.dtype})"] = "to have the dtype of the weights"
        if weight.device != x.device:
            changes[f"x.to({str(weight.device)!r})"] = "to be where the weights are"
    if isinstance(layer, nn.Embedding) and x.is_floating_point():
        changes = {"x.long()": "since indices are whole numbers"}
    return (changes,)


def _per_frame(error: ForwardError) -> str | None:
    """Wrap the layer, or fold time into the batch."""
    assert error.call is not None
    layer, folded = error.call[0], _first(error, _FRAME_CHANGES)
    if not isinstance(layer, nn.Module) or not _goes_on(error, "x", TimeDistributed(layer)):
        return folded
    wrapped = "wrap the layer in fxtemporal.nn.TimeDistributed"
    return wrapped if folded is None else f"{wrapped}, or give it {folded.removeprefix('give it ')}"


def _takes(layer: Any, x: Tensor) -> str | None:
    """What to give to a layer that is given other features, and that no change of ``x`` helps."""
    match layer:
        case nn.Conv2d() | nn.ConvTranspose2d() | nn.Conv3d() | nn.ConvTranspose3d():
            channels = layer.in_channels
        case nn.BatchNorm2d() | nn.BatchNorm3d():
            channels = layer.num_features
        case nn.Linear() if x.dim() and x.shape[-1] != layer.in_features:
            return f"give it {layer.in_features} features, or build it for {x.shape[-1]}"
        case nn.RNNBase() if x.dim() != 3 or x.shape[-1] != layer.input_size:
            return f"give it (B, T, {layer.input_size})"
        case _:
            return None
    axes = "T, H, W" if isinstance(layer, _CLIPS) else "H, W"
    rank = 5 if isinstance(layer, _CLIPS) else 4
    fits = x.dim() == rank and x.shape[1] == channels
    return None if fits else f"give it (B, {channels}, {axes})"


def _first(error: ForwardError, changes: tuple[_Changes, ...]) -> str | None:
    """The first of ``changes`` with which the failing call goes on, in words."""
    for alike in changes:
        there = [f"{new} {what}" for new, what in alike.items() if _goes_on(error, new)]
        if there:
            return f"give it {', or '.join(there)}"
    return None


class _Op(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _goes_on(error: ForwardError, change: str, layer: nn.Module | None = None) -> bool:
    """Whether the failing call runs with ``change``, which is evaluated, in place of its input."""
    assert error.call is not None
    called, args, kwargs = error.call
    args, kwargs = own_inputs((args, kwargs))
    names = {"torch": torch, "x": args[0] if args else kwargs.get("input")}
    layer = layer or (called if isinstance(called, nn.Module) else _Op(called))
    with stand_in(layer) as other, torch.no_grad(), quiet():
        try:
            changed = eval(change, names)
            given = ((changed, *args[1:]), kwargs) if args else ((), {**kwargs, "input": changed})
            other.module(*given[0], **given[1])
        except Exception:  # whatever the layer raises
            return False
    return True
