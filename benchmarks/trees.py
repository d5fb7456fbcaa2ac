"""Two checkouts beside each other: ``python benchmarks/trees.py OLD --save``.

What a change costs: for every model of ``benchmarks.models``, the seconds of
``optimize(model, inputs, tune="static")`` and the milliseconds of a call of its result, with the
code in the folder OLD and with that of this one. Each runs in a process of its own; they take
turns, so that one waits while the other is timed. A ratio is new / old, paired by turn.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, cast

HERE = Path(__file__).resolve().parent.parent
TURNS, OPTIMIZED, TURN_SECONDS = 40, 5, 0.2


class Tree:
    """A process that runs the code in one folder."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(folder), "FXTEMPORAL_CACHE": os.devnull},
            text=True,
        )

    def ask(self, *words: object) -> float:
        """The number that the process answers with."""
        questions, answers = self._process.stdin, self._process.stdout
        print(*words, file=questions, flush=True)
        line = cast(IO[str], answers).readline()
        if not line:
            raise RuntimeError(f"the process ended at {words}")
        return float(line)


def work() -> None:
    """Answer what is asked on stdin: ``model NAME``, ``optimize``, ``calls COUNT``."""
    import torch

    import fxtemporal
    from benchmarks.models import MODELS

    model, inputs, result = torch.nn.Module(), (), torch.nn.Module()
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        start = time.perf_counter()
        if word == "model":
            model, inputs = MODELS[rest].build(), MODELS[rest].inputs()
        elif word == "optimize":
            result = fxtemporal.optimize(model, inputs, tune="static", progress=False)
        else:
            with torch.no_grad():
                for _ in range(int(rest)):
                    result(*inputs)
        print(time.perf_counter() - start, flush=True)


def ratios(old: Tree, new: Tree, *words: object, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of the old tree, and new / old; who goes first changes from turn to turn."""
    seconds, found = [], []
    for turn in range(turns):
        pair = (old, new) if turn % 2 else (new, old)
        took = {id(tree): tree.ask(*words) for tree in pair}
        seconds.append(took[id(old)])
        found.append(took[id(new)] / took[id(old)])
    return seconds, found


def compared(old: Tree, new: Tree, name: str) -> list[str]:
    """A line of the table."""
    for tree in (old, new):
        tree.ask("model", name)
        tree.ask("optimize")
        tree.ask("calls", 3)
    seconds, optimizing = ratios(old, new, "optimize", turns=OPTIMIZED)
    count = max(1, round(TURN_SECONDS / old.ask("calls", 1)))
    took, calling = ratios(old, new, "calls", count, turns=TURNS)
    line = [name, f"{statistics.median(seconds):.2f}", _spread(optimizing)]
    return [*line, f"{1e3 * statistics.median(took) / count:.3f}", _spread(calling)]


def _spread(values: list[float]) -> str:
    lower, middle, upper = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({lower:.3f}–{upper:.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a folder with an older checkout")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--save", type=Path, help="write the table to this file")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from tabulate import tabulate

    from benchmarks.measure import machine
    from benchmarks.models import MODELS

    trees = Tree(options.old.resolve()), Tree(HERE)
    headers = ["model", "optimize s, old", "new / old", "call ms, old", "new / old (quartiles)"]
    lines = []
    for name in options.only or MODELS:
        lines.append(compared(*trees, name))
        print(*lines[-1], flush=True)
    table = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    print(table)
    if options.save:
        about = [f"- {key}: {value}" for key, value in machine().items()]
        about.append(f"- date: {datetime.date.today()}")
        title = "# What a change costs\n\n`python benchmarks/trees.py OLD --save FILE`, see there."
        text = "\n".join([title, "", *about, "", table, ""])
        options.save.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        sys.exit(main())
