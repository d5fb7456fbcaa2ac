"""lower and load: write a module as an artifact of a backend, and load it to run it.

::

    freeze → torch.export → the backend's build → loaded back and compared → moved into place
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import shutil
import tempfile
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from fxtemporal.capture.arguments import check_types
from fxtemporal.capture.failures import raise_if_model_fails
from fxtemporal.ir.freeze import freeze
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.raised import first_line, owning_defects, root_cause
from fxtemporal.lowering.artifact import Manifest, checked, read, staged, write
from fxtemporal.lowering.export import Example, Exported, Free, close, export, leaves_of
from fxtemporal.mistakes import telling_cure
from fxtemporal.passes.rule import Remark
from fxtemporal.support.clock import timed
from fxtemporal.support.errors import FxTemporalError, LoweringError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree
from fxtemporal.tuning.sessions import Session
from fxtemporal.verification.comparison import relative_error

__all__ = ["BACKENDS", "Artifact", "Backend", "load", "lower", "settings"]


class Backend(Protocol):
    """The contents of a backend's file."""

    FREE: Free
    """The sizes that are free unless ``dynamic`` says otherwise."""

    @property
    def build(self) -> Callable[..., dict[str, Any]]:
        """Writes an :class:`Exported` to a path; returns details for the manifest."""

    def start(self, path: Path, manifest: Manifest) -> Session:
        """Loads the written file into the engine, ready to run."""

    def absent(self) -> str | None:
        """Why an artifact cannot run here; None if it can."""


if TYPE_CHECKING:  # each backend is one
    from fxtemporal.lowering import inductor, onnx, openvino, tensorrt, torch_tensorrt

    _CHECKED: tuple[Backend, ...] = (onnx, openvino, inductor, tensorrt, torch_tensorrt)


@dataclass(frozen=True)
class BackendFile:
    """One backend by its name: a file of this package, imported when it is used."""

    name: str
    suffix: str
    extra: str | None = None
    """The extra of fxtemporal that installs the packages it needs."""

    @property
    def loaded(self) -> Backend:
        """The backend's file, imported.

        Raises:
            LoweringError: a package that it needs is not installed, or does not work here.
        """
        try:
            return cast(Backend, importlib.import_module(f"fxtemporal.lowering.{self.name}"))
        except ModuleNotFoundError as error:
            raise LoweringError(
                f"{self.name} needs {error.name}, which is not installed: "
                f"pip install 'fxtemporal[{self.extra}]'"
            ) from error
        except Exception as error:  # a package may fail in any way on a machine it is not for
            raise LoweringError(
                f"{self.name}: what pip install 'fxtemporal[{self.extra}]' installs does not work "
                f"here: {first_line(error)}"
            ) from error


BACKENDS: Mapping[str, BackendFile] = {
    backend.name: backend
    for backend in (
        BackendFile("onnx", ".onnx", "onnx"),
        BackendFile("openvino", ".xml", "openvino"),
        BackendFile("inductor", ".pt2"),
        BackendFile("tensorrt", ".engine", "tensorrt-rtx"),
        BackendFile("torch_tensorrt", ".pt2", "tensorrt"),
    )
}


@dataclass(frozen=True, eq=False)
class Artifact:
    """A module on a backend's engine, from :func:`lower` or :func:`load`: call it like the module.

    ``path`` is the file. ``remark`` says what was built, the time it took, and its size; ``detail``
    has the same as plain values. The engine is started at the first call.
    """

    path: Path
    manifest: Manifest
    _runs: list[Session] = field(default_factory=list, repr=False)

    @property
    def backend(self) -> str:
        return self.manifest.backend

    @property
    def detail(self) -> Mapping[str, Any]:
        return self.manifest.detail

    @property
    def remark(self) -> Remark:
        return Remark(f"lower-{self.backend}", "applied", self.path.name, detail=self.detail)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs, computed by the engine.

        Raises:
            SpecializationError: the artifact was not made for such arguments.
            LoweringError: the engine is not installed, cannot run here, or fails.
        """
        tensors = self.manifest.flatten(args, kwargs)
        run = self.start()
        try:
            return self.manifest.unflatten(run(tensors))
        except FxTemporalError:
            raise
        except Exception as error:  # an engine raises its own
            why = first_line(root_cause(error))
            raise LoweringError(f"{self.path} failed: {why}") from error

    def start(self) -> Session:
        """The engine, ready to run: a list of tensors in, a list out.

        Raises:
            LoweringError: the engine is not installed, or cannot run here.
        """
        if not self._runs:
            backend = BACKENDS[self.backend].loaded
            if (absent := backend.absent()) is not None:
                raise LoweringError(f"{self.path}: {absent}")
            try:
                with quiet():
                    self._runs.append(backend.start(self.path, self.manifest))
            except LoweringError:
                raise
            except Exception as error:  # an engine raises its own
                raise LoweringError(
                    f"{self.backend} cannot load {self.path}: {first_line(root_cause(error))}"
                ) from error
        return self._runs[0]


def load(path: str | os.PathLike[str]) -> Artifact:
    """Load an artifact that :func:`lower` wrote.

    An engine file can be machine code, as an AOTInductor package is: load only files you trust.

    Raises:
        LoweringError: there is no such artifact, or it or its manifest is incomplete or altered.
    """
    manifest = read(Path(path))
    if manifest.backend not in BACKENDS:
        raise LoweringError(f"{path}: no backend is called {manifest.backend!r}; update fxtemporal")
    return Artifact(Path(path), manifest)


@owning_defects("lower")
def lower(
    gm: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...],
    backend: str,
    path: str | os.PathLike[str] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    original: nn.Module | ExportedProgram | None = None,
    **options: Any,
) -> Artifact:
    """Build an artifact that an engine runs, and write it to ``path``.

    Args:
        gm: a result of :func:`fxtemporal.optimize`, or any module that torch.export takes. It is
            not changed; values derived from its parameters are frozen in the artifact.
        example_inputs: the forward's arguments.
        backend: ``"onnx"``, ``"openvino"``, ``"inductor"`` (an AOTInductor package), ``"tensorrt"``
            or ``"torch_tensorrt"``.
        path: the file, ending in ``.onnx``, ``.xml``, ``.pt2``, ``.engine`` or ``.pt2``, in the
            order of the backends. Its manifest is ``path.json``. Without a path, the files exist as
            long as the returned artifact. An existing file is replaced once the new one is
            complete.
        example_kwargs: keyword arguments of the forward.
        original: the model before ``optimize``: it is lowered as well, and the remark compares
            both.
        **options: ``dynamic``: the sizes that stay free as far as the graph allows, ``"none"``,
            ``"batch"``, ``"frames"`` (all but H and W) or ``"all"``; and the options that ``build``
            of the backend's file documents. Without ``dynamic``, if the engine refuses the graph
            with free sizes, they are fixed, and the detail says why.

    Returns:
        An :class:`Artifact`. It was compared with ``gm`` if its engine runs here.

    Raises:
        LoweringError: the backend is unknown, is not installed, refuses the graph, or computes
            other numbers; the path cannot be written; an option is unknown.
        CaptureError: ``gm`` is no model, or it fails on the example inputs.
    """
    chosen = _backend(backend)
    check_types(gm, example_inputs, example_kwargs)
    target = None if path is None else checked(Path(path), chosen.suffix)
    asked = not {"dynamic", "batch"}.isdisjoint(options)
    free, options = settings(chosen, options)
    build = _built if asked else _built_somehow
    example: Example = (tuple(example_inputs), dict(example_kwargs or {}))
    _check_forward(gm, example)
    folder = None
    if target is None:
        folder = tempfile.mkdtemp(prefix="fxtemporal-")
        target = Path(folder) / f"model{chosen.suffix}"
    try:
        with quiet(), staged(target) as draft:
            manifest = build(chosen, gm, example, free, draft, options)
            if original is not None:
                beside = draft.parent / "original" / draft.name
                beside.parent.mkdir()
                whole = build(chosen, original, example, free, beside, options)
                shutil.rmtree(beside.parent)
                manifest.detail["original"] = whole.detail
            write(draft, manifest)
        artifact = Artifact(target, manifest)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, LoweringError):
            raise LoweringError(f"{target.name} was not written: {error}") from error
        raise
    if folder is not None:
        weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
    return artifact


def _check_forward(model: nn.Module | ExportedProgram, example: Example) -> None:
    """Raise if ``model`` fails on the example inputs by itself, or gives nothing to lower."""
    module = model.module() if isinstance(model, ExportedProgram) else model
    held = (*module.parameters(), *module.buffers(), *pytree.tree_leaves(example))
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in held):
        raise LoweringError(
            "the model or its example inputs are on the meta device and hold no numbers: load the "
            "weights first"
        )
    with telling_cure():
        raise_if_model_fails(module, example)
    plain = (type(None), str, int, float, types.GeneratorType)
    if all(isinstance(leaf, plain) for _, leaf in leaves_of(module, example)):
        raise LoweringError(f"{type(module).__name__} returns no tensor: there is nothing to lower")


def _backend(name: str) -> BackendFile:
    if name not in BACKENDS:
        raise LoweringError(f"no backend is called {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def settings(backend: BackendFile, options: Mapping[str, Any]) -> tuple[Free, dict[str, Any]]:
    """The sizes to leave free, and the arguments for the backend's ``build``.

    Raises:
        LoweringError: there is no such option.
    """
    parameters = inspect.signature(backend.loaded.build).parameters.values()
    there = ["dynamic", *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    for name in options:
        if name not in there:
            raise LoweringError(
                f"{backend.name} has no option {name!r}; there are {', '.join(there)}"
            )
    rest = dict(options)
    free = rest.pop("dynamic", "batch" if rest.get("batch") else backend.loaded.FREE)
    if free not in get_args(Free):
        known = ", ".join(get_args(Free))
        raise LoweringError(f"{backend.name}: dynamic must be one of {known}, not {free!r}")
    return free, rest


def _built_somehow(
    backend: BackendFile,
    model: nn.Module | ExportedProgram,
    example: Example,
    free: Free,
    draft: Path,
    options: Mapping[str, Any],
) -> Manifest:
    """:func:`_built`; if the engine refuses free sizes, again with those of the example."""
    try:
        return _built(backend, model, example, free, draft, options)
    except LoweringError as error:
        if free == "none":
            raise
        for file in [path for path in draft.parent.iterdir() if path.is_file()]:
            file.unlink()
        try:
            manifest = _built(backend, model, example, "none", draft, options)
        except LoweringError:
            raise error from None  # free sizes were not the cause
        manifest.detail["sizes_fixed_because"] = str(error)
        return manifest


def _built(
    backend: BackendFile,
    model: nn.Module | ExportedProgram,
    example: Example,
    free: Free,
    draft: Path,
    options: Mapping[str, Any],
) -> Manifest:
    """Build the artifact at ``draft``, compare it, and return its manifest."""
    exported = export(_frozen(model), example, free)
    manifest = Manifest.of(backend.name, exported)
    try:
        detail, seconds = timed(partial(backend.loaded.build, exported, draft, **options))
    except FxTemporalError:
        raise
    except Exception as error:  # an engine raises its own
        why = first_line(root_cause(error))
        raise LoweringError(f"{backend.name} refuses the graph: {why}") from error
    manifest.ranges.update(detail.pop("ranges", {}))
    size = sum(file.stat().st_size for file in draft.parent.iterdir() if file.is_file())
    manifest.detail.update({"build_seconds": round(seconds, 3), "bytes": size, **detail})
    if (absent := backend.loaded.absent()) is None:
        manifest.detail["relative_error"] = _error(Artifact(draft, manifest), exported)
        manifest.detail["compared_at"] = len(exported.samples)
    else:
        manifest.detail["not_compared"] = absent
    return manifest


def _frozen(model: nn.Module | ExportedProgram) -> nn.Module:
    if isinstance(model, ExportedProgram):
        return model.module()
    if isinstance(model, OptimizedModule):
        model = copy.deepcopy(model)
        freeze(model)
    return model


def _error(artifact: Artifact, exported: Exported) -> float:
    """The error of the artifact against the module, relative to each output's largest value.

    Raises:
        LoweringError: the error is larger than rounding explains.
    """
    precision = artifact.detail.get("precision")
    dtype = None if precision is None else getattr(torch, precision)
    worst = 0.0
    for sample in exported.samples:
        wanted = [leaf for _, leaf in leaves_of(exported.module, sample)]
        given = pytree.tree_leaves(artifact(*sample[0], **sample[1]))
        if len(wanted) != len(given) or not all(map(_closer(dtype), wanted, given)):
            raise LoweringError(
                f"{artifact.backend} gives other numbers than the module: do not use it for this "
                "model, and please report it"
            )
        worst = max(worst, relative_error(given, wanted))
    return worst


def _closer(dtype: torch.dtype | None) -> Any:
    return lambda wanted, given: close(wanted, given, dtype)
