"""Races whose outcome a test decides: nothing is run, and nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxtemporal import Tune
from fxtemporal.compiler.stages import run
from fxtemporal.compiler.state import Request
from fxtemporal.passes.selection import passes_of
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.timing import Timing

__all__ = ["Referee", "refereed", "won_by"]


def won_by(times: float) -> Timing:
    """A race that the second wins by so many times; below 1, the first does."""
    return Timing(1.0, 1.0 / times, times, times, times, 5)


class Referee:
    """Decides races as it is told; what it is not told of is measured.

    Args:
        race: two networks to how many times as fast the second is.
        times: a name to milliseconds, for networks that are timed together.
        forms: a form and a layout to milliseconds; then no network wins by its layout.
        large: bytes that leave every cache.
    """

    def __init__(
        self,
        race: Callable[[Any, Any], float] | None = None,
        times: Callable[[str], float] | None = None,
        forms: Callable[[str, str], float] | None = None,
        large: int = Races.large,
    ) -> None:
        self.race, self.times, self.forms, self.large = race, times, forms, large
        self.raced = 0
        self.measured: list[str] = []
        """Each layer whose forms were asked for, in which layout."""

    def __call__(self, races: Races) -> Races:
        return _Decided(races, self)


class _Decided(Races):
    def __init__(self, races: Races, referee: Referee) -> None:
        super().__init__(races.inputs, races.tune, races.cache, races.frozen)
        self.referee, self.large = referee, referee.large

    def raced(self, before: nn.Module, after: nn.Module, seconds: float) -> Timing:
        self.referee.raced += 1
        race = self.referee.race
        return (
            super().raced(before, after, seconds) if race is None else won_by(race(before, after))
        )

    def wins(self, one: nn.Module, other: nn.Module) -> bool:
        return self.referee.forms is None and super().wins(one, other)

    def interleaved(self, modules: Mapping[str, nn.Module], always: str) -> dict[str, float]:
        times = self.referee.times
        if times is None:
            return super().interleaved(modules, always)
        return {name: times(name) for name in modules}

    def form_times(
        self, site: Any, forms: Iterable[str], layout: str, target: str
    ) -> dict[str, float]:
        decide = self.referee.forms
        if decide is None:
            return super().form_times(site, forms, layout, target)
        self.referee.measured.append(f"{site.key} {layout}")
        return {form: decide(form, layout) for form in forms}

    def copy_time(self, like: Tensor) -> float:
        return super().copy_time(like) if self.referee.forms is None else 0.01


def refereed(
    referee: Callable[[Races], Races],
    model: nn.Module,
    inputs: tuple[Any, ...],
    tune: Tune | None,
    passes: Sequence[Any] | None = None,
    **settings: Any,
) -> fx.GraphModule:
    """``fxtemporal.optimize``, with ``referee`` in the place of its clock."""
    example = inputs, dict[str, Any]()
    asked = {"tune": tune, "verify": True, "referee": referee} | settings
    return run(Request(model, example, passes_of(passes), **asked))
