"""Put an exact, cheaper form in place of a Conv3d whose kernel is flat along some axis.

Video networks are full of 3-D convolutions that are not 3-D at all: (1, 7, 7) stems, (3, 1, 1)
temporal halves, (1, 1, 1) shortcuts, kernels that span every frame. Engines run them as full 3-D
convolutions. The forms of :mod:`fxtemporal.functional` compute the same numbers with conv2d::

    before   y = self.layer1[0].conv1(x)                      nn.Conv3d, kernel (1, 3, 3)
    after    w = self.layer1[0].conv1.weight
             y = conv3d_spatial(x, w, None, stride, ...)      conv2d over (B·T, C, H, W)

The parameters stay where they are, so the state dict is that of the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxtemporal.analysis.conv3d import conv3d_geometry
from fxtemporal.functional import FORMS, ConvGeometry, conv3d_spanning
from fxtemporal.graph import Program
from fxtemporal.ops import Attr, Op
from fxtemporal.rules import Code, Reason, Rule, Site, blocked_module

__all__ = ["Conv3dForms", "Conv3dSite"]

PREFERENCE = tuple(
    f"conv3d_{name}" for name in ("pointwise", "full_extent", "temporal", "spatial", "patchify")
)
"""The first form of these whose domain holds the layer is taken."""

_FUNCTIONS = {"conv3d_full_extent": conv3d_spanning}
"""What is called where a form holds for one number of frames alone: it leaves that number free."""


@dataclass(frozen=True, eq=False)
class Conv3dSite:
    """One call of a Conv3d. ``op`` is None for a module that is not exactly an ``nn.Conv3d``."""

    node: fx.Node
    key: str
    op: Op | None
    geometry: ConvGeometry | None

    @property
    def form(self) -> str | None:
        if self.geometry is None:
            return None
        legal = (name for name in PREFERENCE if not any(FORMS[name].blockers(self.geometry)))
        return next(legal, None)


class Conv3dForms(Rule[Conv3dSite]):
    """Conv3d → the exact form that its kernel has."""

    name = "conv3d-forms"

    def candidates(self, program: Program) -> Iterable[Conv3dSite]:
        calls: dict[str, int] = {}
        for node in list(program.graph.nodes):
            if not node.op.startswith("call"):
                continue
            op = program.op(node)
            if op is None and not _looks_like_conv3d(program, node):
                continue
            if op is not None and op.name != "conv3d":
                continue
            target = _target(op, node)
            calls[target] = calls.get(target, 0) + 1
            key = target if calls[target] == 1 else f"{target}@{calls[target]}"
            geometry = None if op is None else conv3d_geometry(program, op)
            yield Conv3dSite(node, key, op, geometry)

    def site(self, program: Program, candidate: Conv3dSite) -> Site:
        target = _target(candidate.op, candidate.node)
        return Site(self.name, candidate.key, target, program.location(candidate.node))

    def preconditions(self, program: Program, candidate: Conv3dSite) -> Iterator[Reason]:
        geometry = candidate.geometry
        if candidate.op is None:
            reason = blocked_module(program, candidate.node)
            assert reason is not None
            yield reason
        elif geometry is None:
            yield Reason(Code.SHAPES_UNKNOWN, "its weight is computed, and its shape is not known")
        elif candidate.form is None:
            kernel = "×".join(map(str, geometry.kernel))
            if geometry.frames is None:
                text = f"{kernel}: whether it reaches over all frames needs example inputs"
                yield Reason(Code.SHAPES_UNKNOWN, text)
            text = f"the {kernel} kernel reaches over time and space"
            yield Reason(Code.DENSE_KERNEL, text)

    def rewrite(self, program: Program, candidate: Conv3dSite) -> Mapping[str, Any]:
        op, form, node = candidate.op, candidate.form, candidate.node
        assert op is not None
        assert form is not None
        with program.graph.inserting_before(node):
            weight = program.argument(op.args["weight"])
            bias = program.argument(op.args["bias"])
            rest = [op.args[k] for k in ("stride", "padding", "dilation", "groups", "padding_mode")]
            source = program.argument(op.args["input"])
            function = _FUNCTIONS.get(form, FORMS[form].function)
            new = program.graph.call_function(function, (source, weight, bias, *rest))
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        return self.detail(program, candidate)

    def detail(self, program: Program, candidate: Conv3dSite) -> Mapping[str, Any]:
        geometry = candidate.geometry
        if geometry is None:
            return {}
        kernel = "×".join(map(str, geometry.kernel))
        return {"form": candidate.form, "kernel": kernel, "frames": geometry.frames}


def _target(op: Op | None, node: fx.Node) -> str:
    """The module whose weight it is, or the node where the weight is no module's."""
    weight = op.args["weight"] if op is not None else None
    if isinstance(weight, Attr) and weight.name.endswith(".weight"):
        return weight.name.removesuffix(".weight")
    return str(node.target) if node.op == "call_module" else node.name


def _looks_like_conv3d(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.gm.get_submodule(str(node.target)), nn.Conv3d)
