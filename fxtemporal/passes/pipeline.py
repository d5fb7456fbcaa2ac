"""Runs rules over a program.

``optimize`` and ``audit`` go through the same loop: candidates, preconditions, rewrite, remark.
``audit`` runs it on a copy that is thrown away, so that what it says of a later pass already takes
the earlier ones into account, and the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxtemporal.analysis.cost import Costs, SiteCost
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.building.output_layouts import keep_output_layouts
from fxtemporal.passes.dump import Dump
from fxtemporal.passes.rule import Remark, Rule, Status
from fxtemporal.support.errors import FxTemporalError

__all__ = ["Key", "Outcome", "Skip", "run_rules"]

Key = tuple[str, str]
"""A site: the rule's name and the site's key."""


@dataclass(frozen=True)
class Skip:
    """Why a legal site is not to be rewritten: found wrong, or not worth it."""

    status: Status
    reason: Reason
    detail: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The rewritten program, and a remark for each site in the order they were met."""

    program: Program
    remarks: tuple[tuple[Key, Remark], ...]

    @property
    def applied(self) -> tuple[Key, ...]:
        return tuple(key for key, remark in self.remarks if remark.status == "applied")

    def remark(self, key: Key) -> Remark:
        return dict(self.remarks)[key]


def run_rules(
    captured: Program,
    rules: Iterable[Rule[Any]],
    skips: Mapping[Key, Skip] | None = None,
    only: frozenset[Key] | None = None,
    costs: Costs | None = None,
    dump: Dump | None = None,
) -> Outcome:
    """Rewrite a copy of ``captured`` by every rule in turn.

    ``skips`` are sites to leave, and what to say of them; with ``only``, all but those are left
    and nothing is said. A rewrite that raises is undone, by starting again without it. With
    ``costs``, each remark says what its site costs; ``dump`` is told of the program after each.
    """
    skips = dict(skips or {})
    rules = tuple(rules)
    careful = False
    while True:
        try:
            outcome = _run_once(captured.copy(), rules, skips, only, careful, costs, dump)
            if outcome.applied:
                if captured.keeps_layouts:
                    keep_output_layouts(outcome.program, captured)
                outcome.program.refresh()
            return outcome
        except FxTemporalError:
            raise
        except _RewriteError as failure:
            text = f"{type(failure.error).__name__}: {failure.error}".splitlines()[0]
            skips[failure.key] = Skip("failed", Reason(Code.REWRITE_RAISED, text))
        except Exception:  # a rewrite left a broken graph: which one did, a check after each says
            if careful:
                raise
            careful = True


class _RewriteError(Exception):
    def __init__(self, key: Key, error: Exception) -> None:
        super().__init__(key)
        self.key = key
        self.error = error


def _run_once(
    program: Program,
    rules: tuple[Rule[Any], ...],
    skips: Mapping[Key, Skip],
    only: frozenset[Key] | None,
    careful: bool,
    costs: Costs | None,
    dump: Dump | None,
) -> Outcome:
    remarks: dict[Key, Remark] = {}
    for rule in rules:
        program.drop_unread()
        while _sweep(program, rule, skips, only, careful, costs, remarks):
            pass
        if dump is not None:
            dump(rule.name, program)
    if any(remark.status == "applied" for remark in remarks.values()):
        program.drop_unread()
    program.hoist_checks()
    program.refresh()
    return Outcome(program, tuple(remarks.items()))


def _sweep(
    program: Program,
    rule: Rule[Any],
    skips: Mapping[Key, Skip],
    only: frozenset[Key] | None,
    careful: bool,
    costs: Costs | None,
    remarks: dict[Key, Remark],
) -> bool:
    """One look at every candidate of ``rule``; True where a rewrite calls for another look.

    ``careful``: check the graph after each rewrite, which takes as long as there are nodes.
    """
    for candidate in rule.candidates(program):
        site = rule.site(program, candidate)
        key = (rule.name, site.key)
        if key in remarks and remarks[key].status != "missed":
            continue
        reasons = tuple(rule.preconditions(program, candidate))
        skip = skips.get(key)
        applied = not reasons and skip is None and (only is None or key in only)
        if not applied and not reasons and skip is None:
            continue
        words = rule.what(program, candidate), rule.becomes(program, candidate)
        ledger = None if costs is None else _Ledger(costs, program, rule.nodes(program, candidate))
        status: Status = "missed" if skip is None or reasons else skip.status
        detail = dict(rule.detail(program, candidate))
        if applied:
            status = "applied"
            try:
                detail = dict(rule.rewrite(program, candidate))
                program.fill_in()
                if careful:
                    program.graph.lint()
            except Exception as error:  # the graph may be half rewritten: start again
                raise _RewriteError(key, error) from error
        elif skip is not None and not reasons:
            reasons = (skip.reason,)
            detail |= dict(skip.detail)
        cost = None if ledger is None else ledger.site(program)
        remarks[key] = Remark(
            site.rule, status, site.target, site.location, reasons, detail, *words, cost
        )
        if applied and rule.moves_others:
            return True
    return False


class _Ledger:
    """What a site cost before it was rewritten, and what the whole program did."""

    def __init__(self, costs: Costs, program: Program, nodes: Iterable[fx.Node]) -> None:
        self.costs = costs
        self.before = costs.of(program, nodes)
        self.total = costs.total(program)

    def site(self, program: Program) -> SiteCost:
        """What it costs now is what the whole program costs more, or less, than before."""
        return SiteCost(self.before, self.before + (self.costs.total(program) - self.total))
