"""Times a model before and after ``optimize``, on every installed engine, in one run.

::

    found = bench(model, (clip,), ["eager", "openvino"])
    print(found)                # milliseconds, their ratio with its quartiles, the error
    found.plot("bench.png")

For each engine the model is optimized with that engine as the target. All are then timed in turn,
with a pause between engines, since an engine's threads may spin for a while after a call.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxtemporal.api import optimize
from fxtemporal.ir.stand_in import StandIn, own_inputs, stand_in
from fxtemporal.reports.plots import draw_bars
from fxtemporal.support.errors import FxTemporalError, PassError
from fxtemporal.tuning.engines import ENGINES, compile_with, reset, versions
from fxtemporal.tuning.settings import Tune
from fxtemporal.tuning.side_by_side import Durations, interleaved, speedup
from fxtemporal.verification.comparison import relative_error

__all__ = ["Bench", "EngineBench", "bench"]

BEFORE, AFTER = "model", "optimized"
_SETTLE = 0.02
"""Seconds after which no engine's threads spin any more."""


@dataclass
class EngineBench:
    """One engine: milliseconds of the model before and after, and the error of each.

    Errors are max|a−b| / max|b| against the model in float64; None if it does not run in float64.
    ``note`` says why something was not measured.
    """

    engine: str
    before: Durations | None = None
    after: Durations | None = None
    errors: tuple[float | None, float | None] = (None, None)
    note: str = ""

    @property
    def speedup(self) -> tuple[float, float, float] | None:
        """The speed-up: lower quartile, median, upper quartile over the rounds."""
        if self.before is None or self.after is None:
            return None
        return speedup(self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "milliseconds": {
                "before": None if self.before is None else self.before.to_dict(),
                "after": None if self.after is None else self.after.to_dict(),
            },
            "speedup": self.speedup,
            "relative_error": {"before": self.errors[0], "after": self.errors[1]},
            "note": self.note,
        }


@dataclass(frozen=True)
class Bench:
    """The measurements on each engine, and the environment."""

    engines: tuple[EngineBench, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "environment": dict(self.environment),
            "engines": [found.to_dict() for found in self.engines],
        }

    def __str__(self) -> str:
        rows = []
        for found in self.engines:
            low, middle, high = found.speedup or (None, None, None)
            rows.append(
                [
                    found.engine,
                    _milliseconds(found.before),
                    _milliseconds(found.after),
                    "" if middle is None else f"{middle:.2f} ({low:.2f}–{high:.2f})",
                    *("" if error is None else f"{error:.1e}" for error in found.errors),
                ]
            )
        headers = ["engine", "ms before", "ms after", "times as fast", "error before", "after"]
        lines = [tabulate(rows, headers, disable_numparse=True)]
        lines += [f"{found.engine}: {found.note}" for found in self.engines if found.note]
        lines.append(", ".join(f"{key} {value}" for key, value in self.environment.items()))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw milliseconds before and after, a pair of bars per engine.

        Args:
            path: a ``.png`` or ``.svg`` file.

        Raises:
            FxTemporalError: nothing was measured, or Matplotlib is not installed.
        """
        measured = [f for f in self.engines if f.before is not None and f.after is not None]
        if not measured:
            raise FxTemporalError("nothing was measured on both sides: there is nothing to plot")
        draw_bars(
            {
                found.engine: (found.before.median, found.after.median)
                for found in measured
                if found.before is not None and found.after is not None
            },
            path,
        )


def _milliseconds(taken: Durations | None) -> str:
    if taken is None:
        return "not measured"
    low, high = taken.spread
    return f"{taken.median:.2f} ({low:.2f}–{high:.2f})"


@torch.no_grad()
def bench(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    engines: Sequence[str] | None = None,
    *,
    seconds: float = 20.0,
    tick: Callable[[str], None] = lambda stage: None,
) -> Bench:
    """Time ``model`` and its optimized form on each engine, interleaved.

    Args:
        inputs: tensors, the forward's positional arguments.
        engines: names in :data:`fxtemporal.tuning.engines.ENGINES`; default: all installed ones.
        seconds: for all timing, but at least 3 rounds; optimizing and compiling are not counted.
        tick: called with the name of each step.

    Raises:
        PassError: an unknown engine, inputs that are not tensors, or a time that is not above 0.
    """
    if not all(isinstance(x, Tensor) for x in inputs):
        raise PassError("bench: engines take tensors alone, by position")
    if not seconds > 0:
        raise PassError(f"bench: seconds must be above 0, not {seconds}")
    names = _installed() if engines is None else list(dict.fromkeys(engines))
    for name in names:
        if name not in ENGINES:
            raise PassError(f"bench: no engine {name!r}; there are {', '.join(ENGINES)}")
    with stand_in(model) as other:
        return _bench(other.module, inputs, names, seconds, tick)


def _bench(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    names: Sequence[str],
    seconds: float,
    tick: Callable[[str], None],
) -> Bench:
    reset()
    reference = _in_float64(model, inputs)
    found = [EngineBench(name) for name in names]
    calls: dict[str, Callable[[], object]] = {}
    for entry in found:
        try:
            tick(f"optimizing for {entry.engine}")
            frozen = entry.engine != "eager"
            tune = Tune(target=entry.engine)
            fast = optimize(model, inputs, tune=tune, freeze=frozen, progress=False)
            runs = []
            for variant, module in ((BEFORE, model), (AFTER, fast)):
                tick(f"compiling, {entry.engine}, {variant}")
                runs.append(compile_with(ENGINES[entry.engine], module, inputs).run)
            before, after = (_error(run(*own_inputs(inputs)), reference) for run in runs)
            entry.errors = (before, after)
        except FxTemporalError:
            raise
        except Exception as error:  # an engine may raise anything on an unknown op
            entry.note = f"not measured: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        calls[f"settle {entry.engine}"] = partial(time.sleep, _SETTLE)
        for variant, run in zip((BEFORE, AFTER), runs, strict=True):
            calls[f"{entry.engine} {variant}"] = partial(run, *own_inputs(inputs))
    tick("timing")
    timings = interleaved(calls, budget=seconds) if calls else {}
    for entry in found:
        entry.before = timings.get(f"{entry.engine} {BEFORE}")
        entry.after = timings.get(f"{entry.engine} {AFTER}")
    return Bench(tuple(found), _environment(names))


def _installed() -> list[str]:
    """The engines whose packages are installed."""
    return [e.name for e in ENGINES.values() if "not installed" not in versions([e]).values()]


def _in_float64(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The model's outputs in float64; None if it does not run in float64."""
    try:
        wide = (x.double() if x.is_floating_point() else x for x in inputs)
        return StandIn(model).module.double()(*own_inputs(tuple(wide)))
    except Exception:  # a forward may raise anything on an unknown dtype
        return None


def _error(result: Any, reference: Any) -> float | None:
    return None if reference is None else relative_error(result, reference)


def _environment(engines: Sequence[str]) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        **versions(ENGINES[name] for name in engines),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
