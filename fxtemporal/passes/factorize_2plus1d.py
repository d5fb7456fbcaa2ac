"""Replace a Conv3d by a spatial and a temporal convolution of lower rank: (2+1)D. Lossy.

The R(2+1)D paper (Tran et al., arXiv 1711.11248) puts a (1, d, d) convolution into M_i channels
and a (t, 1, 1) convolution out of them in place of each t×d×d convolution. Here the two factors
come from the singular value decomposition of the trained kernel::

    before   conv   N_in → N_out, (3, 3, 3)
    after    conv.spatial   N_in → M_i,  (1, 3, 3)
             conv.temporal  M_i → N_out, (3, 1, 1)

It is off unless ``optimize(..., factorize=Factorize(...))`` asks for it, and its error is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from fxtemporal.analysis.conv3d import conv3d_geometry
from fxtemporal.errors import PassError
from fxtemporal.functional import ConvGeometry
from fxtemporal.graph import Program
from fxtemporal.nn import Conv2Plus1d, paper_rank
from fxtemporal.ops import Attr, Op
from fxtemporal.rules import Code, Reason, Rule, Site, blocked_module

__all__ = ["Factorize", "Factorize2Plus1d"]


@dataclass(frozen=True)
class Factorize:
    """How far to cut: ``rank`` is ``"paper"`` (M_i), an int, or a fraction of full rank (0, 1].

    M_i keeps the number of parameters, and so saves nothing by itself: a gain needs a lower rank.
    """

    rank: int | float | Literal["paper"] = "paper"

    def __post_init__(self) -> None:
        rank = self.rank
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        share = isinstance(rank, float) and 0 < rank <= 1
        if rank != "paper" and not whole and not share:
            raise PassError(
                f"Factorize: rank must be 'paper', an int from 1, or a fraction in (0, 1], "
                f"not {rank!r}"
            )


@dataclass(frozen=True, eq=False)
class Layer:
    """One Conv3d module and every call of it."""

    path: str
    nodes: tuple[fx.Node, ...]
    op: Op | None
    geometry: ConvGeometry | None
    users: int


class Factorize2Plus1d(Rule[Layer]):
    """Conv3d → (1, kH, kW) then (kT, 1, 1), by a truncated SVD of its kernel."""

    name = "factorize-2plus1d"
    exact = False

    def __init__(self, settings: Factorize) -> None:
        self.settings = settings

    def candidates(self, program: Program) -> Iterable[Layer]:
        readers: dict[str, int] = {}
        calls: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if not node.op.startswith("call"):
                continue
            op = program.op(node)
            for name in {value.name for value in _attributes(op)}:
                readers[name] = readers.get(name, 0) + 1
            if node.op == "call_module" and isinstance(
                program.gm.get_submodule(str(node.target)), nn.Conv3d
            ):
                calls.setdefault(str(node.target), []).append(node)
        for path, nodes in calls.items():
            op = program.op(nodes[0])
            geometry = None if op is None else conv3d_geometry(program, op)
            weight = op.args["weight"] if op is not None else None
            users = readers.get(weight.name, 0) if isinstance(weight, Attr) else 0
            yield Layer(path, tuple(nodes), op, geometry, users - len(nodes))

    def site(self, program: Program, candidate: Layer) -> Site:
        return Site(self.name, candidate.path, candidate.path, program.location(candidate.nodes[0]))

    def preconditions(self, program: Program, candidate: Layer) -> Iterator[Reason]:
        geometry = candidate.geometry
        if candidate.op is None or geometry is None:
            reason = blocked_module(program, candidate.nodes[0])
            assert reason is not None
            yield reason
            return
        if candidate.users > 0 or _tied(program, candidate.path):
            yield Reason(Code.SHARED_PARAMETER, "its weight is used by another layer as well")
        if geometry.kernel[0] == 1 or geometry.kernel[1:] == (1, 1):
            kernel = "×".join(map(str, geometry.kernel))
            yield Reason(Code.NOTHING_SAVED, f"the {kernel} kernel is a factor already")
            return
        if geometry.groups != 1:
            text = f"its {geometry.groups} groups have no factors of one rank"
            yield Reason(Code.NOTHING_SAVED, text)
            return
        full = _full_rank(geometry)
        if isinstance(self.settings.rank, int) and self.settings.rank > full:
            text = f"rank {self.settings.rank} was asked for, and the kernel has {full} at most"
            yield Reason(Code.RANK_OUT_OF_RANGE, text)

    def rewrite(self, program: Program, candidate: Layer) -> Mapping[str, Any]:
        conv = program.gm.get_submodule(candidate.path)
        assert isinstance(conv, nn.Conv3d)
        factors = Conv2Plus1d.from_conv3d(conv, rank=self.settings.rank)
        detail = dict(self.detail(program, candidate))
        detail["parameters"] = f"{_parameters(conv)} → {_parameters(factors)}"
        detail["weight_error"] = weight_error(conv, factors)
        program.gm.set_submodule(candidate.path, factors)
        for node in candidate.nodes:
            node.meta.pop("val", None)
            self._inline(program, node, candidate.path)
        return detail

    def _inline(self, program: Program, node: fx.Node, path: str) -> None:
        """Two calls of nn.Conv3d, so that the passes behind see what they know."""
        source = node.args[0] if node.args else node.kwargs["input"]
        with program.graph.inserting_before(node):
            spatial = program.graph.call_module(f"{path}.spatial", (source,))
            temporal = program.graph.call_module(f"{path}.temporal", (spatial,))
        for new in (spatial, temporal):
            new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(temporal)
        program.graph.erase_node(node)

    def detail(self, program: Program, candidate: Layer) -> Mapping[str, Any]:
        geometry = candidate.geometry
        if geometry is None:
            return {}
        full = _full_rank(geometry)
        rank = self.settings.rank
        if rank == "paper":
            rank = paper_rank(geometry.in_channels, geometry.out_channels, geometry.kernel)
        elif isinstance(rank, float):
            rank = max(1, round(rank * full))
        return {"rank": rank, "full_rank": full, "kernel": "×".join(map(str, geometry.kernel))}


def weight_error(conv: nn.Conv3d, factors: Conv2Plus1d) -> float:
    """‖W − W'‖ / ‖W‖ of the kernel and the one that its factors multiply to."""
    spatial, temporal = factors.spatial.weight.detach(), factors.temporal.weight.detach()
    product = torch.einsum("omt,mchw->octhw", temporal[..., 0, 0], spatial[:, :, 0])
    weight = conv.weight.detach()
    return float((product - weight).norm() / weight.norm().clamp_min(1e-30))


def _full_rank(geometry: ConvGeometry) -> int:
    time, height, width = geometry.kernel
    return min(geometry.in_channels * height * width, geometry.out_channels * time)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _attributes(op: Op | None) -> Iterator[Attr]:
    for value in op.args.values() if op is not None else ():
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, Attr):
                yield entry


def _tied(program: Program, path: str) -> bool:
    """Whether the module, or its weight, also stands at another place of the model."""
    module = program.gm.get_submodule(path)
    weight = module._parameters.get("weight")
    homes = [
        name
        for name, parameter in program.gm.named_parameters(remove_duplicate=False)
        if parameter is weight
    ]
    return len(homes) > 1
