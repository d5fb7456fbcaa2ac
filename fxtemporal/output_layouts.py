"""The memory layout of a program's outputs.

A caller may ``.view()`` what a model returns, so that its order of dimensions in memory is part of
what it computes. A form that writes its result in channels_last is put back at the edge of the
graph, where nothing behind it has done so::

    conv3d_spatial = conv3d_spatial(x, ...)                     channels_last_3d
    laid_out = laid_out(conv3d_spatial, (0, 1, 2, 3, 4), x, (0, 1, 2, 3, 4))      contiguous
    return laid_out
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxtemporal.graph import Program
from fxtemporal.opaque import opaque

__all__ = ["keep_output_layouts", "laid_out"]


_MAPS = 4
"""The least dimensions of a map, which may lie in memory with its channels last."""
_FORMS = ("fxtemporal.functional", "fxtemporal.pooling")


@opaque
def laid_out(
    tensor: Tensor, order: tuple[int, ...], given: Tensor, given_order: tuple[int, ...]
) -> Tensor:
    """``tensor`` with its dimensions in memory in this order, the slowest first.

    The same tensor where that is so already, and where the input ``given`` does not lie in
    ``given_order``, as it did in the example: what the model makes of another layout is not known.
    """
    if not given.permute(given_order).is_contiguous():
        return tensor
    moved = tensor.permute(order)
    dense = moved.contiguous()
    if dense is moved:
        return tensor
    back = [order.index(dim) for dim in range(len(order))]
    return dense.permute(back)


def keep_output_layouts(program: Program, captured: Program) -> None:
    """Lay out each output of ``program`` as that of ``captured`` is."""
    before, after = _outputs(captured), _outputs(program)
    if len(before) != len(after):
        return
    if any(map(_chooses, program.graph.nodes)):
        _reshape_views(program)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    dense = [node for node in inputs if _order(node.meta.get("val"))]
    if not dense:
        return
    largest = max(dense, key=lambda node: node.meta["val"].dim())
    given = largest, _order(largest.meta["val"])
    plain = all(node.meta["val"].is_contiguous() for node in dense)
    unsure = not plain or any(map(_chooses, program.graph.nodes))
    (end,) = (node for node in program.graph.nodes if node.op == "output")
    for old, new in zip(before, after, strict=True):
        if not isinstance(old, fx.Node) or not isinstance(new, fx.Node):
            continue
        wanted, found = _order(old.meta.get("val")), _order(new.meta.get("val"))
        if wanted is None or new.target is laid_out:
            continue
        known = found == wanted or _holds(new.meta.get("val"), wanted)
        if known and not (unsure and len(wanted) >= _MAPS):
            continue
        with program.graph.inserting_before(end):
            put_back = program.graph.call_function(laid_out, (new, wanted, *given))
        put_back.meta.update({k: v for k, v in new.meta.items() if k != "val"})
        end.replace_input_with(new, put_back)


def _reshape_views(program: Program) -> None:
    """A ``view`` of what a form left in another layout is a copy, where nothing writes into it."""
    described = [(node, program.op(node)) for node in program.graph.nodes if _is_call(node)]
    if any(op is not None and op.inplace for _, op in described):
        return
    for node, op in described:
        if op is None or op.name != "view" or not isinstance(op.args.get("input"), fx.Node):
            continue
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _is_call(node: fx.Node) -> bool:
    return node.op.startswith("call")


def _chooses(node: fx.Node) -> bool:
    """Whether a node is a form that chooses its layout when it runs, unlike its fake."""
    return str(getattr(node.target, "__module__", "")).startswith(_FORMS)


def _outputs(program: Program) -> list[Any]:
    (end,) = (node for node in program.graph.nodes if node.op == "output")
    return pytree.tree_leaves(end.args)


def _order(value: Any) -> tuple[int, ...] | None:
    """The dimensions by their strides; None where entries share memory, or it has gaps."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    strides = list(value.stride())
    order = tuple(sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim)))
    return order if _holds(value, order) else None


def _holds(value: Any, order: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and bool(value.permute(order).is_contiguous())
