"""Replaces a Conv3d by an exact, cheaper form.

Video networks are full of 3-D convolutions that are not 3-D at all: (1, 7, 7) stems, (3, 1, 1)
temporal halves, (1, 1, 1) shortcuts, kernels that span every frame; and a dense kernel has forms
that multiply less, or that engines are better at. The forms of :mod:`fxtemporal.functional` compute
the same numbers::

    before   y = self.layer1[0].conv1(x)                      nn.Conv3d, kernel (3, 3, 3)
    after    w = self.layer1[0].conv1.weight
             y = conv3d_in_form("conv3d_winograd_4", x, w, None, stride, ..., prepared)

The fastest form is found by timing (:mod:`fxtemporal.tuning.conv3d_forms`), and the rule is given
the choices. Without choices it uses a table, which has flat kernels only. Zeros that ``F.pad`` puts
before and after the clip, as causal networks do, become part of the convolution.

The parameters stay where they are, so the state dict is that of the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.analysis.conv3d_geometry import conv3d_geometry
from fxtemporal.analysis.layout_regions import keeps_layout
from fxtemporal.functional import (
    FORMS,
    ConvGeometry,
    conv3d_in_form,
    conv3d_packed,
    conv3d_spanning,
    conv3d_weight,
)
from fxtemporal.ir.node_meta import copy_meta, value_of
from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.prepared import origin, prepare
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.ir.values import rank, shape
from fxtemporal.passes.conv3d_choice import LAST, FormChoice, ToChoose
from fxtemporal.passes.rule import Remark, Rule, Site

__all__ = ["Conv3dForms", "Conv3dSite"]

PREFERENCE = tuple(
    f"conv3d_{name}" for name in ("pointwise", "full_extent", "temporal", "spatial", "patchify")
)
"""The table: without measurements, the first of these forms that is exact for the layer."""

_FUNCTIONS = {"conv3d_full_extent": conv3d_spanning}
"""Functions for forms that hold for one number of frames only; these work for any number."""

_ARGUMENTS = ("stride", "padding", "dilation", "groups", "padding_mode")


_TITLES = {
    "conv3d_spatial": "2-D convolutions of its frames",
    "conv3d_temporal": "a 2-D convolution over (T, H·W)",
    "conv3d_pointwise": "a 1×1 convolution of its frames",
    "conv3d_full_extent": "a 2-D convolution of all frames as channels",
    "conv3d_patchify": "a matrix product of its patches",
    "conv3d_channels_last_3d": "the same, in channels_last_3d",
    "conv3d_taps": "a 2-D convolution a tap, added up",
    "conv3d_stacked": "a 2-D convolution of its taps as channels",
    "conv3d_spread": "a 2-D convolution that gives all taps at once",
    "conv3d_toeplitz": "a 2-D convolution of the clip as channels",
    "conv3d_winograd_2": "temporal Winograd F(2, k)",
    "conv3d_winograd_3": "temporal Winograd F(3, k)",
    "conv3d_winograd_4": "temporal Winograd F(4, k)",
    "conv3d_low_rank": "a 2-D convolution and a temporal filter",
}
"""Each form in a few words."""


@dataclass(frozen=True, eq=False)
class Conv3dSite:
    """One call of a Conv3d. ``op`` is None for a module that is not exactly an ``nn.Conv3d``.

    ``source`` is its input, (B, C, T, H, W). If the graph pads a clip with frames of zeros first,
    ``source`` is the clip, and ``geometry`` has the zeros as ``time_padding``.
    """

    node: fx.Node
    key: str
    op: Op | None
    geometry: ConvGeometry | None
    source: Any = None
    nested: bool = False
    """Whether it is in a graph within the graph, as torch.export writes autocast and conditions."""

    @property
    def form(self) -> str | None:
        """The form that the table gives; None if it gives none."""
        if self.geometry is None:
            return None
        legal = (name for name in PREFERENCE if not any(FORMS[name].blockers(self.geometry)))
        return next(legal, None)


class Conv3dForms(Rule[Conv3dSite]):
    """Conv3d → an exact form of it.

    ``choices`` gives the form by the site's key; None: the table of flat kernels. With ``confined``
    a form that spreads NaN (:attr:`fxtemporal.functional.Form.confined`) is never used: it is no
    candidate in :meth:`to_choose`, and choosing it counts as no choice. With ``bitwise`` the
    candidates equal conv3d to the last bit.
    """

    name = "conv3d-forms"

    def __init__(
        self,
        choices: Mapping[str, FormChoice] | None = None,
        *,
        confined: bool = False,
        bitwise: bool = False,
    ) -> None:
        self.choices = choices
        self.confined = confined
        self.bitwise = bitwise

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        return self.choices is None

    def keeping(self, *, confined: bool, bitwise: bool) -> Conv3dForms:
        if type(self) is not Conv3dForms:
            return self
        return self._but(confined=self.confined or confined, bitwise=self.bitwise or bitwise)

    def choosing(self, choices: Mapping[str, FormChoice]) -> Conv3dForms:
        return self._but(choices=choices)

    def group(self, remark: Remark) -> str:
        """One group for all measured sites; one for each form otherwise."""
        if "milliseconds" in remark.detail:
            return self.name
        return f"{self.name} {remark.detail.get('form') or remark.target}"

    def _but(self, **settings: Any) -> Conv3dForms:
        """This rule with some settings changed."""
        return Conv3dForms(**(vars(self) | settings))

    def _choice(self, site: Conv3dSite) -> FormChoice | None:
        choice = None if self.choices is None else self.choices.get(site.key)
        spreads = choice is not None and not FORMS[choice.form].confined
        return None if self.confined and spreads else choice

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
            target = _target(program, op, node)
            calls[target] = calls.get(target, 0) + 1
            key = target if calls[target] == 1 else f"{target}@{calls[target]}"
            geometry = None if op is None else conv3d_geometry(program, op)
            source = None if op is None else op.args["input"]
            if geometry is not None and (causal := _causal(program, source)) is not None:
                source, pads = causal
                frames = (shape(source) or ())[-3]
                geometry = replace(geometry, time_padding=pads, frames=frames)
            yield Conv3dSite(node, key, op, geometry, source)
        for path, inner in program.gm.named_modules():
            for node in inner.graph.nodes if path and isinstance(inner, fx.GraphModule) else ():
                op = program.op(node) if node.op.startswith("call") else None
                if op is not None and op.name == "conv3d":
                    yield Conv3dSite(node, f"{path}.{node.name}", None, None, nested=True)

    def site(self, program: Program, candidate: Conv3dSite) -> Site:
        target = _target(program, candidate.op, candidate.node)
        if candidate.nested:
            target = program.module_path(candidate.node) or candidate.key
        return Site(self.name, candidate.key, target, program.location(candidate.node))

    def to_choose(self, program: Program) -> Iterator[ToChoose]:
        """The sites whose form can be chosen by timing."""
        for site in self.candidates(program):
            value = value_of(site.source) if isinstance(site.source, fx.Node) else None
            weight = None if site.op is None else origin(program, site.op.args["weight"])
            if site.op is None or weight is None or not isinstance(value, torch.Tensor):
                continue
            if site.geometry is None or value.dim() not in (4, 5) or value.numel() == 0:
                continue
            given = program.tensor(weight).detach()
            kernel = (site.geometry.out_channels, *given.shape[1:])
            if given.is_meta or given.shape != kernel or given.dtype != value.dtype:
                continue  # merged with others: it has no weight of its own
            batch = value.shape[0] if value.dim() == 5 else 1
            bias = site.op.args["bias"] is not None
            asked = self.confined, self.bitwise
            yield ToChoose(site.key, site.node, site.geometry, given, bias, batch, *asked)

    def preconditions(self, program: Program, candidate: Conv3dSite) -> Iterator[Reason]:
        geometry = candidate.geometry
        choice = self._choice(candidate)
        if candidate.nested:
            yield Reason(Code.NESTED_GRAPH, "it runs in a graph of its own, under autocast or cond")
        elif candidate.op is None:
            reason = blocked_module(program, candidate.node)
            assert reason is not None
            yield reason
        elif geometry is None:
            yield Reason(Code.SHAPES_UNKNOWN, "its weight or one of its settings is computed")
        elif choice is not None:
            if choice.form == "conv3d":
                text = f"no exact form of it was faster than {choice.before:.3g} ms"
                yield Reason(Code.NOT_FASTER, text)
        elif candidate.form is None:
            kernel = _sizes(geometry.kernel)
            if geometry.frames is None:
                text = f"{kernel}: whether it reaches over all frames needs example inputs"
                yield Reason(Code.SHAPES_UNKNOWN, text)
            text = f"the {kernel} kernel reaches over time and space"
            yield Reason(Code.DENSE_KERNEL, text)

    def nodes(self, program: Program, candidate: Conv3dSite) -> Iterable[fx.Node]:
        return () if candidate.nested else (candidate.node,)

    def what(self, program: Program, candidate: Conv3dSite) -> str:
        if candidate.geometry is None:
            return "Conv3d"
        return f"Conv3d with a {_sizes(candidate.geometry.kernel)} kernel"

    def becomes(self, program: Program, candidate: Conv3dSite) -> str:
        choice = self._choice(candidate)
        form = candidate.form if choice is None else choice.form
        if form is None:
            return ""
        spreads = "" if FORMS[form].confined else " (spreads NaN)"
        return _TITLES.get(form, form) + spreads

    def rewrite(self, program: Program, candidate: Conv3dSite) -> Mapping[str, Any]:
        node = candidate.node
        choice = self._choice(candidate)
        with program.graph.inserting_before(node):
            new = self._new(program, candidate, choice)
        copy_meta(new, node)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        if choice is not None and choice.layout == LAST:
            _make_contiguous_behind(program, new)
        return self.detail(program, candidate)

    def _new(self, program: Program, site: Conv3dSite, choice: FormChoice | None) -> fx.Node:
        assert site.op is not None
        assert site.geometry is not None
        args = site.op.args
        graph, geometry = program.graph, site.geometry
        source = program.argument(site.source)
        weight = program.argument(args["weight"])
        bias = program.argument(args["bias"])
        rest = [args[name] for name in _ARGUMENTS]
        if geometry.time_padding != (0, 0):
            rest.append(geometry.time_padding)
        if choice is None:
            assert site.form is not None
            function = _FUNCTIONS.get(site.form, FORMS[site.form].function)
            return graph.call_function(function, (source, weight, bias, *rest))
        kwargs: dict[str, Any] = {}
        if FORMS[choice.form].prepares:
            options = {name: args[name] for name in _ARGUMENTS}
            options |= {"time_padding": geometry.time_padding, "frames": geometry.frames}
            options |= {"form": choice.form, "size": geometry.size}
            kwargs["prepared"] = prepare(
                program, conv3d_weight, (weight,), conv3d_packed, **options
            )
        call = (choice.form, source, weight, bias, *rest)
        new = graph.call_function(conv3d_in_form, call, kwargs)
        if choice.layout == LAST:
            last: dict[str, Any] = {"memory_format": torch.channels_last_3d}
            if rank(site.node) == 5:
                return graph.call_method("contiguous", (new,), last)
        return new

    def detail(self, program: Program, candidate: Conv3dSite) -> Mapping[str, Any]:
        geometry = candidate.geometry
        if geometry is None:
            return {}
        kernel = _sizes(geometry.kernel)
        choice = self._choice(candidate)
        if choice is None:
            return {"form": candidate.form, "kernel": kernel, "frames": geometry.frames}
        return {
            "form": choice.form,
            "kernel": kernel,
            "frames": geometry.frames,
            "layout": choice.layout,
            "milliseconds_before": round(choice.before, 4),
            "milliseconds": round(choice.after, 4),
            **({} if FORMS[choice.form].confined else {"spreads_nan": True}),
        }


def _make_contiguous_behind(program: Program, start: fx.Node) -> None:
    """Make tensors contiguous for readers of a channels_last_3d region that may rely on strides."""
    pending, seen = [start], {start}
    while pending:
        node = pending.pop()
        for user in list(node.users):
            op = program.op(user) if user.op.startswith("call") else None
            tensor = node is start or isinstance(value_of(node), torch.Tensor)
            if op is not None and (keeps_layout(op) or Trait.RESTRIDES in op.traits):
                if user not in seen and not _makes_contiguous(user):
                    seen.add(user)
                    pending.append(user)
            elif tensor and _relies_on_strides(user, op):
                with program.graph.inserting_before(user):
                    dense = program.graph.call_method("contiguous", (node,))
                user.replace_input_with(node, dense)


def _makes_contiguous(user: fx.Node) -> bool:
    return user.target == "contiguous" and "memory_format" not in user.kwargs


def _relies_on_strides(user: fx.Node, op: Op | None) -> bool:
    """Whether ``user`` may depend on its input's strides: a view, an output, an unknown call."""
    own = str(getattr(user.target, "__module__", "")).startswith("fxtemporal.")
    return user.op == "output" or (op.name == "view" if op is not None else not own)


def _causal(program: Program, source: Any) -> tuple[fx.Node, tuple[int, int]] | None:
    """``(x, (before, after))`` if ``source`` is x padded with frames of zeros, else None."""
    op = program.op(source) if isinstance(source, fx.Node) else None
    if op is None or op.name != "pad" or not isinstance(op.args["input"], fx.Node):
        return None
    pad, padded = op.args["pad"], op.args["input"]
    zeros = op.args["mode"] == "constant" and op.args["value"] in (None, 0)
    if not zeros or rank(padded) not in (4, 5) or len(pad) != 6:
        return None
    if any(type(size) is not int or size < 0 for size in pad) or any(pad[:4]):
        return None
    return padded, (pad[4], pad[5])


def _sizes(kernel: tuple[int, ...]) -> str:
    return "×".join(map(str, kernel))


def _target(program: Program, op: Op | None, node: fx.Node) -> str:
    """The module that owns the weight; the node's name if no module owns it."""
    weight = None if op is None else origin(program, op.args["weight"])
    if weight is not None and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return str(node.target) if node.op == "call_module" else node.name


def _looks_like_conv3d(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.gm.get_submodule(str(node.target)), nn.Conv3d)
