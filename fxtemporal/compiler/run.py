"""The stages of one call of optimize.

Each stage starts again from the captured program, with what was found out so far: which sites to
skip, and why; which form each Conv3d is to get; in how many chunks folded frames run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxtemporal.analysis.cost import Costs, SiteCost, Structure
from fxtemporal.analysis.peak_memory import peak
from fxtemporal.capture.arguments import Model, behind_pre_hooks
from fxtemporal.capture.capture import capture
from fxtemporal.compiler.free_frames import freed, trip_counts
from fxtemporal.compiler.promises import Promises
from fxtemporal.factorization.factorize_2plus1d import Factorize2Plus1d
from fxtemporal.factorization.planning import plan
from fxtemporal.factorization.settings import Factorize
from fxtemporal.ir.freeze import freeze, memory
from fxtemporal.ir.guards import Specialization
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.ir.stand_in import StandIn, own_inputs
from fxtemporal.mistakes import telling_cure
from fxtemporal.passes.building.output_layouts import layout_of
from fxtemporal.passes.conv3d_forms import Conv3dForms
from fxtemporal.passes.dump import Dump
from fxtemporal.passes.fold_batchnorm import FoldBatchNorm
from fxtemporal.passes.fold_in_chunks import FoldInChunks
from fxtemporal.passes.merge_convolutions import MergeConvolutions
from fxtemporal.passes.overlapping_windows import OverlappingWindows
from fxtemporal.passes.pipeline import Key, Outcome, Skip, run_rules
from fxtemporal.passes.pool3d_forms import Pool3dForms
from fxtemporal.passes.rule import Remark, Rule
from fxtemporal.passes.time_distribute import TimeDistribute
from fxtemporal.reports.report import Report
from fxtemporal.support.errors import CaptureError, PassError, VerificationError
from fxtemporal.support.quiet import quiet
from fxtemporal.tuning.ablation import worth_keeping
from fxtemporal.tuning.cache import Cache, environment
from fxtemporal.tuning.chunk_counts import Choice, Chooser, sized
from fxtemporal.tuning.conv3d_forms import FormChooser
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.settings import Tune
from fxtemporal.tuning.timing import Timing
from fxtemporal.verification.bisect import culprits
from fxtemporal.verification.comparison import Comparison, Sample
from fxtemporal.verification.gradients import other_gradients, outputs_of_parameters
from fxtemporal.verification.inputs import resized
from fxtemporal.verification.verifier import Verifier

__all__ = ["META", "Example", "Run"]

META = "fxtemporal"
"""Where a result keeps its report."""

Example = tuple[tuple[Any, ...], dict[str, Any]]
Kept = tuple[Outcome, Comparison | None, Timing | None]
_LEFT = Reason(Code.MEMORY_LIMIT, "left, to see what a call holds then")


@dataclass
class Run:
    """One call of optimize: the captured program, and what was found out about its sites."""

    model: Model
    example: Example | None
    rules: tuple[Rule[Any], ...]
    factorize: Factorize | None
    verify: bool
    promises: Promises
    tick: Callable[[str], None]
    skips: dict[Key, Skip] = field(default_factory=dict)

    def __post_init__(self) -> None:
        args, kwargs = self.example or (None, None)
        self.verifier: Verifier | None = None
        with telling_cure(self.model):
            self.captured = self._keeping(capture(self.model, args, kwargs))
        self.rules = tuple(map(self._confined, self.rules))
        self.costs = None if self.example is None else Costs()
        self.before = () if self.costs is None else self.costs.blocks(self.captured)
        self.priced: dict[Key, SiteCost | None] = {}
        self.measured: dict[Key, Timing] = {}
        self.lossy: tuple[tuple[Key, Remark], ...] = ()
        self.curve: tuple[tuple[float, float], ...] = ()
        self.changed = False  # by a lossy rule: what follows is compared with what it left
        if self.captured.doubt is not None and not self.verify:
            raise CaptureError(
                f"{self.captured.doubt}: only a comparison with the model can tell whether its "
                "graph is right. Give example inputs, and leave verify on."
            )
        if self.verify:
            assert self.example is not None
            self._refuse_meta_tensors()
            self.verifier = self._verifier(self.original)
            self._keeping(self.captured)
            if self.captured.doubt is not None:
                self._refuse_unless_equal(self.verifier.compare(self.captured.gm))
                for example in (self.example, pytree.tree_map_only(Tensor, _asking, self.example)):
                    try:
                        verifier = Verifier(self.original, example, gradients=True)
                    except Exception:  # the model may not take gradients, in any way
                        continue
                    if not verifier.compare(self.captured.gm).equal:
                        raise VerificationError(
                            f"{self.captured.doubt}, and computes something else where gradients "
                            "are asked for: a graph is one of the two. Decide on self.training, or "
                            "on an argument of the forward."
                        )
        lossy = tuple(rule for rule in self.rules if not rule.exact)
        if self.promises.bitwise and (lossy or self.factorize is not None):
            raise PassError("exact='bitwise' and a lossy pass, or factorize, contradict each other")
        if self.factorize is not None:
            planned = plan(self.captured, self.factorize, self.example, self.tick)
            self.curve = planned.curve
            lossy = (*lossy, Factorize2Plus1d(planned))
        if lossy:
            self._check_capture()
            outcome = run_rules(self.captured, lossy, costs=self.costs)
            self.rules = tuple(rule for rule in self.rules if rule.exact)
            self.lossy, self.changed = outcome.remarks, bool(outcome.applied)
            if self.changed:
                self.captured = outcome.program
                if self.verify:
                    assert self.example is not None
                    self.verifier = self._verifier(self.captured.gm)

    def _keeping(self, captured: Program) -> Program:
        captured.keeps_layouts = self.promises.layout == "same"
        if self.verifier is not None:
            captured.output_layouts = tuple(map(layout_of, self.verifier.outputs))
        return captured

    def _confined(self, rule: Rule[Any]) -> Rule[Any]:
        if type(rule) is not Conv3dForms or not self.promises.confined:
            return rule
        return rule.but(confined=True, bitwise=rule.bitwise or self.promises.bitwise)

    def _verifier(self, original: nn.Module) -> Verifier:
        assert self.example is not None
        bitwise, confined = self.promises.bitwise, self.promises.confined
        return Verifier(original, self.example, bitwise=bitwise, confined=confined)

    @property
    def original(self) -> nn.Module:
        return self.model.module() if isinstance(self.model, ExportedProgram) else self.model

    def _refuse_meta_tensors(self) -> None:
        inputs = [leaf for leaf in pytree.tree_leaves(self.example) if isinstance(leaf, Tensor)]
        if any(t.is_meta for t in (*self.original.parameters(), *inputs)):
            raise CaptureError(
                "the model or its example inputs are on the meta device and hold no numbers: there "
                "is nothing to verify. Load the weights first, or ask fxtemporal.audit"
            )

    def _check_capture(self) -> None:
        """The captured graph must be the model; where it is not, torch.export has its turn."""
        if self.verifier is None:
            return
        assert self.example is not None
        comparison = self.verifier.compare(self.captured.gm)
        if not comparison.equal and self.captured.frontend == "fx":
            self.captured = self._keeping(capture(self.model, *self.example, frontend="export"))
            comparison = self.verifier.compare(self.captured.gm)
        self._refuse_unless_equal(comparison)

    @staticmethod
    def _refuse_unless_equal(comparison: Comparison) -> None:
        if not comparison.equal:
            bad = next(sample for sample in comparison.samples if not sample.equal)
            what = bad.problem or f"relative error {bad.relative_error:.1e}"
            raise VerificationError(
                f"the captured graph is not the model: on {bad.inputs}, {what}. The forward may "
                "depend on something outside its inputs and parameters (random numbers, a counter, "
                "a global): make it an input, or call optimize on the part that does not."
            )

    def races(self, tune: Tune, frozen: bool) -> Races:
        """Measuring on the device of the inputs, or of the model, with what is known of it."""
        assert self.example is not None
        given = [*self.original.parameters(), *pytree.tree_leaves(self.example)]
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        cache = Cache(tune.folder, environment(device, tune.target))
        return Races(self.example, tune, cache, frozen)

    def choose_forms(self, races: Races, tick: Any) -> None:
        """Measure which form of each Conv3d is the fastest, and have the rule use it."""
        place = next((i for i, rule in enumerate(self.rules) if _may_choose(rule)), None)
        if place is None:
            return
        rule, before, after = self.rules[place], self.rules[:place], self.rules[place + 1 :]
        assert isinstance(rule, Conv3dForms)
        if not _has_conv3d(self.captured):
            return
        program = run_rules(self.captured, before, self.skips).program
        sites = tuple(rule.to_choose(program))
        if not sites:
            return
        chooser = FormChooser(program, sites, races.cache, races.tune, tick)
        best: tuple[tuple[Rule[Any], ...], nn.Module] | None = None
        for name, choices in chooser.variants().items():
            rules = (*before, rule.but(choices=choices), *after)
            module = run_rules(self.captured, rules, self.skips).program.gm
            tick(f"measuring the forms, {name}")
            if best is None or _wins(module, best[1], races):
                best = rules, module
        assert best is not None
        self.rules = best[0]

    def verified(self, tick: Any) -> tuple[Outcome, Comparison | None]:
        """All rewrites, without those that change the numbers."""
        outcome = run_rules(self.captured, self.rules, self.skips, costs=self.costs)
        self.priced = {key: remark.cost for key, remark in outcome.remarks}
        if self.verifier is None:
            return outcome, None
        tick("verifying")
        verifier = self.verifier
        comparison = verifier.compare(outcome.program.gm)
        if comparison.equal:
            return outcome, comparison
        if not self.changed:
            self._check_capture()
            outcome = run_rules(self.captured, self.rules, self.skips)

        def passes(keys: Sequence[Key]) -> bool:
            tick("looking for the rewrite that is wrong")
            tried = run_rules(self.captured, self.rules, self.skips, frozenset(keys))
            return verifier.compare(tried.program.gm).equal

        bad = next(sample for sample in comparison.samples if not sample.equal)
        for key in culprits(outcome.applied, passes):
            text = bad.problem or (
                f"relative error {bad.relative_error:.1e} on {bad.inputs}, "
                f"at most {bad.bound:.1e} is rounding"
            )
            self.skips[key] = _undone(bad, text)
        outcome = run_rules(self.captured, self.rules, self.skips)
        comparison = verifier.compare(outcome.program.gm)
        if not comparison.equal:
            raise VerificationError("rewrites remain that change the numbers; please report this")
        return outcome, comparison

    def freed(
        self, outcome: Outcome, comparison: Comparison | None, wanted: Iterable[int] = ()
    ) -> tuple[Outcome, Comparison | None]:
        """The same, without the checks of a number of frames that nothing depends on any more.

        ``wanted`` are numbers to admit beforehand. What a lossy rule left runs at one number of
        frames alone: there is no telling what it would have computed at another.
        """
        example = self.example
        fixed = self.changed or self.captured.frontend != "fx"
        if example is None or self.verifier is None or fixed:
            return outcome, comparison
        verifier = self.verifier
        model = StandIn(self.original, share_parameters=True).module
        given = behind_pre_hooks(model, *own_inputs(example))
        model._forward_pre_hooks.clear()  # the result runs them before its graph, as the model does
        shapes = pytree.tree_map_only(Tensor, lambda t: t.new_zeros(()).expand(t.shape), given)

        def again(dim: int, frames: int, other: int) -> Program:
            with quiet():
                try:
                    program = capture(model, *_empty(shapes, dim, frames, other, 3), only="fx")
                except CaptureError:  # a mask (B, T) has to change too
                    program = capture(model, *_empty(shapes, dim, frames, other, 2), only="fx")
                return run_rules(program, self.rules, self.skips).program

        tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        ranks = (3, 2) if any(tensor.dim() == 2 for tensor in tensors) else (3,)

        found: list[Sample] = []

        def agrees(dim: int, frames: int, tried: Program, other: int) -> bool:
            name = f"{other} {'entry' if other == 1 else 'entries'} in dimension {dim}"
            for least_rank in ranks:
                inputs = resized(example, {dim: (frames, other)}, least_rank=least_rank)
                sample = verifier.at(tried.gm, inputs, name + ", masks too" * (least_rank == 2))
                if sample is not None and not sample.equal:
                    return False
                found.extend([sample] if sample is not None else [])
            return True

        def accepted(loose: Program) -> bool:
            compared = verifier.compare(loose.gm)
            found[:] = compared.samples
            return compared.equal

        for dim, frames in dict.fromkeys(trip_counts(self.captured)):
            tries = partial(again, dim, frames), partial(agrees, dim, frames)
            loose = freed(outcome.program, dim, frames, *tries, accepted, wanted)
            if loose is not None:
                outcome, comparison = Outcome(loose, outcome.remarks), Comparison(tuple(found))
        return outcome, comparison

    @property
    def baseline(self) -> nn.Module:
        """What the exact rewrites are measured against."""
        return self.captured.gm

    def faster(
        self, outcome: Outcome, comparison: Comparison | None, races: Races, tick: Any
    ) -> tuple[Outcome, Comparison | None, Timing]:
        """Only the rewrites that pay on this device."""
        groups: dict[str, list[Key]] = {}
        for key in outcome.applied:
            groups.setdefault(_group(outcome.remark(key)), []).append(key)

        def build(names: frozenset[str]) -> nn.Module:
            if not names:
                return self.baseline
            if names == groups.keys():
                return outcome.program.gm
            only = frozenset(key for name in names for key in groups[name])
            return run_rules(self.captured, self.rules, self.skips, only).program.gm

        compiled = races.tune.target != "eager"  # for each race anew, which takes long
        sure = frozenset(g for g in groups if compiled or g == Conv3dForms.name)
        verdict = worth_keeping(list(groups), build, races, tick, sure)
        races.cache.save()
        lost, timing = verdict.lost, verdict.network
        self.measured = {key: gain for name, gain in verdict.gains.items() for key in groups[name]}
        if not lost:
            return outcome, comparison, timing
        for name, slower in lost.items():
            text = f"{slower.before:.3g} ms without it, {slower.after:.3g} ms with it"
            reason = Reason(Code.NOT_FASTER, text)
            detail = (("speedup", round(slower.speedup, 3)),)
            self.skips.update(dict.fromkeys(groups[name], Skip("missed", reason, detail)))
        outcome = run_rules(self.captured, self.rules, self.skips)
        if self.verifier is not None:
            first = self.verifier.compare(outcome.program.gm, example_only=True)
            if not first.equal:  # fewer rewrites may round otherwise than all of them
                outcome, comparison = self.verified(tick)
        return outcome, comparison, timing

    def in_chunks(
        self,
        outcome: Outcome,
        comparison: Comparison | None,
        timing: Timing | None,
        races: Races,
        start: float,
        tick: Any,
    ) -> Kept:
        """Folded frames in as many chunks as the memory limit asks for, or as pays.

        The time for measuring runs from ``start``. Without a limit, chunks are what keeps eager
        mode's activations in the cache; another engine has its own means.
        """
        tune, deadline = races.tune, start + races.tune.seconds
        if tune.target != "eager" and tune.limit is None:
            return outcome, comparison, timing
        groups = self._loops(outcome)
        slow = frozenset(name for name, keys in groups.items() if keys[0] in self.skips)

        def build(left: frozenset[str]) -> Program:
            if left == slow:
                return outcome.program.copy()
            skips = self._leaving(groups, dict.fromkeys(left, _LEFT))
            return run_rules(self.captured, self.rules, skips).program

        chooser = Chooser(build, list(groups), slow, races, deadline, tick)
        choice = chooser.choose()
        if choice.left != slow or choice.chunks:
            why = {name: choice.why.get(name) for name in choice.left}
            self.skips = self._leaving(groups, why)
            self._run_in(choice)
            before = outcome, comparison, timing
            changed = choice.left != slow or any(n > 1 for n in choice.chunks.values())
            if choice.left == slow:
                chunks = run_rules(outcome.program, self.rules[-1:], self.skips)
                outcome = Outcome(chunks.program, (*outcome.remarks, *chunks.remarks))
            else:
                outcome = run_rules(self.captured, self.rules, self.skips)
            if changed:
                outcome, comparison = self._checked(outcome, comparison, choice)
                tick("measuring the network")
                timing = races.race(self.baseline, outcome.program.gm, 0.1)
                if not timing.wins() and tune.limit is None and choice.left == slow:
                    outcome, comparison, timing = self._in_one_piece(before, choice, timing)
        races.cache.save()
        return self._above_limit(outcome, tune), comparison, timing

    def _leaving(
        self, groups: Mapping[str, list[Key]], left: Mapping[str, Reason | None]
    ) -> dict[Key, Skip]:
        """What to skip so that just these loops are left, and why: None where that is known."""
        skips = dict(self.skips)
        for name, keys in groups.items():
            for key in keys:
                if name not in left:
                    skips.pop(key, None)
                elif (reason := left[name]) is not None:
                    skips[key] = Skip("missed", reason)
        return skips

    def _loops(self, outcome: Outcome) -> dict[str, list[Key]]:
        """The loops that are folded, or would be if that had paid, as they were measured."""
        groups: dict[str, list[Key]] = {}
        for key, remark in outcome.remarks:
            slow = key in self.skips and self.skips[key].reason.code is Code.NOT_FASTER
            if key[0] == TimeDistribute.name and (remark.status == "applied" or slow):
                groups.setdefault(_group(remark), []).append(key)
        return groups

    def _run_in(self, choice: Choice) -> None:
        self.rules = (*self.rules, FoldInChunks(choice.chunks))
        for region, count in choice.chunks.items():
            if count == 1:
                skip = Skip("missed", choice.why[region])
                self.skips[FoldInChunks.name, region] = skip

    def _in_one_piece(self, before: Kept, choice: Choice, slower: Timing) -> Kept:
        """What there was ``before`` chunks, in which the network turned out slower."""
        text = f"the network takes {slower.before:.3g} ms without it, {slower.after:.3g} ms with it"
        for region, count in choice.chunks.items():
            if count > 1:
                skip = Skip("missed", Reason(Code.NOT_FASTER, text))
                self.skips[FoldInChunks.name, region] = skip
        whole, comparison, timing = before
        chunks = run_rules(whole.program, self.rules[-1:], self.skips)
        return (
            Outcome(chunks.program, (*whole.remarks, *chunks.remarks)),
            comparison,
            timing,
        )

    def _checked(
        self, outcome: Outcome, comparison: Comparison | None, choice: Choice
    ) -> tuple[Outcome, Comparison | None]:
        """The same, compared with the original again; in one piece where chunks are wrong."""
        if self.verifier is None:
            return outcome, comparison
        comparison = self.verifier.compare(outcome.program.gm)
        if comparison.equal:
            return outcome, comparison
        bad = next(sample for sample in comparison.samples if not sample.equal)
        undone = _undone(bad, bad.problem or "in chunks it gave other numbers; please report this")
        for region in choice.chunks:
            self.skips[FoldInChunks.name, region] = undone
        outcome = run_rules(self.captured, self.rules, self.skips)
        return outcome, self.verifier.compare(outcome.program.gm)

    def _above_limit(self, outcome: Outcome, tune: Tune) -> Outcome:
        """The same, with a remark where a call of the result holds more than the limit."""
        if tune.limit is None or (held := peak(outcome.program).bytes) <= tune.limit:
            return outcome
        text = (
            f"a call holds {sized(held)} at its peak by estimate; the limit is "
            f"{sized(tune.limit)}, and nothing is known that holds less"
        )
        detail = {"peak_bytes_after": held}
        reasons = (Reason(Code.MEMORY_LIMIT, text),)
        name = type(self.original).__name__
        remark = Remark(FoldInChunks.name, "missed", name, None, reasons, detail)
        return Outcome(outcome.program, (*outcome.remarks, ((FoldInChunks.name, ""), remark)))

    def finish(
        self,
        outcome: Outcome,
        comparison: Comparison | None,
        timing: Timing | None,
        settings: dict[str, Any],
    ) -> fx.GraphModule:
        gm = outcome.program.gm
        self._dump(outcome.program)
        if self.changed and comparison is not None and self.example is not None:
            comparison = Verifier(self.original, self.example).compare(gm, exact=False)
        folding = (TimeDistribute.name, OverlappingWindows.name)
        outcome = Outcome(outcome.program, tuple(self._priced(outcome)))
        remarks = tuple(remark for _, remark in (*self.lossy, *outcome.remarks))
        rerolled = any(r.rule in folding and r.status == "applied" for r in remarks)
        assert isinstance(gm, OptimizedModule)
        gm.hold_modes(
            {
                **_modes_held_before(self.original, gm),
                **(_folded_modes(gm) if rerolled else {}),
                **_batchnorm_modes(gm, outcome),
                **outcome.program.modes,
            }
        )
        gradients = None if settings.get("freeze") or self.changed else self._other_gradients(gm)
        if gradients is not None:
            example = self.example
            outputs = () if example is None else outputs_of_parameters(self.original, example)
            gm.refuse_gradients(gradients, outputs)
        if self.verifier is not None and (switched := self.verifier.outputs_with_gradients):
            gm.refuse_gradients_when_off(switched)
        used = memory(self.original, gm)
        if settings.get("freeze"):
            freeze(gm)
            used = memory(self.original, gm)
        else:
            gm.watch(self.original, self.captured.graph)
        gm.meta[META] = Report(
            mode="optimize",
            remarks=remarks,
            specializations=outcome.program.specializations,
            comparison=comparison,
            timing=timing,
            frontend=self.captured.frontend,
            note=self.captured.note,
            gradients=gradients,
            settings=settings,
            memory=used,
            curve=self.curve,
            structure=None
            if self.costs is None
            else Structure(self.before, self.costs.blocks(outcome.program)),
        )
        return gm

    def _dump(self, result: Program) -> None:
        """Every pass once more, with what was decided of its sites, for those who want to see."""
        if (dump := Dump(self.original)).wanted:
            dump("captured", self.captured)
            run_rules(self.captured, self.rules, self.skips, dump=dump)
            dump("result", result)

    def _other_gradients(self, gm: nn.Module) -> str | None:
        """Why the gradients of ``gm`` are not the model's, as far as was verified."""
        if self.verifier is None or self.example is None:
            return self.captured.gradients
        thorough = self.verifier.cheap
        found = other_gradients(self.original, gm, self.example, thorough=thorough)
        known = self.captured.gradients
        return found if found is None or known is None else f"{found} ({known})"

    def _priced(self, outcome: Outcome) -> Iterator[tuple[Key, Remark]]:
        """The remarks, with what each site costs, and what it was measured to gain."""
        for key, remark in outcome.remarks:
            cost = self.priced.get(key)
            detail = dict(remark.detail)
            if remark.status == "applied" and (timing := self.measured.get(key)) is not None:
                detail["network_milliseconds_before"] = round(timing.before, 4)
                detail["network_milliseconds"] = round(timing.after, 4)
            yield key, replace(remark, cost=cost, detail=detail)


def _asking(tensor: Tensor) -> Tensor:
    """An input that gradients are asked of."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _empty(shapes: Any, dim: int, old: int, new: int, least_rank: int) -> Any:
    """Inputs of such shapes, without values, where dimension ``dim`` is ``new`` instead of ``old``.

    A number of frames is tried at a call, long after the example inputs are gone.
    """

    def empty(like: Tensor) -> Tensor:
        sizes = list(like.shape)
        if len(sizes) >= least_rank and dim < len(sizes) and sizes[dim] == old:
            sizes[dim] = new
        return like.new_zeros(sizes)

    return pytree.tree_map_only(Tensor, empty, shapes)


def _has_conv3d(program: Program) -> bool:
    calls = (node for node in program.graph.nodes if node.op.startswith("call"))
    return any((op := program.op(node)) is not None and op.name == "conv3d" for node in calls)


def _wins(one: nn.Module, other: nn.Module, races: Races) -> bool:
    """Whether ``one`` runs, and is the faster of the two."""
    try:
        return races.race(other, one, 1.0).speedup > 1
    except Exception:  # a view may refuse the layout, in any way
        return False


def _folded_modes(model: nn.Module) -> dict[str, Specialization]:
    """The modes of what, behind a re-rolled loop, would see all frames at once in the other."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    why = "a loop was re-rolled, and in the other mode it would see all its frames at once"
    return {
        path: Specialization(f"{path}.training", module.training, None, why)
        for path, module in model.named_modules()
        if isinstance(module, kinds) or getattr(module, "dropout", False)
    }


def _modes_held_before(model: nn.Module, result: nn.Module) -> dict[str, Specialization]:
    """What holds for ``model``, or a part of it, because that is a result of optimize itself."""
    there = {path for path, _ in result.named_modules()}
    held = {}
    for path, module in model.named_modules():
        for name, fixed in module.held_modes.items() if isinstance(module, OptimizedModule) else ():
            full = f"{path}.{name}" if path and name else path or name
            held[full if full in there else ""] = fixed
    return held


def _batchnorm_modes(model: nn.Module, outcome: Outcome) -> dict[str, Specialization]:
    """The modes of each BatchNorm that was folded, in which alone it is what it was folded as."""
    why = "its BatchNorm was folded into the layer before it"
    found = {}
    for rule, key in outcome.applied:
        remark = outcome.remark((rule, key))
        module = dict(model.named_modules()).get(remark.target)
        if rule == FoldBatchNorm.name and module is not None and not module.training:
            name = f"{remark.target}.training"
            found[remark.target] = Specialization(name, False, remark.location, why)
    return found


def _undone(bad: Sample, text: str) -> Skip:
    """What to say of a rewrite that gave another result than the promised."""
    match bad.asked:
        case "bits":
            return Skip("missed", Reason(Code.NOT_BITWISE, text))
        case "nan":
            return Skip("missed", Reason(Code.SPREADS_NAN, text))
    return Skip("failed", Reason(Code.WRONG_RESULT, text))


def _may_choose(rule: Rule[Any]) -> bool:
    return isinstance(rule, Conv3dForms) and rule.choices is None


_TOGETHER = frozenset({FoldBatchNorm.name, MergeConvolutions.name, Pool3dForms.name})
"""Rules whose sites are all alike: they pay on a machine, or they do not."""


def _group(remark: Remark) -> str:
    """Rewrites that are measured together: each loop by itself, all sites of one form."""
    if remark.rule in _TOGETHER or "milliseconds" in remark.detail:
        return remark.rule
    form = remark.detail.get("form")
    return f"{remark.rule} {form or remark.target}"
