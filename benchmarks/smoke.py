"""Every model of ``benchmarks.models``, before and after: ``python -m benchmarks.smoke``.

One table: milliseconds, their ratio, the error of both against float64, and the convolutions that
were executed. The exit status is 1 if a case breaks: a loop that still runs more convolutions than
the same model batched by hand, a model that became slower, or a result that is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxtemporal
from benchmarks.measure import (
    CountConvolutions,
    Timing,
    interleaved,
    machine,
    machine_slug,
    relative_error,
    speedup,
)
from benchmarks.models import MODELS, Case

__all__ = ["Row", "main", "run_case"]

SLOWEST = 0.97
LARGEST_ERROR = 1e-5
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """What was measured for one case. Convolutions are those executed in one call."""

    name: str
    loops: bool
    before: Timing
    after: Timing
    error_before: float
    error_after: float
    convolutions_before: int
    convolutions_after: int
    convolutions_by_hand: int | None
    optimize_seconds: float

    @property
    def speedup(self) -> tuple[float, float, float]:
        return speedup(self.before, self.after)

    def broken(self) -> list[str]:
        """What is wrong with this case, a sentence each."""
        found = []
        if self.loops and self.convolutions_after != self.convolutions_by_hand:
            found.append(
                f"executes {self.convolutions_after} convolutions, "
                f"batched by hand {self.convolutions_by_hand}"
            )
        if self.speedup[1] < SLOWEST:
            found.append(f"runs at {self.speedup[1]:.2f}x, less than {SLOWEST}x")
        if not self.error_after < LARGEST_ERROR:
            found.append(f"relative error {self.error_after:.1e}, not below {LARGEST_ERROR:.0e}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "milliseconds": {"before": self.before.to_dict(), "after": self.after.to_dict()},
            "speedup": dict(zip(("lower", "median", "upper"), self.speedup, strict=True)),
            "relative_error": {"before": self.error_before, "after": self.error_after},
            "convolutions": {
                "before": self.convolutions_before,
                "after": self.convolutions_after,
                "by_hand": self.convolutions_by_hand,
            },
            "optimize_seconds": self.optimize_seconds,
            "broken": self.broken(),
        }


def _convolutions(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with CountConvolutions() as convolutions:
        model(*inputs)
    return convolutions.count


def _errors(
    model: nn.Module, optimized: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[float, float]:
    reference = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    return (
        relative_error(model(*inputs), reference),
        relative_error(optimized(*inputs), reference),
    )


@torch.no_grad()
def run_case(case: Case, rounds: int = 200, budget: float = 8.0) -> Row:
    """Optimize one model and measure it against the original."""
    model, inputs = case.build(), case.inputs()
    start = time.perf_counter()
    optimized = fxtemporal.optimize(model, inputs)
    seconds = time.perf_counter() - start
    by_hand = case.hand_batched(model) if case.hand_batched else None
    error_before, error_after = _errors(model, optimized, inputs)
    timings = interleaved(
        {"before": lambda: model(*inputs), "after": lambda: optimized(*inputs)},
        rounds=rounds,
        budget=budget,
    )
    return Row(
        name=case.name,
        loops=case.loops,
        before=timings["before"],
        after=timings["after"],
        error_before=error_before,
        error_after=error_after,
        convolutions_before=_convolutions(model, inputs),
        convolutions_after=_convolutions(optimized, inputs),
        convolutions_by_hand=_convolutions(by_hand, inputs) if by_hand else None,
        optimize_seconds=seconds,
    )


def _table(rows: Sequence[Row], style: str) -> str:
    def line(row: Row) -> list[object]:
        lower, ratio, upper = row.speedup
        by_hand = row.convolutions_by_hand
        return [
            row.name,
            f"{row.before.median:.2f}",
            f"{row.after.median:.2f}",
            f"{ratio:.2f} ({lower:.2f}–{upper:.2f})",
            f"{row.error_before:.1e}",
            f"{row.error_after:.1e}",
            row.convolutions_before,
            row.convolutions_after,
            "" if by_hand is None else by_hand,
            f"{row.optimize_seconds:.1f}",
        ]

    headers = [
        "model",
        "ms before",
        "ms after",
        "ratio (quartiles)",
        "error before",
        "error after",
        "convs before",
        "convs after",
        "by hand",
        "optimize s",
    ]
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(
        [line(row) for row in rows],
        headers,
        tablefmt=style,
        colalign=align,
        disable_numparse=True,
    )


def _broken(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name}: {text}" for row in rows for text in row.broken()]


def _environment() -> dict[str, Any]:
    return {**machine(), "torchvision": version("torchvision")}


def _save(rows: Sequence[Row], environment: dict[str, Any]) -> Path:
    path = RESULTS / f"smoke-{machine_slug(environment)}.md"
    lines = [
        "# Smoke benchmark",
        "",
        "`python -m benchmarks.smoke --save`, eager mode, float32. Milliseconds are medians of one",
        "interleaved run; the ratio is before / after, paired by round, with its quartiles. Errors",
        "are max|a−b| / max|b| against the original in float64. Convolutions are those executed in",
        "one call; *by hand* is the same model with its frames folded by hand.",
        "",
        *(f"- {key}: {value}" for key, value in environment.items()),
        "",
        _table(rows, "github"),
        "",
    ]
    if broken := _broken(rows):
        lines += ["Broken:", "", *(f"- {text}" for text in broken), ""]
    RESULTS.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    _write_json(path.with_suffix(".json"), rows, environment)
    return path


def _write_json(path: Path, rows: Sequence[Row], environment: dict[str, Any]) -> None:
    content = {"environment": environment, "cases": [row.to_dict() for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="NAME", default=None)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was measured here")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--rounds", type=int, default=200, help="at most, for each model")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds to time each model")
    options = parser.parse_args(arguments)

    environment = _environment()
    rows = []
    with tqdm(options.only or list(MODELS), disable=None, leave=False) as names:
        for name in names:
            names.set_description(name)
            rows.append(run_case(MODELS[name], options.rounds, options.budget))

    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print(_table(rows, "simple"))
    if options.json:
        _write_json(options.json, rows, environment)
    if options.save:
        print(f"saved to {_save(rows, environment)}")
    broken = _broken(rows)
    for text in broken:
        print(f"broken: {text}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
