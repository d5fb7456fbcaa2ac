"""Builds a graph with TensorRT engines by Torch-TensorRT; unsupported ops stay in PyTorch.

It needs a GPU, and compiles in this process for that GPU.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch_tensorrt
from torch import Tensor

from fxtemporal.lowering.artifact import Manifest
from fxtemporal.lowering.export import Exported, Free
from fxtemporal.support.byte_sizes import in_bytes
from fxtemporal.support.errors import LoweringError
from fxtemporal.support.torch_private import pytree
from fxtemporal.tuning.sessions import Session

__all__ = ["FREE", "absent", "build", "start"]

FREE: Free = "none"

_COVERAGE = re.compile(r"consists of (\d+) Total Operators, of which (\d+) operators are supported")
_ENGINE = re.compile(r"TRT Engine #\d+ ")


def build(
    exported: Exported,
    path: Path,
    *,
    min_block_size: int = 5,
    require_full_compilation: bool = False,
    workspace: int | str | None = None,
    optimization_level: int | None = None,
    hardware_compatible: bool = False,
    version_compatible: bool = False,
) -> dict[str, Any]:
    """Compile the program with ``torch_tensorrt.dynamo.compile``, and save it.

    Args:
        min_block_size: the fewest operators for which a separate engine is built.
        require_full_compilation: refuse a graph if a part of it would stay in PyTorch.
        workspace: the most memory that a layer may use while it runs, in bytes or as ``"1GiB"``.
        optimization_level: TensorRT's own level, 0 to 5.
        hardware_compatible: run on other GPUs as well, from Ampere on.
        version_compatible: run with later versions of TensorRT as well.
    """
    if absent() is not None:
        raise LoweringError("torch_tensorrt needs an NVIDIA GPU, and there is none here")
    args, kwargs = pytree.tree_map_only(Tensor, torch.Tensor.cuda, exported.asked)
    settings = {
        "arg_inputs": args,
        "kwarg_inputs": kwargs,
        "min_block_size": min_block_size,
        "require_full_compilation": require_full_compilation,
        "workspace_size": 0 if workspace is None else in_bytes(workspace, "workspace"),
        "optimization_level": optimization_level,
        "hardware_compatible": hardware_compatible,
        "version_compatible": version_compatible,
    }
    dynamo = torch_tensorrt.dynamo
    coverage = _coverage(exported, settings)
    compiled = dynamo.compile(exported.program, **settings)
    torch_tensorrt.save(compiled, str(path), arg_inputs=list(args), kwarg_inputs=kwargs)
    return {"library": f"torch_tensorrt {torch_tensorrt.__version__}", **coverage}


def _coverage(exported: Exported, settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a dry run: the number of operators in engines, and of engines."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "dryrun.txt"
        with redirect_stdout(io.StringIO()):  # it prints what it writes
            torch_tensorrt.dynamo.compile(exported.program, dryrun=str(told), **settings)
        text = told.read_text() if told.is_file() else ""
    found = _COVERAGE.search(text)
    if found is None:
        return {}
    return {
        "operators": int(found[1]),
        "operators_in_tensorrt": int(found[2]),
        "engines": len(_ENGINE.findall(text)),
    }


def absent() -> str | None:
    """Why an artifact cannot run here; None if it can."""
    return None if torch.cuda.is_available() else "there is no GPU here to run a TensorRT engine on"


def start(path: Path, manifest: Manifest) -> Session:
    module = torch_tensorrt.load(str(path)).module()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        home = tensors[0].device
        args, kwargs = manifest.arguments([x.cuda() for x in tensors])
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        return [leaf.to(home) for leaf in leaves if isinstance(leaf, Tensor)]

    return run
