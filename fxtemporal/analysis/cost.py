"""The cost of a program: FLOPs, and a time predicted from them and from the memory traffic.

Each node runs once on fake tensors, and each ATen op in it is metered: FLOPs by the formulas of
``torch.utils.flop_counter`` (a multiply-add counts as two), bytes by the tensors it reads and
writes. The time of an op is predicted by the roofline model (Williams, Waterman and Patterson,
*Roofline*, 2009), plus the overhead of a call::

    milliseconds = call + max(flops / rate, bytes / bandwidth)      # of memory, or of the cache

That explains most of what re-rolling a loop gains: T calls read the weights T times. The constants
fit the measurements of ``benchmarks.predictions`` on one machine. On another machine, trust ratios
more than milliseconds, and measurements there more than either. Two convolutions of the same work
are predicted to take the same time, whatever kernels they run on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fxtemporal.ir.node_meta import has_value, needed_value
from fxtemporal.ir.prepared import is_prepared
from fxtemporal.ir.program import Program
from fxtemporal.ir.values import run_node
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.dispatch import TorchDispatchMode

__all__ = ["Block", "Cost", "Costs", "SiteCost", "Structure"]

_RATE = 2.5e8
"""FLOPs per millisecond of large convolutions and products, on the machine of the benchmarks."""
_BANDWIDTH = 8.0e6
"""Bytes per millisecond between the cores and memory."""
_CACHED = 1.6e7
"""Bytes per millisecond of an op whose tensors fit into the cache."""
_CACHE = 2 << 20
"""Bytes that fit into the cache."""
_CALL = 0.012
"""Milliseconds that PyTorch takes to call an op."""
_STEP = 0.02
"""Milliseconds of one step of a recurrent layer, on top of its work: steps run in sequence."""
_VIEW = 0.002
"""Milliseconds of an op that computes strides only."""


@dataclass(frozen=True)
class Cost:
    """The cost of one call: FLOPs, ops run, and predicted milliseconds."""

    flops: int = 0
    calls: int = 0
    milliseconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.calls + other.calls,
            self.milliseconds + other.milliseconds,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.flops - other.flops,
            self.calls - other.calls,
            self.milliseconds - other.milliseconds,
        )

    def to_dict(self) -> dict[str, float]:
        return {
            "flops": self.flops,
            "calls": self.calls,
            "predicted_milliseconds": round(self.milliseconds, 4),
        }


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site, before and after its rewrite."""

    before: Cost
    after: Cost

    @property
    def speedup(self) -> float:
        """Predicted speed-up of the site: 2.0 is twice as fast."""
        return self.before.milliseconds / max(self.after.milliseconds, 1e-6)

    def to_dict(self) -> dict[str, Any]:
        return {"before": self.before.to_dict(), "after": self.after.to_dict()}


@dataclass(frozen=True)
class Block:
    """One module of a program: how often it is called, and what all its calls cost."""

    module: str
    times: int
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        return {"module": self.module, "times": self.times, **self.cost.to_dict()}


_NOTHING = Cost()


@dataclass(frozen=True)
class Structure:
    """The modules that a model runs, before and after its rewrites."""

    before: tuple[Block, ...]
    after: tuple[Block, ...]

    @property
    def cost_before(self) -> Cost:
        return sum((block.cost for block in self.before), _NOTHING)

    @property
    def cost_after(self) -> Cost:
        return sum((block.cost for block in self.after), _NOTHING)

    @property
    def speedup(self) -> float | None:
        """Predicted speed-up of the model; None if it runs no op."""
        after = self.cost_after.milliseconds
        return self.cost_before.milliseconds / after if after else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": [block.to_dict() for block in self.before],
            "after": [block.to_dict() for block in self.after],
        }


class Costs:
    """The costs of nodes; equal calls are metered once."""

    def __init__(self) -> None:
        self._of: dict[fx.Node, Cost] = {}
        self._alike: dict[Any, Cost] = {}

    def of(self, program: Program, nodes: Iterable[fx.Node]) -> Cost:
        """The total cost of ``nodes``."""
        return sum((self._node(program, node) for node in nodes), _NOTHING)

    def total(self, program: Program) -> Cost:
        return self.of(program, program.graph.nodes)

    def blocks(self, program: Program, depth: int = 2) -> tuple[Block, ...]:
        """The cost of each module, named to ``depth`` levels, in the order of their first calls.

        A module is called as often as most of the layers in it are.
        """
        costs: dict[str, Cost] = {}
        calls: dict[str, dict[str, int]] = {}
        for node in program.graph.nodes:
            cost = self._node(program, node)
            if not cost.calls:
                continue
            path = program.module_path(node)
            name = ".".join(path.split(".")[:depth])
            costs[name] = costs.get(name, _NOTHING) + cost
            if node.op == "call_module":
                seen = calls.setdefault(name, {})
                seen[path] = seen.get(path, 0) + 1
        return tuple(
            Block(name, statistics.mode(calls.get(name, {"": 1}).values()), cost)
            for name, cost in costs.items()
        )

    def _node(self, program: Program, node: fx.Node) -> Cost:
        if node not in self._of:
            self._of[node] = self._metered(program, node)
        return self._of[node]

    def _metered(self, program: Program, node: fx.Node) -> Cost:
        if not node.op.startswith("call") or not has_value(node):
            return _NOTHING
        if not _has_tensor(needed_value(node)) or is_prepared(program, node):
            return _NOTHING
        if any(not has_value(source) for source in node.all_input_nodes):
            return _NOTHING
        key = _key(node)
        if key not in self._alike:
            meter = _Meter()
            with suppress(Exception):  # a node that fails is counted up to the failing op
                run_node(program.gm, node, program.fake_mode, meter, again=True)
            self._alike[key] = meter.cost
        return self._alike[key]


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _key(node: fx.Node) -> Any:
    """A key that is equal for calls of the same cost."""
    leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return node.op, node.target, str(structure), tuple(_described(leaf) for leaf in leaves)


def _described(leaf: Any) -> str:
    values = pytree.tree_leaves(needed_value(leaf) if isinstance(leaf, fx.Node) else leaf)
    return repr([(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in values])


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the ATen ops that run inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = _NOTHING

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question, such as the device of a tensor
            return func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        self.cost += _op_cost(func, formula, args, kwargs, result)
        return result


def _op_cost(
    func: Any, formula: Callable[..., int] | None, args: Any, kwargs: Any, result: Any
) -> Cost:
    returns = [entry.alias_info for entry in func._schema.returns]
    if any(alias is not None and not alias.is_write for alias in returns):
        return Cost(0, 1, _VIEW)
    read = {id(t): t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    written = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    size = sum(t.numel() * t.element_size() for t in (*read.values(), *written))
    flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
    moved = size / (_CACHED if size <= _CACHE else _BANDWIDTH)
    steps = args[0].shape[0] * _STEP if func.overloadpacket in _STEPPING else 0.0
    return Cost(flops, 1, _CALL + steps + max(flops / _RATE, moved))


def _recurrent(input: Tensor, weights: Iterable[Tensor]) -> int:
    """FLOPs of a recurrent layer: each step of each sample uses each weight once."""
    matrices = (weight.numel() for weight in weights if weight.dim() == 2)
    return 2 * input.shape[0] * input.shape[1] * sum(matrices)


def _onednn_layer(input: Tensor, w_ih: Tensor, w_hh: Tensor, *args: Any, **kwargs: Any) -> int:
    return _recurrent(input, (w_ih, w_hh))


def _cudnn_layers(input: Tensor, weights: Iterable[Tensor], *args: Any, **kwargs: Any) -> int:
    return _recurrent(input, weights)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    count = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return int(count)


_aten = torch.ops.aten
_STEPPING = frozenset((_aten.mkldnn_rnn_layer, _aten._cudnn_rnn))
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.mkldnn_rnn_layer: _onednn_layer,
    _aten._cudnn_rnn: _cudnn_layers,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
