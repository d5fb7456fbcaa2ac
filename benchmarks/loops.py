"""Loops over time on every engine: ``python -m benchmarks.loops``.

Each model of ``benchmarks.loop_models`` is measured three ways: the loop as written, after
``fxtemporal.optimize``, and batched by hand; each on eager PyTorch, Inductor, OpenVINO and ONNX
Runtime, all of them interleaved in one process. The tables give milliseconds and their ratios, the
errors against float64, the seconds until each engine's first result, and the memory of one eager
call. An engine that is not installed, or that fails on a model, is "not measured", with a note.

``--scaling`` adds the time that ``optimize`` itself takes as the loop grows; ``--only`` without a
name measures no model, which leaves that table alone.

The exit status is 1 if an optimized loop is slower than the loop in eager mode, or a result is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxtemporal
from benchmarks.engines import ENGINES, Compiled, compile_with, reset, versions
from benchmarks.loop_models import LOOPS, small_cnn_lstm
from benchmarks.measure import (
    Timing,
    interleaved,
    machine,
    machine_slug,
    relative_error,
    speedup,
)
from benchmarks.memory import peak_of_call
from benchmarks.models import Case

__all__ = ["VARIANTS", "Cell", "Result", "main", "run_case", "run_scaling"]

VARIANTS = ("loop", "optimized", "by hand")
SLOWEST = 0.97
LARGEST_ERROR = 1e-5
SCALING = (16, 64, 256, 1024)
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"

# Threads of one engine go on spinning for some milliseconds after its call: let them fall asleep.
_SETTLE = 0.01

Tick = Callable[[str], object]


@dataclass(frozen=True)
class Cell:
    """One variant of a model on one engine."""

    timing: Timing
    error: float
    compile_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "milliseconds": self.timing.to_dict(),
            "relative_error": self.error,
            "compile_seconds": self.compile_seconds,
        }


@dataclass
class Result:
    """What was measured for one model. What is missing was not measured; ``notes`` say why."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    engines: tuple[str, ...]
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    optimize_seconds: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, engine: str, before: str, after: str) -> tuple[float, float, float] | None:
        """How many times faster ``after`` is than ``before``: lower quartile, median, upper."""
        first, second = self.cells.get((engine, before)), self.cells.get((engine, after))
        if first is None or second is None:
            return None
        return speedup(first.timing, second.timing)

    def broken(self) -> list[str]:
        """What is wrong with this model, a sentence each."""
        found = []
        if self.optimize_seconds is None:
            found.append("cannot be optimized")
        ratio = self.ratio("eager", "loop", "optimized")
        if ratio is not None and ratio[1] < SLOWEST:
            found.append(f"runs at {ratio[1]:.2f}x in eager mode, less than {SLOWEST}x")
        for (engine, variant), cell in self.cells.items():
            if not cell.error <= LARGEST_ERROR:
                found.append(
                    f"{engine}, {variant}: relative error {cell.error:.1e}, "
                    f"above {LARGEST_ERROR:.0e}"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inputs": [list(shape) for shape in self.shapes],
            "engines": {engine: self._engine_to_dict(engine) for engine in self.engines},
            "optimize_seconds": self.optimize_seconds,
            "peak_bytes": self.memory,
            "notes": self.notes,
            "broken": self.broken(),
        }

    def _engine_to_dict(self, engine: str) -> dict[str, Any]:
        content: dict[str, Any] = {
            variant: self.cells[engine, variant].to_dict()
            for variant in VARIANTS
            if (engine, variant) in self.cells
        }
        content["loop / optimized"] = self.ratio(engine, "loop", "optimized")
        content["optimized / by hand"] = self.ratio(engine, "optimized", "by hand")
        return content


def _reason(error: Exception) -> str:
    """An error in one line: its type, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:200]}"


def _variants(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], result: Result) -> Any:
    """The modules to measure by variant; notes it where ``optimize`` refuses the model."""
    assert case.hand_batched is not None
    variants = {"loop": model, "by hand": case.hand_batched(model).eval()}
    start = time.perf_counter()
    try:
        variants["optimized"] = fxtemporal.optimize(model, inputs, progress=False)
        result.optimize_seconds = time.perf_counter() - start
    except fxtemporal.FxTemporalError as error:
        result.notes.append(f"{result.name}, optimize: {_reason(error)}")
    return {variant: variants[variant] for variant in VARIANTS if variant in variants}


def _compiled(
    variants: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    result: Result,
    skip: Collection[str],
    tick: Tick,
) -> dict[tuple[str, str], Compiled]:
    """Each variant on each engine, as far as engines are there and manage; the rest is noted."""
    compiled = {}
    for engine in result.engines:
        if f"{result.name}/{engine}" in skip:
            result.notes.append(f"{result.name}, {engine}: left out with --skip")
            continue
        for variant, module in variants.items():
            tick(f"compiling, {engine}, {variant}")
            try:
                compiled[engine, variant] = compile_with(engine, module, inputs)
            except ImportError as error:
                result.notes.append(f"{engine}: not installed ({error})")
                break
            except Exception as error:  # an engine may raise anything on what it does not know
                result.notes.append(f"{result.name}, {engine}, {variant}: {_reason(error)}")
    return compiled


def _timed(
    compiled: Mapping[tuple[str, str], Compiled],
    inputs: tuple[Tensor, ...],
    rounds: int,
    budget: float,
) -> dict[tuple[str, str], Timing]:
    """All of them in one interleaved run, with a pause wherever the engine changes."""
    pause = partial(time.sleep, _SETTLE)
    functions: dict[str, Callable[[], object]] = {}
    for engine, variant in compiled:
        functions.setdefault(f"before {engine}", pause)
        functions[f"{engine}, {variant}"] = partial(compiled[engine, variant].run, *inputs)
    functions["at the end"] = pause
    timings = interleaved(functions, rounds=rounds, budget=budget)
    return {key: timings[", ".join(key)] for key in compiled}


def _measure_memory(variants: Mapping[str, nn.Module], inputs: Any, result: Result) -> None:
    for variant, module in variants.items():
        try:
            result.memory[variant] = peak_of_call(module, inputs)
        except Exception as error:  # not Linux, a graph that cannot be pickled, a child killed
            result.notes.append(f"{result.name}, memory, {variant}: {_reason(error)}")


@torch.no_grad()
def run_case(
    case: Case,
    engines: Sequence[str] = tuple(ENGINES),
    rounds: int = 100,
    budget: float = 60.0,
    memory: bool = True,
    skip: Collection[str] = (),
    tick: Tick = lambda stage: None,
) -> Result:
    """Measure one model: all variants on all engines, in one interleaved run.

    ``skip`` names what to leave out, as ``"model/engine"``. ``tick`` is told of each stage.
    """
    model, inputs = case.build(), case.inputs()
    result = Result(case.name, tuple(tuple(x.shape) for x in inputs), tuple(engines))
    reset()
    tick("optimizing")
    variants = _variants(case, model, inputs, result)
    if memory:
        tick("memory")
        _measure_memory(variants, inputs, result)
    compiled = _compiled(variants, inputs, result, skip, tick)
    tick("reference")
    reference = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    errors = {key: relative_error(made.run(*inputs), reference) for key, made in compiled.items()}
    tick("timing")
    for key, timing in _timed(compiled, inputs, rounds, budget).items():
        result.cells[key] = Cell(timing, errors[key], compiled[key].seconds)
    return result


@dataclass(frozen=True)
class Scaling:
    """Seconds that ``optimize`` takes on a loop over ``frames`` frames."""

    frames: int
    measured: float
    static: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


def run_scaling(frames: int) -> Scaling:
    """Time ``optimize`` on the small CNN, with the result measured as well, and without."""
    case = small_cnn_lstm("scaling", frames)
    model, inputs = case.build(), case.inputs()
    seconds = {}
    for tune in ("static", "measure"):
        start = time.perf_counter()
        fxtemporal.optimize(model, inputs, tune=tune, progress=False)
        seconds[tune] = time.perf_counter() - start
    return Scaling(frames, seconds["measure"], seconds["static"])


def _tabulate(lines: Iterable[list[str]], headers: list[str], left: int, style: str) -> str:
    """A table whose first ``left`` columns are words."""
    align = ("left",) * left + ("right",) * (len(headers) - left)
    return tabulate(list(lines), headers, tablefmt=style, colalign=align, disable_numparse=True)


def _milliseconds(cell: Cell | None) -> str:
    if cell is None:
        return NOT_MEASURED
    lower, upper = cell.timing.spread
    return f"{cell.timing.median:.2f} ({lower:.2f}–{upper:.2f})"


def _ratio(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})"


def _times(results: Sequence[Result], style: str) -> str:
    def lines() -> Iterator[list[str]]:
        for result in results:
            for engine in result.engines:
                yield [
                    result.name,
                    engine,
                    *(_milliseconds(result.cells.get((engine, name))) for name in VARIANTS),
                    _ratio(result.ratio(engine, "loop", "optimized")),
                    _ratio(result.ratio(engine, "optimized", "by hand")),
                ]

    headers = ["model", "engine", *(f"ms {name}" for name in VARIANTS)]
    return _tabulate(lines(), [*headers, "loop / optimized", "optimized / by hand"], 2, style)


def _errors_and_compiling(results: Sequence[Result], style: str) -> str:
    def lines() -> Iterator[list[str]]:
        for result in results:
            for engine in result.engines:
                cells = [result.cells.get((engine, name)) for name in VARIANTS]
                yield [
                    result.name,
                    engine,
                    *("" if cell is None else f"{cell.error:.1e}" for cell in cells),
                    *("" if cell is None else f"{cell.compile_seconds:.1f}" for cell in cells),
                ]

    headers = ["model", "engine", *(f"error {name}" for name in VARIANTS)]
    return _tabulate(lines(), [*headers, *(f"first s {name}" for name in VARIANTS)], 2, style)


def _models(results: Sequence[Result], style: str) -> str:
    def peak(result: Result, variant: str) -> str:
        found = result.memory.get(variant)
        return "" if found is None else f"{found / 2**20:.0f}"

    lines = (
        [
            result.name,
            ", ".join("×".join(map(str, shape)) for shape in result.shapes),
            "failed" if result.optimize_seconds is None else f"{result.optimize_seconds:.1f}",
            *(peak(result, name) for name in VARIANTS),
        ]
        for result in results
    )
    headers = ["model", "input", "optimize s", *(f"peak MiB {name}" for name in VARIANTS)]
    return _tabulate(lines, headers, 2, style)


def _scaling_table(scaling: Sequence[Scaling], style: str) -> str:
    lines = (
        [
            str(row.frames),
            f"{row.measured:.2f}",
            f"{row.static:.2f}",
            f"{row.static / row.frames * 1e3:.2f}",
        ]
        for row in scaling
    )
    headers = ["T", "optimize s", "optimize s, tune=static", "ms a frame, tune=static"]
    return _tabulate(lines, headers, 0, style)


def _tables(results: Sequence[Result], scaling: Sequence[Scaling], style: str) -> dict[str, str]:
    """The tables by title, those that have rows."""
    tables = {}
    if results:
        tables["Milliseconds a call"] = _times(results, style)
        tables["Errors, and seconds to the first result"] = _errors_and_compiling(results, style)
        tables["Optimizing, and the memory of one eager call"] = _models(results, style)
    if scaling:
        tables["Optimizing the small CNN + LSTM over T frames"] = _scaling_table(scaling, style)
    return tables


def _notes(results: Sequence[Result]) -> list[str]:
    """Each note once: an engine that is not installed has one for every model."""
    return list(dict.fromkeys(note for result in results for note in result.notes))


def _broken(results: Sequence[Result]) -> list[str]:
    return [f"{result.name}: {text}" for result in results for text in result.broken()]


def _environment(engines: Sequence[str]) -> dict[str, Any]:
    return {**machine(), "torchvision": version("torchvision"), **versions(engines)}


_ABOUT = """\
`python -m benchmarks.loops --save`, float32, all engines on torch's number of threads. Milliseconds
are medians with quartiles of one interleaved run a model; ratios are paired by round, with their
quartiles: above 1, the second is the faster. Errors are max|a−b| / max|b| against the loop in
float64. *First s* is the time from the module to its first result, with empty caches: conversion,
compilation and one call. The peak is what one eager call adds to a process that holds the model."""


def _save(
    results: Sequence[Result], scaling: Sequence[Scaling], environment: dict[str, Any]
) -> Path:
    path = RESULTS / f"loops-{machine_slug(environment)}.md"
    lines = ["# Loops over time", "", _ABOUT, ""]
    lines += [*(f"- {key}: {value}" for key, value in environment.items()), ""]
    for title, table in _tables(results, scaling, "github").items():
        lines += [f"## {title}", "", table, ""]
    for title, texts in (("Not measured", _notes(results)), ("Broken", _broken(results))):
        if texts:
            lines += [f"## {title}", "", *(f"- {text}" for text in texts), ""]
    RESULTS.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    _write_json(path.with_suffix(".json"), results, scaling, environment)
    return path


def _write_json(
    path: Path,
    results: Sequence[Result],
    scaling: Sequence[Scaling],
    environment: dict[str, Any],
) -> None:
    content = {
        "environment": environment,
        "cases": [result.to_dict() for result in results],
        "scaling": [row.to_dict() for row in scaling],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", choices=list(LOOPS), metavar="NAME", default=None)
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), metavar="NAME", default=list(ENGINES)
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        choices=[f"{name}/{engine}" for name in LOOPS for engine in ENGINES],
        metavar="MODEL/ENGINE",
        default=[],
        help="leave out what takes too long to compile: sliding_windows/inductor",
    )
    parser.add_argument("--rounds", type=int, default=100, help="at most, for each model")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time each model")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--scaling", action="store_true", help="time optimize itself as T grows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was measured here")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    return parser.parse_args(arguments)


def _describe(bar: tqdm[Any], name: str, stage: str) -> None:
    bar.set_description(f"{name}: {stage}")


def _measured(options: argparse.Namespace) -> tuple[list[Result], list[Scaling]]:
    names = list(LOOPS) if options.only is None else options.only
    lengths = SCALING if options.scaling else ()
    results, scaling = [], []
    with tqdm(total=len(names) + len(lengths), disable=None, leave=False) as bar:
        for name in names:
            results.append(
                run_case(
                    LOOPS[name],
                    options.engines,
                    options.rounds,
                    options.budget,
                    memory=not options.no_memory,
                    skip=options.skip,
                    tick=partial(_describe, bar, name),
                )
            )
            bar.update()
        for frames in lengths:
            bar.set_description(f"optimizing T={frames}")
            scaling.append(run_scaling(frames))
            bar.update()
    return results, scaling


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    results, scaling = _measured(options)
    environment = _environment(options.engines)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    for title, table in _tables(results, scaling, "simple").items():
        print(f"\n{title}\n\n{table}")
    for note in _notes(results):
        print(f"{NOT_MEASURED}: {note}")
    if options.json:
        _write_json(options.json, results, scaling, environment)
    if options.save:
        print(f"saved to {_save(results, scaling, environment)}")
    broken = _broken(results)
    for text in broken:
        print(f"broken: {text}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
