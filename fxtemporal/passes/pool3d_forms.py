"""Replaces a 3-D pooling whose window is flat along some axis by an exact, cheaper form.

Video networks pool space and time separately: (1, 3, 3) after a stem, (2, 1, 1) between stages, and
one average over everything before the classifier. The forms of :mod:`fxtemporal.functional.pool3d`
compute the same with 2-D poolings and means::

    before   y = self.pool(x)                      nn.MaxPool3d, window (1, 3, 3)
    after    y = max_pool3d_spatial(x, ...)        max_pool2d over (B, C·T, H, W)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxtemporal.functional.pool3d import POOL_FORMS, PoolForm, PoolWindow
from fxtemporal.ir.node_meta import copy_meta, value_of
from fxtemporal.ir.ops import Op
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason, blocked_module
from fxtemporal.passes.rule import Rule, Site

__all__ = ["Pool3dForms", "Pool3dSite"]

_OPS = frozenset(form.op for form in POOL_FORMS.values())
_MODULES = (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d)


@dataclass(frozen=True, eq=False)
class Pool3dSite:
    """One call of a 3-D pooling. ``op`` is None for a module that is not known as one."""

    node: fx.Node
    key: str
    target: str
    op: Op | None
    window: PoolWindow | None

    @property
    def form(self) -> PoolForm | None:
        if self.op is None or self.window is None:
            return None
        forms = (form for form in POOL_FORMS.values() if form.op == self.op.name)
        window = self.window
        return next((form for form in forms if not any(form.blockers(window))), None)


class Pool3dForms(Rule[Pool3dSite]):
    """MaxPool3d, AvgPool3d, AdaptiveAvgPool3d → the exact form that the window has."""

    name = "pool3d-forms"
    alike = True

    def candidates(self, program: Program) -> Iterable[Pool3dSite]:
        calls: dict[str, int] = {}
        for node in list(program.graph.nodes):
            if not node.op.startswith("call"):
                continue
            op = program.op(node)
            if op is None and not _looks_like_pooling(program, node):
                continue
            if op is not None and op.name not in _OPS:
                continue
            target = program.module_path(node) if node.op == "call_module" else node.name
            calls[target] = calls.get(target, 0) + 1
            key = target if calls[target] == 1 else f"{target}@{calls[target]}"
            yield Pool3dSite(node, key, target, op, None if op is None else _window(op))

    def site(self, program: Program, candidate: Pool3dSite) -> Site:
        location = program.location(candidate.node)
        return Site(self.name, candidate.key, candidate.target, location)

    def preconditions(self, program: Program, candidate: Pool3dSite) -> Iterator[Reason]:
        node = candidate.node
        if candidate.op is None:
            module = program.gm.get_submodule(str(node.target))
            reason = blocked_module(program, node)
            if reason is not None:
                yield reason
            if getattr(module, "return_indices", False):
                text = f"{node.target} returns the indices of its maxima in (T, H, W) too"
                yield Reason(Code.RETURNS_INDICES, text)
            elif reason is None:
                yield Reason(Code.UNSUPPORTED_OP, f"how {node.target} is called is not known")
            return
        if candidate.window is None:
            yield Reason(Code.SHAPES_UNKNOWN, "its window is computed in the forward")
        elif candidate.form is None:
            text = f"the window {_said(candidate.window)} reaches over time and space"
            yield Reason(Code.NO_FLAT_WINDOW, text)
        val = value_of(node)
        if isinstance(val, Tensor) and not val.dtype.is_floating_point:
            yield Reason(Code.UNSUPPORTED_OP, f"it pools {val.dtype}")

    def nodes(self, program: Program, candidate: Pool3dSite) -> Iterable[fx.Node]:
        return (candidate.node,)

    def what(self, program: Program, candidate: Pool3dSite) -> str:
        if candidate.window is None:
            return "3-D pooling"
        goal = "to" if candidate.window.sizes else "over"
        return f"3-D pooling {goal} {_said(candidate.window)}"

    def becomes(self, program: Program, candidate: Pool3dSite) -> str:
        form = candidate.form
        if form is None:
            return ""
        return "a mean" if form.name.endswith("_mean") else "2-D pooling"

    def rewrite(self, program: Program, candidate: Pool3dSite) -> Mapping[str, Any]:
        op, form, node = candidate.op, candidate.form, candidate.node
        assert op is not None
        assert form is not None
        source, *rest = op.args.values()
        with program.graph.inserting_before(node):
            arguments = (program.argument(source), *rest)
            new = program.graph.call_function(form.function, arguments)
        copy_meta(new, node)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        return self.detail(program, candidate)

    def detail(self, program: Program, candidate: Pool3dSite) -> Mapping[str, Any]:
        if candidate.window is None:
            return {}
        form = candidate.form
        window = _said(candidate.window)
        return {"form": None if form is None else form.name, "window": window}


def _window(op: Op) -> PoolWindow | None:
    """The window of ``op``; None if one of its sizes is a value of the graph."""
    values = [op.args.get(name) for name in ("kernel_size", "padding", "output_size")]
    entries = [entry for value in values if value is not None for entry in value]
    if not all(entry is None or isinstance(entry, int) for entry in entries):
        return None
    kernel, padding, sizes = values
    return PoolWindow(sizes=sizes) if kernel is None else PoolWindow(kernel, padding or (0, 0, 0))


def _said(window: PoolWindow) -> str:
    return "×".join("·" if n is None else str(n) for n in window.sizes or window.kernel)


def _looks_like_pooling(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.gm.get_submodule(str(node.target)), _MODULES)
