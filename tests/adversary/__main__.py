"""``python -m tests.adversary --programs 2000 --networks 1000 --seed 0 --jobs 2 --save FILE``."""

import argparse
import datetime
import sys
from pathlib import Path

from .campaign import Found, campaign, prepare
from .networks import network
from .oracle import FAULTS, judge
from .programs import program
from .shrinker import shrink


def main() -> int:
    """Exit code 1 where a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversary", description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the first seed of both")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--shrunk", type=int, default=3, help="failures shrunk of one verdict")
    parser.add_argument("--lost", action="store_true", help="count lost Python state as a fault")
    parser.add_argument("--save", type=Path, help="append seeds, counts and faults to this file")
    parser.add_argument("--show", metavar="KIND:SEED", help="print one case and its verdict")
    given = parser.parse_args()
    if given.show:
        prepare()
        kind, seed = given.show.split(":")
        case = {"program": program, "network": network}[kind](int(seed))
        print(case.script(), *case.calls, sep="\n")
        verdict = judge(case)
        print(verdict)
        if verdict.kind in FAULTS:
            case, verdict = shrink(case, verdict)
            print(case.script(), case, verdict, sep="\n")
        return 0
    outcome = campaign(
        given.programs,
        given.networks,
        seed=given.seed,
        jobs=given.jobs,
        shrunk=given.shrunk,
        lost=given.lost,
    )
    for found in outcome.found:
        print(found.text())
    print(outcome.table())
    if given.save:
        _save(given.save, given, outcome.table(), outcome.found)
    return 1 if outcome.found else 0


def _save(path: Path, given: argparse.Namespace, table: str, found: list[Found]) -> None:
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    last = given.seed + max(given.programs, given.networks) - 1
    lines = [f"# {now}, seeds {given.seed} to {last}", "", table, "", f"{len(found)} faults", ""]
    lines += [entry.text() for entry in found]
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
