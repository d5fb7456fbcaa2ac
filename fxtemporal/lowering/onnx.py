"""Builds an ``.onnx`` file, for ONNX Runtime and every engine that reads ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript  # noqa: F401  # torch's exporter needs it
import torch
from torch import Tensor

from fxtemporal.lowering.artifact import Manifest, Run
from fxtemporal.lowering.export import Exported, Free
from fxtemporal.support.errors import LoweringError

__all__ = ["FREE", "absent", "build", "converted", "session", "start"]

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


def start(path: Path, manifest: Manifest) -> Run:
    return session(str(path))


def session(model: str | bytes) -> Run:
    """ONNX Runtime on the CPU, with torch's number of threads, for a file or its content."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in runtime.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        if len(tensors) != len(names):
            raise LoweringError(f"the graph reads {len(names)} of {len(tensors)} inputs")
        arrays = {name: _array(x) for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in runtime.run(None, arrays)]

    return run


def _array(x: Tensor) -> Any:
    if x.dtype == torch.bfloat16:
        raise LoweringError("NumPy has no bfloat16: give the model float32 inputs and outputs")
    return x.cpu().numpy()
