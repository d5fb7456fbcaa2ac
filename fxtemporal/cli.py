"""The command line: ``fxtemporal audit MODEL``, ``optimize MODEL -o FILE`` and ``lower``.

::

    $ fxtemporal audit examples/cnn_lstm.py:build --input 2x10x3x32x32 --fail-on missed
    $ fxtemporal optimize examples/cnn_lstm.py:build --input 2x10x3x32x32 -o model.pt2
    $ fxtemporal lower examples/cnn_lstm.py:build --input 2x10x3x32x32 --backend onnx -o model.onnx

Nothing here imports torch before the arguments are known to be right. Reports go to stdout, all
else to stderr: what the model itself prints, progress, and errors of one line each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fxtemporal import __version__
from fxtemporal.errors import (
    CaptureError,
    FxTemporalError,
    LoweringError,
    PassError,
    VerificationError,
)
from fxtemporal.locate import UsageError, line_of, load, nearest

if TYPE_CHECKING:
    from fxtemporal.factorization.settings import Factorize
    from fxtemporal.report import Report
    from fxtemporal.tuning import Tune

__all__ = ["main"]

FINE, FOUND, USAGE, NOT_CAPTURED, NOT_VERIFIED, INTERRUPTED = 0, 1, 2, 3, 4, 130

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool", "uint8")
STATUSES = ("applied", "missed", "failed")

EPILOG = """\
MODEL is one of
  package.module:callable    imported; the working directory is searched too
  path/to/file.py:callable   run as a file; the modules beside it can be imported
  model.pt2                  saved by torch.export.save or by fxtemporal optimize
where callable is a function without required arguments that returns an nn.Module, an nn.Module
subclass that can be built without arguments, or an nn.Module. A model is put in eval mode, since
that is what is deployed.

exit status
  0  fine                                    3  the model could not be captured or exported
  1  something that --fail-on names          4  verification failed
  2  wrong usage                           130  interrupted
"""


@dataclass(frozen=True)
class Input:
    """``2x10x3x32x32:float32``: the shape and dtype of one positional argument."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}:{self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Input:
        sizes, colon, dtype = text.partition(":")
        if not all(size.isascii() and size.isdigit() and int(size) for size in sizes.split("x")):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no shape: write sizes from 1 with x between them, like 2x10x3x32x32"
            )
        if colon and dtype not in DTYPES:
            near = nearest(dtype, DTYPES)
            raise argparse.ArgumentTypeError(
                f"{text!r}: no dtype {dtype!r}{near}; there are {', '.join(DTYPES)}"
            )
        return cls(tuple(map(int, sizes.split("x"))), dtype or "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("fxtemporal: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # each ends as one line; what is unexpected is a defect, and says so
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
        case FxTemporalError():
            return str(error), NOT_CAPTURED
    what = f"{type(error).__name__}: {error} (at {line_of(error, package=True)})"
    return (
        f"{what}. A defect of fxtemporal: please report it with --traceback",
        NOT_CAPTURED,
    )


def _run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "audit":
        return _audit(options)
    return _optimize(options) if options.command == "optimize" else _lower(options)


# -- the arguments ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxtemporal",
        description="A compiler for the time axis of PyTorch models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fxtemporal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="audit|optimize|lower")
    audit = _command(commands, "audit", "say what optimize would do, and why not more")
    audit.add_argument(
        "--fail-on",
        type=_names,
        metavar="NAME,...",
        help="exit with 1 if a site has this status (applied, missed, failed) or reason code",
    )
    audit.add_argument("--train", action="store_true", help="leave the model in the mode it is in")
    optimize = _command(commands, "optimize", "write the optimized model as a .pt2")
    optimize.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.pt2")
    optimize.add_argument(
        "--freeze",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write what was derived from parameters, such as a folded BatchNorm, in their place; "
        "--no-freeze keeps the parameters, and derives it at every call (default: --freeze)",
    )
    lower = _command(commands, "lower", "write what an engine runs of the optimized model")
    lower.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    lower.add_argument(
        "--backend",
        required=True,
        metavar="NAME",
        help="onnx (*.onnx), openvino (*.xml), inductor (*.pt2), tensorrt (*.engine) or "
        "torch_tensorrt (*.pt2)",
    )
    lower.add_argument(
        "--option",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend, such as dynamic=batch, batch=1,8, precision=float16 or "
        "compute_capabilities=8.0,8.9; may be given several times",
    )
    lower.add_argument(
        "--compare",
        action="store_true",
        help="lower the model as it is as well, and say what optimizing gained",
    )
    for command in (optimize, lower):
        _choices(command)
    return parser


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--input",
        action="append",
        type=Input.parse,
        default=[],
        metavar="SHAPE[:DTYPE]",
        help="a positional input, like 2x10x3x32x32 or 2x10:int64; several are given in order. "
        "Floats are normal random numbers, the rest random 0 and 1. A .pt2 may carry its own",
    )
    parser.add_argument("--passes", type=_names, metavar="NAME,...", help="run just these passes")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _choices(command: argparse.ArgumentParser) -> None:
    """What a command that optimizes may be told."""
    command.add_argument(
        "--tune",
        choices=("measure", "static"),
        help="measure: keep what is faster here (default, but for TensorRT); static: measure "
        "nothing",
    )
    command.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="the most that the activations of one call may hold at their peak, such as 512MiB or "
        "2GB: folded frames run in chunks that fit, or loops are left",
    )
    command.add_argument(
        "--factorize",
        type=_cut,
        metavar="RANK|KIND=SHARE",
        help="also factorize Conv3d as (2+1)D, which is lossy: 'paper', a whole number, or a "
        "fraction of full rank such as 0.25; or flops=0.5, params=0.5 or latency=0.5 of the model "
        "shared out between its layers; or energy=0.9 or error=0.1 for each layer",
    )
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="with --factorize: a .pt file with a tensor of example inputs, (N, ...), or a list of "
        "inputs of the model; the factors then minimise the error on these",
    )
    command.add_argument(
        "--no-verify", action="store_true", help="do not compare the result with the model"
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name: write NAME or NAME,NAME")
    return names


def _cut(text: str) -> dict[str, int | float | str]:
    """What ``--factorize`` asks for, as an argument of Factorize."""
    kind, equals, value = text.partition("=")
    kind, value = (kind, value) if equals else ("rank", text)
    if kind in ("rank", "flops", "params", "latency", "energy", "error"):
        if (kind, value) == ("rank", "paper"):
            return {kind: value}
        for number in (int, float) if kind == "rank" else (float,):
            with contextlib.suppress(ValueError):
                return {kind: number(value)}
    raise argparse.ArgumentTypeError(
        f"{text!r}: write paper, a whole number or a fraction; or flops=, params=, latency=, "
        "energy= or error= and a number"
    )


def _option(text: str) -> tuple[str, Any]:
    """``batch=1,8``: a name, and a word, a number, true, false, or several with commas between."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    if "," in value or name == "compute_capabilities":
        entries = value.split(",")
        return name, entries if name == "compute_capabilities" else tuple(map(_plain, entries))
    return name, _plain(value)


def _plain(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


# -- the commands ----------------------------------------------------------------------------------


def _audit(options: argparse.Namespace) -> int:
    _check_names(options)
    with contextlib.redirect_stdout(sys.stderr):
        from fxtemporal.api import audit

        model = load(options.model, train=options.train)
        inputs = _inputs(options)
        try:
            with _about(options.model):
                report = audit(model, inputs, passes=options.passes)
        except CaptureError as error:
            if inputs is None and "Give example inputs" in str(error):
                raise UsageError(f"{error} (--input 2x10x3x32x32, for example)") from error
            raise
    _show(report, options.json)
    return _found(report, options.fail_on or ())


def _optimize(options: argparse.Namespace) -> int:
    _check_output(options.output, ".pt2")
    _check_names(options)
    with contextlib.redirect_stdout(sys.stderr):
        from fxtemporal.api import report as report_of
        from fxtemporal.lowering.exported import save_exported

        _, example, fast = _optimized(options, _tune(options), options.freeze)
        with _about(options.model):
            save_exported(fast, *example, options.output)
    _show(report_of(fast), options.json)
    _wrote(options.output, options.output.stat().st_size)
    return FINE


def _lower(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        from fxtemporal.api import report as report_of
        from fxtemporal.lowering.lower import BACKENDS, lower, settings

        if options.backend not in BACKENDS:
            near = nearest(options.backend, [*BACKENDS])
            known = ", ".join(BACKENDS)
            raise UsageError(f"--backend: no {options.backend!r}{near}; there are {known}")
        backend = BACKENDS[options.backend]
        _check_output(options.output, backend.suffix)
        _check_names(options)
        try:  # what is not installed, or unknown, is said before minutes of work
            settings(backend, dict(options.option))
        except LoweringError as error:
            raise UsageError(str(error)) from error
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
    _show(replace(report, remarks=(*report.remarks, artifact.remark)), options.json)
    _wrote(options.output, artifact.detail["bytes"])
    return FINE


def _optimized(
    options: argparse.Namespace, tune: Tune | Literal["measure", "static"] | None, freeze: bool
) -> tuple[Any, tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """The model, its example inputs, and what optimize makes of it."""
    from fxtemporal.api import optimize
    from fxtemporal.capture import example_of

    factorize = _factorize(options)
    model = load(options.model)
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
        )
    return model, example, fast


def _wrote(path: Path, size: int) -> None:
    print(f"fxtemporal: wrote {path} ({size / 1e6:.1f} MB)", file=sys.stderr)


@contextlib.contextmanager
def _about(model: str) -> Iterator[None]:
    """Errors of the package, which do not know what the model is called here, name it."""
    try:
        yield
    except FxTemporalError as error:
        raise type(error)(f"{model}: {error}") from error


def _check_names(options: argparse.Namespace) -> None:
    """Refuse names of passes and reasons that do not exist, before anything is loaded."""
    from fxtemporal.passes import DEFAULT_PASSES
    from fxtemporal.rules import Code

    known = {
        "passes": [rule.name for rule in DEFAULT_PASSES],
        "fail_on": [*STATUSES, *(str(code) for code in Code)],
    }
    for option, names in known.items():
        for name in getattr(options, option, None) or ():
            if name not in names:
                flag = f"--{option.replace('_', '-')}"
                raise UsageError(
                    f"{flag}: nothing is called {name!r}{nearest(name, names)}; "
                    f"there are {', '.join(names)}"
                )


def _check_output(path: Path, suffix: str) -> None:
    """What cannot be written, before minutes of work."""
    if path.suffix != suffix:
        raise UsageError(f"--output {path}: name it *{suffix}")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {path}: give a file in a folder that exists")


def _factorize(options: argparse.Namespace) -> Factorize | None:
    from fxtemporal.factorization.settings import Factorize

    if options.factorize is None:
        if options.calibration is not None:
            raise UsageError("--calibration is of use with --factorize alone")
        return None
    return Factorize(**options.factorize, calibration=_calibration(options))


_CLIPS = 8
"""Of a tensor of calibration data, as many run at a time."""


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
    from fxtemporal.tuning import Tune

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
"""What choices are measured on; on the CPU nothing tells what TensorRT will like."""


def _tune_for(backend: str, options: argparse.Namespace) -> Tune | Literal["static"]:
    from fxtemporal.tuning import Tune

    tune = _tune(options)
    if isinstance(tune, Tune):
        return replace(tune, target=_TARGETS.get(backend, tune.target))
    if tune == "static" or (tune is None and backend not in _TARGETS):
        return "static"
    return Tune(target=_TARGETS.get(backend, "eager"))


def _found(report: Report, names: Sequence[str]) -> int:
    """1 if a remark has a status or a reason code of ``names``, and what it was."""
    counts = dict.fromkeys(names, 0)
    for remark in report.remarks:
        for name in {remark.status, *(str(reason.code) for reason in remark.reasons)}:
            if name in counts:
                counts[name] += 1
    found = [f"{count} {name}" for name, count in counts.items() if count]
    if found:
        print(f"fxtemporal: --fail-on found {', '.join(found)}", file=sys.stderr)
    return FOUND if found else FINE


def _show(report: Report, as_json: bool) -> None:
    text = report.to_json() if as_json else _fitted(report)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fitted(report: Report) -> str:
    """On a terminal, as wide as that is."""
    if not sys.stdout.isatty():
        return str(report)
    width = shutil.get_terminal_size().columns
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
