"""Saves an optimized module as a ``.pt2``, which runs with PyTorch alone, without this package.

::

    fast = fxtemporal.optimize(model, (clip,))
    save_exported(fast, (clip,), {}, "model.pt2")

    torch.export.load("model.pt2").module()(clip)      # on another machine, no fxtemporal there

The batch and every other size stay free if the graph allows it. Sizes that the trace fixed are
fixed in the file too, and calls at other sizes raise an error there as well.

``torch.export.load`` unpickles the records of an archive, and a pickle can run any code. Therefore
:func:`load_exported` checks the archive first.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx
from torch.export import ExportedProgram

from fxtemporal.capture.exported_guards import is_guard
from fxtemporal.ir.raised import first_line
from fxtemporal.lowering.archive_names import bad_entry, bad_name
from fxtemporal.lowering.artifact import checked, staged
from fxtemporal.lowering.export import export, leaves_of, same
from fxtemporal.support.errors import CaptureError, FxTemporalError, LoweringError

__all__ = ["load_exported", "save_exported"]

PICKLES = (".pt", ".pth", ".pkl", ".pickle")


def save_exported(
    gm: fx.GraphModule,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None,
    path: str | os.PathLike[str],
) -> ExportedProgram:
    """Write ``gm`` to ``path`` (``*.pt2``) and return the program as read back from the file.

    The file appears complete or not at all: it is written next to ``path``, loaded, compared with
    ``gm`` on the example inputs, and only then moved into place. It contains the example inputs.

    Raises:
        LoweringError: the folder does not exist, torch.export refuses the graph, the file cannot be
            written, or it computes other numbers than ``gm``.
    """
    target = checked(Path(path), ".pt2")
    try:
        example = tuple(example_inputs), dict(example_kwargs or {})
        exported = export(gm, example, guarded=True)
    except LoweringError as error:
        raise LoweringError(f"{target} was not written: {error}") from error
    with staged(target) as draft:
        try:
            with draft.open("wb") as file:
                torch.export.save(exported.program, file)
        except (OSError, RuntimeError) as error:
            raise LoweringError(f"cannot write {target}: {first_line(error)}") from error
        loaded = _load_back(draft, target)
        module = loaded.module()
        for sample in exported.samples:
            if not same(leaves_of(gm, sample), leaves_of(module, sample)):
                raise LoweringError(
                    f"{target} was not written: read back, it gives other numbers than the "
                    "optimized module. Please report this, with the model"
                )
    return loaded


def load_exported(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read a ``.pt2`` that ``torch.export.save`` or :func:`save_exported` wrote.

    A file that could run code while it is read is refused: it has pickles of anything but tensors
    and plain values, compiled libraries, or calls of Python functions among its operators.

    Raises:
        CaptureError: there is no such file, it is not a ``.pt2``, it is damaged, or it is refused.
    """
    file = Path(path)
    if not file.is_file():
        raise CaptureError(f"{file}: there is no such file")
    if file.suffix in PICKLES:
        _refuse_pickle(file)
    try:
        with file.open("rb") as stream:
            _check_archive(file, stream)
            stream.seek(0)
            with _quiet():
                return torch.export.load(stream)
    except FxTemporalError:
        raise
    except OSError as error:
        raise CaptureError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch's reader may raise anything on a malformed file
        raise CaptureError(
            f"{file}: torch {torch.__version__} cannot read it: {first_line(error)}. It is "
            "damaged, or another version wrote it: export the model again with torch.export.save"
        ) from error


# -- writing ---------------------------------------------------------------------------------------


def _load_back(draft: Path, target: Path) -> ExportedProgram:
    try:
        return load_exported(draft)
    except CaptureError as error:
        text = str(error).replace(str(draft), str(target))
        raise LoweringError(f"{text} (it was just written; nothing is kept)") from error


# -- reading ---------------------------------------------------------------------------------------

# The calls that a .pt2 may contain: operators, and arithmetic on sizes. All others are Python.
_OPERATOR = re.compile(
    r"torch\.ops\.[a-z]\w*\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\._?sym_\w+|#\w+:.*"
    r"|torch\.fx\.experimental\.symbolic_shapes\.\w+"
)
# sympy evaluates the text of a size, Mul(Integer(10), Symbol('s53')). A valid text has no dunder,
# no call of a lower-case name, no attribute, and nothing but arithmetic.
_NO_SIZE = re.compile(r"__|\b[a-z_]\w*\s*\(|[a-zA-Z_)']\s*\.|[^\w\s'().,+\-*/%=<>!&|~]")


def _check_archive(file: Path, stream: io.BufferedReader) -> None:
    head = stream.read(4)
    if head[:1] == b"\x80":
        _refuse_pickle(file)
    if head[:2] != b"PK":
        raise CaptureError(f"{file}: not a .pt2: write one with torch.export.save")
    try:
        archive = zipfile.ZipFile(stream)
        if (wrong := bad_entry(archive)) is not None:
            raise CaptureError(f"{file}: refused: it holds {wrong}")
        broken = archive.testzip()
        # In a truncated file, zipfile may find the end of an archive that was nested in it.
        whole = any(entry.header_offset == 0 for entry in archive.filelist)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CaptureError(f"{file}: damaged or cut short: write or copy it again") from error
    if not whole:
        raise CaptureError(f"{file}: damaged or cut short: write or copy it again")
    if broken is not None:
        raise CaptureError(f"{file}: damaged at {broken}: write or copy it again")
    root = archive.namelist()[0].partition("/")[0] if archive.namelist() else ""
    names = {name.removeprefix(f"{root}/") for name in archive.namelist()}
    if "data.pkl" in names:
        _refuse_pickle(file)
    if "archive_format" not in names or archive.read(f"{root}/archive_format") != b"pt2":
        raise CaptureError(f"{file}: not a .pt2: write one with torch.export.save")
    if "models/model.json" not in names:
        raise CaptureError(f"{file}: a .pt2 without an exported program in it")
    if any(name.startswith("data/aotinductor/") for name in names):
        _refuse(file, "compiled libraries")

    def read(name: str) -> bytes:
        return archive.read(f"{root}/{name}")

    for name in sorted(names):
        if name.startswith("models/"):
            _check_program(file, json.loads(read(name)))
        elif name.endswith(".pt"):
            _check_pickle(file, name, read(name))
        elif name.endswith("_config.json"):
            folder = name.rpartition("/")[0]
            for payload in json.loads(read(name))["config"].values():
                stored = f"{folder}/{payload['path_name']}"
                if payload["path_name"].startswith(("custom_obj_", "opaque_obj_")):
                    _refuse(file, f"a Python object ({stored})")
                if payload.get("use_pickle"):
                    _check_pickle(file, stored, read(stored))


def _check_pickle(file: Path, name: str, content: bytes) -> None:
    """Refuse a record with more than tensors and plain values, which torch reads without code."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # refused or malformed content
        raise CaptureError(
            f"{file}: refused: the pickle {name} in it can run code; export the model again, with "
            "example inputs of tensors and plain values"
        ) from error


def _check_program(file: Path, program: Any) -> None:
    for key, value in _strings(program):
        if key == "target" and not _OPERATOR.fullmatch(value):
            _refuse(file, f"a call of {value!r}")
        if key == "expr_str" and _NO_SIZE.search(value):
            _refuse(file, f"the size {value!r}")
    for text in _guards(program):
        if not isinstance(text, str) or not is_guard(text):
            _refuse(file, f"the guard {text!r}")
    if (name := bad_name(program)) is not None:
        _refuse(file, f"the name {name}")


def _guards(program: Any) -> Iterator[Any]:
    """All guards in a JSON value, at any depth."""
    pending = [program]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield from part.get("guards_code") or ()
        if isinstance(part, dict | list):
            pending += part.values() if isinstance(part, dict) else part


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Each ``key: "string"`` of the operators and sizes in a JSON value."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if isinstance(entry, str):
                if key != "target" or "inputs" in value:  # a node, not a parameter's name
                    yield key, entry
            else:
                yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def _refuse_pickle(file: Path) -> NoReturn:
    raise CaptureError(
        f"{file}: refused: it is a pickle, and it can run code; export it with torch.export.save"
    )


def _refuse(file: Path, what: str) -> NoReturn:
    raise CaptureError(f"{file}: refused: it holds {what}, which can run code")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.export's log of an error that it also raises."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
