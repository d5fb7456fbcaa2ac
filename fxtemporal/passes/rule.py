"""The parts of a rewrite: a rule, its sites, its reasons, and the remark on each site.

A :class:`Rule` finds *candidates* (frozen dataclasses that carry all the rewrite needs), lists the
*preconditions* that fail (a generator: each blocker is one ``yield``; nothing yielded means legal)
and *rewrites*. :mod:`fxtemporal.passes.pipeline` runs rules; ``audit`` and ``optimize`` run the
same loop.

Every site that a rule looks at gets one :class:`Remark`. The codes in :class:`Code` are stable:
scripts and CI settings may rely on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from fxtemporal.ir.reasons import Code, Reason

if TYPE_CHECKING:
    from torch import fx, nn

    from fxtemporal.analysis.cost import SiteCost
    from fxtemporal.ir.guards import Specialization
    from fxtemporal.ir.program import Program

__all__ = ["Remark", "Rule", "Site", "Status"]

Status = Literal["applied", "missed", "failed"]


@dataclass(frozen=True)
class Site:
    """One place that a rule looks at: its name, and where the user wrote it.

    ``key`` is the same each time the same rule searches the same program.
    """

    rule: str
    key: str
    target: str
    location: str | None


@dataclass(frozen=True)
class Remark:
    """The result for one site: applied or not, and why.

    ``target`` is a module path or a node name, ``location`` is ``file:line`` in the user's code,
    ``detail`` a plain dict: the new form, frames folded, FLOPs and parameters, milliseconds.
    ``what`` describes the site, ``becomes`` the result of the rewrite. ``cost`` is the cost before
    and after; None if the shapes are not known.
    """

    rule: str
    status: Status
    target: str
    location: str | None = None
    reasons: tuple[Reason, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""
    becomes: str = ""
    cost: SiteCost | None = None

    @property
    def left(self) -> tuple[Reason, ...]:
        """The reasons why a part of a rewritten site was left."""
        entries = self.detail.get("left_because", ())
        return tuple(Reason(Code(e["code"]), e["text"], e.get("location")) for e in entries)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "status": self.status,
            "target": self.target,
            "location": self.location,
            "what": self.what,
            "becomes": self.becomes,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "detail": dict(self.detail),
            "cost": None if self.cost is None else self.cost.to_dict(),
        }


C = TypeVar("C")


class Rule(ABC, Generic[C]):
    """One kind of rewrite. Stateless: a candidate carries all that its site needs.

    To add one: a file in ``passes/``, a line in ``DEFAULT_PASSES``, a test file.
    """

    name: str
    exact: bool = True
    """Whether the rewrite computes the same numbers. Rules that do not run first, unverified."""
    options: tuple[str, ...] = ()
    """Arguments of the class that a pass name can set, as strings: ``"name{option=a,b}"``."""
    moves_others: bool = False
    """Whether a rewrite can change the other candidates, so that they are searched again."""
    folds_loops: bool = False
    """Whether a rewrite holds all frames of a loop at once, which can take too much memory."""
    alike: bool = False
    """Whether all its sites are kept or left together after timing."""
    chooses: bool = False
    """Whether a site has several possible rewrites, and timing is still to find the fastest."""

    @abstractmethod
    def candidates(self, program: Program) -> Iterable[C]:
        """Every site worth a remark, in graph order."""

    @abstractmethod
    def site(self, program: Program, candidate: C) -> Site:
        """The name and place of ``candidate``."""

    @abstractmethod
    def preconditions(self, program: Program, candidate: C) -> Iterator[Reason]:
        """Each blocker, not only the first. Nothing yielded: the rewrite is legal."""

    @abstractmethod
    def rewrite(self, program: Program, candidate: C) -> Mapping[str, Any]:
        """Change the graph; return the remark's ``detail``."""

    def detail(self, program: Program, candidate: C) -> Mapping[str, Any]:
        """The remark's ``detail`` for a site that is left alone."""
        return MappingProxyType({})

    def nodes(self, program: Program, candidate: C) -> Iterable[fx.Node]:
        """The nodes of the site, whose cost is the site's cost."""
        return ()

    def what(self, program: Program, candidate: C) -> str:
        """What the site is, in a few words: ``"Conv3d with a 1×7×7 kernel"``."""
        return ""

    def becomes(self, program: Program, candidate: C) -> str:
        """What the site becomes, in a few words: ``"2-D convolutions of its frames"``."""
        return ""

    # for the stages of optimize

    def keeping(self, *, confined: bool, bitwise: bool) -> Rule[C]:
        """This rule, limited to rewrites that spread no NaN, or keep the last bit."""
        return self

    def to_choose(self, program: Program) -> Iterable[Any]:
        """The sites whose possible rewrites are to be timed, if the rule ``chooses``."""
        return ()

    def choosing(self, choices: Mapping[str, Any]) -> Rule[C]:
        """This rule with a fixed choice for each site, by its key."""
        return self

    def group(self, remark: Remark) -> str:
        """The group of the site; timing keeps or drops the sites of one group together."""
        return self.name if self.alike else f"{self.name} {remark.target}"

    def modes(self, model: nn.Module, applied: Sequence[Remark]) -> Mapping[str, Specialization]:
        """The training modes, by module path, that ``model`` must keep for what was applied."""
        return {}
