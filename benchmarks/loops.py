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
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.loop_models import LOOPS
from benchmarks.loop_runs import VARIANTS, Cell, Result, Scaling, run_case, run_scaling
from benchmarks.measure import machine, machine_slug
from fxtemporal.tuning.engines import ENGINES, versions

__all__ = ["main"]

SCALING = (16, 64, 256, 1024)
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"


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
    packages = versions(ENGINES[name] for name in engines)
    return {**machine(), "torchvision": version("torchvision"), **packages}


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
    parser.add_argument(
        "--targets", action="store_true", help="optimize for each engine, not for eager mode alone"
    )
    parser.add_argument("--rounds", type=int, default=100, help="at most, for each model")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to time each model")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--scaling", action="store_true", help="time optimize itself as T grows")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write what was measured here, model by model"
    )
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    return parser.parse_args(arguments)


def _describe(bar: tqdm[Any], name: str, stage: str) -> None:
    bar.set_description(f"{name}: {stage}")


def _measured(
    options: argparse.Namespace, environment: dict[str, Any]
) -> tuple[list[Result], list[Scaling]]:
    """Everything that was asked for; the JSON file grows with it, as a full run takes long."""
    names = list(LOOPS) if options.only is None else options.only
    lengths = SCALING if options.scaling else ()
    results: list[Result] = []
    scaling: list[Scaling] = []
    with tqdm(total=len(names) + len(lengths), disable=None, leave=False) as bar:

        def done() -> None:
            bar.update()
            if options.json:
                _write_json(options.json, results, scaling, environment)

        for name in names:
            result = run_case(
                LOOPS[name],
                [ENGINES[engine] for engine in options.engines],
                options.rounds,
                options.budget,
                memory=not options.no_memory,
                skip=options.skip,
                targets=options.targets,
                tick=partial(_describe, bar, name),
            )
            results.append(result)
            done()
        for frames in lengths:
            bar.set_description(f"optimizing T={frames}")
            scaling.append(run_scaling(frames))
            done()
    return results, scaling


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    environment = _environment(options.engines)
    results, scaling = _measured(options, environment)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    for title, table in _tables(results, scaling, "simple").items():
        print(f"\n{title}\n\n{table}")
    for note in _notes(results):
        print(f"{NOT_MEASURED}: {note}")
    if options.save:
        print(f"saved to {_save(results, scaling, environment)}")
    broken = _broken(results)
    for text in broken:
        print(f"broken: {text}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
