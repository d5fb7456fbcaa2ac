"""Artifacts: files of a backend, written completely or not at all, and checked before they run.

Next to ``model.onnx`` is its manifest, ``model.onnx.json``: the artifact's inputs and outputs, the
versions and settings it was made with, and a SHA-256 of every file. A file that is incomplete or
altered is refused before an engine reads it. The manifest protects against damage; it is not a
signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)

from fxtemporal.ir.node_meta import value_of
from fxtemporal.lowering.export import Exported
from fxtemporal.support import files
from fxtemporal.support.errors import LoweringError, SpecializationError
from fxtemporal.support.torch_private import pytree

__all__ = ["Manifest", "checked", "dtype_of", "manifest_path", "read", "staged", "write"]


_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The description of an artifact.

    ``inputs`` and ``outputs`` have one entry per leaf: ``{"name", "dtype", "shape"}`` for a tensor,
    where a free size is a name, or ``{"value"}`` for a value that the graph fixed. ``structure`` is
    the nesting of arguments and of results, as torch's pytree writes it; None for a plain tuple.
    """

    backend: str
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    structure: tuple[str, str | None]
    ranges: dict[str, tuple[int, int | None]]
    detail: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, backend: str, exported: Exported) -> Manifest:
        """The manifest of an artifact made from a program.

        Raises:
            LoweringError: the program does what an artifact cannot: it writes into its inputs or
                buffers, or returns a value that is neither a tensor nor fixed.
        """
        # Writes are in the signature once the graph is functional.
        program = exported.program.run_decompositions({})
        signature = program.graph_signature
        written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        if written:
            raise LoweringError(
                f"{backend}: the graph writes into {', '.join(written)}, and an artifact keeps no "
                "state. Return the new value from the forward instead"
            )
        values = {node.name: value_of(node) for node in program.graph.nodes}
        given = [s.arg for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
        inputs = []
        for number, argument in enumerate(given):
            if isinstance(argument, ConstantArgument):
                inputs.append({"name": argument.name, "value": argument.value})
            elif isinstance(argument, TensorArgument):
                entry = _tensor(argument.name, values[argument.name], exported.names)
                inputs.append(entry | {"shape": list(exported.shapes[number])})
            else:
                raise LoweringError(
                    f"{backend}: the argument {argument.name} is a number that may change: give a "
                    "tensor, or fix it"
                )
        outputs = []
        for number, result in enumerate(
            s.arg for s in signature.output_specs if s.kind is OutputKind.USER_OUTPUT
        ):
            if isinstance(result, ConstantArgument):
                outputs.append({"name": f"output_{number}", "value": result.value})
            elif isinstance(result, TensorArgument):
                value = values[result.name]
                outputs.append(_tensor(f"output_{number}", value, exported.names))
            else:
                raise LoweringError(
                    f"{backend}: result {number} is a number that depends on the sizes of the "
                    "input: return tensors alone"
                )
        spec = program.call_spec
        assert spec.in_spec is not None
        assert spec.out_spec is not None
        nested = _written(spec.in_spec)
        if nested is None:
            raise LoweringError(
                f"{backend}: the arguments are nested in a type that cannot be written down: use "
                "tuples, lists and dicts"
            )
        structure = nested, _written(spec.out_spec)
        return cls(backend, (*inputs,), (*outputs,), structure, dict(exported.ranges))

    # -- calls

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors in the arguments of a call.

        Raises:
            SpecializationError: the artifact was not made for such arguments.
        """
        expected = pytree.treespec_loads(self.structure[0])
        keys = [*expected.child(1).context]
        if sorted(kwargs) == sorted(keys):
            kwargs = {key: kwargs[key] for key in keys}
        leaves, found = pytree.tree_flatten((args, dict(kwargs)))
        if found != expected:
            raise SpecializationError(
                f"this {self.backend} artifact takes {_calls(expected)}, not {_calls(found)}"
            )
        sizes: dict[str, int] = {}
        tensors = []
        for entry, leaf in zip(self.inputs, leaves, strict=True):
            if "value" in entry:
                if isinstance(leaf, Tensor) or leaf != entry["value"]:
                    raise self._other(entry, f"is fixed to {entry['value']!r}, not {leaf!r}")
                continue
            self._check(entry, leaf, sizes)
            tensors.append(leaf.detach())
        return tensors

    def _check(self, entry: Mapping[str, Any], leaf: Any, sizes: dict[str, int]) -> None:
        if not isinstance(leaf, Tensor):
            raise self._other(entry, f"is a tensor, not {type(leaf).__name__}")
        if str(leaf.dtype) != entry["dtype"]:
            raise self._other(entry, f"is {entry['dtype']}, not {leaf.dtype}")
        wanted = entry["shape"]
        text = f"has shape ({', '.join(map(str, wanted))}), not {tuple(leaf.shape)}"
        if leaf.dim() != len(wanted):
            raise self._other(entry, text)
        for size, expected in zip(leaf.shape, wanted, strict=True):
            if isinstance(expected, str):
                least, most = self.ranges[expected]
                if size < least or (most is not None and size > most):
                    of = f"from {least} to {most}" if most is not None else f"{least} at least"
                    raise self._other(entry, f"{text}, with {expected} {of}")
                expected = sizes.setdefault(expected, size)
            if size != expected:
                raise self._other(entry, text)

    def _other(self, entry: Mapping[str, Any], text: str) -> SpecializationError:
        return SpecializationError(
            f"{entry['name']} of this {self.backend} artifact {text}. Lower the model again for "
            "what it is to be given"
        )

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that :meth:`flatten` turned into ``tensors``."""
        given = iter(tensors)
        leaves = [e["value"] if "value" in e else next(given) for e in self.inputs]
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(self.structure[0]))
        return args, kwargs

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """The result of a call, nested as the module's."""
        results = iter(tensors)
        leaves = [
            entry["value"] if "value" in entry else next(results).to(dtype_of(entry))
            for entry in self.outputs
        ]
        if self.structure[1] is None:
            return tuple(leaves)
        return pytree.tree_unflatten(leaves, pytree.treespec_loads(self.structure[1]))

    # -- text

    def to_json(self) -> str:
        content = {"format": _FORMAT, **vars(self)}
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest in ``text``. Raises ValueError if it was damaged or has another format."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
            raise ValueError("it is damaged")
        if content.pop("format", None) != _FORMAT:
            raise ValueError("another version of fxtemporal wrote it")
        nested, inputs, outputs = (content.pop(k) for k in ("structure", "inputs", "outputs"))
        return cls(inputs=(*inputs,), outputs=(*outputs,), structure=(*nested,), **content)


def _tensor(name: str, value: Tensor, names: Mapping[str, str]) -> dict[str, Any]:
    shape = [s if isinstance(s, int) else names.get(str(s), str(s)) for s in value.shape]
    return {"name": name, "dtype": str(value.dtype), "shape": shape}


def dtype_of(entry: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _written(spec: pytree.TreeSpec) -> str | None:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError:  # a type that has no serialized name in pytree
        return None


def _calls(spec: pytree.TreeSpec) -> str:
    """The nesting of the arguments of a call, as text: ``(*, [*, *], name=*)``."""
    args, kwargs = pytree.tree_unflatten(["*"] * spec.num_leaves, spec)
    parts = [str(part).replace("'", "") for part in args]
    parts += [f"{name}={value}".replace("'", "") for name, value in kwargs.items()]
    return f"({', '.join(parts)})"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- files -----------------------------------------------------------------------------------------


def checked(path: Path, suffix: str) -> Path:
    """``path``, if a file can be written there.

    Raises:
        LoweringError: it has another suffix, is a folder, or its folder does not exist.
    """
    if path.suffix != suffix:
        raise LoweringError(f"cannot write {path}: name it *{suffix}")
    if path.is_dir():
        raise LoweringError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise LoweringError(
            f"cannot write {path}: the folder {path.parent} does not exist; create it first"
        )
    return path


def manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary path to build ``path`` at: see :func:`fxtemporal.support.files.staged`.

    The manifest is moved last: without it, or with an older one, nothing loads.

    Raises:
        LoweringError: a file cannot be written.
    """
    try:
        with files.staged(path, last=manifest_path(path).name) as draft:
            yield draft
    except OSError as error:
        raise LoweringError(f"cannot write {path}: {error.strerror or error}") from error


def write(path: Path, manifest: Manifest) -> None:
    """Write the manifest of all files in the folder of ``path``."""
    for file in sorted(path.parent.iterdir()):
        manifest.files[file.name] = _digest(file)
    manifest_path(path).write_text(manifest.to_json())


def read(path: Path) -> Manifest:
    """The manifest of the artifact at ``path``, after a check of its files.

    Raises:
        LoweringError: there is no such artifact, or it is incomplete or altered.
    """
    if not path.is_file():
        raise LoweringError(f"{path}: there is no such file")
    beside = manifest_path(path)
    try:
        manifest = Manifest.from_json(beside.read_text())
    except FileNotFoundError as error:
        raise LoweringError(
            f"{path}: its manifest {beside.name} is missing: copy it along, or lower again"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoweringError(
            f"{beside}: it cannot be read ({error}): copy it again, or lower the model again"
        ) from error
    for name, digest in manifest.files.items():
        file = path.with_name(name)
        if not file.is_file():
            raise LoweringError(f"{path}: {name}, a part of it, is missing: copy it along")
        if _digest(file) != digest:
            raise LoweringError(
                f"{file}: cut short or altered since it was written: copy it again, or lower the "
                "model again"
            )
    if path.name not in manifest.files:
        raise LoweringError(f"{path}: it was renamed; it is {', '.join(manifest.files)}")
    return manifest


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
