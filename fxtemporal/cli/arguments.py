"""The commands and options of the command line, and how to parse them."""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from fxtemporal import __version__
from fxtemporal.cli.find_model import UsageError, nearest
from fxtemporal.compiler.promises import Exact, Layout, Nan, Promises

__all__ = ["DTYPES", "FORMATS", "STATUSES", "Input", "parser"]

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool", "uint8")
STATUSES = ("applied", "missed", "failed")
FORMATS = {
    "table": (".txt",),
    "json": (".json",),
    "markdown": (".md",),
    "sarif": (".sarif",),
    "html": (".html", ".htm"),
}
"""``{format of a report: suffixes of its files}``."""

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    root = _Parser(
        prog="fxtemporal",
        description="A compiler for the time axis of PyTorch models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"fxtemporal {__version__}")
    commands = root.add_subparsers(
        dest="command", required=True, metavar="audit|bench|optimize|lower"
    )
    audit = _command(commands, "audit", "say where time is wasted, what to do, and what it gains")
    _audit(audit)
    bench = _command(commands, "bench", "time the model before and after, on each engine")
    bench.add_argument(
        "--engines",
        type=_names,
        metavar="NAME,...",
        help="eager, inductor, openvino, onnxruntime (default: those that are installed)",
    )
    bench.add_argument(
        "--seconds",
        type=_above_zero,
        default=20.0,
        help="for the timing; optimizing and compiling come on top (default: 20)",
    )
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, .png or .svg")
    bench.add_argument("--json", action="store_true", help="print what was measured as JSON")
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
        _passes(command)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
    return root


def _audit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--measure",
        action="store_true",
        help="optimize a copy, and say what each rewrite was measured to gain here",
    )
    command.add_argument(
        "--fail-on",
        type=_names,
        metavar="NAME,...",
        help="exit with 1 if a site has this status (applied, missed, failed) or reason code, if "
        "this usual mistake is found, or, slower:PERCENT, if the model takes that much longer than "
        "it need",
    )
    command.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="report only what an earlier report, written with --format json, has not",
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        help="default: what the name of --output says, or a table",
    )
    command.add_argument("--json", action="store_true", help="the same as --format json")
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the report there, not to stdout"
    )
    command.add_argument(
        "--train", action="store_true", help="leave the model in the mode it is in"
    )
    _passes(command)


def _passes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--passes",
        type=_names,
        metavar="NAME,...",
        help="run just these passes; options in braces: time-distribute{allow=randomness}",
    )
    command.add_argument(
        "--dump",
        type=Path,
        metavar="FOLDER",
        help="write the graph's code after every pass (also: $FXTEMPORAL_DUMP)",
    )


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
    parser.add_argument(
        "--method", metavar="NAME", help="the method to call in place of the forward, like decode"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _choices(command: argparse.ArgumentParser) -> None:
    """Add the options of the commands that optimize."""
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
    for name, known, text in (
        ("exact", Exact, "bitwise: keep only what gives the model's numbers bit for bit"),
        ("nan", Nan, "confined: take no form that spreads NaN or infinite values to other frames"),
        ("layout", Layout, "any: outputs lie in memory as the last op wrote them"),
    ):
        default = getattr(Promises, name)
        text = f"{text} (default: {default})"
        command.add_argument(f"--{name}", choices=get_args(known), default=default, help=text)
    command.add_argument(
        "--no-verify", action="store_true", help="do not compare the result with the model"
    )


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in re.split(r",(?![^{]*\})", text))  # not in braces
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name: write NAME or NAME,NAME")
    return names


def _cut(text: str) -> dict[str, int | float | str]:
    """The value of ``--factorize`` as an argument of Factorize."""
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
    """``batch=1,8``: a name, and a word, number, true or false, or several with commas between."""
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
