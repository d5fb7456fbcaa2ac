"""The sessions of the engines, used both for timing and for running artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxtemporal.support.errors import LoweringError

__all__ = ["Session", "onnxruntime_session", "openvino_session"]

Session: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""An engine with a loaded model: input tensors in, output tensors out, by position."""


def onnxruntime_session(model: str | bytes) -> Session:
    """ONNX Runtime on the CPU, with torch's number of threads, for a file or its content."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads spin while a call runs, as by default, but stop when it ends.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in runtime.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        if len(tensors) != len(names):
            raise LoweringError(f"the graph reads {len(names)} of {len(tensors)} inputs")
        arrays = {name: _array(x) for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in runtime.run(None, arrays)]

    return run


def openvino_session(model: Any) -> Session:
    """OpenVINO on the CPU, in float32, with torch's number of threads, for a file or a model."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 on CPUs that have it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        # Results are copied, so that the next call does not overwrite them.
        results = compiled([x.cpu().numpy() for x in tensors], share_inputs=True)
        return [torch.from_numpy(results[i]) for i in range(len(compiled.outputs))]

    return run


def _array(x: Tensor) -> Any:
    if x.dtype == torch.bfloat16:
        raise LoweringError("NumPy has no bfloat16: give the model float32 inputs and outputs")
    return x.cpu().numpy()
