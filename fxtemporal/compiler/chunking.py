"""Splits folded frames into chunks, to meet a memory limit or to be faster."""

from __future__ import annotations

from collections.abc import Mapping

from fxtemporal.analysis.peak_memory import peak
from fxtemporal.compiler.measuring import groups_of
from fxtemporal.compiler.rewriting import undone
from fxtemporal.compiler.state import State
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.pipeline import Key, Outcome, Skip, run_rules
from fxtemporal.passes.rule import Remark
from fxtemporal.tuning.chunk_counts import ChunkChooser, Chunking, sized
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.timing import Timing

__all__ = ["chunk"]

_LEFT = Reason(Code.MEMORY_LIMIT, "left, to see what a call holds then")
_SECONDS = 0.1
"""Seconds for timing the network in chunks against the original."""


def chunk(state: State) -> State:
    """Split folded frames into chunks; leave loops unfolded if a call would hold too much memory.

    Without a limit, chunks only serve to keep eager mode's activations in the cache; other engines
    have their own means for that.
    """
    races = state.races
    if races is None or (races.tune.target != "eager" and races.tune.limit is None):
        return state
    groups = _loops(state)
    slow = frozenset(name for name, keys in groups.items() if keys[0] in state.skips)

    def build(left: frozenset[str]) -> Program:
        if left == slow:
            return state.rewritten.program.copy()
        skips = _leaving(state, groups, dict.fromkeys(left, _LEFT))
        return state.rewrite(skips=skips).program

    chooser = ChunkChooser(build, list(groups), slow, races, state.deadline, state.request.tick)
    choice = chooser.choose()
    chunked = state
    if choice.left != slow or choice.chunks:
        why = {name: choice.why.get(name) for name in choice.left}
        chunked = _run_in(state.but(skips=_leaving(state, groups, why)), choice, slow)
        if choice.left != slow or any(count > 1 for count in choice.chunks.values()):
            chunked = _verified(chunked, choice)
            chunked = _measured(state, chunked, choice, races, slow)
    races.cache.save()
    return _above_limit(chunked, choice, races.tune.limit)


def _loops(state: State) -> Mapping[str, list[Key]]:
    """The loops that are folded, or were left only because folding is not faster, in groups."""
    folding = {rule.name for rule in state.rules if rule.folds_loops}

    def counts(key: Key, remark: Remark) -> bool:
        slow = key in state.skips and state.skips[key].reason.code is Code.NOT_FASTER
        return key[0] in folding and (remark.status == "applied" or slow)

    return groups_of(state, [key for key, remark in state.rewritten.remarks if counts(key, remark)])


def _leaving(
    state: State, groups: Mapping[str, list[Key]], left: Mapping[str, Reason | None]
) -> dict[Key, Skip]:
    """The skips that leave exactly the loops ``left``; a reason of None keeps the one known."""
    skips = dict(state.skips)
    for name, keys in groups.items():
        for key in keys:
            if name not in left:
                skips.pop(key, None)
            elif (reason := left[name]) is not None:
                skips[key] = Skip("missed", reason)
    return skips


def _run_in(state: State, choice: Chunking, slow: frozenset[str]) -> State:
    """Run the rewrites, then the chunks of ``choice``."""
    rule = choice.rule
    whole = {
        (rule.name, region): Skip("missed", choice.why[region])
        for region, count in choice.chunks.items()
        if count == 1
    }
    state = state.but(rules=(*state.rules, rule), skips={**state.skips, **whole})
    if choice.left != slow:
        return state.but(outcome=state.rewrite())
    return state.but(outcome=_behind(state, state.rewritten))


def _behind(state: State, outcome: Outcome) -> Outcome:
    """Run only the last rule, which makes the chunks, on ``outcome``."""
    chunks = run_rules(outcome.program, state.rules[-1:], state.skips)
    return Outcome(chunks.program, (*outcome.remarks, *chunks.remarks))


def _verified(state: State, choice: Chunking) -> State:
    """Compare with the original again; undo the chunks if the numbers are wrong."""
    comparison = state.compared(state.rewritten.program.gm)
    if comparison is None or comparison.equal:
        return state.but(comparison=comparison)
    bad = next(sample for sample in comparison.samples if not sample.equal)
    wrong = undone(bad, bad.problem or "in chunks it gave other numbers; please report this")
    regions = {(choice.rule.name, region): wrong for region in choice.chunks}
    state = state.but(skips={**state.skips, **regions})
    outcome = state.rewrite()
    return state.but(outcome=outcome, comparison=state.compared(outcome.program.gm))


def _measured(
    before: State, chunked: State, choice: Chunking, races: Races, slow: frozenset[str]
) -> State:
    """``chunked``, timed; the state ``before`` it if the network is slower in chunks."""
    state = chunked
    state.request.tick("measuring the network")
    timing = races.race(state.captured.gm, state.rewritten.program.gm, _SECONDS)
    if timing.wins() or races.tune.limit is not None or choice.left != slow:
        return state.but(timing=timing)
    skips = {**state.skips, **_in_one_piece(choice, timing)}
    state = state.but(skips=skips, comparison=before.comparison, timing=before.timing)
    return state.but(outcome=_behind(state, before.rewritten))


def _in_one_piece(choice: Chunking, slower: Timing) -> dict[Key, Skip]:
    """Skips for the regions in chunks, with the timing that was slower."""
    text = f"the network takes {slower.before:.3g} ms without it, {slower.after:.3g} ms with it"
    skip = Skip("missed", Reason(Code.NOT_FASTER, text))
    regions = (region for region, count in choice.chunks.items() if count > 1)
    return {(choice.rule.name, region): skip for region in regions}


def _above_limit(state: State, choice: Chunking, limit: int | None) -> State:
    """``state``, with a remark if a call of the result holds more than the limit."""
    outcome = state.rewritten
    if limit is None or (held := peak(outcome.program).bytes) <= limit:
        return state
    text = (
        f"a call holds {sized(held)} at its peak by estimate; the limit is {sized(limit)}, and "
        "nothing is known that holds less"
    )
    name, reasons = choice.rule.name, (Reason(Code.MEMORY_LIMIT, text),)
    target = type(state.request.original).__name__
    remark = Remark(name, "missed", target, None, reasons, {"peak_bytes_after": held})
    return state.but(outcome=Outcome(outcome.program, (*outcome.remarks, ((name, ""), remark))))
