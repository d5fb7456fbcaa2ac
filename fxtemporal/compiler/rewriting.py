"""The stages that rewrite: lossy rules, then exact ones, without rewrites found to be wrong."""

from __future__ import annotations

from collections.abc import Sequence

from fxtemporal.compiler.capturing import check_capture
from fxtemporal.compiler.state import Lossy, State
from fxtemporal.factorization.factorize_2plus1d import Factorize2Plus1d
from fxtemporal.factorization.planning import plan
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.pipeline import Key, Skip, run_rules
from fxtemporal.support.errors import PassError, VerificationError
from fxtemporal.verification.bisect import culprits
from fxtemporal.verification.comparison import Sample

__all__ = ["lossy", "rewrite", "undone"]


def lossy(state: State) -> State:
    """Run the lossy rules that were asked for; later stages compare with their result.

    Raises:
        PassError: ``exact="bitwise"`` was asked for too.
        VerificationError: the captured graph is not the model.
    """
    request = state.request
    rules = tuple(rule for rule in state.rules if not rule.exact)
    if request.promises.bitwise and (rules or request.factorize is not None):
        raise PassError("exact='bitwise' and a lossy pass, or factorize, contradict each other")
    curve: tuple[tuple[float, float], ...] = ()
    if request.factorize is not None:
        planned = plan(state.captured, request.factorize, request.example, request.tick)
        rules, curve = (*rules, Factorize2Plus1d(planned)), planned.curve
    if not rules:
        return state
    state = check_capture(state)
    outcome = run_rules(state.captured, rules, costs=state.costs)
    done = Lossy(outcome.remarks, curve, changed=bool(outcome.applied))
    state = state.but(rules=tuple(rule for rule in state.rules if rule.exact), lossy=done)
    if not done.changed:
        return state
    verifier = request.verifier(outcome.program.gm) if request.verify else None
    return state.but(captured=outcome.program, verifier=verifier)


def rewrite(state: State) -> State:
    """Run all exact rewrites, and drop those that change the numbers.

    Raises:
        VerificationError: the captured graph is not the model.
    """
    state.request.tick("rewriting")
    outcome = state.rewrite(costs=state.costs)
    prices = {key: remark.cost for key, remark in outcome.remarks}
    state = state.but(outcome=outcome, prices=prices)
    if state.verifier is None:
        return state
    state.request.tick("verifying")
    comparison = state.verifier.compare(outcome.program.gm)
    if not comparison.equal:
        bad = next(sample for sample in comparison.samples if not sample.equal)
        return _without_culprits(state, bad)
    return state.but(comparison=comparison)


def _without_culprits(state: State, bad: Sample) -> State:
    """Drop the rewrites that change the numbers, as they did on ``bad``."""
    tick, verifier = state.request.tick, state.verifier
    assert verifier is not None
    if not state.lossy.changed:
        state = check_capture(state)
        state = state.but(outcome=state.rewrite())
    tried = state

    def passes(keys: Sequence[Key]) -> bool:
        tick("looking for the rewrite that is wrong")
        return verifier.compare(tried.rewrite(only=frozenset(keys)).program.gm).equal

    text = bad.problem or (
        f"relative error {bad.relative_error:.1e} on {bad.inputs}, "
        f"at most {bad.bound:.1e} is rounding"
    )
    wrong = culprits(state.rewritten.applied, passes)
    state = state.but(skips={**state.skips, **dict.fromkeys(wrong, undone(bad, text))})
    outcome = state.rewrite()
    comparison = verifier.compare(outcome.program.gm)
    if not comparison.equal:
        raise VerificationError("rewrites remain that change the numbers; please report this")
    return state.but(outcome=outcome, comparison=comparison)


def undone(bad: Sample, text: str) -> Skip:
    """The skip for a rewrite that broke a promise on ``bad``, with ``text`` as its reason."""
    match bad.asked:
        case "bits":
            return Skip("missed", Reason(Code.NOT_BITWISE, text))
        case "nan":
            return Skip("missed", Reason(Code.SPREADS_NAN, text))
    return Skip("failed", Reason(Code.WRONG_RESULT, text))
