"""Keeps the memory layout of a program's outputs.

A caller may ``.view()`` a result, so the order of its dimensions in memory is part of the model's
contract. If a form writes its result in channels_last, and no later op changes that, the layout is
restored at the output::

    conv3d_spatial = conv3d_spatial(x, ...)                     channels_last_3d
    laid_out = laid_out(conv3d_spatial, (0, 1, 2, 3, 4), x, (0, 1, 2, 3, 4))      contiguous
    return laid_out
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxtemporal.functional.layout import transformed
from fxtemporal.ir.leaf import leaf_function
from fxtemporal.ir.node_meta import copy_meta, has_value, needed_value, value_of
from fxtemporal.ir.ops import Trait
from fxtemporal.ir.program import Program
from fxtemporal.passes.building.form_layouts import chooses_layout, keep_form_layouts
from fxtemporal.support.torch_private import pytree

__all__ = ["keep_output_layouts", "laid_out", "layout_of"]


_FOLLOWS = Trait.KEEPS_LAYOUT | Trait.RESTRIDES | Trait.SAME_MEMORY | Trait.ELEMENTWISE
_MAPS = 4
"""The least number of dimensions of a tensor that may be channels-last."""
Layout: TypeAlias = tuple[int | None, ...]
"""The dimensions in memory, the slowest first; None marks a possible gap between two."""
_Layouts: TypeAlias = tuple[Layout | None, ...]


@leaf_function
def laid_out(tensor: Tensor, layout: Layout, given: Tensor, given_layout: Layout) -> Tensor:
    """``tensor`` with its dimensions in memory in the order of ``layout``, with no other gaps.

    Returned as it is if it has that layout already. Also if the input ``given`` does not have
    ``given_layout``, that of the example: the model's output layout is then not known. And under a
    transform of ``torch.func``, which decides the layout.
    """
    order = _order(layout)
    if tensor.dim() != len(order) or transformed():  # a size of 1 that was squeezed
        return tensor
    if not _holds(given, given_layout) or _holds(tensor, layout):
        return tensor
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


@leaf_function
def each_laid_out(tensors: Any, layouts: _Layouts, given: Tensor, given_layout: Layout) -> Any:
    """Several tensors, each in its layout, or all in the only one; None leaves one as it is."""
    leaves, structure = pytree.tree_flatten(tensors)
    layouts = layouts * len(leaves) if len(layouts) == 1 else layouts
    pairs = zip(leaves, layouts, strict=True)
    laid = [
        t if wanted is None else laid_out(t, wanted, given, given_layout) for t, wanted in pairs
    ]
    return pytree.tree_unflatten(laid, structure)


def keep_output_layouts(program: Program, captured: Program) -> None:
    """Give each output of ``program`` the layout of the same output of ``captured``."""
    before, after = _outputs(captured), _outputs(program)
    if len(before) != len(after):
        return None
    chooses = any(map(chooses_layout, program.graph.nodes))
    if chooses:
        _reshape_views(program)
    if chooses and captured.exact_layouts:
        return keep_form_layouts(program, outputs=True, exactly=True)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    wanted = _wanted(before, captured.output_layouts)
    if wanted is None or not any(has_value(node) for node in inputs):
        return keep_form_layouts(program, outputs=True)
    keep_form_layouts(program, outputs=False)
    dense = [node for node in inputs if layout_of(value_of(node)) is not None]
    if not dense:
        return None
    largest = max(dense, key=lambda node: needed_value(node).dim())
    given = largest, layout_of(needed_value(largest))
    unsure = chooses or not all(needed_value(node).is_contiguous() for node in dense)
    if chooses:
        for old, new in zip(before, after, strict=True):
            _lay_out_before_cuts(program, _cut_from(captured, old), _cut_from(program, new), given)
    (end,) = (node for node in program.graph.nodes if node.op == "output")
    for new, fakes, layouts in zip(after, *wanted, strict=True):
        if not isinstance(new, fx.Node) or new.target in (laid_out, each_laid_out):
            continue
        mine = pytree.tree_leaves(value_of(new))
        mine = mine if len(mine) == len(layouts) else [None] * len(layouts)
        asked = tuple(
            layout if _asked(fake, layout, value, unsure) else None
            for fake, layout, value in zip(fakes, layouts, mine, strict=True)
        )
        if not any(asked):
            continue
        several = isinstance(value_of(new), tuple | list | dict)
        asked = asked[:1] if len(set(asked)) == 1 else asked
        function, what = (each_laid_out, asked) if several else (laid_out, asked[0])
        with program.graph.inserting_before(end):
            put_back = program.graph.call_function(function, (new, what, *given))
        copy_meta(put_back, new)
        end.replace_input_with(new, put_back)
    return None


def _wanted(outputs: list[Any], real: _Layouts | None) -> tuple[list[Any], list[_Layouts]] | None:
    """For each output its fake tensors, and their layouts, as observed if the model was run.

    None if an output has no fake tensors, since it may hold several tensors.
    """
    fakes = [
        pytree.tree_leaves(value_of(node)) if isinstance(node, fx.Node) else [node]
        for node in outputs
    ]
    layouts: list[_Layouts] = [tuple(map(layout_of, values)) for values in fakes]
    if real is not None and len(real) == sum(map(len, fakes)):
        seen = iter(real)
        layouts = [tuple(next(seen) or layout for layout in group) for group in layouts]
    elif any(isinstance(node, fx.Node) and not has_value(node) for node in outputs):
        return None
    return fakes, layouts


def _cut_from(program: Program, node: Any) -> fx.Node | None:
    """The tensor that may be channels-last and of which an output of fewer dimensions is a view."""
    first = node
    while isinstance(node, fx.Node) and _is_call(node):
        value = value_of(node)
        if isinstance(value, Tensor) and value.dim() >= _MAPS:
            return None if node is first else node
        op = program.op(node)
        if op is None or not op.traits & (_FOLLOWS | Trait.CUTS):
            return None
        node = op.args.get("input")
    return None


def _lay_out_before_cuts(
    program: Program, old: fx.Node | None, new: fx.Node | None, given: tuple[fx.Node, Any]
) -> None:
    """Give ``new`` the layout of ``old``: once cut, a copy would close the gaps between strides."""
    layout = None if old is None or new is None else layout_of(value_of(old))
    if new is None or layout is None or new.target is laid_out:
        return
    with program.graph.inserting_after(new):
        put_back = program.graph.call_function(laid_out, (new, layout, *given))
    new.replace_all_uses_with(put_back, delete_user_cb=lambda user: user is not put_back)
    copy_meta(put_back, new)


def _asked(fake: Any, layout: Layout | None, value: Any, unsure: bool) -> bool:
    """Whether ``value`` needs a layout node to have the layout of the model's ``fake``."""
    if layout is None:
        return False
    known = _holds(fake, layout) and _holds(value, layout)
    return not known or (unsure and len(_order(layout)) >= _MAPS)


def _is_call(node: fx.Node) -> bool:
    return node.op.startswith("call")


def _reshape_views(program: Program) -> None:
    """Replace ``view`` by ``reshape`` after the last in-place write: a form may leave the tensor in
    a layout that needs a copy.
    """
    for node in reversed(program.graph.nodes):
        op = program.op(node) if _is_call(node) else None
        if op is not None and op.inplace:
            return  # it may write through an earlier view
        if op is None or op.name != "view" or not isinstance(op.args.get("input"), fx.Node):
            continue
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _outputs(program: Program) -> list[Any]:
    (end,) = (node for node in program.graph.nodes if node.op == "output")
    return pytree.tree_leaves(end.args)


@torch.no_grad()
def layout_of(value: Any) -> Layout | None:
    """The dimensions in order of their strides, with the gaps between them."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    strides = list(value.stride())
    order = tuple(sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim)))
    if value.permute(order).is_contiguous():
        return order
    layout: list[int | None] = []
    step = 1
    for dim in reversed(order):
        if value.shape[dim] != 1:
            layout += [] if strides[dim] == step else [None]
            step = strides[dim] * value.shape[dim]
        layout.append(dim)
    return tuple(reversed(layout))


def _order(layout: Layout) -> tuple[int, ...]:
    return tuple(dim for dim in layout if dim is not None)


def _holds(value: Any, layout: Layout) -> bool:
    """Whether ``value`` has the dimension order of ``layout``, and no gap that it does not have."""
    order = _order(layout)
    if not isinstance(value, Tensor) or value.dim() != len(order):
        return False
    if value.permute(order).is_contiguous():
        return True
    if len(order) == len(layout):
        return False
    step, dense = 1, True
    for dim in reversed(layout):
        if dim is None:
            dense = False
        elif value.shape[dim] != 1:
            if dense and value.stride(dim) != step:
                return False
            step, dense = value.stride(dim) * value.shape[dim], True
    return True
