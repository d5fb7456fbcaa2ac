"""Restores the memory layout after a form, if the layout makes a difference.

A form may write its result in another layout than the ``conv3d`` that it replaces. If numbers
depend on the layout, like a dropout mask drawn in memory order, the result is put right after the
form into the layout that ``conv3d`` would give it at run time. The same holds for an output whose
layout no example inputs show::

    conv3d_spatial = conv3d_spatial(x, weight, ...)                 channels_last
    as_conv3d_lays_out = as_conv3d_lays_out(conv3d_spatial, x, weight, ...)     contiguous
    relu = relu(as_conv3d_lays_out)

Between two forms this is not needed if only numbers matter to the second. The input that ``conv3d``
would have had is then not there to look at. Its layout is still known if every op from the inputs
on makes contiguous tensors of contiguous ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from fxtemporal.analysis.aliasing import written_by
from fxtemporal.analysis.layout_regions import keeps_layout
from fxtemporal.functional import conv3d_in_form
from fxtemporal.functional.layout import transformed
from fxtemporal.ir.leaf import leaf_function
from fxtemporal.ir.node_meta import copy_meta, value_of
from fxtemporal.ir.ops import Attr, Op, Trait
from fxtemporal.ir.program import Program
from fxtemporal.support.torch_private.convolutions import memory_format, suggest_memory_format

__all__ = [
    "as_conv3d_lays_out",
    "chooses_layout",
    "contiguous_gradient",
    "keep_form_layouts",
    "keep_gradient_layouts",
]

_CONVOLUTIONS, _POOLS = "fxtemporal.functional", "fxtemporal.functional.pool3d"
_ARGUMENTS = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": (1, 1, 1),
    "padding": (0, 0, 0),
    "dilation": (1, 1, 1),
    "groups": 1,
}
"""The first arguments of a form of ``conv3d``, with their defaults."""

_AS_THEY_ARE = (None, torch.contiguous_format, torch.preserve_format)
"""Memory formats that contiguous tensors have, or keep."""


class _Seen(IntEnum):
    """Where the layout of a result makes a difference."""

    NOWHERE = 0
    AT_AN_OUTPUT = 1
    IN_NUMBERS = 2


@leaf_function
def as_conv3d_lays_out(
    tensor: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``tensor``, the result of a form, in the layout that ``conv3d`` would give it."""
    if transformed() or weight.dim() != 5 or tensor.dim() not in (4, 5):
        return tensor
    clip, maps = (input, tensor) if tensor.dim() == 5 else (input[None], tensor[None])
    if 0 in clip.shape[2:]:  # the form pads it, as F.pad would: the result is contiguous
        laid_out = torch.contiguous_format
    else:
        # More than any call pads: it chooses no backend, and makes no clip too short.
        sizes = zip(weight.shape[2:], dilation, strict=True)
        around = tuple(step * (taps - 1) for taps, step in sizes)
        window = (stride, around, dilation, False, (0, 0, 0), groups)
        last = _is_channels_last(clip) or _is_channels_last(weight)
        laid_out = torch.channels_last_3d if last else torch.contiguous_format
        if not torch.compiler.is_compiling():  # a compiler can trace only answers that are tensors
            laid_out = memory_format(clip, weight, window) or laid_out
    maps = maps.contiguous(memory_format=laid_out)
    return maps if tensor.dim() == 5 else maps[0]


@leaf_function
def contiguous_among(tensor: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """``tensor`` made contiguous if all of ``inputs`` are contiguous; else ``tensor``."""
    if transformed() or not all(given.is_contiguous() for given in inputs):
        return tensor
    return tensor.contiguous()


@leaf_function
def contiguous_gradient(tensor: Tensor) -> Tensor:
    """``tensor``, whose gradient reaches the op that made it in the contiguous format.

    The backward of InstanceNorm on one sample gives wrong gradients for one in channels_last (torch
    2.13, on a CPU). Nothing is copied.
    """
    if transformed() or torch.compiler.is_compiling() or not tensor.requires_grad:
        return tensor
    return tensor.flatten().view(tensor.shape) if tensor.is_contiguous() else tensor


def keep_gradient_layouts(program: Program) -> None:
    """Have each InstanceNorm get the gradient in the layout in which the model's does."""
    if not any(map(chooses_layout, program.graph.nodes)):
        return
    for node in list(program.graph.nodes):
        op = program.op(node) if node.op.startswith("call") else None
        if op is None or op.name != "instance_norm":
            continue
        if any(user.target is not contiguous_gradient for user in node.users):
            _insert(program, node, contiguous_gradient)


def keep_form_layouts(program: Program, *, outputs: bool, exactly: bool = False) -> None:
    """Insert layout nodes after each form of ``program`` whose layout makes a difference.

    ``outputs``: also if the layout is visible only at an output; ``exactly``: as torch lays it out
    for any input, not only for a contiguous one.
    """
    writes = [node for node in program.graph.nodes if _writes(program, node)]
    forms = [node for node in program.graph.nodes if _chooses(node)]
    seen = {form: _seen(program, form, writes[-1:]) for form in forms}
    above = {form: _above(form) for form in forms if seen[form]}
    plain = not any(map(_is_channels_last, program.gm.parameters()))
    simple = {
        form
        for form, nodes in above.items()
        if seen[form] is _Seen.AT_AN_OUTPUT
        and not exactly
        and plain
        and any(map(_chooses, nodes))
        and all(_keeps_contiguous(program, node) for node in nodes)
    }
    exact = {form for form in above if seen[form] is _Seen.IN_NUMBERS}
    exact |= set(above) - simple if outputs else set()
    exact |= {node for form in exact for node in above[form] if _chooses(node)}
    for form in forms:
        if form in exact and not _is_pool(form):
            _insert(program, form, as_conv3d_lays_out, *_convolved(form))
        elif form in exact:  # a mean is contiguous for any input
            _insert(program, form, contiguous_among, [])
        elif outputs and form in simple:
            inputs = [node for node in above[form] if node.op == "placeholder"]
            _insert(program, form, contiguous_among, sorted(inputs))


def _insert(program: Program, form: fx.Node, function: Callable[..., Tensor], *args: Any) -> None:
    with program.graph.inserting_after(form):
        laid_out = program.graph.call_function(function, (form, *args))
    copy_meta(laid_out, form)
    form.replace_all_uses_with(laid_out, delete_user_cb=lambda user: user is not laid_out)


def _convolved(form: fx.Node) -> Iterator[Any]:
    """Input, weight, stride, dilation and groups of a call of a form."""
    args = form.args[1:] if form.target is conv3d_in_form else form.args
    given = dict(zip(_ARGUMENTS, args, strict=False)) | form.kwargs
    for name, default in _ARGUMENTS.items():
        if name not in ("bias", "padding"):
            yield given.get(name, default)


def _seen(program: Program, form: fx.Node, last_write: Sequence[fx.Node]) -> _Seen:
    """Where the layout of the result of ``form`` makes a difference, up to the next forms."""
    found = _Seen.NOWHERE
    pending, known = [form], {form}
    while pending:
        for user in pending.pop().users.keys() - known:
            known.add(user)
            if user.op == "output":
                found = max(found, _Seen.AT_AN_OUTPUT)
            elif not _chooses(user) and user.target not in (as_conv3d_lays_out, contiguous_among):
                if _reads_layout(program, user, last_write):
                    return _Seen.IN_NUMBERS
                if not _makes_dense(program, user):
                    pending.append(user)
    return found


def _reads_layout(program: Program, node: fx.Node, last_write: Sequence[fx.Node]) -> bool:
    """Whether numbers may depend on the memory layout of the input of ``node``.

    Random numbers are drawn in memory order; and ``x.contiguous()`` is ``x`` or a copy, which
    differ once something is written. Some ops raise an error in other layouts, or misread them.
    """
    if _follows(node):
        return False
    op = program.op(node)
    if op is not None and (Trait.PICKS_LAYOUTS in op.traits or _is_misread(program, op)):
        return True
    if op is None or op.random or ("training" in op.args and "norm" not in op.name):
        return op is None or Trait.PER_CHANNEL not in op.traits
    follows = op.traits & (Trait.ELEMENTWISE | Trait.RESTRIDES | Trait.FACT)
    alike = op.owns or op.inplace or (follows and Trait.REFORMATS not in op.traits)
    return not alike and any(node < write for write in last_write)


def _is_misread(program: Program, op: Op) -> bool:
    """Whether torch may compute a convolution wrongly on a channels-last input.

    In bfloat16, oneDNN reads beyond such an input of one frame where each channel has a kernel of
    its own, and the time is padded (seen with torch 2.13).
    """
    if op.name != "conv3d" or op.args["groups"] == 1:
        return False
    weight = op.args["weight"]
    known = program.tensor(weight.name) if isinstance(weight, Attr) else value_of(weight)
    return not isinstance(known, Tensor) or known.dtype == torch.bfloat16


def _makes_dense(program: Program, node: fx.Node) -> bool:
    """Whether the layout of the result of ``node`` does not depend on that of its input."""
    op = program.op(node)
    if op is not None and op.name == "flatten":  # T = 1 and later dimensions left: it may be a view
        return op.args["end_dim"] in (-1, (program.dims(op.args["input"]) or 0) - 1)
    return op is not None and Trait.DENSE in op.traits


def _writes(program: Program, node: fx.Node) -> bool:
    return bool(written_by(program, node))


def _above(form: fx.Node) -> set[fx.Node]:
    """All nodes that the input of ``form`` depends on, without weights."""
    found: set[fx.Node] = set()
    pending = [form.args[form.target is conv3d_in_form]]
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and node not in found and node.op != "get_attr":
            found.add(node)
            convolution = _chooses(node) and not _is_pool(node)
            pending += node.args[:2] if convolution else node.all_input_nodes
    return found


def _keeps_contiguous(program: Program, node: fx.Node) -> bool:
    """Whether the model's tensor here is contiguous if all its inputs are.

    An input that is not contiguous in the example is not expected to be.
    """
    if node.op == "placeholder":
        example = value_of(node)
        return not isinstance(example, Tensor) or example.is_contiguous()
    if _chooses(node) or _follows(node):
        return True
    op = program.op(node)
    if op is None or op.args.get("memory_format") not in _AS_THEY_ARE:
        return False
    return keeps_layout(op) or Trait.MAKES_CONTIGUOUS in op.traits


def _chooses(node: fx.Node) -> bool:
    return chooses_layout(node) and not _follows(node)


def _follows(node: fx.Node) -> bool:
    return _is_pool(node) and getattr(node.target, "__name__", "").startswith("max_pool3d")


def _is_pool(node: fx.Node) -> bool:
    return str(getattr(node.target, "__module__", "")).startswith(_POOLS)


def _is_channels_last(maps: Tensor) -> bool:
    """Whether torch takes ``maps`` for channels-last: sizes of 1 may leave a choice."""
    return maps.dim() == 5 and suggest_memory_format(maps) == torch.channels_last_3d


def chooses_layout(node: fx.Node) -> bool:
    """Whether a node is a form that chooses its layout when it runs, unlike its fake."""
    return str(getattr(node.target, "__module__", "")).startswith((_CONVOLUTIONS, _POOLS))
