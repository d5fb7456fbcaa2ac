"""Artifacts of every backend, from the model and from the optimized one: ``benchmarks.deploy``.

Each model is lowered as it is, and after ``fxtemporal.optimize`` for the engine that will run it
(for TensorRT without measuring, since a CPU does not tell). Milliseconds are those of all artifacts
of a model in turn, in one process: medians with their quartiles, and the ratio of the rounds.
Errors are max|a−b| / max|b| against eager mode in float64; those of the factorized network against
itself, since its factors are lossy. TensorRT builds for GPUs that are not here: its milliseconds
are "not measured".
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxtemporal
from benchmarks.conv3d_models import CONV3D
from benchmarks.loop_models import LOOPS
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
from fxtemporal import Artifact, Factorize, Tune
from fxtemporal.lowering.lower import BACKENDS
from fxtemporal.passes import PORTABLE_PASSES
from fxtemporal.tuning.engines import ENGINES, reset, versions

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
BEFORE, AFTER = "model", "optimized"

MODELS: Mapping[str, tuple[Case, Factorize | None]] = {
    "r3d_18": (CONV3D["r3d_18"], None),
    "r2plus1d_18": (CONV3D["r2plus1d_18"], None),
    "resnet18_lstm_64": (LOOPS["resnet18_lstm_64"], None),
    "c3d, half its FLOPs": (CONV3D["c3d"], Factorize(flops=0.5)),
}


@dataclass(frozen=True)
class Way:
    """A backend with its options, and the engine that choices are measured on."""

    backend: str
    target: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Way] = {
    "onnx": Way("onnx", "onnxruntime"),
    "openvino": Way("openvino", "openvino"),
    "inductor": Way("inductor", "inductor"),
    "inductor, fixed sizes": Way("inductor", "inductor", {"dynamic": "none"}),
    "torch.compile": Way("compile"),
    "tensorrt SM80": Way("tensorrt", None, {"compute_capabilities": ["8.0"]}),
    "tensorrt SM89": Way("tensorrt", None, {"compute_capabilities": ["8.9"]}),
    "torch_tensorrt": Way("torch_tensorrt"),
}


@dataclass
class Built:
    """What one way made of one variant of a model."""

    model: str
    way: str
    variant: str
    build_seconds: float | None = None
    engine_seconds: float | None = None
    megabytes: float | None = None
    layers: int | None = None
    timing: Timing | None = None
    error: float | None = None
    note: str = ""

    speedup: tuple[float, float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        timing = None if self.timing is None else self.timing.to_dict()
        return {**vars(self), "timing": timing, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}"}


def _optimized(
    model: nn.Module, inputs: Any, target: str | None, factorize: Factorize | None
) -> nn.Module:
    tune: Any = "static" if target is None else Tune(target=target)
    passes = PORTABLE_PASSES if target is None else None
    return fxtemporal.optimize(
        model, inputs, passes=passes, tune=tune, factorize=factorize, freeze=True
    )


def _build(way: Way, module: nn.Module, inputs: Any, folder: Path, built: Built) -> Any:
    """What runs, or None where it cannot run here."""
    start = time.perf_counter()
    if way.backend == "compile":
        backend = "inductor" if built.variant == BEFORE else "fxtemporal"
        run = torch.compile(module, backend=backend)
        run(*inputs)
        built.build_seconds = time.perf_counter() - start
        return run
    suffix = BACKENDS[way.backend].suffix
    path = folder / f"{len([*folder.iterdir()])}{suffix}"
    artifact: Artifact = fxtemporal.lower(module, inputs, way.backend, path, **way.options)
    built.build_seconds = artifact.detail["build_seconds"]
    built.engine_seconds = artifact.detail.get("engine_seconds")
    built.megabytes = artifact.detail["bytes"] / 1e6
    built.layers = artifact.detail.get("layers")
    if "sizes_fixed_because" in artifact.detail:
        built.note = f"sizes fixed: {artifact.detail['sizes_fixed_because']}"
    if "not_compared" in artifact.detail:
        built.note = artifact.detail["not_compared"]
        return None
    return artifact


@torch.no_grad()
def run_model(
    name: str, ways: Sequence[str], budget: float, tick: Callable[[str], None]
) -> list[Built]:
    """All ways for one model, timed in one interleaved run."""
    case, factorize = MODELS[name]
    model, inputs = case.build(), case.inputs()
    reset()
    modules: dict[str | None, nn.Module] = {}
    found, runs = [], {}
    wide = tuple(x.double() for x in inputs)
    exact = copy.deepcopy(model).double()(*wide)
    with tempfile.TemporaryDirectory() as folder:
        for label in ways:
            way = WAYS[label]
            for variant in (BEFORE, AFTER):
                built = Built(name, label, variant)
                found.append(built)
                try:
                    module = model
                    if variant == AFTER and (way.backend != "compile" or factorize is not None):
                        if way.target not in modules:
                            tick(f"optimizing for {way.target or 'TensorRT'}")
                            modules[way.target] = _optimized(model, inputs, way.target, factorize)
                        module = modules[way.target]
                    tick(f"{label}, {variant}")
                    run = _build(way, module, inputs, Path(folder), built)
                except Exception as error:  # an engine may raise anything on what it does not know
                    built.note = reason(error)
                    continue
                if run is not None:
                    runs[label, variant] = partial(run, *inputs)
                    reference = exact
                    if factorize is not None and variant == AFTER:
                        reference = copy.deepcopy(module).double()(*wide)
                    built.error = relative_error(run(*inputs), reference)
        tick("timing")
        calls: dict[str, Callable[[], object]] = {}
        for key, call in runs.items():
            calls.setdefault(f"before {key[0]}", settle)
            calls[" ".join(key)] = call
        timings = interleaved(calls, rounds=40, budget=budget)
        for built in found:
            built.timing = timings.get(f"{built.way} {built.variant}")
        for before, after in zip(found[::2], found[1::2], strict=True):
            if before.timing is not None and after.timing is not None:
                after.speedup = speedup(before.timing, after.timing)
    return found


# -- tables ----------------------------------------------------------------------------------------


Record = Mapping[str, Any]


def _row(record: Record) -> list[str]:
    return [
        record["model"],
        record["way"],
        record["variant"],
        _number(record["build_seconds"], ".1f"),
        _number(record["engine_seconds"], ".2f"),
        _number(record["megabytes"], ".1f"),
        _number(record["layers"], "d"),
        _milliseconds(record["timing"]),
        _ratio(record["speedup"]),
        _number(record["error"], ".1e"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _milliseconds(timing: Record | None) -> str:
    if timing is None:
        return "not measured"
    low, high = timing["spread"]
    return f"{timing['median']:.1f} ({low:.1f}–{high:.1f})"


def _ratio(ratio: Sequence[float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})"


HEADERS = [
    "model",
    "backend",
    "of",
    "build s",
    "engine s",
    "MB",
    "layers",
    "milliseconds",
    "speed-up",
    "error",
]


def _markdown(records: Sequence[Record], environment: Mapping[str, Any]) -> str:
    about = __doc__.split("\n\n")[1]
    parts = ["# Artifacts\n", about + "\n"]
    parts.append("\n".join(f"- {key}: {value}" for key, value in environment.items()) + "\n")
    dates = dict.fromkeys(f"- {r['model']}, {r['way']}: {r['date']}" for r in records)
    parts.append("Measured:\n\n" + "\n".join(dates) + "\n")
    rows = [_row(record) for record in records]
    parts.append(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True) + "\n")
    notes = [f"{r['model']}, {r['way']}, {r['variant']}: {r['note']}" for r in records if r["note"]]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.deploy", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(MODELS), help="these models")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--budget", type=float, default=40.0, help="seconds to time each model")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="with --save: what benchmarks/results has of other models and ways stays",
    )
    options = parser.parse_args(arguments)
    environment = {**machine(), **versions([ENGINES["openvino"], ENGINES["onnxruntime"]])}
    environment["device with a GPU"] = "not measured"
    path = RESULTS / f"deploy-{machine_slug(environment)}.json"
    names = options.only or list(MODELS)
    found = _kept(path, names, options.ways) if options.keep else []
    with tqdm(names, disable=None, leave=False) as bar:
        for name in bar:
            tick = partial(_describe, bar, name)
            found += [b.to_dict() for b in run_model(name, options.ways, options.budget, tick)]
            found.sort(key=_place)
            if options.save:  # after each model: all of them take half an hour
                content = {"environment": environment, "artifacts": found}
                path.write_text(json.dumps(content, indent=1) + "\n")
                path.with_suffix(".md").write_text(_markdown(found, environment))
    print(_markdown(found, environment))
    return 0


def _kept(path: Path, names: Sequence[str], ways: Sequence[str]) -> list[dict[str, Any]]:
    """What was measured before, and is not measured again."""
    records = json.loads(path.read_text())["artifacts"] if path.exists() else []
    return [r for r in records if r["model"] not in names or r["way"] not in ways]


def _place(record: Record) -> tuple[int, int, int]:
    variant = (BEFORE, AFTER).index(record["variant"])
    return list(MODELS).index(record["model"]), list(WAYS).index(record["way"]), variant


def _describe(bar: tqdm[Any], name: str, stage: str) -> None:
    bar.set_description(f"{name}: {stage}")


if __name__ == "__main__":
    sys.exit(main())
