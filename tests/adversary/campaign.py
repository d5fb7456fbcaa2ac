"""A campaign: many seeds, each judged in a guarded process, failures shrunk and grouped."""

import collections
import dataclasses
import sys
import time
import traceback
import warnings
from typing import Any

import torch

from . import ops, workers
from .case import Call, Case
from .networks import network
from .oracle import FAULTS, Verdict, judge, run_alone
from .programs import program
from .shrinker import fingerprint, shrink

_MADE = {"program": program, "network": network}
_LIMIT = 30.0  # seconds a case may take
_SHRINKING = 40.0


@dataclasses.dataclass(frozen=True)
class Found:
    """One fault: the smallest case that shows it, and the seeds that met it."""

    verdict: Verdict
    case: Case
    seeds: list[str]

    def text(self) -> str:
        """Verdict, seeds and script, as Markdown."""
        kind, aspect = self.verdict.key
        seeds = ", ".join(self.seeds[:8]) + (" ..." if len(self.seeds) > 8 else "")
        return (
            f"## {kind}: {aspect}\n\n{self.verdict.detail}\n\n"
            f"Seeds ({len(self.seeds)}): {seeds}\n\n"
            f"```python\n{self.case.script()}```\n"
        )


@dataclasses.dataclass
class Outcome:
    """What a campaign found."""

    counts: dict[str, collections.Counter[str]]
    notes: collections.Counter[str]
    found: list[Found]
    seconds: float

    @property
    def cases(self) -> int:
        """How many cases were judged."""
        return sum(sum(counts.values()) for counts in self.counts.values())

    def table(self) -> str:
        """Counts by verdict."""
        lines = []
        for kind, counts in self.counts.items():
            parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
            lines.append(f"{kind}s: {sum(counts.values()):,}: {parts}")
        if self.notes:
            lines.append(
                "of these: " + ", ".join(f"{k} {n}" for k, n in sorted(self.notes.items()))
            )
        each = self.seconds / max(self.cases, 1)
        lines.append(f"{self.cases:,} cases in {self.seconds:,.0f} s, {each:.3f} s a case")
        return "\n".join(lines)


def prepare() -> None:
    """What every child would do again: one thread, the op database."""
    torch.set_num_threads(1)
    ops.database()
    for made in _MADE.values():
        judge_seed((made.__name__, 0))


def judge_seed(item: tuple[str, int]) -> tuple[Verdict, bool]:
    """The verdict of a seed, and whether the process is fit for another."""
    torch.set_num_threads(1)
    kind, seed = item
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            verdict = judge(_MADE[kind](seed))
        except Exception as error:  # the adversary's own fault, which is to be seen
            text = "".join(traceback.format_exception(error)[-3:])
            verdict = Verdict("broken", type(error).__name__, text)
    return verdict, verdict.kind != "changed" or verdict.aspect.startswith("model")


def _shrink_seed(item: tuple[str, int, Verdict]) -> tuple[Any, bool]:
    torch.set_num_threads(1)
    kind, seed, verdict = item
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrink(_MADE[kind](seed), verdict, seconds=_SHRINKING), False


def _dies_alone(item: tuple[str, int]) -> bool:
    """Whether the original takes the process with it, before anything is optimized."""
    ((_, _, why),) = workers.run(_run_seed_alone, [item], jobs=1, limit=_LIMIT)
    return why == "killed"


def _run_seed_alone(item: tuple[str, int]) -> tuple[None, bool]:
    kind, seed = item
    run_alone(_MADE[kind](seed))
    return None, False


def campaign(
    programs: int,
    networks: int,
    *,
    seed: int = 0,
    jobs: int = 1,
    shrunk: int = 3,
    lost: bool = False,
) -> Outcome:
    """Judge so many programs and networks from ``seed`` on, and shrink what failed.

    At most ``shrunk`` failures of one verdict are shrunk; the rest counts for the first of them.
    """
    prepare()
    items = [("program", seed + i) for i in range(programs)]
    items += [("network", seed + i) for i in range(networks)]
    counts = {kind: collections.Counter[str]() for kind in _MADE}
    notes = collections.Counter[str]()
    failures: dict[tuple[str, str], list[tuple[str, int, Verdict]]] = {}
    faults = (*FAULTS, "broken", *["lost"] * lost)
    start = time.monotonic()
    for item, verdict, why in workers.run(judge_seed, items, jobs=jobs, limit=_LIMIT):
        if why == "killed" and _dies_alone(item):
            verdict = Verdict("skipped", "torch dies of the original alone")
        verdict = verdict or Verdict("crash", why, f"{why} after {_LIMIT:.0f} s at most")
        name = verdict.kind
        if verdict.kind in ("refused", "skipped"):
            name += f" ({verdict.aspect})"
        counts[item[0]][name] += 1
        for note in {":".join(p[:25] for p in n.split(":")[:2]) for n in verdict.notes}:
            if not note.startswith("lenient"):
                notes[f"{item[0]}s, {note}"] += 1
        if verdict.kind in faults:  # said at once: a long run may be cut off
            print(*item, verdict.kind, verdict.aspect, verdict.detail, file=sys.stderr, flush=True)
            failures.setdefault(verdict.key, []).append((*item, verdict))
    seconds = time.monotonic() - start
    return Outcome(counts, notes, _grouped(failures, jobs, shrunk), seconds)


def _again(item: tuple[str, int, Verdict]) -> Case:
    """The case of a seed; an empty one where it cannot be made."""
    kind, seed, _ = item
    try:
        return _MADE[kind](seed)
    except Exception as error:
        return Case(f"{kind}{seed}", f"# {error}\n", "None", (), (), Call())


def _grouped(
    failures: dict[tuple[str, str], list[tuple[str, int, Verdict]]], jobs: int, shrunk: int
) -> list[Found]:
    groups: dict[str, Found] = {}
    first: dict[tuple[str, str], str] = {}
    todo = [failure for held in failures.values() for failure in held[:shrunk]]
    for item, result, _ in workers.run(
        _shrink_seed, todo, jobs=jobs, limit=3 * _SHRINKING + _LIMIT
    ):
        case, verdict = result or (_again(item), item[2])
        mark = fingerprint(case, verdict)
        found = groups.setdefault(mark, Found(verdict, case, []))
        found.seeds.append(f"{item[0]} {item[1]}")
        first.setdefault(verdict.key, mark)
    for key, held in failures.items():
        for kind, seed, _ in held[shrunk:]:
            if key in first:
                groups[first[key]].seeds.append(f"{kind} {seed}")
    return list(groups.values())
