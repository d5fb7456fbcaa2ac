"""The Conv3d layers of a program that may be factorized, and their costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxtemporal.analysis.conv3d_geometry import conv3d_geometry
from fxtemporal.functional import ConvGeometry
from fxtemporal.functional.factors import ORDERS, Order
from fxtemporal.ir.node_meta import copy_meta, forget_value, value_of
from fxtemporal.ir.ops import Attr, Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.nn.conv2plus1d import Conv2Plus1d

__all__ = ["Layer", "layers_of", "put_in"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of a Conv3d, and every call that convolves with it.

    ``path`` names the module that holds the weight, ``name`` the weight itself; ``geometry`` is
    None if a call is not understood.
    """

    path: str
    name: str
    nodes: tuple[fx.Node, ...]
    op: Op | None
    geometry: ConvGeometry | None
    elsewhere: bool
    """Whether anything else reads the weight."""
    whole: bool
    """Whether the module at ``path`` holds only this layer, and nothing else reads it."""

    @property
    def kernel(self) -> str:
        assert self.geometry is not None
        return "×".join(map(str, self.geometry.kernel))

    def weight(self, program: Program) -> Tensor:
        return program.tensor(self.name).detach()

    def blockers(self, program: Program) -> Iterator[Reason]:
        """The reasons why the layer cannot be factorized."""
        geometry = self.geometry
        if self.op is None or geometry is None:
            reason = blocked_module(program, self.nodes[0])
            yield reason or Reason(Code.SHAPES_UNKNOWN, "its weight or its bias is computed")
            return
        if self.elsewhere or _homes(program, self.name) > 1:
            yield Reason(Code.SHARED_PARAMETER, "its weight is used by another layer as well")
        if geometry.kernel[0] == 1 or geometry.kernel[1:] == (1, 1):
            yield Reason(Code.NOTHING_SAVED, f"the {self.kernel} kernel is a factor already")

    def factors(
        self, weight: Tensor, bias: Tensor | None, order: Order, right: Tensor, left: Tensor
    ) -> Conv2Plus1d:
        """The module of two factors, :meth:`Conv2Plus1d.of_factors`."""
        g = self.geometry
        assert g is not None
        return Conv2Plus1d.of_factors(
            weight,
            bias,
            right,
            left,
            order=order,
            stride=g.stride,
            padding=g.padding,
            dilation=g.dilation,
            padding_mode=g.padding_mode,
        )

    def full_rank(self, order: Order) -> int:
        """The least channels between the factors that lose nothing, for all groups together."""
        g = self.geometry
        assert g is not None
        time, space = g.kernel[0], g.kernel[1] * g.kernel[2]
        inputs, outputs = g.in_channels // g.groups, g.out_channels // g.groups
        if order == "spatial-temporal":
            return g.groups * min(inputs * space, outputs * time)
        return g.groups * min(inputs * time, outputs * space)

    def parameters(self, rank: int | None, order: Order = "spatial-temporal") -> int:
        """Number of weights of the factors; of the layer itself if ``rank`` is None."""
        first, second = self._weights(rank, order)
        return first + second

    def flops(self, rank: int | None, order: Order = "spatial-temporal") -> int:
        """Floating-point operations of all calls: two for each product."""
        g = self.geometry
        assert g is not None
        first, second = self._weights(rank, order)
        total = 0
        for node in self.nodes:
            value = value_of(node)
            if not isinstance(value, Tensor) or g.frames is None or g.size is None:
                continue
            batch, *after = value.shape[0] if value.dim() == 5 else 1, *value.shape[-3:]
            between = [g.frames, *after[1:]] if order == "spatial-temporal" else [after[0], *g.size]
            total += 2 * batch * (first * math.prod(between) + second * math.prod(after))
        return total

    def _weights(self, rank: int | None, order: Order) -> tuple[int, int]:
        g = self.geometry
        assert g is not None
        time, space = g.kernel[0], g.kernel[1] * g.kernel[2]
        if rank is None:
            return 0, g.out_channels * (g.in_channels // g.groups) * time * space
        first, second = (space, time) if order == "spatial-temporal" else (time, space)
        return rank * (g.in_channels // g.groups) * first, g.out_channels * (
            rank // g.groups
        ) * second


def layers_of(program: Program) -> tuple[Layer, ...]:
    """Every Conv3d weight that the graph convolves with, in graph order."""
    readers: dict[str, int] = {}
    calls: dict[str, list[tuple[fx.Node, Op | None]]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0)
        if not node.op.startswith("call"):
            continue
        op = program.op(node)
        for name in {value.name for value in _attributes(op)}:
            readers[name] = readers.get(name, 0) + 1
        if op is not None and op.name == "conv3d":
            weight = op.args["weight"]
            name = weight.name if isinstance(weight, Attr) else node.name
            calls.setdefault(name, []).append((node, op))
        elif op is None and _is_conv3d(program, node):
            calls.setdefault(f"{node.target}.weight", []).append((node, None))
    found = []
    for name, members in calls.items():
        node, op = members[0]
        known = all(_reads_parameters(other) for _, other in members)
        geometry = conv3d_geometry(program, op) if known and op is not None else None
        path = name.rpartition(".")[0]
        nodes = tuple(node for node, _ in members)
        alike = len({_how(other) for _, other in members}) == 1
        elsewhere = not alike or readers.get(name, len(nodes)) > len(nodes)
        whole = known and op is not None and _is_whole(program, path, op, readers, len(nodes))
        found.append(Layer(path, name, nodes, op, geometry, elsewhere, whole))
    return tuple(found)


def _reads_parameters(op: Op | None) -> bool:
    """Whether the weight is a parameter, and the bias is a parameter or None."""
    if op is None or not isinstance(op.args["weight"], Attr):
        return False
    return op.args["bias"] is None or isinstance(op.args["bias"], Attr)


def _is_whole(program: Program, path: str, op: Op, readers: Mapping[str, int], calls: int) -> bool:
    """Whether the module holds only tensors that ``op`` reads, and only its calls read them."""
    if not path:
        return False
    module = program.gm.get_submodule(path)
    slots = (module._parameters, module._buffers, module._modules)
    held = {f"{path}.{name}" for slot in slots for name, value in slot.items() if value is not None}
    read = {op.args[name].name for name in ("weight", "bias") if op.args[name] is not None}
    return held <= read and all(readers.get(name, calls) <= calls for name in held)


def _how(op: Op | None) -> tuple[object, ...]:
    """All arguments of a convolution except its input."""
    args = op.args if op is not None else {}
    return tuple((name, value) for name, value in args.items() if name != "input")


def put_in(program: Program, layer: Layer, factors: nn.Module) -> None:
    """Replace each call by two calls of nn.Conv3d, so that later passes see known layers."""
    module = program.gm.get_submodule(layer.path)
    attribute = layer.name.rpartition(".")[2]
    name = f"{attribute}_factors"
    path = layer.path
    if not layer.whole:
        path = f"{layer.path}.{name}" if layer.path else name
    described = [op for node in layer.nodes if (op := program.op(node)) is not None]
    factors.train(module.training)
    program.gm.set_submodule(path, factors)
    order = ("spatial", "temporal")
    if getattr(factors, "order", ORDERS[0]) != ORDERS[0]:
        order = ("temporal", "spatial")
    replaced: dict[fx.Node, fx.Node] = {}
    for node, op in zip(layer.nodes, described, strict=True):
        value = op.args["input"]
        value = replaced.get(value, value)
        forget_value(node)
        with program.graph.inserting_before(node):
            for part in order:
                value = program.graph.call_module(f"{path}.{part}", (value,))
                copy_meta(value, node)
        replaced[node] = value
        node.replace_all_uses_with(value)
        program.graph.erase_node(node)
    for node in list(program.graph.nodes):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    if not layer.whole:
        module._parameters.pop(attribute, None)


def _attributes(op: Op | None) -> Iterator[Attr]:
    for value in op.args.values() if op is not None else ():
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, Attr):
                yield entry


def _is_conv3d(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.gm.get_submodule(str(node.target)), nn.Conv3d)


def _homes(program: Program, name: str) -> int:
    """The number of names that the model has for the weight."""
    weight = program.tensor(name)
    named = program.gm.named_parameters(remove_duplicate=False)
    homes = sum(isinstance(p, torch.Tensor) and p is weight for _, p in named)
    return max(homes, 1)
