"""What a rewrite is made of: a rule, its reasons, and the remark it leaves behind.

A :class:`Rule` finds *candidates* (frozen dataclasses that carry all the rewrite needs), lists the
*preconditions* that fail (a generator: each blocker is one ``yield``; nothing yielded means legal)
and *rewrites*. :mod:`fxtemporal.passes.pipeline` runs rules; ``audit`` and ``optimize`` run the
same loop.

Every site that a rule looks at ends as one :class:`Remark`. The codes in :class:`Code` are stable:
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
    """One place that a rule looks at: what it is called, and where the user wrote it.

    ``key`` is the same each time the same program is searched by the same rule.
    """

    rule: str
    key: str
    target: str
    location: str | None


@dataclass(frozen=True)
class Remark:
    """What became of one site.

    ``target`` is a module path or a node name, ``location`` is ``file:line`` in the user's code,
    ``detail`` a plain dict: what it became, frames folded, FLOPs and parameters, milliseconds.
    ``what`` says what the site is, ``becomes`` what the rewrite makes of it, and ``cost`` what it
    costs as it is and after; None where the shapes are not known.
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
        """Of a site that was rewritten: why a part of it was not."""
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
    """One kind of rewrite. Stateless: what one site needs travels in its candidate.

    Adding one: a file in ``passes/``, a line in ``DEFAULT_PASSES``, a test file.
    """

    name: str
    exact: bool = True
    """Whether the rewrite computes the same numbers; rules that do not run first, unverified."""
    options: tuple[str, ...] = ()
    """Arguments of the class that a text can give, each as strings: ``"name{option=a,b}"``."""
    moves_others: bool = False
    """Whether a rewrite can change what the other candidates are, so that they are sought anew."""
    folds_loops: bool = False
    """Whether a rewrite holds all frames of a loop at once, so that memory may speak against it."""
    alike: bool = False
    """Whether its sites stand or fall together, where it is measured what pays."""
    chooses: bool = False
    """Whether it has several ways to rewrite a site, and the fastest is still to be found."""

    @abstractmethod
    def candidates(self, program: Program) -> Iterable[C]:
        """Every site worth a remark, in graph order."""

    @abstractmethod
    def site(self, program: Program, candidate: C) -> Site:
        """Its name and place."""

    @abstractmethod
    def preconditions(self, program: Program, candidate: C) -> Iterator[Reason]:
        """Each blocker, not only the first. Nothing yielded: the rewrite is legal."""

    @abstractmethod
    def rewrite(self, program: Program, candidate: C) -> Mapping[str, Any]:
        """Change the graph; return the remark's ``detail``."""

    def detail(self, program: Program, candidate: C) -> Mapping[str, Any]:
        """What a remark says of a site that is left alone."""
        return MappingProxyType({})

    def nodes(self, program: Program, candidate: C) -> Iterable[fx.Node]:
        """What the site is made of: its cost is theirs."""
        return ()

    def what(self, program: Program, candidate: C) -> str:
        """What the site is, in a few words: ``"Conv3d with a 1×7×7 kernel"``."""
        return ""

    def becomes(self, program: Program, candidate: C) -> str:
        """What the rewrite makes of it, in a few words: ``"2-D convolutions of its frames"``."""
        return ""

    # what the stages of optimize ask

    def keeping(self, *, confined: bool, bitwise: bool) -> Rule[C]:
        """The same rule, kept to what was promised of NaN and of the last bit."""
        return self

    def to_choose(self, program: Program) -> Iterable[Any]:
        """Of a rule that ``chooses``: the sites to measure each way of."""
        return ()

    def choosing(self, choices: Mapping[str, Any]) -> Rule[C]:
        """The same rule, with the way to take at each site, by its key."""
        return self

    def group(self, remark: Remark) -> str:
        """Sites of one group are kept or left together, as they measure."""
        return self.name if self.alike else f"{self.name} {remark.target}"

    def modes(self, model: nn.Module, applied: Sequence[Remark]) -> Mapping[str, Specialization]:
        """The training modes, by module path, that ``model`` must keep for what was applied."""
        return {}
