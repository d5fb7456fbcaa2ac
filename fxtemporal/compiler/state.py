"""The request of one call of optimize, and its state between stages.

A :class:`State` never changes: each stage (:mod:`fxtemporal.compiler.stages`) makes another. Each
one holds the captured program, and the decisions on its sites: which to skip, and why; the form of
each Conv3d; the number of chunks of folded frames. A rewrite always starts from the captured
program, so that nothing is ever undone in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxtemporal.analysis.cost import Block, Costs, SiteCost
from fxtemporal.capture.arguments import Model
from fxtemporal.compiler.promises import Promises
from fxtemporal.factorization.settings import Factorize
from fxtemporal.ir.otherwise import Otherwise
from fxtemporal.ir.program import Program
from fxtemporal.passes.building.output_layouts import layout_of
from fxtemporal.passes.pipeline import Key, Outcome, Skip, run_rules
from fxtemporal.passes.rule import Remark, Rule
from fxtemporal.support.clock import Deadline
from fxtemporal.support.torch_private import pytree
from fxtemporal.tuning.cache import Cache, environment
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.settings import Tune
from fxtemporal.tuning.timing import Timing
from fxtemporal.verification.comparison import Comparison
from fxtemporal.verification.verifier import Verifier

__all__ = ["Example", "Lossy", "Request", "State"]

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """The arguments of one call of optimize; ``tune`` is None if nothing is measured."""

    model: Model
    example: Example | None = None
    rules: tuple[Rule[Any], ...] = ()
    factorize: Factorize | None = None
    tune: Tune | None = None
    verify: bool = False
    freeze: bool = False
    frames: tuple[int, int] | None = None
    promises: Promises = field(default_factory=Promises)
    tick: Callable[[str], None] = lambda stage: None
    otherwise: Callable[..., Otherwise] | None = None
    """Makes what the result runs at calls that a guard refuses; None: it raises an error."""
    captured: Program | None = None
    """The captured model, where that was done before."""
    is_part: bool = False
    """Whether the model is a part of another, whose Python may read how the outputs lie."""
    referee: Callable[[Races], Races] = lambda races: races
    """What decides races, made of what measures them: for tests, and for other ways to measure."""

    @property
    def original(self) -> nn.Module:
        return self.model.module() if isinstance(self.model, ExportedProgram) else self.model

    @property
    def is_lossy(self) -> bool:
        """Whether the result may give other numbers than the model."""
        return self.factorize is not None or any(not rule.exact for rule in self.rules)

    def settings(self) -> dict[str, Any]:
        """The settings for the report: all that differ from a default, and how to measure."""
        settings: dict[str, Any] = {"tune": "static" if self.tune is None else vars(self.tune)}
        if self.factorize is not None:
            settings["factorize"] = self.factorize.to_dict()
        if self.freeze:
            settings["freeze"] = True
        return settings | self.promises.to_dict()

    def verifier(self, original: nn.Module) -> Verifier:
        """A verifier that compares with ``original``, as strictly as was promised."""
        assert self.example is not None
        bitwise, confined = self.promises.bitwise, self.promises.confined
        return Verifier(original, self.example, bitwise=bitwise, confined=confined)

    def races(self) -> Races | None:
        """The timing on the device of the model or its inputs; None if nothing is measured."""
        if self.tune is None or self.example is None:
            return None
        given = [*self.original.parameters(), *pytree.tree_leaves(self.example)]
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        cache = Cache(self.tune.folder, environment(device, self.tune.target))
        return self.referee(Races(self.example, self.tune, cache, self.freeze))


@dataclass(frozen=True)
class Lossy:
    """The result of the lossy rules, which run first; later stages are compared with it."""

    remarks: tuple[tuple[Key, Remark], ...] = ()
    curve: tuple[tuple[float, float], ...] = ()
    changed: bool = False


@dataclass(frozen=True)
class State:
    """All that a stage knows and decides. ``outcome`` is the result of ``rules`` on ``captured``,
    without the sites in ``skips``.

    ``blocks`` are the costs of the captured program, ``prices`` the cost of each site, ``gains``
    its measured timing. ``deadline`` ends all measuring. ``result`` is set by the last stage.
    """

    request: Request
    captured: Program
    rules: tuple[Rule[Any], ...]
    verifier: Verifier | None = None
    races: Races | None = None
    deadline: Deadline = field(default_factory=lambda: Deadline(0.0))
    costs: Costs | None = None
    blocks: tuple[Block, ...] = ()
    lossy: Lossy = Lossy()
    skips: Mapping[Key, Skip] = field(default_factory=dict)
    outcome: Outcome | None = None
    comparison: Comparison | None = None
    timing: Timing | None = None
    prices: Mapping[Key, SiteCost | None] = field(default_factory=dict)
    gains: Mapping[Key, Timing] = field(default_factory=dict)
    result: fx.GraphModule | None = None

    def but(self, **changes: Any) -> State:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def rewritten(self) -> Outcome:
        assert self.outcome is not None, "nothing was rewritten yet"
        return self.outcome

    def rewrite(
        self,
        *,
        rules: tuple[Rule[Any], ...] | None = None,
        skips: Mapping[Key, Skip] | None = None,
        only: frozenset[Key] | None = None,
        costs: Costs | None = None,
    ) -> Outcome:
        """Run the rules on the captured program; this state does not change."""
        rules = self.rules if rules is None else rules
        skips = self.skips if skips is None else skips
        return run_rules(self.captured, rules, skips, only, costs)

    def with_captured(self, captured: Program) -> State:
        """A copy with another program, whose outputs must have the model's memory layout."""
        captured.exact_layouts = self.request.is_part
        captured.keeps_layouts = self.request.promises.layout == "same" or self.request.is_part
        if self.verifier is not None:
            captured.output_layouts = tuple(map(layout_of, self.verifier.outputs))
        return self.but(captured=captured)

    def compared(self, module: nn.Module) -> Comparison | None:
        """Compare ``module`` with the original; None if nothing is verified."""
        return None if self.verifier is None else self.verifier.compare(module)
