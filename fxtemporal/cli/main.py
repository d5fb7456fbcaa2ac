"""The command line: ``fxtemporal audit MODEL``, ``bench``, ``optimize -o FILE`` and ``lower``.

::

    $ fxtemporal audit examples/cnn_lstm.py:build --input 2x10x3x32x32 --fail-on missed
    $ fxtemporal optimize examples/cnn_lstm.py:build --input 2x10x3x32x32 -o model.pt2
    $ fxtemporal lower examples/cnn_lstm.py:build --input 2x10x3x32x32 --backend onnx -o model.onnx

Nothing here imports torch before the arguments are checked. Reports go to stdout, all else to
stderr: output of the model itself, progress, and errors of one line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fxtemporal.cli.arguments import FORMATS, STATUSES, Input, parser
from fxtemporal.cli.find_model import ModelCodeError, UsageError, load_model, nearest
from fxtemporal.support.errors import (
    CaptureError,
    FxTemporalError,
    InternalError,
    LoweringError,
    PassError,
    VerificationError,
)
from fxtemporal.support.files import write_whole

if TYPE_CHECKING:
    from fxtemporal.factorization.settings import Factorize
    from fxtemporal.reports.report import Report
    from fxtemporal.tuning.settings import Tune

__all__ = ["main"]

FINE, FOUND, USAGE, NOT_CAPTURED, NOT_VERIFIED, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("fxtemporal: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # each is printed as one line; an unexpected one as a defect
        if "--traceback" in arguments:
            traceback.print_exc()
        text, status = _explain(error)
        print(f"fxtemporal: error: {' '.join(text.split())}", file=sys.stderr)
        return status


def _explain(error: Exception) -> tuple[str, int]:
    match error:
        case UsageError() | PassError():
            return str(error), USAGE
        case VerificationError():
            return str(error), NOT_VERIFIED
        case InternalError():
            return f"{error} (--traceback, --dump folder)", NOT_CAPTURED
        case FxTemporalError():
            return str(error), NOT_CAPTURED
    from fxtemporal.ir.raised import defect

    return _explain(defect(error, "the command line"))


def _run(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    commands = {"audit": _audit, "bench": _bench, "optimize": _optimize, "lower": _lower}
    with _dumping(getattr(options, "dump", None)):
        return commands[options.command](options)


@contextlib.contextmanager
def _dumping(folder: Path | None) -> Iterator[None]:
    """Set ``$FXTEMPORAL_DUMP`` to the folder of ``--dump``."""
    before = os.environ.get("FXTEMPORAL_DUMP")
    if folder is not None:
        os.environ["FXTEMPORAL_DUMP"] = str(folder)
    try:
        yield
    finally:
        if folder is not None:
            os.environ.pop("FXTEMPORAL_DUMP")
            os.environ |= {} if before is None else {"FXTEMPORAL_DUMP": before}


# -- the commands ----------------------------------------------------------------------------------


def _audit(options: argparse.Namespace) -> int:
    _check_names(options)
    kind = _format(options)
    with contextlib.redirect_stdout(sys.stderr):
        from fxtemporal.api import audit
        from fxtemporal.reports.baseline import new_since, read_baseline

        try:
            known = None if options.baseline is None else read_baseline(options.baseline)
        except FxTemporalError as error:
            raise UsageError(f"--baseline: {error}") from error
        model = load_model(options.model, options.method, train=options.train)
        inputs = _inputs(options)
        try:
            with _about(options.model):
                report = audit(model, inputs, passes=options.passes, measure=options.measure)
        except CaptureError as error:
            if inputs is None and "Give example inputs" in str(error):
                raise UsageError(f"{error} (--input 2x10x3x32x32, for example)") from error
            raise
        if known is not None:
            report = new_since(report, known)
    if options.output is None:
        _print(_rendered(report, kind))
    else:
        _write(options.output, _rendered(report, kind))
    if report.stopped is not None:
        print(f"fxtemporal: error: {options.model}: {report.stopped}", file=sys.stderr)
        return NOT_CAPTURED
    return _found(report, options.fail_on or ())


def _bench(options: argparse.Namespace) -> int:
    if options.plot is not None:
        _check_output(options.plot, ".png", ".svg", option="--plot")
    with contextlib.redirect_stdout(sys.stderr):
        from torch import nn
        from tqdm import tqdm

        from fxtemporal.capture.arguments import example_of
        from fxtemporal.cli.bench import bench

        model = load_model(options.model, options.method)
        example = example_of(model, _inputs(options), None)
        if example is None:
            raise UsageError(f"{options.model}: give an --input, like --input 2x10x3x32x32")
        module = model if isinstance(model, nn.Module) else model.module()
        with (
            _about(options.model),
            tqdm(desc="bench", unit="step", disable=None, leave=False) as bar,
        ):
            found = bench(
                module,
                example[0],
                options.engines,
                seconds=options.seconds,
                tick=bar.set_description_str,
            )
        if options.plot is not None:
            found.plot(options.plot)
    _print(json.dumps(found.to_dict(), indent=2) if options.json else str(found))
    return FINE


def _optimize(options: argparse.Namespace) -> int:
    _check_output(options.output, ".pt2")
    _check_names(options)
    with contextlib.redirect_stdout(sys.stderr):
        from fxtemporal.api import report as report_of
        from fxtemporal.lowering.pt2 import save_exported

        _, example, fast = _optimized(options, _tune(options), options.freeze)
        with _about(options.model):
            save_exported(fast, *example, options.output)
    _print(_rendered(report_of(fast), "json" if options.json else "table"))
    _wrote(options.output, options.output.stat().st_size)
    return FINE


def _lower(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        from fxtemporal.api import report as report_of
        from fxtemporal.lowering.lower import BACKENDS, lower, settings
        from fxtemporal.passes import PORTABLE_PASSES

        if options.backend not in BACKENDS:
            near = nearest(options.backend, [*BACKENDS])
            known = ", ".join(BACKENDS)
            raise UsageError(f"--backend: no {options.backend!r}{near}; there are {known}")
        backend = BACKENDS[options.backend]
        _check_output(options.output, backend.suffix)
        _check_names(options)
        try:  # refuse a missing package or an unknown option before minutes of work
            settings(backend, dict(options.option))
        except LoweringError as error:
            raise UsageError(str(error)) from error
        if options.passes is None and backend.name not in _TARGETS:
            options.passes = PORTABLE_PASSES
        model, example, fast = _optimized(options, _tune_for(backend.name, options), freeze=True)
        with _about(options.model):
            artifact = lower(
                fast,
                example[0],
                backend.name,
                options.output,
                example_kwargs=example[1],
                original=model if options.compare else None,
                **dict(options.option),
            )
    report = report_of(fast)
    report = replace(report, remarks=(*report.remarks, artifact.remark))
    _print(_rendered(report, "json" if options.json else "table"))
    _wrote(options.output, artifact.detail["bytes"])
    return FINE


def _optimized(
    options: argparse.Namespace, tune: Tune | Literal["measure", "static"] | None, freeze: bool
) -> tuple[Any, tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """The model, its example inputs, and the optimized module."""
    from fxtemporal.api import optimize
    from fxtemporal.capture.arguments import example_of

    factorize = _factorize(options)
    model = load_model(options.model, options.method)
    example = example_of(model, _inputs(options), None)
    if example is None:
        raise UsageError(f"{options.model}: give an --input, like --input 2x10x3x32x32")
    with _about(options.model):
        fast = optimize(
            model,
            *example,
            passes=options.passes,
            factorize=factorize,
            tune=tune,
            verify=not options.no_verify,
            freeze=freeze,
            exact=options.exact,
            nan=options.nan,
            layout=options.layout,
        )
    return model, example, fast


def _wrote(path: Path, size: int) -> None:
    print(f"fxtemporal: wrote {path} ({size / 1e6:.1f} MB)", file=sys.stderr)


@contextlib.contextmanager
def _about(model: str) -> Iterator[None]:
    """Add the model's name on the command line to errors of the package."""
    try:
        yield
    except SystemExit as error:  # its status would be taken for one of these commands
        raise ModelCodeError(f"{model}: the model's code ends the process: {error}") from error
    except FxTemporalError as error:
        raise type(error)(f"{model}: {error}") from error


def _check_names(options: argparse.Namespace) -> None:
    """Refuse passes and reasons that do not exist, before anything is loaded."""
    from fxtemporal.ir.reasons import Code
    from fxtemporal.mistakes import Mistake
    from fxtemporal.passes import DEFAULT_PASSES
    from fxtemporal.passes.selection import passes_of

    known = {
        "passes": [rule.name for rule in DEFAULT_PASSES],
        "fail_on": [*STATUSES, *map(str, Code), *map(str, Mistake), "slower:PERCENT"],
    }
    for option, names in known.items():
        for entry in getattr(options, option, None) or ():
            name = entry.partition("{")[0] if option == "passes" else entry
            if name not in names and not (option == "fail_on" and _percent(name) is not None):
                flag = f"--{option.replace('_', '-')}"
                raise UsageError(
                    f"{flag}: nothing is called {name!r}{nearest(name, names)}; "
                    f"there are {', '.join(names)}"
                )
    try:
        passes_of(getattr(options, "passes", None))
    except PassError as error:
        raise UsageError(f"--passes: {error}") from error


def _percent(name: str) -> float | None:
    """P of ``slower:P``; None for another name."""
    kind, colon, number = name.partition(":")
    if kind != "slower" or not colon:
        return None
    try:
        percent = float(number)
    except ValueError:
        return None
    return percent if 0 <= percent < float("inf") else None


def _check_output(path: Path, *suffixes: str, option: str = "--output") -> None:
    """Refuse a path that cannot be written, before minutes of work."""
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{option} {path}: name it {' or '.join(f'*{s}' for s in suffixes)}")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option} {path}: give a file in a folder that exists")


def _format(options: argparse.Namespace) -> str:
    """The format of the report: as asked for, or by the suffix of the file."""
    asked = "json" if options.json else options.format
    if options.output is None:
        return str(asked or "table")
    _check_output(options.output)
    suffix = options.output.suffix
    named = next((kind for kind, suffixes in FORMATS.items() if suffix in suffixes), None)
    if asked is None and named is None:
        raise UsageError(
            f"--output {options.output}: give --format, or a name that ends in "
            f"{', '.join(suffix for suffixes in FORMATS.values() for suffix in suffixes)}"
        )
    return str(asked or named)


def _factorize(options: argparse.Namespace) -> Factorize | None:
    from fxtemporal.factorization.settings import Factorize

    if options.factorize is None:
        if options.calibration is not None:
            raise UsageError("--calibration is of use with --factorize alone")
        return None
    return Factorize(**options.factorize, calibration=_calibration(options))


_CLIPS = 8
"""How many clips of a tensor of calibration data run at a time."""


def _calibration(options: argparse.Namespace) -> list[Any] | None:
    if options.calibration is None:
        return None
    import torch

    path = options.calibration
    try:
        data = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--calibration {path}: it cannot be read: {reason}") from error
    if isinstance(data, torch.Tensor):
        return list(torch.split(data, _CLIPS)) if data.dim() else [data]
    if not isinstance(data, list):
        raise UsageError(
            f"--calibration {path}: save a tensor or a list, not {type(data).__name__}"
        )
    return data


def _tune(options: argparse.Namespace) -> Tune | Literal["measure", "static"] | None:
    from fxtemporal.tuning.settings import Tune

    if options.memory_limit is None:
        tune: Literal["measure", "static"] | None = options.tune
        return tune
    if options.tune == "static":
        raise UsageError("--memory-limit needs measuring: leave --tune static out")
    try:
        return Tune(memory_limit=options.memory_limit)
    except PassError as error:
        raise UsageError(f"--memory-limit: {error}") from error


_TARGETS = {"onnx": "onnxruntime", "openvino": "openvino", "inductor": "inductor"}
"""``{backend: engine to measure on}``; nothing on a CPU predicts TensorRT."""


def _tune_for(backend: str, options: argparse.Namespace) -> Tune | Literal["static"]:
    from fxtemporal.tuning.settings import Tune

    tune = _tune(options)
    if isinstance(tune, Tune):
        return replace(tune, target=_TARGETS.get(backend, tune.target))
    if tune == "static" or (tune is None and backend not in _TARGETS):
        return "static"
    return Tune(target=_TARGETS.get(backend, "eager"))


def _found(report: Report, names: Sequence[str]) -> int:
    """1 if the report has anything that ``names`` name, which is printed; else 0."""
    counts = dict.fromkeys(names, 0)
    named = [{r.status, *(str(why.code) for why in (*r.reasons, *r.left))} for r in report.remarks]
    for entry in (*named, *({str(finding.code)} for finding in report.findings)):
        for name in entry & counts.keys():
            counts[name] += 1
    found = [f"{count} {name}" for name, count in counts.items() if count]
    limits = [percent for name in names if (percent := _percent(name)) is not None]
    if limits and report.gain is not None and 100 * (report.gain - 1) >= min(limits):
        how = "measured" if report.timing is not None else "predicted"
        found.append(f"{how} {100 * (report.gain - 1):.0f} % slower than it need be")
    if found:
        print(f"fxtemporal: --fail-on found {', '.join(found)}", file=sys.stderr)
    return FOUND if found else FINE


def _rendered(report: Report, kind: str) -> str:
    match kind:
        case "json":
            return report.to_json()
        case "markdown":
            return report.to_markdown()
        case "sarif":
            return json.dumps(report.to_sarif(), indent=2)
        case "html":
            return report.to_html()
    return _fitted(report)


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, f"{text.rstrip()}\n")
    except OSError as error:
        raise UsageError(f"--output {path}: it cannot be written: {error}") from error


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fitted(report: Report) -> str:
    """The report as text; on a terminal, fitted to its width."""
    if not sys.stdout.isatty():
        return str(report)
    width = shutil.get_terminal_size().columns
    if report.mode == "audit":
        return report.text(width)
    table, gap, sentences = report.text(width).rpartition("\n\n")
    lines = [textwrap.fill(line, width, subsequent_indent="  ") for line in sentences.splitlines()]
    return table + gap + "\n".join(lines)


# -- the inputs ------------------------------------------------------------------------------------


def _inputs(options: argparse.Namespace) -> tuple[Any, ...] | None:
    if not options.input:
        return None
    import torch

    generator = torch.Generator().manual_seed(0)

    def tensor(entry: Input) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if dtype.is_floating_point:
            return torch.randn(entry.shape, generator=generator).to(dtype)
        return torch.randint(0, 2, entry.shape, generator=generator).to(dtype)

    made = []
    for entry in options.input:
        try:
            made.append(tensor(entry))
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise UsageError(
                f"--input {entry}: {prod(entry.shape)} numbers do not fit into memory; "
                "give a smaller shape"
            ) from error
    return tuple(made)
