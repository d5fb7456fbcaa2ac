"""The stages that measure: the fastest form of each Conv3d, and the rewrites that pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxtemporal.compiler.rewriting import rewrite
from fxtemporal.compiler.state import State
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.pipeline import Key, Skip
from fxtemporal.passes.rule import Rule
from fxtemporal.support.clock import Deadline
from fxtemporal.tuning.ablation import worth_keeping
from fxtemporal.tuning.conv3d_forms import FormChooser
from fxtemporal.tuning.races import Races

__all__ = ["choose_forms", "drop_slower", "groups_of"]

_Rules = tuple[Rule[Any], ...]


def choose_forms(state: State) -> State:
    """Measure which form of each Conv3d is the fastest, and make the rule use it."""
    races = state.races
    if races is None:
        return state
    state = state.but(deadline=Deadline(races.tune.seconds))
    for place, rule in enumerate(state.rules):
        if rule.chooses and any(True for _ in rule.candidates(state.captured)):
            return _with_fastest_forms(state, races, place)
    return state


def _with_fastest_forms(state: State, races: Races, place: int) -> State:
    rule, before, after = state.rules[place], state.rules[:place], state.rules[place + 1 :]
    program = state.rewrite(rules=before).program
    sites = tuple(rule.to_choose(program))
    if not sites:
        return state
    tick = state.request.tick
    best: tuple[_Rules, nn.Module] | None = None
    chooser = FormChooser(program, sites, races, tick)
    for name, choices in chooser.variants().items():
        rules = (*before, rule.choosing(choices), *after)
        module = state.rewrite(rules=rules).program.gm
        tick(f"measuring the forms, {name}")
        if best is None or races.wins(module, best[1]):
            best = rules, module
    assert best is not None
    return state.but(rules=best[0])


def drop_slower(state: State) -> State:
    """Drop the rewrites that do not pay on this device."""
    races, applied = state.races, state.rewritten.applied
    if races is None or not applied:
        return state
    groups = groups_of(state, applied)
    measured = frozenset(
        name for name, keys in groups.items() if any(_milliseconds(state, key) for key in keys)
    )

    def build(names: frozenset[str]) -> nn.Module:
        if not names:
            return state.captured.gm
        if names == groups.keys():
            return state.rewritten.program.gm
        only = frozenset(key for name in names for key in groups[name])
        return state.rewrite(only=only).program.gm

    compiled = races.tune.target != "eager"  # compiled again for each race, which takes long
    sure = frozenset(groups) if compiled else measured
    verdict = worth_keeping(list(groups), build, races, state.request.tick, sure)
    races.cache.save()
    gains = {key: gain for name, gain in verdict.gains.items() for key in groups[name]}
    state = state.but(gains=gains, timing=verdict.network)
    if not verdict.lost:
        return state
    skips = dict(state.skips)
    for name, slower in verdict.lost.items():
        text = f"{slower.before:.3g} ms without it, {slower.after:.3g} ms with it"
        reason = Reason(Code.NOT_FASTER, text)
        detail = (("speedup", round(slower.speedup, 3)),)
        skips.update(dict.fromkeys(groups[name], Skip("missed", reason, detail)))
    state = state.but(skips=skips)
    state = state.but(outcome=state.rewrite())
    if state.verifier is not None:
        first = state.verifier.compare(state.rewritten.program.gm, example_only=True)
        if not first.equal:  # fewer rewrites may round differently than all of them
            state = rewrite(state)
    return state


def groups_of(state: State, keys: Sequence[Key]) -> Mapping[str, list[Key]]:
    """``{group: its sites}``: a group is measured as one, as its rule says."""
    rules = {rule.name: rule for rule in state.rules}
    groups: dict[str, list[Key]] = {}
    for key in keys:
        remark = state.rewritten.remark(key)
        groups.setdefault(rules[remark.rule].group(remark), []).append(key)
    return groups


def _milliseconds(state: State, key: Key) -> bool:
    """Whether a site was measured before, on its own."""
    return "milliseconds" in state.rewritten.remark(key).detail
