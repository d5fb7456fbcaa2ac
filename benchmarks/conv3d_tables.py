"""The tables of ``benchmarks.conv3d``, made of what it writes as JSON: a record a model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

__all__ = ["AFTER", "BEFORE", "markdown"]

BEFORE, AFTER = "model", "optimized"

Record = dict[str, Any]
Table = tuple[list[list[str]], list[str]]


def markdown(records: Sequence[Record], environment: dict[str, Any], about: str) -> str:
    """All tables, under what was measured and where."""
    parts = ["# Networks of 3-D convolutions\n", about + "\n"]
    parts.append("\n".join(f"- {key}: {value}" for key, value in environment.items()) + "\n")
    dates = "\n".join(f"- {record['name']}: {record['date']}" for record in records)
    parts.append(f"A run a model:\n\n{dates}\n")
    parts.append(f"## Milliseconds a call\n\n{_grid(_times(records))}\n")
    parts += [f"{line}\n" for line in _means(records)]
    if notes := [note for record in records for note in (*record["notes"], *_unchanged(record))]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    for title, table in (
        ("Errors, seconds of optimize, and what was applied", _details(records)),
        ("Milliseconds of each form on each layer, eager mode", _layers(records)),
    ):
        parts.append(f"## {title}\n\n{_grid(table)}\n")
    return "\n".join(parts)


def _unchanged(record: Record) -> list[str]:
    return [
        f"{record['name']}, {engine}: nothing was applied: the ratio is that of one graph, "
        "compiled twice"
        for engine in _engines(record)
        if engine != "eager" and not record["forms"].get(engine)
    ]


def _grid(table: Table) -> str:
    return tabulate(*table, tablefmt="github", disable_numparse=True)


def _engines(record: Record) -> list[str]:
    return [*dict.fromkeys(key.split()[0] for key in record["milliseconds"])]


def _cell(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return "not measured"
    low, high = timing["spread"]
    return f"{timing['median']:.1f} ({low:.1f}–{high:.1f})"


def _ratio(ratio: Sequence[float] | None) -> str:
    """The median over the rounds and its quartiles; or the ratio of the medians alone."""
    if not ratio:
        return ""
    return (
        f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})" if len(ratio) == 3 else f"{ratio[0]:.2f}"
    )


def _best_peer(record: Record) -> tuple[str, float] | None:
    """The fastest engine but eager mode on the model as it is, and its milliseconds."""
    times = {
        engine: record["milliseconds"].get(f"{engine} {BEFORE}") for engine in _engines(record)
    }
    peers = {name: t["median"] for name, t in times.items() if name != "eager" and t is not None}
    return min(peers.items(), key=lambda peer: peer[1], default=None)


def _times(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        peer = _best_peer(record)
        for engine in _engines(record):
            before, after = (record["milliseconds"].get(f"{engine} {v}") for v in (BEFORE, AFTER))
            ratio = record["speedup"][engine]
            lines.append(
                [
                    record["name"],
                    engine,
                    _cell(before),
                    _cell(after),
                    _ratio(ratio),
                    "" if peer is None or after is None else f"{peer[1] / after['median']:.2f}",
                    "" if peer is None else peer[0],
                ]
            )
    headers = ["model", "engine", "as it is", "optimized", "speed-up", "over best peer", "which is"]
    return lines, headers


def _means(records: Sequence[Record]) -> list[str]:
    ratios: dict[str, dict[str, float]] = {}
    for record in records:
        for engine, ratio in record["speedup"].items():
            if ratio is not None:
                ratios.setdefault(engine, {})[record["name"]] = ratio[len(ratio) // 2]
    lines = []
    for engine, found in ratios.items():
        mean, least = statistics.geometric_mean(found.values()), min(found, key=lambda m: found[m])
        lines.append(
            f"{engine}: geometric mean {mean:.2f}× over {len(found)} models, "
            f"least {found[least]:.2f}× ({least})."
        )
    return lines


def _details(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        for engine, seconds in record["optimize_seconds"].items():
            errors = [record["relative_error"].get(f"{engine} {v}") for v in (BEFORE, AFTER)]
            forms = ", ".join(f"{n} {form}" for form, n in sorted(record["forms"][engine].items()))
            lines.append(
                [
                    record["name"],
                    engine,
                    *("—" if error is None else f"{error:.1e}" for error in errors),
                    *(f"{taken:.1f}" for taken in seconds),
                    *[""] * (2 - len(seconds)),
                    forms.replace("conv3d_", ""),
                ]
            )
    headers = ["model", "target", "error as it is", "error optimized", "optimize s", "from cache s"]
    return lines, [*headers, "applied"]


def _layers(records: Sequence[Record]) -> Table:
    """Each layer once, however many models have it; the fastest form in bold."""
    layers = {key: figures for record in records for key, figures in record["layers"].items()}
    layers = {key: figures for key, figures in layers.items() if key.startswith("conv3d ")}
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
