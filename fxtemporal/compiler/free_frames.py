"""Makes the number of frames T free again.

Tracing a Python loop over ``range(x.size(1))`` fixes T. Once the loop is re-rolled, T is left only
as numbers in the graph: ``unflatten(0, (-1, 16))``. The model is traced and rewritten again with
other numbers of frames. If the graphs differ only in such numbers, and each number is a size of an
earlier tensor, or a multiple of T plus a constant, it is computed from the input's shape instead.

Equal graphs at a few T prove nothing about other T: the forward may do something else from 40
frames on. So the guard on T is replaced by one that admits the T that were tried, and tries others
at their first call: :class:`fxtemporal.ir.admitted.AdmittedFrames`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.analysis.effects import leaves_no_trace
from fxtemporal.analysis.families import families_of, is_input
from fxtemporal.analysis.loops import computes
from fxtemporal.capture.arguments import behind_pre_hooks
from fxtemporal.capture.capture import capture
from fxtemporal.capture.tracing.input_data import MOST
from fxtemporal.compiler.state import Example, State
from fxtemporal.compiler.unifier import Unifier, code, counts_laps, skeleton
from fxtemporal.ir.admitted import AdmittedFrames
from fxtemporal.ir.guards import guard
from fxtemporal.ir.node_meta import is_no_frame
from fxtemporal.ir.program import Program
from fxtemporal.ir.shape_memo import Shapes
from fxtemporal.ir.stand_in import StandIn, own_inputs
from fxtemporal.ir.values import rank, shape
from fxtemporal.passes.pipeline import Key, Outcome, Skip, run_rules
from fxtemporal.passes.rule import Rule
from fxtemporal.support.errors import CaptureError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree
from fxtemporal.verification.comparison import Comparison, Sample
from fxtemporal.verification.inputs import resized
from fxtemporal.verification.verifier import Verifier

__all__ = ["free_frames", "freed", "trip_counts"]

_OTHERS = (2, 3, 8, 15, 26, 43, 70)
"""Numbers of frames to trace with, until an even and an odd one give the same graph."""

_STEPS = (4, 8, 16)
"""Frames to add instead, for a model that takes neither 2 nor 3: it may ask for 4 k, or 4 k + 1."""

_REFUSED = 2
"""After so many numbers that the model does not take, an even and an odd one need not be found."""

_STRANGE = 3
"""Give up after this many numbers of frames that give another graph."""

_EVEN = 1.1
"""The nodes that frames add to a graph differ by less than this factor: the first may have more."""

_DRAWS = 3
"""Inputs to compare the numbers on, where they alone decide: one may happen to be all zeros."""

_RESIZING = frozenset(("conv3d", "max_pool3d", "avg_pool3d", "interpolate"))
"""Ops whose result may be shorter or longer, along the same dimension."""


def free_frames(state: State) -> State:
    """Drop the guards on T that the graph no longer needs.

    After a lossy rule T stays fixed: there is no reference for its numbers at another T.
    """
    request, verifier = state.request, state.verifier
    request.tick("freeing the number of frames")
    fixed = state.lossy.changed or state.captured.frontend != "fx"
    counts = dict.fromkeys(trip_counts(state.captured))
    if request.example is None or verifier is None or fixed or not counts:
        return state
    first, last = request.frames or (1, 0)
    known = state.captured.shapes.known
    retrace = _Retrace(request.original, request.example, state.rules, state.skips, known)
    for dim, frames in counts:
        trial = _Trial(verifier, request.example, dim, frames)
        loose = freed(
            state.rewritten.program,
            dim,
            frames,
            partial(retrace, dim, frames),
            trial.agrees,
            trial.accepted,
            range(first, last + 1),
        )
        if loose is not None:
            outcome = Outcome(loose, state.rewritten.remarks)
            state = state.but(outcome=outcome, comparison=Comparison(tuple(trial.samples)))
    return state


class _Retrace:
    """Traces the model, and rewrites it in the same way, with other sizes of its inputs.

    A number of frames may be tried at a call, long after ``optimize``: so only the shapes of the
    example inputs are kept.
    """

    def __init__(
        self,
        original: nn.Module,
        example: Example,
        rules: tuple[Rule[Any], ...],
        skips: Mapping[Key, Skip],
        known: Shapes,
    ) -> None:
        self.rules, self.skips, self.known = rules, skips, known
        self.model = StandIn(original, share_parameters=True).module
        given = behind_pre_hooks(self.model, *own_inputs(example))
        # The result runs these hooks before its graph, as the model does.
        self.model._forward_pre_hooks.clear()
        self.shapes = pytree.tree_map_only(Tensor, _kept, given)

    def __call__(self, dim: int, frames: int, other: int) -> Program:
        """The rewritten program with ``other`` entries in dimension ``dim``, not ``frames``."""
        empty = partial(self._empty, dim, frames, other)
        with quiet():
            try:
                program = self._captured(empty(least_rank=3))
            except CaptureError:
                if self._shapes(empty(least_rank=2)) == self._shapes(empty(least_rank=3)):
                    raise
                program = self._captured(empty(least_rank=2))  # a mask (B, T) too
            return run_rules(program, self.rules, self.skips).program

    def _captured(self, inputs: Any) -> Program:
        return capture(self.model, *inputs, only="fx", shapes=self.known)

    @staticmethod
    def _shapes(inputs: Any) -> list[torch.Size]:
        return [leaf.shape for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]

    def _empty(self, dim: int, old: int, new: int, least_rank: int) -> Any:
        """Inputs of zeros whose dimension ``dim`` is ``new`` instead of ``old``."""

        def empty(like: Tensor) -> Tensor:
            sizes = list(like.shape)
            if len(sizes) >= least_rank and dim < len(sizes) and sizes[dim] == old:
                sizes[dim] = new
            if sizes == list(like.shape) and _may_be_settings(like):
                return like.clone()
            return like.new_zeros(sizes)

        return pytree.tree_map_only(Tensor, empty, self.shapes)


def _may_be_settings(tensor: Tensor) -> bool:
    """Whether a forward may read the data of ``tensor``: of a few whole numbers."""
    return not tensor.is_floating_point() and 0 < tensor.numel() <= MOST


def _kept(tensor: Tensor) -> Tensor:
    """What is kept of an example input: its shape, and the data of settings."""
    if _may_be_settings(tensor):
        return tensor.clone()
    return tensor.new_zeros(()).expand(tensor.shape)


class _Trial:
    """Compares a program with the model at other numbers of frames; ``samples`` has the results."""

    def __init__(self, verifier: Verifier, example: Example, dim: int, frames: int) -> None:
        self.verifier, self.example, self.dim, self.frames = verifier, example, dim, frames
        tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        self.ranks = (3, 2) if any(tensor.dim() == 2 for tensor in tensors) else (3,)
        self.samples: list[Sample] = []

    def agrees(self, tried: Program, other: int, draws: int = 1) -> bool:
        """Whether ``tried`` gives the model's numbers with ``other`` frames, on so many inputs.

        With several, these decide alone: then gradients are compared too.
        """
        name = f"{other} {'entry' if other == 1 else 'entries'} in dimension {self.dim}"
        sizes = {self.dim: (self.frames, other)}
        for least_rank, draw in itertools.product(self.ranks, range(draws)):
            generator = torch.Generator().manual_seed(draw)
            inputs = resized(self.example, sizes, generator, least_rank=least_rank)
            masks = ", masks too" * (least_rank == 2)
            sample = self.verifier.at(tried.gm, inputs, name + masks)
            if sample is not None and not sample.equal:
                return False
            if draws > 1 and self.verifier.other_gradients(tried.gm, inputs):
                return False
            self.samples.extend([sample] if sample is not None and draw == 0 else [])
        return True

    def accepted(self, loose: Program) -> bool:
        """Whether ``loose`` gives the model's numbers for the example."""
        compared = self.verifier.compare(loose.gm)
        self.samples[:] = compared.samples
        return compared.equal


def trip_counts(program: Program) -> Iterator[tuple[int, int]]:
    """``(dim, T)`` of the inputs' sizes that only loops read."""
    readers: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for check in program.graph.nodes:
        held = program.held_size(check) if check.target is guard else None
        found = None if held is None else _origin(program, *held)
        if found is not None:
            readers.setdefault(found, []).append(check)
    for (source, dim), checks in readers.items():
        frames = (shape(source) or ())[dim:]
        if dim and frames and frames[0] > 1 and all(counts_laps(check) for check in checks):
            yield dim, frames[0]


def _origin(program: Program, tensor: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """The input, and its dimension, that ``dim`` of ``tensor`` was; a guess, None if unknown."""
    while not is_input(tensor):
        op = program.op(tensor) if tensor.op.startswith("call") else None
        source = None if op is None else op.args.get("input")
        if op is None or not isinstance(source, fx.Node) or rank(source) != rank(tensor):
            return None
        match op.name:
            case "transpose":
                swapped = {op.args["dim0"]: op.args["dim1"], op.args["dim1"]: op.args["dim0"]}
                dim = swapped.get(dim, dim)
            case "permute":
                dim = op.args["dims"][dim]
            case "rearrange":
                names = [side.split() for side in str(op.args["pattern"]).split("->")]
                if not all(name.isidentifier() for side in names for name in side):
                    return None
                dim = names[0].index(names[1][dim])
            case name if name not in _RESIZING:
                if (shape(source) or ())[dim] != (shape(tensor) or ())[dim]:
                    return None
        tensor = source
    return tensor, dim


def freed(
    program: Program,
    dim: int,
    frames: int,
    again: Callable[[int], Program],
    agrees: Callable[..., bool],
    accepted: Callable[[Program], bool],
    wanted: Iterable[int] = (),
) -> Program | None:
    """A copy of ``program`` that is right for every T it admits; None if there is none.

    Args:
        program: rewritten, with ``frames`` frames in dimension ``dim`` of its inputs.
        again: gives the program, rewritten in the same way, for another number of frames.
        agrees: whether a program gives the model's numbers with that number of frames.
        accepted: whether a program gives them for the example. It admits no other T yet.
        wanted: more numbers of frames to try.
    """
    alike, strange, refused = [(frames, program)], list[int](), list[int]()
    lengths = {frames: len(program.graph.nodes)}
    others = [other for other in _OTHERS if other != frames]
    while others:
        parities = {t % 2 for t, _ in alike[1:]}
        if len(parities) == 2 or (len(alike) > 2 and len(refused) >= _REFUSED):
            break
        other = others.pop(0)
        try:
            tried = again(other)
        except Exception:  # the model itself may not take so many frames
            refused.append(other)
            if len(refused) == _REFUSED and len(alike) == 1:
                others = [frames + step for step in _STEPS]
            if len(refused) == 2 * _REFUSED and len(alike) < 3:
                return None
            continue
        if skeleton(tried) == skeleton(program):
            alike.append((other, tried))
        else:
            strange.append(other)
            lengths[other] = len(tried.graph.nodes)
        given_up = len(strange) == _STRANGE or _grows(lengths)
        if given_up or (strange and _leaves_frames(program, frames)):
            return None
    if len(alike) < 3:
        return None
    unifier = Unifier(alike)
    loose = unifier.run()
    if loose is None:
        return None
    text = code(loose)
    checks = unifier.check_frames(dim)
    if checks is None:
        return None

    def same_graph(other: int) -> bool:
        try:
            tried = again(other)
            if skeleton(tried) != skeleton(program):
                return False
            more = Unifier([*alike, (other, tried)]).run()
        except Exception:  # the model may not take so many frames, or the graphs have other lengths
            return False
        return more is not None and code(more) == text

    if not accepted(loose) or not all(agrees(loose, t) for t, _ in alike[1:]):
        return None
    checks._same_graph = same_graph
    by_numbers = leaves_no_trace(program)
    for other in sorted({1, *strange, *wanted} - checks.counts):
        # With one frame there is no loop to re-roll: compare the numbers instead.
        tries = by_numbers and other in (1, *strange) and other >= unifier.least
        if same_graph(other) or (tries and _is_right(loose, checks, other, agrees)):
            checks.counts |= {other}
    return loose


def _grows(lengths: Mapping[int, int]) -> bool:
    """Whether each frame adds about as many nodes to the graph: a loop is left in it."""
    points = sorted(lengths.items())
    slopes = [(m - n) / (t - s) for (s, n), (t, m) in itertools.pairwise(points)]
    return len(slopes) > 1 and min(slopes) > 0 and max(slopes) < _EVEN * min(slopes)


def _leaves_frames(program: Program, frames: int) -> bool:
    """Whether ``program`` still computes each of the ``frames`` alone, in ops of its own."""
    left = sum(is_no_frame(node) for node in program.graph.nodes)
    return frames > 2 and (
        left >= frames
        or any(
            computes(family) and len(family.lanes) >= frames for family in families_of(program).all
        )
    )


def _is_right(
    loose: Program,
    checks: AdmittedFrames,
    frames: int,
    agrees: Callable[..., bool],
) -> bool:
    before = checks.counts
    checks.counts = before | {frames}
    try:
        return agrees(loose, frames, _DRAWS)
    finally:
        checks.counts = before
