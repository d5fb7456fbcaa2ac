"""Measuring: is the rewritten network faster, on this device, at these shapes?

Two graphs are timed against each other in one process, turn by turn, so that both see the same
drift of the machine; the medians are compared. Rewrites are then tried without, a group at a time,
and a group that costs more than it gains is left out.
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
"""Seconds for one race of the network; slow ones take three rounds."""


@dataclass(frozen=True)
class Verdict:
    """What became of groups of rewrites: the final race of the ``network``, and races without a
    group against with it: those that it ``lost``, and so is left out, and what others gain.
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
    """Which groups of rewrites do not pay, and what each gains or costs.

    ``build(groups)`` gives the module with just those groups applied. From all of them, each group
    is left out in turn and stays out where the network is faster without it; if what remains does
    not beat the original, nothing stays. Groups that are ``sure`` were measured before, site by
    site: they are left out only if the network turns out slower with them. What an engine compiles
    twice runs faster once than the other time, so that there the network has to win by a margin,
    and again when both are compiled anew.
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
