"""Folds a BatchNorm in eval mode into the convolution before it.

In eval mode a BatchNorm multiplies each channel by a constant and adds another one. A convolution
with other weights does the same at no cost. A separate BatchNorm reads and writes the whole
activation once more, which on a CPU is a good part of a video network's time::

    before   y = self.norm(self.conv(x))              nn.Conv3d, nn.BatchNorm3d
    after    w, b = self._prepared_0(...)             computed once, see fxtemporal.ir.prepared
             y = F.conv3d(x, w, b, stride, ...)

with ``w = weight · s``, ``b = (bias - mean) · s + shift`` and ``s = scale / sqrt(var + eps)`` along
the output channels. The result differs by rounding: each weight is rounded once more, which moves
the result by about one unit in the last place of its dtype.

Every conv and conv_transpose, and a linear on (B, C), takes part; a weight that several
convolutions share is folded for each separately. The parameters stay where they are. The result is
right in eval mode only: :func:`fxtemporal.optimize` guards the mode of each folded BatchNorm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.analysis.aliasing import written_by
from fxtemporal.analysis.interference import attributes_written, mode_switch
from fxtemporal.ir.guards import Specialization
from fxtemporal.ir.leaf import leaf_function
from fxtemporal.ir.node_meta import copy_meta, value_of
from fxtemporal.ir.ops import Attr, Op, Trait
from fxtemporal.ir.prepared import prepare
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.ir.values import rank
from fxtemporal.passes.building.convolution_call import FUNCTIONS, layer_call
from fxtemporal.passes.rule import Remark, Rule, Site
from fxtemporal.support.torch_private.layers import BatchNorm, Conv

__all__ = ["FoldBatchNorm", "Normalized", "folded"]

_LAYERS = (Conv, nn.Linear)
_STATISTICS = ("running_mean", "running_var")
_AFFINE = ("weight", "bias")
_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)
_RANKS: Mapping[type[nn.Module], int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
"""The rank of input that a BatchNorm requires."""


@leaf_function
def folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    eps: float,
    transposed: bool,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The weight and bias of a convolution followed by a BatchNorm.

    Computed in float32 or wider, and rounded once, to the dtype of ``weight``. The output channels
    are dimension 0 of ``weight``; if ``transposed``, dimension 1 of each of its ``groups`` parts.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = (var.to(wide) + eps).rsqrt()
    if scale is not None:
        factor = factor * scale.to(wide)
    offset = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    offset = offset * factor
    if shift is not None:
        offset = offset + shift.to(wide)
    if transposed:
        parts = torch.unflatten(weight.to(wide), 0, (groups, -1))
        rows = factor.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
        scaled = (parts * rows).flatten(0, 1)
    else:
        scaled = weight.to(wide) * factor.view(-1, *(1,) * (weight.dim() - 1))
    return scaled.to(weight.dtype), offset.to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Normalized:
    """One BatchNorm and the layer whose output it reads; an op is None if it is not known."""

    node: fx.Node
    key: str
    target: str
    op: Op | None
    layer: fx.Node
    layer_op: Op | None
    written: frozenset[str]
    """The parameters and buffers that the forward writes."""
    formatted: frozenset[fx.Node]
    """Calls that copy or not, by the layout of what they get, and whose result is written."""


class FoldBatchNorm(Rule[Normalized]):
    """Convolution, then BatchNorm in eval mode → one convolution with prepared weights."""

    name = "fold-batchnorm"
    alike = True

    def candidates(self, program: Program) -> Iterable[Normalized]:
        written, formatted = attributes_written(program), _formatted_before_a_write(program)
        calls: dict[str, int] = {}
        for node in list(program.graph.nodes):
            op = program.op(node)
            if op is None and not _is_module(program, node, (BatchNorm,)):
                continue
            if op is not None and op.name != "batch_norm":
                continue
            layer = node.args[0] if op is None and node.args else op and op.args["input"]
            if not isinstance(layer, fx.Node):
                continue
            layer_op = program.op(layer)
            if layer_op is None and not _is_module(program, layer, _LAYERS):
                continue
            if layer_op is not None and layer_op.name not in FUNCTIONS:
                continue
            target = _target(op, node)
            calls[target] = calls.get(target, 0) + 1
            key = target if calls[target] == 1 else f"{target}@{calls[target]}"
            yield Normalized(node, key, target, op, layer, layer_op, written, formatted)

    def site(self, program: Program, candidate: Normalized) -> Site:
        location = program.location(candidate.node)
        return Site(self.name, candidate.key, candidate.target, location)

    def preconditions(self, program: Program, candidate: Normalized) -> Iterator[Reason]:
        for node, op in ((candidate.node, candidate.op), (candidate.layer, candidate.layer_op)):
            if op is None:
                yield blocked_module(program, node) or Reason(
                    Code.SUBCLASS, f"{node.target} is not exactly a layer of torch.nn"
                )
        yield from self._readers(program, candidate)
        if candidate.op is not None:
            yield from self._statistics(candidate.op)
        if candidate.op is None or candidate.layer_op is None:
            return
        names = [*_sources(candidate.layer_op, ("weight", "bias"))]
        names += _sources(candidate.op, (*_STATISTICS, *_AFFINE))
        for value in names:
            if isinstance(value, fx.Node):
                yield Reason(Code.COMPUTED_WEIGHT, f"{value.name} is computed at each call")
            elif isinstance(value, Attr) and value.name in candidate.written:
                yield Reason(Code.VISIBLE_WRITE, f"the forward writes {value.name}")
        yield from self._axis(program, candidate)
        yield from self._dtype(program, candidate)

    def _readers(self, program: Program, candidate: Normalized) -> Iterator[Reason]:
        layer = candidate.layer
        for user in layer.users:
            op = program.op(user)
            if user is candidate.node or (op is not None and Trait.FACT in op.traits):
                continue
            if layer in written_by(program, user):
                text = f"{user.name} writes into what {layer.name} gave"
                yield Reason(Code.VISIBLE_WRITE, text)
            else:
                what = "it is an output" if user.op == "output" else f"{user.name} reads it too"
                text = f"what {program.called(layer)} gives is needed as it is: {what}"
                yield Reason(Code.OUTPUT_SHARED, text)

        formatted = _reached(candidate.node, candidate.formatted)
        if formatted is not None:
            text = f"whether {program.called(formatted)} copies depends on how BatchNorm lays out "
            text += "its result, and a later op writes in place"
            yield Reason(Code.VISIBLE_WRITE, text)

        switch = mode_switch(program, layer, candidate.node)
        if switch is not None:
            text = f"{switch.name}, which stands between the two, may switch a mode"
            yield Reason(Code.UNSUPPORTED_OP, text)

    def _statistics(self, op: Op) -> Iterator[Reason]:
        if op.args["running_mean"] is None or op.args["running_var"] is None:
            text = "it has no running statistics, and takes those of each batch"
            yield Reason(Code.BATCH_STATISTICS, text)
        elif op.args["training"] is not False:
            text = "it is in training mode, and takes the statistics of each batch"
            yield Reason(Code.TRAINING_BATCHNORM, text)

    def _axis(self, program: Program, candidate: Normalized) -> Iterator[Reason]:
        assert candidate.layer_op is not None
        name = candidate.layer_op.name
        batched = 2 if name == "linear" else int(name[-2]) + 2
        found = rank(candidate.layer)
        if found is None and _is_module(program, candidate.node, tuple(_RANKS)):
            found = _RANKS[type(program.gm.get_submodule(str(candidate.node.target)))]
        if found is None:
            text = f"whether it normalizes the channels of {name} depends on a shape not known"
            yield Reason(Code.SHAPES_UNKNOWN, text)
        elif found != batched:
            text = f"{name} gives {found} dimensions here, and dimension 1 is not its channels"
            yield Reason(Code.OTHER_AXIS, text)

    def _dtype(self, program: Program, candidate: Normalized) -> Iterator[Reason]:
        assert candidate.layer_op is not None
        assert candidate.op is not None
        weight = candidate.layer_op.args["weight"]
        if not isinstance(weight, Attr):
            return
        own = program.tensor(weight.name).dtype
        others = {
            program.tensor(value.name).dtype
            for value in _sources(candidate.op, (*_STATISTICS, *_AFFINE))
            if isinstance(value, Attr)
        }
        val = value_of(candidate.node)
        result = {val.dtype} if isinstance(val, Tensor) else set()
        low = own in (torch.float16, torch.bfloat16)
        allowed = {own, torch.float32} if low else {own}
        if not own.is_floating_point or not others <= allowed or not result <= {own}:
            dtypes = ", ".join(sorted(str(dtype) for dtype in {own, *others, *result}))
            yield Reason(Code.MIXED_DTYPES, f"their tensors are of {dtypes}")

    def nodes(self, program: Program, candidate: Normalized) -> Iterable[fx.Node]:
        return (candidate.node,)

    def what(self, program: Program, candidate: Normalized) -> str:
        kind = (
            "linear"
            if candidate.layer_op and candidate.layer_op.name == "linear"
            else "convolution"
        )
        return f"BatchNorm behind a {kind}"

    def becomes(self, program: Program, candidate: Normalized) -> str:
        return "part of the weights before it"

    def rewrite(self, program: Program, candidate: Normalized) -> Mapping[str, Any]:
        op, layer_op, node, layer = (
            candidate.op,
            candidate.layer_op,
            candidate.node,
            candidate.layer,
        )
        assert op is not None
        assert layer_op is not None
        values = _sources(layer_op, ("weight", "bias")) + _sources(op, (*_STATISTICS, *_AFFINE))
        with program.graph.inserting_before(layer):
            sources = [None if value is None else program.argument(value) for value in values]
            pair = prepare(
                program,
                folded,
                sources,
                eps=op.args["eps"],
                transposed="transpose" in layer_op.name,
                groups=layer_op.args.get("groups", 1),
            )
            weight = program.graph.call_function(operator.getitem, (pair, 0))
            bias = program.graph.call_function(operator.getitem, (pair, 1))
            new = layer_call(program, layer_op, weight, bias)
        copy_meta(new, layer)
        node.replace_all_uses_with(new)
        layer.replace_all_uses_with(new, delete_user_cb=lambda user: user is not node)
        for old in (node, layer):
            inputs = old.all_input_nodes
            program.graph.erase_node(old)
            for unread in inputs:
                if unread.op == "get_attr" and not unread.users:
                    program.graph.erase_node(unread)
        return {"into": _target(layer_op, layer)}

    def modes(self, model: nn.Module, applied: Sequence[Remark]) -> Mapping[str, Specialization]:
        """Eval mode for each folded BatchNorm: only then is its folded form right."""
        why = "its BatchNorm was folded into the layer before it"
        modules = dict(model.named_modules())
        return {
            remark.target: Specialization(f"{remark.target}.training", False, remark.location, why)
            for remark in applied
            if (module := modules.get(remark.target)) is not None and not module.training
        }


def _formatted_before_a_write(program: Program) -> frozenset[fx.Node]:
    """Calls that give a tensor as it is if it is channels-last, else a copy, and are written to.

    Where sizes are 1, BatchNorm gives other strides than the layer before it.
    """
    found: list[fx.Node] = []
    written = False
    for node in reversed(program.graph.nodes):
        op = program.op(node) if node.op.startswith("call") else None
        if written and op is not None and op.args.get("memory_format") in _CHANNELS_LAST:
            found.append(node)
        written = written or bool(written_by(program, node))
    return frozenset(found)


def _reached(start: fx.Node, among: frozenset[fx.Node]) -> fx.Node | None:
    """One of the nodes ``among`` that depends on ``start``."""
    pending, known = [start] if among else [], {start}
    while pending:
        for user in pending.pop().users.keys() - known:
            if user in among:
                return user
            known.add(user)
            pending.append(user)
    return None


def _is_module(program: Program, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.gm.get_submodule(str(node.target)), kinds)


def _sources(op: Op, names: Iterable[str]) -> list[Any]:
    return [op.args[name] for name in names]


def _target(op: Op | None, node: fx.Node) -> str:
    """The module that owns the statistics or weight; the node's name if no module does."""
    args = {} if op is None else op.args
    home = args.get("running_mean") or args.get("weight")
    if isinstance(home, Attr) and "." in home.name:
        return home.name.rpartition(".")[0]
    return str(node.target) if node.op == "call_module" else node.name
