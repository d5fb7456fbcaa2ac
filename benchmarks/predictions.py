"""What an audit predicts, against what is measured: ``python -m benchmarks predictions``.

Each model is audited without measuring, then optimized with the same rewrites and timed against the
model in eager mode, interleaved. An audit is of use if it puts models in the right order: the table
ends with Spearman's rank correlation of the two, and with the median of their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxtemporal
from benchmarks.conv3d_models import CONV3D
from benchmarks.loop_models import LOOPS
from benchmarks.measure import interleaved, machine, machine_slug, speedup
from benchmarks.models import MODELS

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
CASES = {**MODELS, **LOOPS, **CONV3D}
LEFT_OUT = ("swin3d_t", "mvit_v1_b")
"""Nothing is rewritten in them without measuring."""


@torch.no_grad()
def _measured(name: str, budget: float) -> tuple[float, float, tuple[float, float, float]]:
    """Predicted gain, FLOPs, and the measured gain with its quartiles."""
    model, inputs = CASES[name].build(), CASES[name].inputs()
    report = fxtemporal.audit(model, inputs)
    fast = fxtemporal.optimize(model, inputs, tune="static")
    timings = interleaved(
        {"before": lambda: model(*inputs), "after": lambda: fast(*inputs)}, budget=budget
    )
    assert report.structure is not None
    gain = report.gain or 1.0
    flops = report.structure.cost_before.flops
    return gain, flops, speedup(timings["before"], timings["after"])


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda k: values[k])
    ranks = [0.0] * len(values)
    for rank, k in enumerate(order):
        ranks[k] = float(rank)
    return ranks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks predictions", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=None)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds to time each model")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    options = parser.parse_args(arguments)
    names = options.only or [name for name in CASES if name not in LEFT_OUT]
    found = {}
    with tqdm(names, disable=None, leave=False) as bar:
        for name in bar:
            bar.set_description(name)
            found[name] = _measured(name, options.budget)
    rows = [
        [
            name,
            f"{flops / 1e9:.3g}",
            f"{predicted:.2f}",
            f"{middle:.2f} ({low:.2f}–{high:.2f})",
            f"{predicted / middle:.2f}",
        ]
        for name, (predicted, flops, (low, middle, high)) in found.items()
    ]
    headers = ["model", "GFLOP", "predicted ×", "measured × (quartiles)", "predicted / measured"]
    environment = machine()
    parts = [
        "# What an audit predicts\n",
        __doc__.partition("\n\n")[2],
        "\n".join(f"- {key}: {value}" for key, value in environment.items()) + "\n",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n",
    ]
    if len(found) > 2:
        predicted = [entry[0] for entry in found.values()]
        measured = [entry[2][1] for entry in found.values()]
        ranks = statistics.correlation(_ranks(predicted), _ranks(measured))
        ratio = statistics.median(p / m for p, m in zip(predicted, measured, strict=True))
        parts.append(f"Rank correlation {ranks:.2f}; predicted / measured {ratio:.2f} (median).\n")
    text = "\n".join(parts)
    print(text)
    if options.save:
        (RESULTS / f"predictions-{machine_slug(environment)}.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
