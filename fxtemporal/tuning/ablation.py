"""Measures which rewrites make the network faster, on this device, at these shapes.

Two graphs are timed against each other in one process, in alternation, so that both see the same
drift of the machine; the medians are compared. Then each group of rewrites is left out in turn, and
a group that costs more than it gains stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxtemporal.support.clock import Deadline
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.timing import Timing

__all__ = ["Verdict", "worth_keeping"]

_LONGEST = 1.0
"""Most seconds for one race of the network; a slow network still takes three rounds."""


@dataclass(frozen=True)
class Verdict:
    """The result for groups of rewrites. ``network``: the timing of the final network.

    ``lost``: groups dropped, with their timing; ``gains``: groups kept, with theirs.
    """

    network: Timing
    lost: Mapping[str, Timing]
    gains: Mapping[str, Timing]


def worth_keeping(
    groups: Sequence[str],
    build: Callable[[frozenset[str]], nn.Module],
    races: Races,
    tick: Callable[[str], None],
    sure: frozenset[str] = frozenset(),
) -> Verdict:
    """Find the groups of rewrites that do not pay, and what each gains or costs.

    ``build(groups)`` gives the module with exactly those groups applied. Starting from all, each
    group is left out in turn, and stays out if the network is faster without it. If the rest does
    not beat the original, nothing is kept. Groups in ``sure`` were measured before, site by site:
    they are left out only if the network is slower with them. Two compilations of one module differ
    in speed, so a compiled network must win by a margin, and again after both are compiled again.
    """
    tune = races.tune
    margin = 0.0 if tune.target == "eager" else tune.margin
    deadline = Deadline(tune.seconds)
    share = tune.seconds / (2 * len(groups) + 2)
    kept = frozenset(groups)
    lost: dict[str, Timing] = {}
    gains: dict[str, Timing] = {}

    original, current = build(frozenset()), build(kept)

    def leave_out(some: Iterable[str]) -> None:
        nonlocal kept, current
        for group in some if len(groups) > 1 else ():
            if deadline.over:
                break
            tick(f"measuring without {group}")
            without = build(kept - {group})
            timing = races.race(without, current, min(share, _LONGEST))
            if timing.speedup < 1 - tune.margin:
                lost[group] = timing
                kept, current = kept - {group}, without
            else:
                gains[group] = timing

    leave_out(group for group in groups if group not in sure)
    tick("measuring the network")
    timing = races.race(original, current, min(share, _LONGEST))
    if not timing.wins(margin) and kept & sure:
        leave_out(group for group in groups if group in sure)
        timing = races.race(original, current, min(share, _LONGEST))
    if kept and tune.target != "eager" and timing.wins(margin):
        again = races.again(original, current, min(share, _LONGEST))
        timing = min(timing, again, key=lambda race: race.speedup)
    if kept and not timing.wins(margin):
        lost.update(dict.fromkeys(kept, timing))
        kept = frozenset()
    if len(kept) == 1:
        gains = dict.fromkeys(kept, timing)
    return Verdict(timing, lost, {group: gain for group, gain in gains.items() if group in kept})
