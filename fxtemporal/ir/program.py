"""A captured program: an fx graph, the example value of each node, and the meaning of its ops.

Every node of a program that was captured with example inputs carries ``needed_value(node)``: a fake
tensor (shape, dtype, strides, no data), a number, or a tuple of those. Rules read programs and
change them through this class; :meth:`Program.refresh` ends each rewrite.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxtemporal.ir.guards import Specialization, guard, length, specializations
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.node_meta import has_value, needed_value, set_value, set_writes, value_of
from fxtemporal.ir.ops import Attr, Describer, Op
from fxtemporal.ir.shallow_copy import twin
from fxtemporal.ir.shape_memo import ShapeMemo
from fxtemporal.ir.source import is_user_file, short_location
from fxtemporal.ir.values import attribute, rank, run_node
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from fxtemporal.support.torch_private.transforms import leaving_transforms

__all__ = ["Program"]

_EDGES = ("placeholder", "output")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _lies_alike(value: Any, other: Any) -> bool:
    """Whether the tensors of two values have the same strides."""
    mine, theirs = pytree.tree_leaves(value), pytree.tree_leaves(other)
    return len(mine) == len(theirs) and all(
        one.stride() == two.stride()
        for one, two in zip(mine, theirs, strict=True)
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
    )


def _one_by_one(op: Op) -> bool:
    """Whether ``op`` cuts a tensor into pieces of one entry each."""
    return op.name == "split" and op.args["sizes"] == 1


def _sizes_read(check: fx.Node) -> set[fx.Node] | None:
    """All nodes that ``check`` depends on, without inputs; None if some are not sizes."""
    chain: set[fx.Node] = set()
    pending = list(check.all_input_nodes)
    while pending:
        node = pending.pop()
        if node.op == "placeholder" or node in chain:
            continue
        if not isinstance(value_of(node), int | torch.Size):
            return None
        chain.add(node)
        pending.extend(node.all_input_nodes)
    return chain


def _varying(op: Op) -> Any:
    """The computed operand of a sum or difference with a constant; None for two computed ones."""
    computed = [op.args[k] for k in ("input", "other") if isinstance(op.args[k], fx.Node)]
    plain = type(op.args.get("alpha", 1)) is int and op.args.get("alpha", 1) == 1
    return computed[0] if len(computed) == 1 and plain else None


_COPIED = (
    "modes",
    "writes",
    "doubt",
    "gradients",
    "output_layouts",
    "keeps_layouts",
    "exact_layouts",
)


class Program:
    """A graph module that rewrites may change, and questions about it.

    ``frontend`` is ``"fx"``, ``"export"`` or ``"given"``; ``note`` says why the first choice of
    front end was not used. ``modes`` are the modules whose training flag the capture read, by path.
    ``doubt`` says what the capture could not check: only a comparison with the model can.
    ``writes`` are the settings that the forward gave to layers which run as they are.
    ``gradients`` says why the graph's gradients cannot be the model's. ``output_layouts`` are the
    observed memory layouts of the model's outputs, which fake tensors may not show; with
    ``keeps_layouts`` rewrites keep them, and with ``exact_layouts`` for inputs in any layout.
    """

    modes: Mapping[str, Specialization] = MappingProxyType({})
    writes: frozenset[str] = frozenset()
    doubt: str | None = None
    gradients: str | None = None
    output_layouts: tuple[tuple[int | None, ...] | None, ...] | None = None
    keeps_layouts: bool = True
    exact_layouts: bool = False

    def __init__(
        self,
        gm: OptimizedModule,
        fake_mode: FakeTensorMode,
        frontend: str,
        note: str | None = None,
        shapes: ShapeMemo | None = None,
    ) -> None:
        self.gm = gm
        self.fake_mode = fake_mode
        self.frontend = frontend
        self.note = note
        self.shapes = ShapeMemo(fake_mode) if shapes is None else shapes
        self._describe = Describer(gm)
        self._ops: dict[fx.Node, tuple[Any, Any, Op | None]] = {}

    def copy(self) -> Program:
        """A copy with the same parameters, but a new graph and new modules."""
        graph = fx.Graph(tracer_cls=self.graph._tracer_cls)
        graph.output(graph.graph_copy(self.graph, {}))
        graph.set_codegen(self.graph._codegen)
        gm = OptimizedModule(twin(self.gm), graph, type(self.gm).__name__, later=True)
        copy = Program(gm, self.fake_mode, self.frontend, self.note, self.shapes)
        for name in _COPIED:
            setattr(copy, name, getattr(self, name))
        return copy

    @property
    def layer_settings(self) -> tuple[Any, ...]:
        """How layers are set, and outputs made: two graphs are alike only if these are."""
        modes = {path: (m.value, m.sets) for path, m in self.modes.items()}
        return self.writes, modes, getattr(self.gm, "returns", None)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """All that the capture fixed: sizes, layouts, modes."""
        return (*specializations(self.graph), *self.modes.values())

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def op(self, node: fx.Node) -> Op | None:
        """The description of ``node``, independent of its spelling; None if it is not known.

        Cached as long as the arguments of ``node`` are the same objects: fx replaces them at each
        edit.
        """
        args, kwargs, op = self._ops.get(node, (None, None, None))
        if args is not node.args or kwargs is not node.kwargs:
            op = self._describe(node)
            self._ops[node] = node.args, node.kwargs, op
        return op

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer called ``name``."""
        value = attribute(self.gm, name)
        assert isinstance(value, torch.Tensor)
        return value

    def held(self) -> tuple[dict[tuple[fx.Node, int], fx.Node], dict[fx.Node, fx.Node]]:
        """Sizes ``(tensor, dim)`` and numbers that a guard pins, each with its guard."""
        sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        numbers: dict[fx.Node, fx.Node] = {}
        for check in self.graph.nodes:
            if check.target is not guard or not isinstance(check.args[0], fx.Node):
                continue
            numbers.setdefault(check.args[0], check)
            if (held := self.held_size(check)) is not None:
                sizes.setdefault(held, check)
        return sizes, numbers

    def held_size(self, check: fx.Node) -> tuple[fx.Node, int] | None:
        """``(tensor, dim)`` whose size the guard ``check`` holds; None if there is none.

        The guard may be on the size, on the number of pieces, or on the size plus a constant.
        """
        number = check.args[0]
        while isinstance(number, fx.Node):
            op = self.op(number)
            if number.target is length:
                number = number.args[0]
            elif op is not None and op.name in ("add", "sub") and type(value_of(number)) is int:
                number = _varying(op)
            else:
                break
        op = self.op(number) if isinstance(number, fx.Node) else None
        if op is None or (op.name not in ("size", "unbind") and not _one_by_one(op)):
            return None
        tensor = op.args["input"]
        return (tensor, op.args["dim"]) if isinstance(tensor, fx.Node) else None

    def hoist_checks(self) -> None:
        """Move guards on input shapes, and the nodes they depend on, to right after the inputs."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        if not placeholders:
            return
        last = placeholders[-1]
        for check in [node for node in self.graph.nodes if node.target is guard]:
            chain = _sizes_read(check)
            if chain is not None and last < check:
                for node in (*sorted(chain), check):
                    if last < node:
                        last.append(node)
                        last = node

    def drop_unread(self) -> None:
        """Erase pure calls whose result nothing reads.

        Otherwise a frame that the forward computes and drops would be computed with the others.
        Gradients of zero would flow back into it, and give NaN if its own derivative is infinite.
        """
        for node in reversed(list(self.graph.nodes)):
            op = self.op(node) if node.op.startswith("call") and not node.users else None
            if op is not None and (op.pure or self._writes_unread(node, op)):
                self._hold_mode(node)
                self.graph.erase_node(node)

    def _hold_mode(self, node: fx.Node) -> None:
        """Hold the mode of a dropped call's module, if it would do more in the other mode."""
        if node.op != "call_module":
            return
        path = str(node.target)
        modules = list(self.gm.get_submodule(path).modules())
        modes = [module.training for module in modules]
        try:
            for module in modules:
                module.training = True
            op = self._describe(node)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
        if op is None or not (op.pure or self._writes_unread(node, op)):
            why = "a call of it that nothing reads was dropped"
            fixed = Specialization(f"{path}.training", False, self.location(node), why)
            self.modes = {**self.modes, path: fixed}

    def _writes_unread(self, node: fx.Node, op: Op) -> bool:
        """Whether ``node`` writes in place into a new tensor that nothing else reads."""
        written = op.args.get("input")
        if not op.inplace or op.random or op.updates or not isinstance(written, fx.Node):
            return False
        source = self.op(written)
        return source is not None and source.owns and set(written.users) == {node}

    def dims(self, value: Any) -> int | None:
        """The rank of a described argument: 0 for a number, None if it is not known."""
        if isinstance(value, Attr):
            return self.tensor(value.name).dim()
        if isinstance(value, fx.Node):
            known = value_of(value)
            return 0 if isinstance(known, int | float) else rank(value)
        return 0

    def argument(self, value: Any) -> Any:
        """A described argument for a new node: a parameter becomes a get_attr node."""
        return self.graph.get_attr(value.name) if isinstance(value, Attr) else value

    def location(self, node: fx.Node) -> str | None:
        """``file:line`` of the innermost frame of user code that made ``node``."""
        if (known := node.meta.get("location")) is not None:
            return str(known)
        frames = _FRAME.findall(node.stack_trace or "")
        for filename, line in reversed(frames):
            if is_user_file(filename):
                return short_location(filename, int(line))
        return None

    def called(self, node: fx.Node) -> str:
        """The module and line of ``node``, for a reason: ``backbone.conv1 (model.py:12)``."""
        path = self.module_path(node) or node.name
        location = self.location(node)
        return f"{path} ({location})" if location else path

    def module_path(self, node: fx.Node) -> str:
        """The module whose forward made ``node``; the module itself for a call of one."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        path = next(reversed(stack.values()))[0]
        return re.sub(r"^L\['self'\]\.?|^_export_root\.?", "", str(path))

    def refresh(self) -> None:
        """Compute the values of new nodes and check the graph, which has other code from now on."""
        self.fill_in()
        self.graph.lint()
        self.gm.recompile_later()

    @leaving_transforms()
    def fill_in(self) -> None:
        """Compute the values of new nodes, and again those of nodes that may share their memory.

        The readers of a new node may have another memory layout from then on.
        """
        renewed: set[fx.Node] = set()
        moved: set[fx.Node] = set()
        pending = [n for n in self.graph.nodes if n.op not in _EDGES and not has_value(n)]
        waiting = set(pending)  # in graph order, which a heap keeps
        while pending:
            node = heapq.heappop(pending)
            if gone := [source for source in node.all_input_nodes if source._erased]:
                raise RuntimeError(
                    f"{node} reads {gone[0]}, which is no node of the graph any more"
                )
            looks = self._looks_into(node, renewed)
            follows = not moved.isdisjoint(node.all_input_nodes)
            if has_value(node) and not looks and not follows:
                continue
            if all(has_value(source) for source in node.all_input_nodes):
                # A size that depends on the data has no value here. A view that the new layout
                # refuses is repaired by a later rule.
                new = not has_value(node)
                kinds = (DataDependentOutputException, DynamicOutputShapeException)
                with suppress(*kinds if new or looks else (Exception,)):
                    value = self._computed(node, again=not new)
                    if new or not _lies_alike(value, needed_value(node)):
                        moved.add(node)
                    elif not looks:
                        continue
                    set_value(node, value)
                    renewed.add(node)
                    for user in node.users:
                        if user.op not in _EDGES and user not in waiting:
                            waiting.add(user)
                            heapq.heappush(pending, user)
        self._ops.clear()

    def _computed(self, node: fx.Node, again: bool) -> Any:
        key = self.shapes.key(node, self.gm, anywhere=True)
        if key is not None and (known := self.shapes.recall(key)) is not None:
            set_writes(node, False)
            return known
        value = run_node(self.gm, node, self.fake_mode, again=again)
        if key is not None:
            self.shapes.remember(key, node, value)
        return value

    def _looks_into(self, node: fx.Node, renewed: set[fx.Node]) -> bool:
        """Whether an unknown call reads a value that was replaced, and may share its memory."""
        if not renewed or not node.op.startswith("call") or not has_value(node):
            return False
        return any(source in renewed for source in node.all_input_nodes) and self.op(node) is None
