"""Builds an ``.onnx`` file, for ONNX Runtime and every engine that reads ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # noqa: F401  # what runs the file: a backend needs all its packages
import onnxscript  # noqa: F401  # torch's exporter needs it
import torch
from torch import Tensor

from fxtemporal.lowering.artifact import Manifest
from fxtemporal.lowering.export import Exported, Free
from fxtemporal.tuning.sessions import Session, onnxruntime_session

__all__ = ["FREE", "absent", "build", "converted", "start"]

FREE: Free = "frames"

_PROTOBUF = 1_800_000_000
"""Bytes of weights above which they go into a separate file: a protobuf holds at most 2 GiB."""


def build(exported: Exported, path: Path, *, opset: int | None = None) -> dict[str, Any]:
    """Write the program as ONNX.

    Args:
        opset: the version of ONNX's operators; default: that of torch's exporter.
    """
    program = converted(exported, opset)
    weights = exported.program.state_dict.values()
    large = sum(w.nbytes for w in weights if isinstance(w, Tensor)) > _PROTOBUF
    program.save(str(path), external_data=large)
    onnx.checker.check_model(str(path), full_check=True)
    return {"nodes": program.model.graph.num_nodes(), "opset": program.model.opset_imports[""]}


def converted(exported: Exported, opset: int | None = None) -> torch.onnx.ONNXProgram:
    """The program in ONNX, its free sizes named."""
    program = torch.onnx.export(exported.program, dynamo=True, opset_version=opset, verbose=False)
    assert program is not None
    program.rename_axes(dict[Any, str](exported.names))
    return program


def absent() -> str | None:
    """Why an artifact cannot run here; None if it can."""
    return None


def start(path: Path, manifest: Manifest) -> Session:
    return onnxruntime_session(str(path))
