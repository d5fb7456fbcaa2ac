"""Ops that do not fold into the batch but run on each frame separately, through ``torch.vmap``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.batching_rules import Call
from fxtemporal.analysis.families import Family
from fxtemporal.ir.node_meta import needed_value, value_of
from fxtemporal.ir.per_frame import single, spelled, vmapped
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree

__all__ = ["mapped_dims", "runs_mapped"]

_FRAMES = 2
"""Frames to compare gradients on."""


def runs_mapped(family: Family, call: Call, blockers: Sequence[Reason]) -> bool:
    """Whether ``torch.vmap`` has a rule for the op, as the first lane calls it.

    The only way to know is to run it: on fake tensors, and then for its gradients on two frames.
    """
    node, op = family.first, call.op
    if op.inplace or op.random or any(r.code is not Code.UNSUPPORTED_OP for r in blockers):
        return False
    if op.name.startswith("new_") or op.name.endswith("_like"):
        return False  # it reads only a frame's size, and returns memory that each frame may write
    value, name = value_of(node), spelled(node)
    dims = mapped_dims(node, call.lanes)
    if not isinstance(value, torch.Tensor) or name is None or dims is None:
        return False
    if not family.equal_shapes():
        return False
    frames = len(family.lanes)

    def stacked(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        known = needed_value(argument)
        if argument not in call.lanes:
            return known
        return known.new_empty((frames, *known.shape))

    try:
        with quiet(), call.program.fake_mode, torch.no_grad():
            args, kwargs = _map((node.args, node.kwargs), stacked)
            result = vmapped(name, dims, *args, **kwargs)
    except Exception:  # torch.vmap refuses in many ways
        return False
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != (frames, *value.shape):
        return False
    return not value.is_floating_point() or _same_gradients(node, name, dims, call.lanes)


def _same_gradients(
    node: fx.Node, name: str, dims: tuple[int | None, ...], lanes: frozenset[fx.Node]
) -> bool:
    """Whether the op has the gradients of the single frames, among equal numbers too.

    torch.vmap may decompose an op: ``max()`` of a frame gives all its largest numbers a part of the
    gradient, and one of them all of it under torch.vmap.
    """
    generator = torch.Generator().manual_seed(0)
    given: list[torch.Tensor] = []

    def made(argument: Any) -> Any:
        known = needed_value(argument) if isinstance(argument, fx.Node) else argument
        if not isinstance(argument, fx.Node) or not isinstance(known, torch.Tensor):
            return known
        sizes = (_FRAMES, *known.shape) if argument in lanes else tuple(known.shape)
        numbers = torch.randint(1, 4, sizes, generator=generator)
        if not known.is_floating_point():
            return numbers.to(known.dtype)
        given.append(numbers.double().requires_grad_())
        return given[-1]

    try:
        with quiet(), torch.enable_grad():
            args, kwargs = _map((node.args, node.kwargs), made)
            together = vmapped(name, dims, *args, **kwargs)
            alone = [
                single(name)(
                    *(a if dim is None else a[t] for a, dim in zip(args, dims, strict=True)),
                    **kwargs,
                )
                for t in range(_FRAMES)
            ]
            ends = torch.rand(together.shape, generator=generator, dtype=together.dtype)
            pairs = (
                torch.autograd.grad((result * ends).sum(), given, allow_unused=True)
                for result in (together, torch.stack(alone))
            )
            return all(_equal(mine, theirs) for mine, theirs in zip(*pairs, strict=True))
    except Exception:  # of numbers that this op does not take, or of fake tensors
        return False


def _equal(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return torch.allclose(mine, theirs, equal_nan=True)


def mapped_dims(node: fx.Node, lanes: frozenset[fx.Node]) -> tuple[int | None, ...] | None:
    """For each argument of ``node`` 0 if it is a lane; None where a lane is not an argument."""
    mapped = [isinstance(argument, fx.Node) and argument in lanes for argument in node.args]
    dims = tuple(0 if is_lane else None for is_lane in mapped)
    elsewhere = [n for n in node.all_input_nodes if n in lanes and n not in _plain(node.args)]
    by_keyword = lanes & set(_plain(tuple(node.kwargs.values())))
    return dims if any(mapped) and not elsewhere and not by_keyword else None


def _plain(arguments: tuple[Any, ...]) -> list[fx.Node]:
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def _map(arguments: Any, function: Any) -> Any:
    return pytree.tree_map(function, arguments)
