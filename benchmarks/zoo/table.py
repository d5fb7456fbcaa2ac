"""``python -m benchmarks zoo [--only NAME ...] [--save]``: every model of the zoo in a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measure import machine, machine_slug
from benchmarks.zoo.case import ZooCase
from benchmarks.zoo.outcome import PACKAGES, Outcome, cases

__all__ = ["main"]

RESULTS = Path(__file__).parent.parent / "results"
LIMIT = 240
"""Seconds for one model, with its build and all comparisons."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks zoo", description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of packages or models")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the outcomes to this file too")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args(arguments)
    wanted = [
        case
        for package in PACKAGES
        for case in cases(package)
        if not options.only or package in options.only or case.name in options.only
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(tqdm(pool.map(_outcome, wanted), total=len(wanted), disable=None))
    text = f"{_table(found)}\n\n{_summary(found)}"
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps([vars(outcome) for outcome in found], indent=1))
    if options.save:
        facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
        page = f"# The zoo\n\n`python -m benchmarks zoo --save`, see there.\n\n{facts}\n\n{text}\n"
        (RESULTS / f"zoo-{machine_slug(machine())}.md").write_text(page)
    return int(any(outcome.wrong or outcome.problem.startswith("fault") for outcome in found))


def _outcome(case: ZooCase) -> Outcome:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo.outcome"]
    try:
        done = subprocess.run(
            [*command, case.package, case.name],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env={**os.environ, "FXTEMPORAL_CACHE": os.devnull},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(case.package, case.name, problem=f"fault: more than {LIMIT} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return Outcome(case.package, case.name, problem=f"fault: {last[:200]}")
    return Outcome(**json.loads(lines[-1]))


def _table(found: Iterable[Outcome]) -> str:
    rows = [
        [
            outcome.package,
            outcome.name,
            f"{outcome.captured} ({outcome.frontend})" if outcome.frontend else outcome.captured,
            outcome.regions,
            f"{outcome.applied}/{outcome.missed}/{outcome.failed}",
            f"{outcome.seconds:.1f}",
            f"{outcome.audit_seconds:.1f}" if outcome.audit_seconds else "",
            f"{outcome.forward:.2f}",
            *(
                "" if error is None else f"{error:.0e}"
                for error in (outcome.example, outcome.batch, outcome.frames)
            ),
            outcome.refused or "",
            (outcome.wrong or outcome.problem)[:90],
        ]
        for outcome in found
    ]
    headers = [
        "package",
        "model",
        "captured",
        "regions",
        "applied/missed/failed",
        "optimize s",
        "audit s",
        "forward s",
        "error",
        "other batch",
        "other frames",
        "refused",
        "note",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _summary(found: Sequence[Outcome]) -> str:
    counts = Counter(outcome.captured for outcome in found)
    wrong = [f"{o.package} {o.name}" for o in found if o.wrong]
    faults = [f"{o.package} {o.name}" for o in found if o.problem.startswith("fault")]
    slow = [
        f"{o.package} {o.name} ({o.seconds:.0f} s)" for o in found if o.seconds > 5 + 20 * o.forward
    ]
    total = max(len(found), 1)
    return "\n".join(
        [
            f"{len(found)} models: {counts['whole']} whole ({counts['whole'] / total:.0%}), "
            f"{counts['parts']} in parts ({counts['parts'] / total:.0%}), {counts['no']} not.",
            f"Wrong: {len(wrong)}. {', '.join(wrong)}",
            f"Errors that are not fxtemporal's: {len(faults)}. {', '.join(faults)}",
            f"Slower than 5 s and 20 forwards: {len(slow)}. {', '.join(slow)}",
        ]
    )
