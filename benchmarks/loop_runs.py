"""One loop over time on every engine: as written, optimized, and batched by hand.

::

    result = run_case(LOOPS["lstm_cell"], engines=("eager", "openvino"))
    result.ratio("eager", "loop", "optimized")     # quartiles of how many times faster
    result.broken()                                # what is wrong with it, a sentence each
    result.notes                                   # what was not measured, and why
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fxtemporal
from benchmarks.loop_models import small_cnn_lstm
from benchmarks.measure import Timing, interleaved, relative_error, speedup
from benchmarks.memory import peak_of_call
from benchmarks.models import Case
from fxtemporal.tuning.engines import ENGINES, Compiled, Engine, compile_with, reset

__all__ = ["VARIANTS", "Cell", "Result", "Scaling", "reason", "run_case", "run_scaling", "settle"]

VARIANTS = ("loop", "optimized", "by hand")
SLOWEST = 0.97
LARGEST_ERROR = 1e-5

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


def settle() -> None:
    """Wait until no engine's threads spin any more."""
    time.sleep(_SETTLE)


def reason(error: Exception) -> str:
    """An error in one line: its type, and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _variants(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], result: Result) -> Any:
    """The modules to measure by variant; notes it where ``optimize`` refuses the model."""
    assert case.hand_batched is not None
    variants = {"loop": model, "by hand": case.hand_batched(model).eval()}
    start = time.perf_counter()
    try:
        variants["optimized"] = fxtemporal.optimize(model, inputs, progress=False)
        result.optimize_seconds = time.perf_counter() - start
    except fxtemporal.FxTemporalError as error:
        result.notes.append(f"{result.name}, optimize: {reason(error)}")
    return {variant: variants[variant] for variant in VARIANTS if variant in variants}


def _compiled(
    variants: Mapping[str, nn.Module],
    engines: Sequence[Engine],
    inputs: tuple[Tensor, ...],
    result: Result,
    skip: Collection[str],
    targets: bool,
    tick: Tick,
) -> dict[tuple[str, str], Compiled]:
    """Each variant on each engine, as far as engines are there and manage; the rest is noted."""
    compiled = {}
    for engine in engines:
        name = engine.name
        if f"{result.name}/{name}" in skip:
            result.notes.append(f"{result.name}, {name}: left out with --skip")
            continue
        for variant, module in variants.items():
            tick(f"compiling, {name}, {variant}")
            try:
                if targets and variant == "optimized" and name != "eager":
                    tune = fxtemporal.Tune(target=name)
                    module = fxtemporal.optimize(variants["loop"], inputs, tune=tune)
                compiled[name, variant] = compile_with(engine, module, inputs)
            except ImportError as error:
                result.notes.append(f"{name}: not installed ({error})")
                break
            except Exception as error:  # an engine may raise anything on what it does not know
                result.notes.append(f"{result.name}, {name}, {variant}: {reason(error)}")
    return compiled


def _timed(
    compiled: Mapping[tuple[str, str], Compiled],
    inputs: tuple[Tensor, ...],
    rounds: int,
    budget: float,
) -> dict[tuple[str, str], Timing]:
    """All of them in one interleaved run, with a pause wherever the engine changes."""
    functions: dict[str, Callable[[], object]] = {}
    for engine, variant in compiled:
        functions.setdefault(f"before {engine}", settle)
        functions[f"{engine}, {variant}"] = partial(compiled[engine, variant].run, *inputs)
    functions["at the end"] = settle
    timings = interleaved(functions, rounds=rounds, budget=budget)
    return {key: timings[", ".join(key)] for key in compiled}


def _error(compiled: Compiled, inputs: tuple[Tensor, ...], reference: Tensor) -> float:
    try:
        return relative_error(compiled.run(*inputs), reference)
    except ValueError:  # of another shape, and therefore wrong
        return math.inf


def _measure_memory(variants: Mapping[str, nn.Module], inputs: Any, result: Result) -> None:
    for variant, module in variants.items():
        try:
            result.memory[variant] = peak_of_call(module, inputs)
        except Exception as error:  # not Linux, a graph that cannot be pickled, a child killed
            result.notes.append(f"{result.name}, memory, {variant}: {reason(error)}")


@torch.no_grad()
def run_case(
    case: Case,
    engines: Sequence[Engine] = tuple(ENGINES.values()),
    rounds: int = 100,
    budget: float = 60.0,
    memory: bool = True,
    skip: Collection[str] = (),
    targets: bool = False,
    tick: Tick = lambda stage: None,
) -> Result:
    """Measure one model: all variants on all engines, in one interleaved run.

    ``skip`` names what to leave out, as ``"model/engine"``. With ``targets``, the model is
    optimized for each engine anew, and measured on it. ``tick`` is told of each stage.
    """
    model, inputs = case.build(), case.inputs()
    shapes = tuple(tuple(x.shape) for x in inputs)
    result = Result(case.name, shapes, tuple(engine.name for engine in engines))
    reset()
    tick("optimizing")
    variants = _variants(case, model, inputs, result)
    if memory:
        tick("memory")
        _measure_memory(variants, inputs, result)
    compiled = _compiled(variants, engines, inputs, result, skip, targets, tick)
    tick("reference")
    reference = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    errors = {key: _error(made, inputs, reference) for key, made in compiled.items()}
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
    case, first = small_cnn_lstm("scaling", frames), small_cnn_lstm("first", 2)
    model, inputs = case.build(), case.inputs()
    fxtemporal.optimize(model, first.inputs(), progress=False)  # what only a first call takes
    seconds = {}
    for tune in ("static", "measure"):
        start = time.perf_counter()
        fxtemporal.optimize(model, inputs, tune=tune, progress=False)
        seconds[tune] = time.perf_counter() - start
    return Scaling(frames, seconds["measure"], seconds["static"])
