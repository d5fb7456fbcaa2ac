"""Chooses the number of chunks of folded frames, and the loops to leave unfolded.

With a memory limit, only candidates that fit count: each region of folded frames in 1, 2, 4, ... T
chunks. If no number of chunks fits, loops are left unfolded. Without a limit, chunks are tried for
regions too large for every cache, and for loops that did not pay when folded in one piece. The
fastest candidate wins; if the time for measuring is over, the one with the fewest chunks that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fxtemporal.analysis.peak_memory import peak
from fxtemporal.analysis.row_regions import Region, regions_of
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.fold_in_chunks import FoldInChunks
from fxtemporal.passes.pipeline import run_rules
from fxtemporal.support.clock import Deadline
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.timing import Timing

__all__ = ["ChunkChooser", "Chunking", "sized"]

_AT_ONCE = 3
"""How many numbers of chunks are timed together, in addition to the best so far."""

_MOST_SECONDS = 0.3
"""Most seconds for one race."""


@dataclass(frozen=True)
class Chunking:
    """A choice: the loops ``left`` unfolded, and the number of ``chunks`` of each region.

    ``why`` has a reason for each loop left, and for each region in one piece. ``bytes`` is the
    estimated peak, ``program`` the resulting program.
    """

    left: frozenset[str]
    chunks: Mapping[str, int]
    program: Program
    bytes: int
    why: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.program.gm

    @property
    def rule(self) -> FoldInChunks:
        """The rule that makes the chunks."""
        return FoldInChunks(self.chunks)


class ChunkChooser:
    """Finds the :class:`Chunking` for one model.

    Args:
        build: makes the rewritten program with the loops of the given groups left unfolded.
        loops: every group of loops that may be folded.
        slow: the groups that were measured, and did not pay when folded in one piece.
        races: times modules on the example, with the settings in ``tune``.
        deadline: the end of measuring.
        tick: called with the name of each step.
    """

    def __init__(
        self,
        build: Callable[[frozenset[str]], Program],
        loops: Sequence[str],
        slow: frozenset[str],
        races: Races,
        deadline: Deadline,
        tick: Callable[[str], None],
    ) -> None:
        self.build = build
        self.loops = loops
        self.slow = slow
        self.races = races
        self.tune = races.tune
        self.deadline = deadline
        self.tick = tick

    def choose(self) -> Chunking:
        self.tick("estimating memory")
        best = self._fitting()
        if not self._fits(best):
            return best
        best = self._tuned(best)
        for loop in sorted(best.left & self.slow):
            best = self._brought_back(best, loop)
        folded = frozenset(self.loops) - best.left
        if self.tune.limit is not None and folded and any(n > 1 for n in best.chunks.values()):
            best = self._against_loops(best, folded)
        return best

    # candidates that fit

    def _fitting(self) -> Chunking:
        """The first that fits: all profitable loops folded; all but one; none."""
        chosen = self._smallest(self.slow)
        if self._fits(chosen):
            return chosen
        folded = [loop for loop in self.loops if loop not in self.slow]
        reason = self._above(chosen)
        attempts = [frozenset((loop,)) for loop in folded] if len(folded) > 1 else []
        for more in (*attempts, frozenset(folded)):
            chosen = replace(self._smallest(self.slow | more), why=dict.fromkeys(more, reason))
            if self._fits(chosen):
                break
        return chosen

    def _above(self, choice: Chunking) -> Reason:
        most = max(choice.chunks.values(), default=1)
        pieces = f"in {most} chunks" if most > 1 else "in one piece"
        text = (
            f"with its frames folded, and run {pieces}, a call holds {sized(choice.bytes)} at its "
            f"peak by estimate; the limit is {sized(self.tune.limit or 0)}"
        )
        return Reason(Code.MEMORY_LIMIT, text)

    def _smallest(self, left: frozenset[str]) -> Chunking:
        """With these loops left, the fewest chunks that fit; if none fit, the lowest peak."""
        program = self.build(left)
        regions = [
            r for r in regions_of(program) if self.tune.limit is not None or self._large(program, r)
        ]
        choice = Chunking(left, {region.key: 1 for region in regions}, program, peak(program).bytes)
        whole = choice
        for region in (*regions, *regions):
            for count in _counts(region):
                if self._fits(choice):
                    break
                if count > choice.chunks[region.key]:
                    fewer = self._with(whole, {**choice.chunks, region.key: count})
                    choice = min(choice, fewer, key=lambda c: c.bytes)
        for region in regions if self._fits(choice) else ():
            for count in _counts(region):
                if count < choice.chunks[region.key]:
                    fewer = self._with(whole, {**choice.chunks, region.key: count})
                    if self._fits(fewer):
                        choice = fewer
        return choice

    def _large(self, program: Program, region: Region) -> bool:
        return _bytes(program, region) > self.races.large

    def _with(self, whole: Chunking, chunks: Mapping[str, int]) -> Chunking:
        """``whole``, whose regions run in one piece, with regions split into ``chunks``."""
        rule = FoldInChunks({key: count for key, count in chunks.items() if count > 1})
        program = run_rules(whole.program, (rule,)).program
        return replace(whole, chunks=dict(chunks), program=program, bytes=peak(program).bytes)

    def _fits(self, choice: Chunking) -> bool:
        return self.tune.limit is None or choice.bytes <= self.tune.limit

    # the fastest candidate

    def _tuned(self, best: Chunking) -> Chunking:
        """The fastest number of chunks for each region, the largest first.

        Once a region gains nothing, smaller ones are not tried.
        """
        if not best.chunks:
            return best
        whole = replace(best, program=self.build(best.left))
        regions = {region.key: region for region in regions_of(whole.program)}
        held = {key: _bytes(whole.program, regions[key]) for key in best.chunks}
        why = dict(best.why)
        lost = None
        for key in sorted(held, key=lambda key: -held[key]):
            if lost is not None:
                if best.chunks[key] == 1:
                    why[key] = lost
                continue
            wanted = (
                held[key] / self.races.large
            )  # so that each chunk is about as large as the cache
            least = max(best.chunks[key] + 1, min(wanted, regions[key].frames))
            counts = [count for count in _counts(regions[key]) if count >= least]
            times: dict[str, float] = {}
            before = best
            while counts and not self.deadline.over:
                fewest, tried, counts = best, counts[:_AT_ONCE], counts[_AT_ONCE:]
                trials = [self._with(whole, {**best.chunks, key: count}) for count in tried]
                named = {str(t.chunks[key]): t for t in (fewest, *trials) if self._fits(t)}
                self.tick("measuring chunks")
                always = str(fewest.chunks[key])
                times = self.races.times({n: t.module for n, t in named.items()}, always)
                if times and (count := self._fewest(times)) != always:
                    best = named[count]
                if best.chunks[key] != tried[-1]:
                    break
            if best.chunks[key] == 1:
                why[key] = _in_one_piece(times)
            if best is before and times:
                text = "a larger one was no faster in more chunks"
                lost = Reason(Code.NOT_FASTER, f"it runs in one piece: {text}")
        return replace(best, why=why)

    def _fewest(self, times: Mapping[str, float]) -> str:
        """The fewest chunks whose time is within the margin of the fastest."""
        enough = min(times.values()) * (1 + self.tune.margin)
        return min((count for count, ms in times.items() if ms <= enough), key=int)

    def _brought_back(self, best: Chunking, loop: str) -> Chunking:
        """``best``, with ``loop`` folded in chunks if that is faster; in one piece it was not."""
        trial = self._smallest(best.left - {loop})
        if not trial.chunks or not self._fits(trial):
            return best
        trial = self._tuned(trial)
        if all(count == 1 for count in trial.chunks.values()):
            return best
        timing = self._race(best, trial)
        return trial if timing is not None and timing.speedup > 1 + self.tune.margin else best

    def _against_loops(self, best: Chunking, folded: frozenset[str]) -> Chunking:
        loops = self._smallest(best.left | folded)
        if not self._fits(loops):
            return best
        self.tick("measuring chunks against the loop")
        timing = self.races.race(loops.module, best.module, self._seconds())  # even with no time
        if timing.speedup > 1:
            return best
        text = f"{timing.before:.3g} ms as a loop, {timing.after:.3g} ms in chunks that fit"
        return replace(loops, why=dict.fromkeys(folded, Reason(Code.NOT_FASTER, text)))

    def _race(self, one: Chunking, other: Chunking) -> Timing | None:
        """The timing of the two; None if the time is over."""
        if (seconds := self._seconds()) == 0:
            return None
        self.tick("measuring chunks")
        return self.races.race(one.module, other.module, seconds)

    def _seconds(self) -> float:
        return min(self.deadline.left, _MOST_SECONDS)


def _counts(region: Region) -> Iterator[int]:
    """1, 2, 4, ... and T."""
    count = 1
    while count < region.frames:
        yield count
        count *= 2
    yield region.frames


def _bytes(program: Program, region: Region) -> int:
    return peak(program, among=set(region.nodes)).bytes


def _in_one_piece(times: Mapping[str, float]) -> Reason:
    whole, chunks = times.get("1"), {count: ms for count, ms in times.items() if count != "1"}
    if whole is None or not chunks:
        return Reason(Code.NOT_MEASURED, "it runs in one piece: the time for measuring was over")
    best = min(chunks, key=lambda count: chunks[count])
    text = f"{whole:.3g} ms in one piece, {chunks[best]:.3g} ms in {best} chunks"
    return Reason(Code.NOT_FASTER, text)


def sized(number: int) -> str:
    """A number of bytes as text: ``1.5 MiB``."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"
