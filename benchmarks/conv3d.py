"""Networks of 3-D convolutions on every engine: ``python -m benchmarks.conv3d``.

Each model of ``benchmarks.conv3d_models`` runs as it is and after ``fxtemporal.optimize``, on eager
PyTorch, Inductor, OpenVINO and ONNX Runtime, all interleaved in one process. For each engine the
model is optimized with that engine as the target. The tables give milliseconds and their ratios,
errors against float64, seconds of ``optimize`` (cold, and once more from its cache), and what each
form takes on each layer. What an engine refuses is "not measured".

The exit status is 1 if an optimized model is slower than 0.98 of the model on the same engine, or
its error is more than 4 times the model's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fxtemporal
from benchmarks.conv3d_models import CONV3D
from benchmarks.conv3d_tables import AFTER, BEFORE, markdown
from benchmarks.loop_runs import reason, settle
from benchmarks.measure import (
    Timing,
    interleaved,
    machine,
    machine_slug,
    relative_error,
    speedup,
)
from benchmarks.models import Case
from fxtemporal.tuning.engines import ENGINES, compile_with, reset, versions

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
ABOUT = """\
Each model of `benchmarks.conv3d_models` runs as it is and after `fxtemporal.optimize`, on eager
PyTorch, Inductor (with freezing), OpenVINO and ONNX Runtime, all interleaved in one process; for
each engine the model is optimized with that engine as the target. float32, medians with their
quartiles; the speed-up is that of the rounds. Errors are max|a−b| / max|b| against eager mode in
float64."""
SLOWEST = 0.98
ERROR_TIMES = 4.0
LEAST_ERROR = 4e-6
"""In float32, an error up to this is rounding, whatever the model's own."""


@dataclass
class Result:
    """What was measured for one model, by (engine, variant)."""

    name: str
    shape: tuple[int, ...]
    timings: dict[tuple[str, str], Timing] = field(default_factory=dict)
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    compile_seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    optimize_seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Cold, and for eager mode once more from the cache."""
    forms: dict[str, dict[str, int]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Milliseconds of each form, by layer and layout, in eager mode."""
    notes: list[str] = field(default_factory=list)
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}")

    def ratio(self, engine: str) -> tuple[float, float, float] | None:
        """How many times faster the optimized model is on this engine: quartiles."""
        pair = [self.timings.get((engine, variant)) for variant in (BEFORE, AFTER)]
        return None if pair[0] is None or pair[1] is None else speedup(pair[0], pair[1])

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "date": self.date,
            "input": list(self.shape),
            "milliseconds": {" ".join(k): t.to_dict() for k, t in self.timings.items()},
            "speedup": {e: self.ratio(e) for e in dict.fromkeys(e for e, _ in self.timings)},
            "relative_error": {" ".join(k): error for k, error in self.errors.items()},
            "compile_seconds": {" ".join(k): s for k, s in self.compile_seconds.items()},
            "optimize_seconds": self.optimize_seconds,
            "forms": self.forms,
            "layers": self.layers,
            "notes": self.notes,
        }


def broken(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record, a sentence each.

    Where nothing was applied, the ratio is that of one graph compiled twice: it counts for nothing.
    """
    found = []
    for engine, ratio in record["speedup"].items():
        middle = ratio[len(ratio) // 2] if ratio else None
        if middle is not None and middle < SLOWEST and record["forms"].get(engine):
            found.append(f"{record['name']}, {engine}: {middle:.2f}x, below {SLOWEST}x")
        own, mine = (record["relative_error"].get(f"{engine} {v}") for v in (BEFORE, AFTER))
        if own is not None and mine is not None and not mine <= max(ERROR_TIMES * own, LEAST_ERROR):
            found.append(f"{record['name']}, {engine}: error {mine:.1e}, its own is {own:.1e}")
    return found


def _optimized(
    model: nn.Module, inputs: tuple[Any, ...], engine: str, cache: Path, result: Result
) -> nn.Module:
    tune = fxtemporal.Tune(target=engine, cache=cache)
    seconds = []
    for _ in ("cold", "from the cache") if engine == "eager" else ("cold",):
        start = time.perf_counter()
        fast = fxtemporal.optimize(model, inputs, tune=tune, freeze=engine != "eager")
        seconds.append(time.perf_counter() - start)
    result.optimize_seconds[engine] = tuple(seconds)
    forms: dict[str, int] = {}
    for remark in fxtemporal.report(fast).remarks:
        if remark.status == "applied":
            name = str(remark.detail.get("form", remark.rule))
            forms[name] = forms.get(name, 0) + 1
    result.forms[engine] = forms
    return fast


@torch.no_grad()
def run_case(
    case: Case, engines: Sequence[str], skip: Sequence[str], budget: float, tick: Any
) -> Result:
    """Measure one model on all engines, as it is and optimized, in one interleaved run."""
    model, inputs = case.build(), case.inputs()
    result = Result(case.name, tuple(inputs[0].shape))
    reset()
    calls: dict[tuple[str, str], Callable[..., Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for engine in engines:
            if f"{case.name}/{engine}" in skip:
                result.notes.append(f"{case.name}, {engine}: left out with --skip")
                continue
            try:
                tick(f"optimizing for {engine}")
                fast = _optimized(model, inputs, engine, Path(cache), result)
                for variant, module in ((BEFORE, model), (AFTER, fast)):
                    tick(f"compiling, {engine}, {variant}")
                    compiled = compile_with(ENGINES[engine], module, inputs)
                    calls[engine, variant] = compiled.run
                    result.compile_seconds[engine, variant] = compiled.seconds
            except Exception as error:  # an engine may raise anything on what it does not know
                result.notes.append(f"{case.name}, {engine}: {reason(error)}")
        for path in Path(cache).iterdir():
            figures = json.loads(path.read_text())["milliseconds"]
            result.layers |= {k: v for k, v in figures.items() if k.endswith("eager")}
    tick("reference")
    reference = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    functions: dict[str, Callable[[], object]] = {}
    for key, call in calls.items():
        result.errors[key] = relative_error(call(*inputs), reference)
        functions.setdefault(f"before {key[0]}", settle)
        functions[" ".join(key)] = partial(call, *inputs)
    tick("timing")
    timings = interleaved(functions, rounds=40, budget=budget)
    result.timings = {key: timings[" ".join(key)] for key in calls}
    return result


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.conv3d", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(CONV3D), help="these models")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--skip", nargs="+", metavar="MODEL/ENGINE", default=[])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time each model")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="with --save: models that benchmarks/results has stay as they were measured then",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    environment = {**machine(), "torchvision": version("torchvision")}
    environment |= versions(ENGINES[name] for name in options.engines)
    environment["device with a GPU"] = "not measured"
    path = RESULTS / f"conv3d-{machine_slug(environment)}.json"
    records: dict[str, dict[str, Any]] = {}
    if options.keep and path.exists():
        records = {record["name"]: record for record in json.loads(path.read_text())["models"]}
    names = list(CONV3D) if options.only is None else options.only
    with tqdm([name for name in names if name not in records], disable=None, leave=False) as bar:
        for name in bar:
            tick = partial(_describe, bar, name)
            result = run_case(CONV3D[name], options.engines, options.skip, options.budget, tick)
            records[name] = result.to_dict()
            records = {name: records[name] for name in CONV3D if name in records}
            if options.save:  # after each model: all of them take more than an hour
                _write(path, [*records.values()], environment)
    print(markdown([*records.values()], environment, ABOUT))
    found = [text for record in records.values() for text in broken(record)]
    for line in found:
        print(f"broken: {line}", file=sys.stderr)
    return 1 if found else 0


def _write(path: Path, records: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    content = {"environment": environment, "models": records}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(records, environment, ABOUT))


def _describe(bar: tqdm[Any], name: str, stage: str) -> None:
    bar.set_description(f"{name}: {stage}")


if __name__ == "__main__":
    sys.exit(main())
