"""Finds the model that a command line names: ``path/to/file.py:build``, ``module:build``, a .pt2.

An exception in the user's own code becomes an error that names its line.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fxtemporal.support.errors import CaptureError, FxTemporalError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

__all__ = ["ModelCodeError", "UsageError", "load_model", "nearest"]

PICKLES = (".pt", ".pth", ".pkl", ".pickle")


class UsageError(FxTemporalError):
    """The command line asks for something that does not exist or does not work."""


class ModelCodeError(FxTemporalError):
    """The user's own code raised while the model was imported or built."""


def load_model(
    text: str, method: str | None = None, *, train: bool = False
) -> nn.Module | ExportedProgram:
    """The model that ``MODEL`` names, in eval mode unless ``train``; its ``method`` as a model."""
    from fxtemporal.capture.methods import method_of

    model = _load(text, train=train)
    if method is None:
        return model
    try:
        return method_of(model, method)
    except CaptureError as error:
        raise UsageError(f"{text}: {error}") from error


def _load(text: str, *, train: bool) -> nn.Module | ExportedProgram:
    import torch
    from torch import nn

    from fxtemporal.capture.arguments import check_types

    if ":" not in text or Path(text).is_file():
        return _load_file(text)
    where, _, name = text.rpartition(":")
    is_file = where.endswith(".py")
    if not where or not name or (where[0] == "." and not is_file):
        raise UsageError(f"{text!r}: write package.module:callable or path/to/file.py:callable")
    module = _run_file(Path(where)) if is_file else _import(where)
    if not hasattr(module, name):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise UsageError(f"{where} has no {name!r}{nearest(name, names)}")
    found = getattr(module, name)
    torch.manual_seed(0)
    model = found if isinstance(found, nn.Module) else _build(text, found)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{text}: gave {_a(model)}, and an nn.Module is needed")
    check_types(model, None, None)
    return model if train else model.eval()


def _load_file(text: str) -> ExportedProgram:
    from fxtemporal.lowering.pt2 import load_exported

    path = Path(text)
    if path.suffix == ".py":
        raise UsageError(f"{text}: say which callable of it builds the model: {text}:build")
    if path.suffix not in (".pt2", *PICKLES) and not path.is_file():
        raise UsageError(
            f"{text!r} is no model: write package.module:callable, path/to/file.py:callable, "
            "or a saved .pt2"
        )
    if not path.is_file():
        raise UsageError(f"{text}: there is no such file")
    return load_exported(path)


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    name = path.stem if path.stem not in sys.modules else f"_fxtemporal_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code: it may raise anything
        del sys.modules[name]
        raise _model_code_error(f"{path} cannot be imported", error) from error
    return module


def _import(name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"no module is called {error.name!r}, neither installed nor in {os.getcwd()}"
            ) from error
        raise _model_code_error(f"{name} cannot be imported", error) from error
    except (Exception, SystemExit) as error:  # the user's code: it may raise anything
        raise _model_code_error(f"{name} cannot be imported", error) from error


def _build(text: str, found: object) -> object:
    if not callable(found):
        raise UsageError(f"{text}: is {_a(found)}: name a function, an nn.Module or a class of it")
    if needed := _required(found):
        raise UsageError(
            f"{text}: needs {', '.join(needed)}: name a function that builds the model without "
            "arguments"
        )
    try:
        return found()
    except (Exception, SystemExit) as error:  # the user's code: it may raise anything
        raise _model_code_error(f"{text} failed", error) from error


def _required(found: Callable[..., object]) -> list[str]:
    """The parameters of ``found`` that have no default."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # a builtin may have no signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _model_code_error(what: str, error: BaseException) -> ModelCodeError:
    if isinstance(error, SyntaxError) and error.filename:
        return ModelCodeError(f"{what}: {error.filename}:{error.lineno}: SyntaxError: {error.msg}")
    message = f"{type(error).__name__}: {error}".rstrip(": ")
    return ModelCodeError(f"{what}: {_line_of(error)}: {message} (--traceback shows more)")


def _line_of(error: BaseException) -> str:
    """``file:line`` of the deepest frame outside libraries and fxtemporal."""
    outside = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")] + ["<"]
    outside.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(tuple(outside))]
    frame = (own or frames)[-1]
    return f"{frame.filename.removeprefix(os.getcwd() + os.sep)}:{frame.lineno}"


def nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"
