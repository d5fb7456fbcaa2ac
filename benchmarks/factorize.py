"""The lossy factorization of a trained network: ``python -m benchmarks.factorize``.

A C3D-style network that reads moving handwritten digits (``benchmarks.digits``, trained once by
``benchmarks.train_digits``) is cut to shares of its floating-point operations, without any
training: by the plain SVD of the weight, every layer to the same fraction of its rank; by a budget
that the layers share; and by that with 512 clips of calibration data. Accuracy is that on digits
which were never trained on. Milliseconds are those of the original and of the network at half its
FLOPs, optimized for the engine, in turn in one process: medians, and the ratio of the rounds with
its quartiles.

The exit status is 1 if more accuracy is lost than is promised.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fxtemporal
from benchmarks.digits import accuracy, clips, trained
from benchmarks.measure import Timing, interleaved, machine, machine_slug, speedup
from examples.finetune import SHARE, cut, distil
from fxtemporal import Factorize, Tune
from fxtemporal.tuning.engines import ENGINES, compile_with

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
SHARES = (0.5, 0.36, 0.26, 0.2)
PROMISED = {0.5: 0.005, 0.36: 0.010}
"""Accuracy that may be lost without training, by share of the FLOPs."""
PROMISED_FINETUNED = 0.010
CLIPS = (8, 32)
"""At a time, where milliseconds are measured."""

Rows = list[list[str]]


def flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def factorized(model: nn.Module, x: Tensor, **asked: Any) -> nn.Module:
    return fxtemporal.optimize(model, (x,), factorize=Factorize(**asked), passes=[], tune="static")


def same_fraction(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """Every layer by plain SVD, at the largest fraction of its rank that leaves ``share``."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        middle = (low + high) / 2
        tried = factorized(model, x, rank=middle)
        if flops(tried, x) <= share * flops(model, x):
            low, best = middle, tried
        else:
            high = middle
    if best is None:
        raise SystemExit(f"no fraction of the rank leaves {share} of the FLOPs")
    return best


def lossy(net: nn.Module, options: argparse.Namespace) -> tuple[Rows, list[str]]:
    """Accuracy of each way to cut at each share; and which promise is broken."""
    test = clips(options.clips, seed=1, held_out=True)
    data, x = clips(512, seed=2)[0], test[0][: CLIPS[0]]
    whole, before = accuracy(net, *test), flops(net, x)
    rows, broken = [["as it is", "1.00", f"{100 * whole:.2f}", ""]], []

    def add(how: str, model: nn.Module, promised: float | None) -> None:
        right = accuracy(model, *test)
        left = f"{flops(model, x) / before:.2f}"
        rows.append([how, left, f"{100 * right:.2f}", f"{100 * (right - whole):+.2f}"])
        if promised is not None and whole - right > promised:
            broken.append(f"{how}, {left} of the FLOPs: {100 * (whole - right):.2f} points lost")

    for share in tqdm(SHARES, disable=None, leave=False):
        add("plain SVD, each layer alike", same_fraction(net, x, share), None)
        add("a budget, by the weights", factorized(net, x, flops=share), None)
        with_data = factorized(net, x, flops=share, calibration=data.split(32))
        add("a budget, with data", with_data, PROMISED.get(share))
    if options.finetune:
        student = cut(net, data, SHARE)
        distil(student, net, clips(6400, seed=3)[0], epochs=4)
        add("a budget, with data, fine-tuned", student, PROMISED_FINETUNED)
    return rows, broken


def milliseconds(net: nn.Module, engines: Sequence[str]) -> Rows:
    """Of the original and of half of it on each engine, all interleaved, for so many clips."""
    return [row for count in CLIPS for row in _milliseconds(net, engines, count)]


def _milliseconds(net: nn.Module, engines: Sequence[str], count: int) -> Rows:
    data = clips(512, seed=2)[0]
    x, settings = data[:count], Factorize(flops=0.5, calibration=data.split(32))
    calls: dict[tuple[str, str], Any] = {}
    with torch.no_grad():
        for engine in engines:
            half = fxtemporal.optimize(
                net,
                (x,),
                factorize=settings,
                tune=Tune(target=engine),
                freeze=engine != "eager",
            )
            for name, model in (("as it is", copy.deepcopy(net)), ("half of the FLOPs", half)):
                calls[engine, name] = partial(compile_with(ENGINES[engine], model, (x,)).run, x)
        found = interleaved({" ".join(key): call for key, call in calls.items()}, 200, budget=30.0)
    timings: dict[tuple[str, str], Timing] = {key: found[" ".join(key)] for key in calls}
    rows = []
    for (engine, name), timing in timings.items():
        low, middle, high = speedup(timings[engine, "as it is"], timing)
        ratio = f"{middle:.2f} ({low:.2f}–{high:.2f})"
        rows.append([str(count), engine, name, f"{timing.median:.2f}", ratio])
    return rows


def _markdown(content: dict[str, Any]) -> str:
    parts = ["# Factorizing a trained network\n", __doc__.split("\n\n")[1] + "\n"]
    for part, headers in (
        ("Accuracy", ["how", "FLOPs left", "accuracy %", "points"]),
        ("Milliseconds a call", ["clips", "engine", "network", "ms", "speed-up"]),
    ):
        if part not in content:
            continue
        machine_of, rows = content[part]["environment"], content[part]["rows"]
        listed = "\n".join(f"- {key}: {value}" for key, value in machine_of.items())
        table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        parts.append(f"## {part}\n\n{listed}\n\n{table}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.factorize", description=__doc__.split("\n")[0]
    )
    engines = [*ENGINES]
    parser.add_argument("--engines", nargs="+", choices=engines, default=["eager", "inductor"])
    parser.add_argument("--clips", type=int, default=3000, help="of the test")
    parser.add_argument("--finetune", action="store_true", help="run examples.finetune as well")
    parser.add_argument("--part", choices=("accuracy", "time"), help="default: both")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write to benchmarks/results, where the other part stays as it was measured",
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    net, broken = trained(), list[str]()
    environment = {**machine(), "device with a GPU": "not measured"}
    path = RESULTS / f"factorize-{machine_slug(environment)}.json"
    content = json.loads(path.read_text()) if options.save and path.exists() else {}
    if options.part != "time":
        rows, broken = lossy(net, options)
        seen = {**environment, "test clips": options.clips}
        content["Accuracy"] = {"environment": seen, "rows": rows}
    if options.part != "accuracy":
        rows = milliseconds(net, options.engines)
        content["Milliseconds a call"] = {"environment": environment, "rows": rows}
    print(_markdown(content))
    if options.save:
        path.write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(_markdown(content))
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
