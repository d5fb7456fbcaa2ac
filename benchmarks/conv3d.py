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
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxtemporal
from benchmarks.conv3d_models import CONV3D
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
from fxtemporal.engines import ENGINES, compile_with, reset, versions

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
SLOWEST = 0.98
ERROR_TIMES = 4.0
LEAST_ERROR = 4e-6
"""In float32, an error up to this is rounding, whatever the model's own."""

BEFORE, AFTER = "model", "optimized"


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

    def ratio(self, engine: str) -> tuple[float, float, float] | None:
        """How many times faster the optimized model is on this engine: quartiles."""
        pair = [self.timings.get((engine, variant)) for variant in (BEFORE, AFTER)]
        return None if pair[0] is None or pair[1] is None else speedup(pair[0], pair[1])

    def best_peer(self) -> tuple[str, float] | None:
        """The fastest engine but eager mode on the model as it is, and its milliseconds."""
        peers = {
            engine: timing.median
            for (engine, variant), timing in self.timings.items()
            if engine != "eager" and variant == BEFORE
        }
        return min(peers.items(), key=lambda peer: peer[1], default=None)

    def broken(self) -> list[str]:
        found = []
        for engine in {engine for engine, _ in self.timings}:
            ratio = self.ratio(engine)
            if ratio is not None and ratio[1] < SLOWEST:
                found.append(f"{self.name}, {engine}: {ratio[1]:.2f}x, below {SLOWEST}x")
            own, mine = self.errors.get((engine, BEFORE)), self.errors.get((engine, AFTER))
            if own is None or mine is None:
                continue
            if not mine <= max(ERROR_TIMES * own, LEAST_ERROR):
                found.append(f"{self.name}, {engine}: error {mine:.1e}, its own is {own:.1e}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "input": list(self.shape),
            "milliseconds": {" ".join(k): t.to_dict() for k, t in self.timings.items()},
            "speedup": {e: self.ratio(e) for e in dict.fromkeys(e for e, _ in self.timings)},
            "relative_error": {" ".join(k): error for k, error in self.errors.items()},
            "compile_seconds": {" ".join(k): s for k, s in self.compile_seconds.items()},
            "optimize_seconds": self.optimize_seconds,
            "forms": self.forms,
            "layers": self.layers,
            "notes": self.notes,
            "broken": self.broken(),
        }


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
                    compiled = compile_with(engine, module, inputs)
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


# -- tables ----------------------------------------------------------------------------------------


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return "not measured"
    low, high = timing.spread
    return f"{timing.median:.1f} ({low:.1f}–{high:.1f})"


def _times(results: Sequence[Result]) -> tuple[list[list[str]], list[str]]:
    lines = []
    for result in results:
        peer = result.best_peer()
        for engine in dict.fromkeys(engine for engine, _ in result.timings):
            ratio = result.ratio(engine)
            mine = result.timings.get((engine, AFTER))
            lines.append(
                [
                    result.name,
                    engine,
                    _cell(result.timings.get((engine, BEFORE))),
                    _cell(mine),
                    "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})",
                    "" if peer is None or mine is None else f"{peer[1] / mine.median:.2f}",
                    "" if peer is None else peer[0],
                ]
            )
    headers = ["model", "engine", "as it is", "optimized", "speed-up", "over best peer", "which is"]
    return lines, headers


def _details(results: Sequence[Result]) -> tuple[list[list[str]], list[str]]:
    lines = []
    for result in results:
        for engine, seconds in result.optimize_seconds.items():
            errors = [result.errors.get((engine, v)) for v in (BEFORE, AFTER)]
            forms = ", ".join(f"{n} {form}" for form, n in sorted(result.forms[engine].items()))
            lines.append(
                [
                    result.name,
                    engine,
                    *("—" if error is None else f"{error:.1e}" for error in errors),
                    *(f"{taken:.1f}" for taken in seconds),
                    *[""] * (2 - len(seconds)),
                    forms.replace("conv3d_", ""),
                ]
            )
    headers = ["model", "target", "error as it is", "error optimized", "optimize s", "from cache s"]
    return lines, [*headers, "applied"]


def _layers(results: Sequence[Result]) -> tuple[list[list[str]], list[str]]:
    """Each layer once, however many models have it; the fastest form in bold."""
    layers = {key: figures for result in results for key, figures in result.layers.items()}
    forms = dict.fromkeys(name for figures in layers.values() for name in sorted(figures))
    names = [*dict.fromkeys(form.partition(" of rank")[0] for form in forms)]
    lines = []
    for key, figures in layers.items():
        plain = {form.partition(" of rank")[0]: ms for form, ms in figures.items()}
        best = min(plain, key=lambda form: plain[form])
        cells = [f"{plain[form]:.2f}" if form in plain else "" for form in names]
        cells[names.index(best)] = f"**{plain[best]:.2f}**"
        lines.append([key.removeprefix("conv3d ").removesuffix(" eager"), *cells])
    return lines, ["layer", *(name.removeprefix("conv3d_") for name in names)]


def _mean(results: Sequence[Result]) -> str:
    ratios = [ratio[1] for r in results if (ratio := r.ratio("eager")) is not None]
    if not ratios:
        return ""
    mean, least = statistics.geometric_mean(ratios), min(ratios)
    return f"Eager mode: geometric mean {mean:.2f}x over {len(ratios)} models, least {least:.2f}x."


def _markdown(results: Sequence[Result], environment: dict[str, Any]) -> str:
    parts = ["# Networks of 3-D convolutions\n", __doc__.split("\n\n")[1] + "\n"]
    parts.append("\n".join(f"- {key}: {value}" for key, value in environment.items()) + "\n")
    for title, (lines, headers) in (
        ("Milliseconds a call", _times(results)),
        ("Errors, seconds of optimize, and what was applied", _details(results)),
        ("Milliseconds of each form on each layer, eager mode", _layers(results)),
    ):
        table = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
        parts.append(f"## {title}\n\n{table}\n")
    parts.append(_mean(results) + "\n")
    notes = [note for result in results for note in result.notes]
    if notes:
        parts.append("## Not measured\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.conv3d", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(CONV3D), help="these models")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--skip", nargs="+", metavar="MODEL/ENGINE", default=[])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time each model")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was measured here")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    return parser.parse_args(arguments)


def _broken(results: Iterable[Result]) -> list[str]:
    return [text for result in results for text in result.broken()]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    environment = {**machine(), "torchvision": version("torchvision")}
    environment |= versions(options.engines)
    environment["device with a GPU"] = "not measured"
    results: list[Result] = []
    names = list(CONV3D) if options.only is None else options.only
    with tqdm(names, disable=None, leave=False) as bar:
        for name in bar:
            tick = partial(_describe, bar, name)
            results.append(
                run_case(CONV3D[name], options.engines, options.skip, options.budget, tick)
            )
            if options.json:
                content = {"environment": environment, "models": [r.to_dict() for r in results]}
                options.json.write_text(json.dumps(content, indent=1))
            if options.save:  # after each model: all of them take more than an hour
                path = RESULTS / f"conv3d-{machine_slug(environment)}.md"
                path.write_text(_markdown(results, environment))
    print(_markdown(results, environment))
    for line in _broken(results):
        print(f"broken: {line}", file=sys.stderr)
    return 1 if _broken(results) else 0


def _describe(bar: tqdm[Any], name: str, stage: str) -> None:
    bar.set_description(f"{name}: {stage}")


if __name__ == "__main__":
    sys.exit(main())
