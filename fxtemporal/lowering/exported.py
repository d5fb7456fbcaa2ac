"""An optimized module as a ``.pt2``: a file that runs wherever PyTorch does, without this package.

::

    fast = fxtemporal.optimize(model, (clip,))
    save_exported(fast, (clip,), {}, "model.pt2")

    torch.export.load("model.pt2").module()(clip)      # on another machine, no fxtemporal there

The batch and every other size stay free where the graph allows. Sizes that the trace fixed are
fixed in the file too, and calls at other sizes raise there as well.

``torch.export.load`` unpickles what it finds in an archive, and a pickle can run any code.
:func:`load_exported` therefore looks into the archive first.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from fxtemporal.errors import CaptureError, FxTemporalError, LoweringError
from fxtemporal.twins import unchanged
from fxtemporal.verify import Tolerance

__all__ = ["load_exported", "save_exported"]

Example = tuple[tuple[Any, ...], dict[str, Any]]

PICKLES = (".pt", ".pth", ".pkl", ".pickle")
_LSTM_WEIGHTS = (
    r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ (was|were) assigned during"
)


def save_exported(
    gm: fx.GraphModule,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None,
    path: str | os.PathLike[str],
) -> ExportedProgram:
    """Write ``gm`` to ``path`` (``*.pt2``) and return the program as it was read back.

    The file appears complete or not at all: it is written beside ``path``, loaded, compared with
    ``gm`` on the example inputs, and only then moved into place. It keeps the example inputs.

    Raises:
        LoweringError: the folder does not exist, torch.export refuses the graph, the disk does,
            or the file computes other numbers than ``gm``.
    """
    target = Path(path)
    _check_target(target)
    example: Example = (tuple(example_inputs), dict(example_kwargs or {}))
    exported, samples = _export(gm, example)
    draft = target.with_name(f".{target.stem}.{os.getpid()}.pt2")
    try:
        try:
            with draft.open("wb") as file:
                torch.export.save(exported, file)
        except (OSError, RuntimeError) as error:
            raise LoweringError(f"cannot write {target}: {_first_line(error)}") from error
        loaded = _load_back(draft, target)
        for sample in samples:
            _compare(gm, loaded.module(), sample, target)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return loaded


def load_exported(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read a ``.pt2`` that ``torch.export.save`` or :func:`save_exported` wrote.

    What would run code while it is read is refused: pickles of anything but tensors and plain
    values, compiled libraries, calls of Python functions in place of operators.

    Raises:
        CaptureError: there is no such file, it is no ``.pt2``, it is damaged, or it is refused.
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
    except Exception as error:  # torch's reader meets what is malformed in any way
        raise CaptureError(
            f"{file}: torch {torch.__version__} cannot read it: {_first_line(error)}. It is "
            "damaged, or another version wrote it: export the model again with torch.export.save"
        ) from error


# -- writing ---------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.suffix != ".pt2":
        raise LoweringError(f"cannot write {target}: name it *.pt2")
    if target.is_dir():
        raise LoweringError(f"cannot write {target}: it is a folder; name a file in it")
    if not target.parent.is_dir():
        raise LoweringError(
            f"cannot write {target}: the folder {target.parent} does not exist; create it first"
        )


def _export(gm: fx.GraphModule, example: Example) -> tuple[ExportedProgram, list[Example]]:
    """The program, and the inputs it must be right on."""
    wide: Example = pytree.tree_map_only(torch.Tensor, _two_samples, example)
    attempts = [
        (wide, _free_dimensions(gm, wide), [wide, example]),
        (example, _free_dimensions(gm, example), [example]),  # the batch is fixed at one
        (example, None, [example]),
    ]
    for (args, kwargs), shapes, samples in attempts:
        try:
            with unchanged(gm), warnings.catch_warnings():
                warnings.filterwarnings("ignore", _LSTM_WEIGHTS, UserWarning)
                exported = torch.export.export(
                    gm, args, kwargs, dynamic_shapes=shapes, strict=False
                )
            return exported, samples
        except Exception as error:  # torch.export raises its own tree, and whatever the graph does
            failure = error
    raise LoweringError(
        f"torch.export refuses the optimized {type(gm).__name__}: {_first_line(failure)}. "
        "Use the optimized module in Python, or leave out the part that torch.export cannot take"
    ) from failure


def _two_samples(tensor: torch.Tensor) -> torch.Tensor:
    """A batch of one as two, since torch.export takes a size of 1 for a constant; storage of its
    own, since the file would keep all that a view looks into."""
    if tensor.dim() == 0 or tensor.shape[0] != 1:
        return tensor.clone()
    return tensor.repeat(2, *[1] * (tensor.dim() - 1))


def _free_dimensions(gm: nn.Module, example: Example) -> dict[str, Any]:
    """All dimensions but those of size 1, which torch.export takes for constants."""

    def free(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        return {dim: Dim.AUTO for dim, size in enumerate(value.shape) if size != 1}

    args, kwargs = example
    bound = inspect.signature(gm.forward).bind(*args, **kwargs).arguments
    shapes: dict[str, Any] = pytree.tree_map(free, dict(bound))
    return shapes


def _load_back(draft: Path, target: Path) -> ExportedProgram:
    try:
        return load_exported(draft)
    except CaptureError as error:
        text = str(error).replace(str(draft), str(target))
        raise LoweringError(f"{text} (it was just written; nothing is kept)") from error


def _compare(gm: nn.Module, loaded: nn.Module, sample: Example, target: Path) -> None:
    expected, actual = _outputs(gm, sample), _outputs(loaded, sample)
    same_places = [place for place, _ in expected] == [place for place, _ in actual]
    pairs = zip(expected, actual, strict=False)
    if not same_places or not all(_same(mine, theirs) for (_, mine), (_, theirs) in pairs):
        raise LoweringError(
            f"{target} was not written: torch.export's program gives other numbers than the "
            "optimized module. Please report this, with the model"
        )


def _outputs(module: nn.Module, sample: Example) -> list[tuple[str, Any]]:
    """Each output and its place: torch.export gives a dict back as an immutable_dict."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, sample)
    with unchanged(module), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        leaves, _ = pytree.tree_flatten_with_path(module(*args, **kwargs))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves]


def _same(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return bool(expected == actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if not expected.dtype.is_floating_point or expected.numel() == 0:
        return torch.equal(expected, actual)
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    bound = Tolerance().bound(expected.dtype, None) * scale
    return torch.allclose(actual.double(), expected.double(), rtol=0, atol=bound, equal_nan=True)


# -- reading ---------------------------------------------------------------------------------------

# What a .pt2 calls: operators, and arithmetic on sizes. Anything else of torch is Python.
_OPERATOR = re.compile(
    r"torch\.ops\.[a-z]\w*\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\._?sym_\w+|#\w+:.*"
    r"|torch\.fx\.experimental\.symbolic_shapes\.\w+"
)
# sympy evaluates the text of a size, Mul(Integer(10), Symbol('s53')). In one there is no dunder, no
# call of a lower-case name, no attribute, and nothing beyond arithmetic.
_NO_SIZE = re.compile(r"__|\b[a-z_]\w*\s*\(|[a-zA-Z_)']\s*\.|[^\w\s'().,+\-*/%=<>!&|~]")


def _check_archive(file: Path, stream: io.BufferedReader) -> None:
    head = stream.read(4)
    if head[:1] == b"\x80":
        _refuse_pickle(file)
    if head[:2] != b"PK":
        raise CaptureError(f"{file}: not a .pt2: write one with torch.export.save")
    try:
        archive = zipfile.ZipFile(stream)
        broken = archive.testzip()
        # In what is left of a file, zipfile finds the end of an archive that lay inside it.
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
    """Of one record: tensors and plain values, which torch reads without running anything."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # what it refuses, and what is malformed
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
    """Without torch.export's log of the error that it raises as well."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
