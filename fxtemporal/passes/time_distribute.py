"""Re-rolls an unrolled per-frame loop into one call over all frames.

A loop over frames reaches the graph as T copies of its body. This pass runs the body once, on the
frames folded into the batch::

    before                                      after
    for t in range(T):                          y = x.flatten(0, 1)            # (B·T, C, H, W)
        outs.append(relu(conv(x[:, t])))        y = relu(conv(y))              # once
    out = torch.stack(outs, dim=1)              out = y.unflatten(0, (-1, T))  # (B, T, C', H', W')

:mod:`fxtemporal.analysis.families` finds the copies, :mod:`fxtemporal.analysis.batching_rules` the
ops that fold. An op of the body that does not fold stays in the loop and reads its frame from the
batched result.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument

from fxtemporal.analysis.aliasing import written_by
from fxtemporal.analysis.batching_rules import Batching, How
from fxtemporal.analysis.families import Family, Lane, Source, Uniform
from fxtemporal.analysis.loops import Loop, SourceBatch, computes, loops_of, owns_memory
from fxtemporal.analysis.vmap_fallback import mapped_dims
from fxtemporal.ir.guards import Specialization, guard, one_shape
from fxtemporal.ir.node_meta import copy_meta, forget_value, mark_no_frame, needed_value, value_of
from fxtemporal.ir.ops import Op, Trait
from fxtemporal.ir.per_frame import spelled, vmapped
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.ir.values import rank
from fxtemporal.passes.building.batched_frames import Stacked, moved, pick, step_of
from fxtemporal.passes.building.collect_frames import Joiner
from fxtemporal.passes.building.held_modes import modes_of_folded
from fxtemporal.passes.rule import Remark, Rule, Site
from fxtemporal.support.errors import PassError

__all__ = ["TimeDistribute"]

_ALLOWABLE = frozenset((str(Code.TRAINING_BATCHNORM), str(Code.RANDOMNESS)))


class TimeDistribute(Rule[Loop]):
    """Loops over frames → one body over (B·T, ...).

    Args:
        allow: reason codes that no longer keep frames in their loop, although the result changes.
            With them the rule is lossy, and looks only at loops that they block:

            - ``"training-batchnorm"``: a normalization in training mode takes its statistics over
              all B·T frames at once, not over the B samples of a frame. Its running statistics are
              updated once a call, not T times, and ``num_batches_tracked`` counts one call.
            - ``"randomness"``: dropout draws its masks for all frames in one call. They are as
              independent as before, but other numbers come from the same seed.

    Raises:
        PassError: another code; ignoring it would give a wrong result.
    """

    name = "time-distribute"
    options = ("allow",)
    moves_others = True  # one loop may read the frames that another joins
    folds_loops = True

    def __init__(self, allow: Iterable[str] = ()) -> None:
        if isinstance(allow, str) or not set(allow) <= _ALLOWABLE:
            listed = ", ".join(sorted(_ALLOWABLE))
            raise PassError(f"allow must be a list of reason codes among {listed}, not {allow!r}")
        self.allowed = frozenset(Code(code) for code in allow)
        self.exact = not self.allowed

    def candidates(self, program: Program) -> Iterable[Loop]:
        found = loops_of(program, self.allowed)
        return (loop for loop in found if loop.allowed) if self.allowed else found

    def site(self, program: Program, candidate: Loop) -> Site:
        first = candidate.frames.first
        body = [f for f in candidate.families if not f.source and not f.uniform]
        return Site(self.name, first.name, _body_path(body) or first.name, program.location(first))

    def preconditions(self, program: Program, candidate: Loop) -> Iterator[Reason]:
        if not any(computes(family) for family in candidate.plans):
            yield from candidate.reasons or (
                Reason(Code.NOTHING_TO_BATCH, "the loop only moves data from place to place"),
            )

    def detail(self, program: Program, candidate: Loop) -> Mapping[str, Any]:
        source = candidate.frames.source
        assert source is not None
        left = [f for f in candidate.families if f not in candidate.plans and not f.source]
        return {
            "source": source.base.name,
            "dim": source.dim,
            "frames": len(candidate.frames.lanes),
            "ops_batched": sum(computes(family) for family in candidate.plans),
            "ops_left": sum(len(f.lanes) for f in left if computes(f)),
        }

    def nodes(self, program: Program, candidate: Loop) -> Iterable[fx.Node]:
        return [node for f in candidate.families if not f.source for node in f.nodes]

    def what(self, program: Program, candidate: Loop) -> str:
        body = [f for f in candidate.families if not f.source and not f.uniform]
        path = _body_path(body)
        kind = type(program.gm.get_submodule(path)).__name__ if path in _modules(program) else ""
        source = candidate.frames.source
        assert source is not None
        unit = "windows" if (source.length or 1) > 1 else "frames" if source.dim else "samples"
        over = f" over {kind}" if kind else ""
        return f"loop of {len(candidate.frames.lanes)} {unit}{over}"

    def becomes(self, program: Program, candidate: Loop) -> str:
        detail = self.detail(program, candidate)
        done, left = detail["ops_batched"], detail["ops_left"]
        return f"one call over all frames for {done} ops" + (f", {left} calls stay" if left else "")

    def rewrite(self, program: Program, candidate: Loop) -> Mapping[str, Any]:
        detail = dict(self.detail(program, candidate))
        if candidate.allowed:
            detail["allowed"] = [reason.to_dict() for reason in candidate.allowed]
        if candidate.reasons:
            detail["left_because"] = [reason.to_dict() for reason in candidate.reasons]
        _Rewriter(program, candidate).run()
        return detail

    def modes(self, model: nn.Module, applied: Sequence[Remark]) -> Mapping[str, Specialization]:
        return modes_of_folded(model)


def _modules(program: Program) -> frozenset[str]:
    return frozenset(path for path, _ in program.gm.named_modules() if path)


def _body_path(body: list[Family]) -> str:
    """The module that holds the whole body of the loop."""
    paths = []
    for family in body:
        stack = family.first.meta.get("nn_module_stack") or {}
        names = [str(path) for path, _ in stack.values()]
        if family.first.op == "call_module":
            names.append(str(family.first.target))
        paths.append(names[-1].split(".") if names else [])
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in alike)


# -- the rewrite -----------------------------------------------------------------------------------


class _Rewriter:
    """Replaces the lanes of each family by one batched node, and updates their readers.

    Each batched node stands before the first lane of its family. So do all its inputs: invariants,
    because that lane reads them, and batched inputs, by the same argument.
    """

    def __init__(self, program: Program, loop: Loop) -> None:
        self.program = program
        self.graph = program.graph
        self.loop = loop
        self.values: dict[Family, Stacked] = {}
        self.uniforms: dict[Family, fx.Node] = {}
        self.lanes = {node: family for family in loop.families for node in family.nodes}

    def run(self) -> None:
        read = {lane.family for family in self.loop.plans for lane in family.lane_operands()}
        for family in self.loop.families:
            with self.graph.inserting_before(family.first):
                if family.source and family in read:
                    self.values[family] = self._frames(family, family.source)
                elif family in self.loop.plans:
                    self.values[family] = self._batched(family, self.loop.plans[family])
                elif family.uniform:
                    self._uniform(family)
        joiner = Joiner(self.program, self.loop, self.values)
        for join in self.loop.joins:
            joiner.collect(join)
        for reader in sorted(self._readers()):
            if not joiner.stack_or_cat(reader):
                self._read_frames(reader)
        for node in sorted(self.lanes, reverse=True):
            if self.lanes[node] in self.values or self.lanes[node] in self.uniforms:
                self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        """Erase a lane that nothing reads, and the nodes that cut it out of its source."""
        if node.users:
            return
        pieces = [n for n in node.all_input_nodes if n not in self.lanes and _cuts(self.program, n)]
        self.graph.erase_node(node)
        for source in pieces:
            self._erase(source)

    # each kind of family

    def _frames(self, family: Family, source: Source) -> Stacked:
        """All frames that the loop reads, as one tensor: a view if they are evenly spaced."""
        base, dim = source.base, source.dim
        frames = tuple(sorted(family.lanes))
        if source.cut == "list":
            return self._listed_frames(family, base, frames)
        axis = 0 if dim == 0 else 1
        step = step_of(frames)
        self._hold(family, source)
        if source.length is not None and source.length > 1 and step is not None:
            reach = frames[-1] + source.length
            last = needed_value(base).shape[dim] < reach + step
            if last and frames[0] == 0 and self._checked(base, dim, family.first):
                value = base  # unfold drops frames at the end that fill no window
            else:
                value = self._pick(family, source, tuple(range(frames[0], reach)))
            value = self.graph.call_method("unfold", (value, dim, source.length, step))
            value = moved(self.graph, value, rank(base) or 0, dim + 1)  # windows come last
        elif source.length is not None and source.length > 1:
            pieces = [
                pick(self.graph, base, dim, tuple(range(f, f + source.length))) for f in frames
            ]
            value = self.graph.call_function(torch.stack, (pieces, dim))
        else:
            value = self._pick(family, source, frames)
            if source.length is not None:
                value = self.graph.call_method("unsqueeze", (value, dim + 1))
        value = moved(self.graph, value, dim, axis)
        if rank(family.first) == 0:  # one number a frame
            value = self.graph.call_method("movedim", (value, 0, 0))
            return Stacked(self.graph, frames, axis, value)
        folded = self.graph.call_method("flatten", (value, 0, 1))
        return Stacked(self.graph, frames, axis, value, folded=folded, anchor=folded)

    def _listed_frames(self, family: Family, base: fx.Node, frames: tuple[int, ...]) -> Stacked:
        """The entries of a list, stacked: a copy, but folding gains more than it costs."""
        entries = [self.graph.call_function(operator.getitem, (base, frame)) for frame in frames]
        for entry in entries:
            mark_no_frame(entry)
        alike = self.graph.call_function(one_shape, (entries,))
        where = self.program.location(family.first)
        text = f"one_shape({base.name})"
        self.graph.call_function(guard, (alike, True, text, where, "the frames were of one shape"))
        stacked = self.graph.call_function(torch.stack, (entries, 1))
        folded = self.graph.call_method("flatten", (stacked, 0, 1))
        return Stacked(self.graph, frames, 1, stacked, folded=folded, anchor=folded)

    def _pick(self, family: Family, source: Source, frames: tuple[int, ...]) -> fx.Node:
        """Only those frames; ``base`` itself if a guard fixes its size to their number."""
        base, dim = source.base, source.dim
        size = needed_value(base).shape[dim]
        step = step_of(frames) or 1
        if frames != tuple(range(frames[0], size, step)) or not self._checked(
            base, dim, family.first
        ):
            return pick(self.graph, base, dim, frames)
        if (frames[0], step) == (0, 1):
            return base
        index: tuple[Argument, ...] = (*[slice(None)] * dim, slice(frames[0], None, step))
        value = self.graph.call_function(operator.getitem, (base, index))
        mark_no_frame(value)
        return value

    def _checked(self, base: fx.Node, dim: int, before: fx.Node) -> bool:
        check = self.program.held()[0].get((base, dim))
        return check is not None and check < before

    def _hold(self, family: Family, source: Source) -> None:
        """Guard that the op which cuts the frames cuts the same ones at the size of a call.

        chunk() divides whatever size it gets. A slice, or the last piece of split(), is shorter at
        the end of the tensor, where narrow() would raise an error that explains nothing.
        """
        base, dim = source.base, source.dim
        if (
            source.cut == "select"
            or source.length is None
            or self._checked(base, dim, family.first)
        ):
            return
        size: int = needed_value(base).shape[dim]
        actual = self.graph.call_method("size", (base, dim))
        text, expected, where = (
            f"{base.name}.size({dim})",
            size,
            self.program.location(family.first),
        )
        if source.cut != "chunk":
            last = max(family.lanes) + source.length
            actual = self.graph.call_function(operator.ge, (actual, last))
            text, expected = f"({text} >= {last})", True
        why = f"{source.cut}() cut frames there"
        self.graph.call_function(guard, (actual, expected, text, where, why))

    def _uniform(self, family: Family) -> None:
        """A size of a frame, read from one frame of the batched value."""
        replaced: dict[fx.Node, fx.Node] = {}
        for node, operand in zip(_inputs(family), family.operands, strict=True):
            if isinstance(operand, Lane) and operand.family in self.values:
                value = self.values[operand.family]
                several = isinstance(value_of(node), list | tuple)
                replaced[node] = value.whole() if several else value.frame(0)
            elif isinstance(operand, Uniform) and operand.family in self.uniforms:
                replaced[node] = self.uniforms[operand.family]
            elif not isinstance(operand, fx.Node):
                return
        self.uniforms[family] = self._copy(family, replaced)
        for node in family.nodes:
            node.replace_all_uses_with(self.uniforms[family])

    def _batched(self, family: Family, plan: Batching) -> Stacked:
        op = plan.call.op
        frames = tuple(sorted(family.lanes))
        inputs: dict[fx.Node, Stacked] = {}
        for node, operand in zip(op.nodes(), family.operands, strict=True):
            if isinstance(operand, Lane):
                value = self.values[operand.family]
                if op.name == "item":  # of the tuple with all frames, even if only some are read
                    frames = tuple(frame - operand.offset for frame in value.frames)
                inputs[node] = value.take(tuple(frame + operand.offset for frame in frames))
        if plan.how is How.MAPPED:
            return self._mapped(family, frames, inputs)
        axes = {value.axis for value in inputs.values()}
        mixed = Trait.ELEMENTWISE in op.traits and len(axes) > 1
        if plan.how is How.BROADCAST or mixed:
            return self._broadcast(family, frames, inputs)
        if plan.how is How.IN_FRONT:
            first = {node: value.at(0).unfolded() for node, value in inputs.items()}
            if plan.arguments is None:
                result = self._copy(family, first)
            else:
                source = first[op.args["input"]]
                result = self.graph.call_method(op.name, (source, *plan.arguments))
            return self._in_front(family, plan, frames, result)
        if op.name == "item":
            value = inputs[op.args["input"]]
            result = self._copy(family, {op.args["input"]: value.whole()})
            if value.is_unfolded:
                return self._in_front(family, plan, frames, result)
            return Stacked(self.graph, frames, value.axis, folded=result)
        axis = axes.pop()
        folded = {node: value.at(axis).folded() for node, value in inputs.items()}
        if op.name in ("cat", "stack"):
            folded |= self._repeated(family, len(frames), axis)
        if op.name in ("view", "reshape", "expand"):
            result = self._resized(op, folded[op.args["input"]])
        else:
            result = self._copy(family, folded)
        return Stacked(self.graph, frames, axis, folded=result)

    def _in_front(
        self, family: Family, plan: Batching, frames: tuple[int, ...], value: fx.Node
    ) -> Stacked:
        """``value``, (T, ...), with its frames on the axis used by other lanes of its origin."""
        stacked = Stacked(self.graph, frames, 0, value)
        if plan.origin is family or isinstance(value_of(family.first), list | tuple):
            return stacked
        if isinstance(plan.origin, SourceBatch):
            return stacked.at(1 if plan.origin.frames else 0)
        assert isinstance(plan.origin, Family)
        return stacked.at(self.values[plan.origin].axis)

    def _mapped(
        self, family: Family, frames: tuple[int, ...], inputs: Mapping[fx.Node, Stacked]
    ) -> Stacked:
        """An op that does not fold, on each frame separately, through ``torch.vmap``."""
        node, plan = family.first, self.loop.plans[family]
        name, dims = spelled(node), mapped_dims(node, plan.call.lanes)
        replaced = {lane: value.at(0).unfolded() for lane, value in inputs.items()}
        replaced |= self._uniform_inputs(family)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: replaced.get(n, n))
        result = self.graph.call_function(vmapped, (name, dims, *args), kwargs)
        copy_meta(result, node)
        return Stacked(self.graph, frames, 0, result)

    def _uniform_inputs(self, family: Family) -> dict[fx.Node, fx.Node]:
        return {
            node: self.uniforms[operand.family]
            for node, operand in zip(_inputs(family), family.operands, strict=True)
            if isinstance(operand, Uniform) and operand.family in self.uniforms
        }

    def _repeated(self, family: Family, frames: int, axis: int) -> dict[fx.Node, fx.Node]:
        """The other inputs of a per-frame cat or stack, (B, ...), repeated for each frame."""
        uniform = self._uniform_inputs(family)
        found = {}
        for node, operand in zip(_inputs(family), family.operands, strict=True):
            if not isinstance(operand, Lane):
                given = uniform.get(node, node)  # the node that the lanes read now
                value = self.graph.call_method("unsqueeze", (given, axis))
                sizes = [-1] * ((rank(node) or 0) + 1)
                sizes[axis] = frames
                value = self.graph.call_method("expand", (value, tuple(sizes)))
                found[given] = self.graph.call_method("flatten", (value, 0, 1))
        return found

    def _broadcast(
        self, family: Family, frames: tuple[int, ...], inputs: dict[fx.Node, Stacked]
    ) -> Stacked:
        """An element-wise op with the frames as dimension 0, (T, ...); other inputs broadcast."""
        dimensions = rank(family.first) or 0
        first = {node: value.at(0).unfolded() for node, value in inputs.items()}
        for node in first:
            for _ in range(dimensions - (rank(node) or 0)):
                first[node] = self.graph.call_method("unsqueeze", (first[node], 1))
        result = Stacked(self.graph, frames, 0, self._copy(family, first))
        batch_major = dimensions > 0 and all(value.axis == 1 for value in inputs.values())
        return result.at(1) if batch_major else result

    def _copy(self, family: Family, inputs: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The node of the first lane, on batched inputs."""
        replaced = {**self._uniform_inputs(family), **inputs}
        if family.op is not None and family.op.inplace:
            written = family.op.args["input"]
            if written in replaced and not self._private(family.first, written):
                replaced[written] = self.graph.call_method("clone", (replaced[written],))
        node = self.graph.node_copy(family.first, lambda n: replaced.get(n, n))
        forget_value(node)
        return node

    def _private(self, writer: fx.Node, written: fx.Node) -> bool:
        """Whether the batched value may be written in place, for all frames at once.

        The loop must own its memory, and all nodes that read it before the write must be batched,
        and stand before the write.
        """
        family = self.lanes.get(written)
        if family is None or family not in self.loop.plans or not computes(family):
            return False
        if len(family.nodes) > len(family.lanes):
            return False  # a call made twice per frame allocated memory twice
        for node in self.loop.aliasing.shared_with(written):
            if node is writer or self.loop.aliasing.derives_from(node, writer):
                continue
            owner = self.lanes.get(node)
            readers = {user for lane in owner.nodes for user in lane.users} if owner else node.users
            for user in readers:
                reader, writing = self.lanes.get(user), self.lanes[writer]
                if reader is writing:
                    continue
                if reader is None or reader not in self.loop.plans:
                    return False
                if reader.number > writing.number:
                    return False
        return True

    def _resized(self, op: Op, folded: fx.Node) -> fx.Node:
        """A view whose first size counted samples; it now counts samples × frames."""
        samples = self.graph.call_method("size", (folded, 0))
        rest = [
            self.uniforms.get(self.lanes[size], size) if size in self.lanes else size
            for size in op.args["size" if op.name == "expand" else "shape"][1:]
        ]
        method = "reshape" if op.name == "view" else op.name  # a fold may have other strides
        return self.graph.call_method(method, (folded, (samples, *rest)))

    # the readers of the lanes

    def _readers(self) -> set[fx.Node]:
        """Every node that is not batched itself but reads a batched one."""
        return {
            user
            for node, family in self.lanes.items()
            if family in self.values and not family.source
            for user in node.users
            if self.lanes.get(user) not in self.values and self.lanes.get(user) not in self.uniforms
        }

    def _read_frames(self, reader: fx.Node) -> None:
        """Make ``reader``, which is not batched, read its frame from the batched value."""
        op = self.program.op(reader)
        written = written_by(self.program, reader)
        for node in reader.all_input_nodes:
            family, lane = self.loop.lanes.get(node, (None, 0))
            if family is None or family not in self.values or family.source:
                continue  # a frame of the input is still in the graph
            frame = self.values[family].frame_of(lane)
            with self.graph.inserting_before(reader):
                if node in written:
                    frame = self.graph.call_method("clone", (frame,))  # nothing else sees it
                elif reader.op == "output" and owns_memory(family):
                    frame = self._frame_of_its_own(node)
                elif op is None and reader.op != "output":  # may read strides, as as_strided
                    dense: dict[str, Any] = {"memory_format": torch.contiguous_format}
                    frame = self.graph.call_method("clone", (frame,), dense)
                elif op is not None and op.name == "view":  # relies on strides
                    frame = self.graph.call_method("contiguous", (frame,))
            reader.replace_input_with(node, frame)

    def _frame_of_its_own(self, node: fx.Node) -> fx.Node:
        """The frame in its own memory. A view with gaps is taken again, of a copy of its source."""
        family, lane = self.loop.lanes[node]
        sources = [n for n in node.all_input_nodes if n in self.loop.lanes]
        known = all(self.loop.lanes[source][0] in self.values for source in sources)
        op = family.op  # an op that writes or computes must not run twice
        view = op is not None and Trait.MOVES in op.traits and not (op.inplace or op.owns)
        if _is_dense(node) or not (view and known and sources):
            return self.graph.call_method("clone", (self.values[family].frame_of(lane),))
        own = {source: self._frame_of_its_own(source) for source in sources}
        return self.graph.node_copy(node, lambda n: own.get(n, n))


def _is_dense(node: fx.Node) -> bool:
    """Whether a copy of ``node`` can have its strides: no overlap and no gaps."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return True
    steps = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: steps[dim], reverse=True)
    return value.permute(order).is_contiguous()


def _inputs(family: Family) -> tuple[fx.Node, ...]:
    return family.op.nodes() if family.op else tuple(family.first.all_input_nodes)


def _cuts(program: Program, node: fx.Node) -> bool:
    op = program.op(node) if node.op.startswith("call") else None
    return op is not None and op.name in ("unbind", "split", "chunk", "shape")
