"""The results put together: fxtemporal + X against X, for each engine X.

``python -m benchmarks summary`` reads the tables in ``benchmarks/results``, writes
``summary-<machine>.md`` beside them, and puts the same numbers into the README, between lines that
say ``<!-- benchmarks: NAME -->`` and ``<!-- /benchmarks -->``. With ``--check`` nothing is written,
and the exit status is 1 where a file says something else than the results.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

__all__ = ["blocks", "main", "read_tables", "written"]

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
ENGINES = ("eager", "inductor", "openvino", "onnxruntime")
MACHINE = "amd-epyc"
"""Whose results the README shows."""

Row = Mapping[str, str]
_UNCHANGED = re.compile(r"^- (\w+), (\w+): nothing was applied", re.MULTILINE)
_BLOCK = re.compile(r"(<!-- benchmarks: (\w+) -->\n)(.*?)(<!-- /benchmarks -->)", re.DOTALL)


def read_tables(path: Path) -> dict[str, list[Row]]:
    """The first table below each heading of a Markdown file, a dict a row; "" before the first."""
    tables: dict[str, list[Row]] = {}
    heading, headers = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading, headers = line[3:], []
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not headers:
            headers = cells
        elif set(line) - set("|-: "):
            tables.setdefault(heading, []).append(dict(zip(headers, cells, strict=True)))
    return tables


def _number(cell: str) -> float | None:
    """The first number of ``34.59 (32.75–38.30)``."""
    match = re.match(r"-?[\d.]+", cell)
    return None if match is None else float(match[0])


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


Pairs = dict[str, dict[str, tuple[float, float, float]]]
"""By model and engine: milliseconds before and after, and how many times as fast."""


def _loops(folder: Path, machine: str) -> Pairs:
    tables = read_tables(folder / f"loops-{machine}.md")
    targeted = next((rows for name, rows in tables.items() if name.startswith("Optimized for")), [])
    names = ("loop", "optimized", "loop / optimized")
    return _pairs(tables["Milliseconds a call"], names) | _pairs(targeted, names)


def _conv3d(folder: Path, machine: str) -> Pairs:
    path = folder / f"conv3d-{machine}.md"
    rows = read_tables(path)["Milliseconds a call"]
    pairs = _pairs(rows, ("as it is", "optimized", "speed-up"))
    for model, engine in _UNCHANGED.findall(path.read_text(encoding="utf-8")):
        before, _, _ = pairs[model][engine]
        pairs[model][engine] = before, before, 1.0
    return pairs


def _pairs(rows: Sequence[Row], names: tuple[str, str, str]) -> Pairs:
    found: Pairs = {}
    for row in rows:
        before, after, ratio = (_number(row[name]) for name in names)
        if before is not None and after is not None and ratio is not None:
            found.setdefault(row["model"], {})[row["engine"]] = before, after, ratio
    return found


def _peers(pairs: Pairs) -> str:
    """A row a model: X alone → fxtemporal + X, for each engine X."""

    def cell(model: str, engine: str) -> str:
        if engine not in pairs[model]:
            return "not measured"
        before, after, ratio = pairs[model][engine]
        if before == after:
            return f"{_milliseconds(before)}, nothing applied"
        return f"{_milliseconds(before)} → {_milliseconds(after)}, {ratio:.2f}×"

    rows = [[model, *(cell(model, engine) for engine in ENGINES)] for model in pairs]
    means = []
    for engine in ENGINES:
        ratios = [found[engine][2] for found in pairs.values() if engine in found]
        means.append(f"**{statistics.geometric_mean(ratios):.2f}×** of {len(ratios)}")
    return tabulate(
        [*rows, ["geometric mean", *means]],
        ["milliseconds, X → fxtemporal + X", *ENGINES],
        tablefmt="github",
        disable_numparse=True,
    )


def _summary(folder: Path, machine: str) -> str:
    return _peers({**_loops(folder, machine), **_conv3d(folder, machine)})


def _accuracy(folder: Path, machine: str) -> str:
    """Accuracy of the factorized network: a row a way to cut it, a column a share of the FLOPs."""
    rows = read_tables(folder / f"factorize-{machine}.md")["Accuracy"]
    (whole,) = [row for row in rows if row["how"] == "as it is"]
    ways = ("a budget, with data", "a budget, by the weights", "plain SVD, each layer alike")
    cut = {way: [row for row in rows if row["how"] == way] for way in ways}
    shares = [row["FLOPs left"] for row in cut[ways[0]]]
    return tabulate(
        [[way, *(row["accuracy %"] for row in cut[way])] for way in ways],
        [f"accuracy, {whole['accuracy %']} % as it is", *(f"{s} of the FLOPs" for s in shares)],
        tablefmt="github",
        disable_numparse=True,
    )


def _artifacts(folder: Path, machine: str) -> str:
    """Artifacts before and after: a row a model and backend."""
    rows = read_tables(folder / f"deploy-{machine}.md")[""]
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row["model"], row["backend"]), {})[row["of"]] = row

    def lines() -> Iterator[list[str]]:
        for (model, backend), sides in pairs.items():
            before, after = sides.get("model"), sides.get("optimized")
            if before is None or after is None or not (before["build s"] and after["build s"]):
                continue
            yield [
                model,
                backend,
                *(_arrow(before[name], after[name]) for name in ("build s", "MB", "layers")),
                _arrow(_first(before["milliseconds"]), _first(after["milliseconds"])),
            ]

    headers = ["model", "artifact", "build, s", "size, MB", "layers", "milliseconds a call"]
    return tabulate(list(lines()), headers, tablefmt="github", disable_numparse=True)


def _first(cell: str) -> str:
    return cell.partition(" (")[0]


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


BLOCKS: Mapping[str, Callable[[Path, str], str]] = {
    "peers": _summary,
    "accuracy": _accuracy,
    "artifacts": _artifacts,
}


def blocks(text: str, folder: Path = RESULTS, machine: str = MACHINE) -> str:
    """``text`` with each block made of the results; raises KeyError for an unknown one."""
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]](folder, machine)}\n{m[4]}", text)


def written(folder: Path = RESULTS, readme: Path = README) -> dict[Path, str]:
    """Each file that this module writes, and what it is to contain."""
    found = {readme: blocks(readme.read_text(encoding="utf-8"), folder)}
    for path in sorted(folder.glob("loops-*.md")):
        machine = path.stem.removeprefix("loops-")
        if (folder / f"conv3d-{machine}.md").exists():
            text = (
                f"# fxtemporal + X against X, {machine}\n\n"
                "Medians of interleaved runs, from the tables beside this one, which have the "
                "spread, the versions and\nthe dates. `python -m benchmarks summary` writes it.\n\n"
                f"{_summary(folder, machine)}\n"
            )
            found[folder / f"summary-{machine}.md"] = text
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks summary", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    options = parser.parse_args(arguments)
    status = 0
    for path, text in written().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            print(f"{path} is not what the results say", file=sys.stderr)
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
