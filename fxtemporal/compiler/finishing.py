"""The last stage: the resulting module, with the modes it is limited to, and its report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from fxtemporal.analysis.cost import Structure
from fxtemporal.analysis.effects import is_checked_first
from fxtemporal.compiler.state import State
from fxtemporal.ir.freeze import freeze, memory
from fxtemporal.ir.guards import Specialization
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.passes.dump import Dump
from fxtemporal.passes.pipeline import run_rules
from fxtemporal.passes.rule import Remark
from fxtemporal.reports.report import Report
from fxtemporal.verification.gradients import other_gradients, outputs_of_parameters
from fxtemporal.verification.verifier import Verifier

__all__ = ["META", "finish"]

META = "fxtemporal"
"""Key of a result's report in its ``meta``."""


def finish(state: State) -> State:
    """Make the module, with the modes it must keep, the gradients it refuses, and its report."""
    request, program = state.request, state.rewritten.program
    gm, original = program.gm, request.original
    assert isinstance(gm, OptimizedModule)
    gm.recompile()  # now, not in the first thread that calls it
    _dump(state)
    comparison = state.comparison
    if state.lossy.changed and comparison is not None and request.example is not None:
        comparison = Verifier(original, request.example).compare(gm, exact=False)
    remarks = tuple(itertools.chain((r for _, r in state.lossy.remarks), _remarks(state)))
    held = _modes_held_before(original, gm) | _modes_of_rules(state, gm, remarks)
    gm.hold_modes({**held, **program.modes})
    gradients = None
    if not request.freeze and not state.lossy.changed:
        gradients = _refuse_other_gradients(state, gm)
    if state.verifier is not None and (switched := state.verifier.outputs_with_gradients):
        gm.refuse_gradients_when_off(switched)
    used = memory(original, gm)
    if request.freeze:
        freeze(gm)
        used = memory(original, gm)
    else:
        gm.watch(original, state.captured.graph)
    if request.otherwise is not None and is_checked_first(program):
        traced = state.captured.frontend == "export"
        gm.run_otherwise(request.otherwise(original, hooks_traced=traced))
    structure = None
    if state.costs is not None:
        structure = Structure(state.blocks, state.costs.blocks(program))
    gm.meta[META] = Report(
        mode="optimize",
        remarks=remarks,
        specializations=program.specializations,
        comparison=comparison,
        timing=state.timing,
        frontend=state.captured.frontend,
        note=state.captured.note,
        gradients=gradients,
        settings=request.settings(),
        memory=used,
        curve=state.lossy.curve,
        structure=structure,
    )
    return state.but(result=gm)


def _dump(state: State) -> None:
    """Run every pass once more, with the final decisions, to dump the graph after each."""
    if (dump := Dump(state.request.original)).wanted:
        dump("captured", state.captured)
        run_rules(state.captured, state.rules, state.skips, dump=dump)
        dump("result", state.rewritten.program)


def _remarks(state: State) -> Iterator[Remark]:
    """The remarks, each with the cost of its site and its measured gain."""
    for key, remark in state.rewritten.remarks:
        detail = dict(remark.detail)
        if remark.status == "applied" and (timing := state.gains.get(key)) is not None:
            detail["network_milliseconds_before"] = round(timing.before, 4)
            detail["network_milliseconds"] = round(timing.after, 4)
        yield replace(remark, cost=state.prices.get(key), detail=detail)


def _modes_held_before(model: nn.Module, result: nn.Module) -> dict[str, Specialization]:
    """Modes that ``model`` must keep since it, or a part of it, is a result of optimize itself."""
    there = {path for path, _ in result.named_modules()}
    held = {}
    for path, module in model.named_modules():
        for name, fixed in module.held_modes.items() if isinstance(module, OptimizedModule) else ():
            full = f"{path}.{name}" if path and name else path or name
            held[full if full in there else ""] = fixed
    return held


def _modes_of_rules(
    state: State, gm: nn.Module, remarks: Sequence[Remark]
) -> dict[str, Specialization]:
    """Modes that the module must keep for the rewrites that each rule applied."""
    applied: dict[str, list[Remark]] = {}
    for remark in remarks:
        if remark.status == "applied":
            applied.setdefault(remark.rule, []).append(remark)
    held: dict[str, Specialization] = {}
    for rule in (*state.request.rules, *state.rules):
        if rule.name in applied:
            held |= rule.modes(gm, applied.pop(rule.name))
    return held


def _refuse_other_gradients(state: State, gm: OptimizedModule) -> str | None:
    """Make ``gm`` refuse a backward if its gradients differ from the model's; return the reason."""
    example, original = state.request.example, state.request.original
    why = state.captured.gradients
    if state.verifier is not None and example is not None:
        found = other_gradients(original, gm, example, thorough=state.verifier.cheap)
        why = found if found is None or why is None else f"{found} ({why})"
    if why is not None:
        gm.refuse_gradients(
            why, () if example is None else outputs_of_parameters(original, example)
        )
    return why
