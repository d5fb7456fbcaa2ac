"""Runs rules over a program.

``optimize`` and ``audit`` run the same loop: candidates, preconditions, rewrite, remark. ``audit``
runs it on a copy that is thrown away. So its remarks on a later pass take the earlier passes into
account, and the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fxtemporal.analysis.cost import Cost, Costs, SiteCost
from fxtemporal.ir.program import Program
from fxtemporal.ir.raised import first_line, innermost_line
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.building.form_layouts import keep_gradient_layouts
from fxtemporal.passes.building.output_layouts import keep_output_layouts
from fxtemporal.passes.dump import Dump
from fxtemporal.passes.rule import Remark, Rule, Status
from fxtemporal.support.errors import FxTemporalError
from fxtemporal.support.quiet import quiet

__all__ = ["Key", "Outcome", "Skip", "run_rules"]

Key = tuple[str, str]
"""A site: the rule's name and the site's key."""


@dataclass(frozen=True)
class Skip:
    """Why a legal site must not be rewritten: the result was wrong, or it does not pay."""

    status: Status
    reason: Reason
    detail: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The rewritten program, and a remark for each site, in the order of the visits."""

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

    ``skips`` maps sites to leave alone to the reason for it. With ``only``, all other sites are
    left alone without a reason. If a rewrite raises, all starts again without it; if a rule raises
    in looking for sites, without the rule, and a remark says so. With ``costs``, each remark has
    the cost of its site. ``dump`` is called with the program after each rule.
    """
    with quiet():  # of an op that refuses the values of a later rewrite
        return _run(captured, tuple(rules), skips, only, costs, dump)


def _run(
    captured: Program,
    rules: tuple[Rule[Any], ...],
    skips: Mapping[Key, Skip] | None,
    only: frozenset[Key] | None,
    costs: Costs | None,
    dump: Dump | None,
) -> Outcome:
    skips = dict(skips or {})
    careful = False
    broken: dict[Key, Remark] = {}
    while True:
        try:
            outcome = _run_once(captured.copy(), rules, skips, only, careful, costs, dump)
            if outcome.applied:
                if captured.keeps_layouts:
                    keep_output_layouts(outcome.program, captured)
                keep_gradient_layouts(outcome.program)
                outcome.program.refresh()
            outcome.program.gm.recompile()
            return replace(outcome, remarks=(*outcome.remarks, *broken.items()))
        except FxTemporalError:
            raise
        except _RewriteError as failure:
            text = first_line(failure.error)
            skips[failure.key] = Skip("failed", Reason(Code.REWRITE_RAISED, text))
        except Exception as failure:  # a rewrite broke the graph: check after each one
            if careful:
                if not isinstance(failure, _RuleError):
                    raise
                name = failure.rule.name
                rules = tuple(rule for rule in rules if rule is not failure.rule)
                where = type(captured.gm).__name__
                broken[name, ""] = Remark(name, "failed", where, None, (_raised(failure.error),))
            careful = not careful


class _RewriteError(Exception):
    def __init__(self, key: Key, error: Exception) -> None:
        super().__init__(key)
        self.key = key
        self.error = error


class _RuleError(Exception):
    """``rule`` raised while it looked for its sites."""

    def __init__(self, rule: Rule[Any], error: Exception) -> None:
        super().__init__(rule.name)
        self.rule = rule
        self.error = error


def _raised(error: Exception) -> Reason:
    where = innermost_line(error)
    return Reason(Code.PASS_RAISED, first_line(error) + (f" at {where}" if where else ""))


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
    ledger = None if costs is None else _Ledger(costs, program)
    for rule in rules:
        program.drop_unread()
        try:
            while _sweep(program, rule, skips, only, careful, ledger, remarks):
                pass
        except (FxTemporalError, _RewriteError):
            raise
        except Exception as error:  # of the rule, or of a graph that a rewrite broke
            raise _RuleError(rule, error) from error
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
    ledger: _Ledger | None,
    remarks: dict[Key, Remark],
) -> bool:
    """Visit every candidate of ``rule`` once; return True if a rewrite requires another visit.

    ``careful``: check the graph after each rewrite, which takes time in proportion to its nodes.
    A site costs what it cost before, and then as much more or less as the whole program does.
    """
    if ledger is not None:
        ledger.change(program)
    for candidate in rule.candidates(program):
        site = rule.site(program, candidate)
        key = (rule.name, site.key)
        if key in remarks and remarks[key].status != "missed":
            continue
        try:
            reasons = tuple(rule.preconditions(program, candidate))
        except FxTemporalError:
            raise
        except Exception as error:  # a defect of the rule at this site; the others are none
            if not careful:
                raise  # the graph may be broken
            remarks[key] = Remark(
                site.rule, "failed", site.target, site.location, (_raised(error),)
            )
            continue
        skip = skips.get(key)
        applied = not reasons and skip is None and (only is None or key in only)
        if not applied and not reasons and skip is None:
            continue
        words = rule.what(program, candidate), rule.becomes(program, candidate)
        nodes = () if ledger is None else rule.nodes(program, candidate)
        before = None if ledger is None else ledger.costs.of(program, nodes)
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
        cost = None
        if ledger is not None and before is not None:
            cost = SiteCost(before, before + ledger.change(program) if applied else before)
        remarks[key] = Remark(
            site.rule, status, site.target, site.location, reasons, detail, *words, cost
        )
        if applied and rule.moves_others:
            return True
    return False


class _Ledger:
    """The costs of a program's nodes, while rewrites replace them."""

    def __init__(self, costs: Costs, program: Program) -> None:
        self.costs = costs
        self.nodes = dict.fromkeys(program.graph.nodes)
        costs.total(program)  # an erased node has no cost any more

    def change(self, program: Program) -> Cost:
        """How much the program's cost changed since the last call."""
        before, self.nodes = self.nodes, dict.fromkeys(program.graph.nodes)
        new = self.costs.of(program, (node for node in self.nodes if node not in before))
        return new - self.costs.of(program, (node for node in before if node not in self.nodes))
