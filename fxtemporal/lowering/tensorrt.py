"""Builds a serialized TensorRT engine with NVIDIA's own ONNX parser and builder.

With the package ``tensorrt`` an engine is built on the GPU that will run it, and every tactic is
measured there. With ``tensorrt_rtx`` (TensorRT for RTX) it is built for named compute capabilities,
even on a machine without a GPU, and finished when it is first loaded on the GPU. In both cases it
runs only on such a GPU, and with the version of the library that built it.

Its speed cannot be measured on another engine: optimize with
``passes=fxtemporal.passes.PORTABLE_PASSES, tune="static"``, which leaves the form of each
convolution to TensorRT.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxtemporal.lowering.artifact import Manifest, dtype_of, read
from fxtemporal.lowering.export import Exported, Free, close, export, leaves_of
from fxtemporal.lowering.onnx import converted
from fxtemporal.support.byte_sizes import in_bytes
from fxtemporal.support.clock import timed
from fxtemporal.support.errors import LoweringError
from fxtemporal.support.torch_private import pytree
from fxtemporal.tuning.sessions import Session, onnxruntime_session

__all__ = ["FREE", "absent", "build", "load_engine", "start"]

FREE: Free = "none"

LIBRARIES = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")


def build(
    exported: Exported,
    path: Path,
    *,
    library: Literal["tensorrt", "tensorrt_rtx"] | None = None,
    compute_capabilities: Sequence[str] | None = None,
    precision: Literal["float32", "tf32", "float16", "bfloat16"] = "float32",
    batch: tuple[int, int] | tuple[int, int, int] | None = None,
    workspace: int | str | None = None,
    optimization_level: int | None = None,
) -> dict[str, Any]:
    """Build an engine.

    Args:
        library: default: ``tensorrt`` if it is installed and there is a GPU, else
            ``tensorrt_rtx``.
        compute_capabilities: the GPUs that an engine of ``tensorrt_rtx`` is for, such as
            ``["8.0", "8.9"]``; default: the GPU of this machine.
        precision: ``"tf32"`` lets tensor cores round the factors of float32 products to 10 bits.
            With ``"float16"`` and ``"bfloat16"`` the graph computes in that dtype; inputs and
            outputs keep theirs. Networks are strongly typed: each layer has the graph's dtype.
        batch: the least and the largest batch size, and optionally, between them, the one for which
            to optimize (default: the example's). Without it, the batch is fixed to the example's.
        workspace: the most memory that a layer may use while it runs, in bytes or as ``"1GiB"``.
        optimization_level: TensorRT's own level, 0 to 5: how long it searches for faster kernels.
    """
    trt = _library(library, compute_capabilities)
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise LoweringError(f"tensorrt: precision must be one of {known}, not {precision!r}")
    if precision in ("float16", "bfloat16"):
        exported = _in(getattr(torch, precision), exported)
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    model = converted(exported).model_proto.SerializeToString()
    if precision in ("float32", "tf32"):
        _check(exported, model)
    if not parser.parse(model):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise LoweringError(f"tensorrt's parser refuses the graph: {errors}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if workspace is not None:
        limit = in_bytes(workspace, "tensorrt: workspace")
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if compute_capabilities is not None:
        _aim(trt, config, compute_capabilities)
    ranges = _profile(builder, config, network, exported, batch)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = Counter(layer.type.name.lower() for layer in layers)
    engine, seconds = timed(lambda: builder.build_serialized_network(network, config))
    if engine is None:
        raise LoweringError(f"{trt.__name__} cannot build the engine: {log.errors()}")
    path.write_bytes(bytes(engine))
    detail: dict[str, Any] = {
        "library": f"{trt.__name__} {trt.__version__}",
        "layers": len(layers),
        "layer_kinds": dict(kinds.most_common()),
        "engine_seconds": round(seconds, 3),
        "ranges": ranges,
    }
    if compute_capabilities is not None:
        detail["compute_capabilities"] = [*compute_capabilities]
    return detail if precision in ("float32", "tf32") else {**detail, "precision": precision}


def _library(asked: str | None, capabilities: Sequence[str] | None) -> ModuleType:
    if asked is not None and asked not in LIBRARIES:
        raise LoweringError(f"tensorrt: library is tensorrt or tensorrt_rtx, not {asked!r}")
    gpu = torch.cuda.is_available()
    if asked is None:
        plain = gpu and capabilities is None and importlib.util.find_spec("tensorrt") is not None
        asked = "tensorrt" if plain else "tensorrt_rtx"
    if asked == "tensorrt" and capabilities is not None:
        raise LoweringError(
            "tensorrt builds for the GPU that is there: leave compute_capabilities out, or "
            "give library='tensorrt_rtx'"
        )
    if not gpu and capabilities is None:
        raise LoweringError(
            "tensorrt: there is no GPU here: name what the engine is for, "
            "compute_capabilities=['8.0', '8.9'], which tensorrt_rtx builds for anywhere"
        )
    return _imported(asked)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a missing package, or one without a driver
        extra = name.replace("_", "-")
        raise LoweringError(
            f"tensorrt: {name} is not installed, or does not work here ({error}): "
            f"pip install 'fxtemporal[{extra}]'"
        ) from error


class _Log:
    """A logger that keeps TensorRT's errors, for the message of the exception."""

    def __init__(self, trt: ModuleType) -> None:
        kept: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    kept.append(message)

        self._kept = kept
        self.logger = Logger()

    def errors(self) -> str:
        return "; ".join(dict.fromkeys(self._kept)) or "it does not say why"


def _check(exported: Exported, model: bytes) -> None:
    """Check on the CPU, with ONNX Runtime, that the ONNX graph gives the module's numbers.

    Raises:
        LoweringError: it gives other numbers.
    """
    run = onnxruntime_session(model)
    for sample in exported.samples:
        given = [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, Tensor)]
        leaves = [leaf for _, leaf in leaves_of(exported.module, sample)]
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(map(close, wanted, run(given))):
            raise LoweringError(
                "tensorrt: the ONNX graph that the engine would be built from gives other numbers "
                "than the module: please report it"
            )


class _Cast(nn.Module):
    """A module that computes in another precision; its inputs and outputs keep their dtypes."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module.to(dtype)
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._inner, (args, kwargs))
        return pytree.tree_map_only(Tensor, self._outer, self.module(*args, **kwargs))

    def _inner(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def _outer(self, x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x


def _in(dtype: torch.dtype, exported: Exported) -> Exported:
    """``exported``, computing in ``dtype``."""
    module = _Cast(copy.deepcopy(exported.module), dtype)
    return export(module, exported.asked, "batch" if exported.ranges else "none")


def _aim(trt: ModuleType, config: Any, capabilities: Sequence[str]) -> None:
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in vars(trt.ComputeCapability).items()
        if re.fullmatch(r"SM\d+", name)
    }
    if isinstance(capabilities, str) or not capabilities:
        raise LoweringError("tensorrt: compute_capabilities is a list, like ['8.0', '8.9']")
    config.num_compute_capabilities = len(capabilities)
    for number, capability in enumerate(capabilities):
        if capability not in known:
            there = ", ".join(sorted(known, key=float))
            raise LoweringError(
                f"tensorrt: {trt.__name__} does not build for compute capability {capability!r}; "
                f"it does for {there}"
            )
        config.set_compute_capability(known[capability], number)


def _profile(
    builder: Any, config: Any, network: Any, exported: Exported, batch: Sequence[int] | None
) -> dict[str, tuple[int, int]]:
    """Set the batch sizes that the engine is built for; return the ranges of free sizes."""
    if batch is None:
        if exported.ranges:
            raise LoweringError("tensorrt: say for which sizes to build, as batch=(1, 8)")
        return {}
    least, most = min(batch), max(batch)
    best = batch[1] if len(batch) == 3 else _batch(exported)
    if len(batch) not in (2, 3) or least != batch[0] or most != batch[-1] or least < 1:
        raise LoweringError(f"tensorrt: batch is (least, most) or (least, best, most), not {batch}")
    if [*exported.ranges] != ["batch"]:
        there = ", ".join(exported.ranges) or "no size"
        raise LoweringError(f"tensorrt: the batch alone can be free, and the graph leaves {there}")
    if least < exported.ranges["batch"][0]:
        raise LoweringError(f"tensorrt: the graph takes no batch of {least}")
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        given = network.get_input(number)
        shapes = [
            tuple(count if size == -1 else size for size in given.shape)
            for count in (least, min(max(best, least), most), most)
        ]
        profile.set_shape(given.name, *shapes)
    config.add_optimization_profile(profile)
    return {"batch": (least, most)}


def _batch(exported: Exported) -> int:
    """The batch size of the example."""
    leaves = pytree.tree_leaves(exported.asked)
    for number, shape in exported.shapes.items():
        if "batch" in shape:
            size: int = leaves[number].shape[shape.index("batch")]
            return size
    return 1


def absent() -> str | None:
    """Why an engine cannot run here; None if it can."""
    return None if torch.cuda.is_available() else "there is no GPU here to run a TensorRT engine on"


def start(path: Path, manifest: Manifest) -> Session:
    """The engine on the current GPU, on its current stream."""
    trt = _imported(manifest.detail["library"].split()[0])
    log = _Log(trt)
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise LoweringError(
            f"{path}: {trt.__name__} {trt.__version__} does not load it: {log.errors()}"
        )
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    given = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    results = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
    dtypes = [dtype_of(entry) for entry in manifest.outputs if "dtype" in entry]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        home = tensors[0].device
        placed = [x.cuda().contiguous() for x in tensors]
        for name, x in zip(given, placed, strict=True):
            context.set_input_shape(name, tuple(x.shape))
            context.set_tensor_address(name, x.data_ptr())
        outputs = []
        for name, dtype in zip(results, dtypes, strict=True):
            made = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, made.data_ptr())
            outputs.append(made)
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise LoweringError(f"{path}: the engine failed: {log.errors()}")
        return [made.to(home) for made in outputs]

    return run


def load_engine(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The engine at ``path``, as a function that is called like its module.

    Raises:
        LoweringError: the file is damaged or not an engine, or there is no such GPU here.
    """
    manifest = read(Path(path))
    if manifest.backend != "tensorrt":
        raise LoweringError(f"{path} is a file of {manifest.backend}: load it with fxtemporal.load")
    if (reason := absent()) is not None:
        raise LoweringError(f"{path}: {reason}")
    run = start(Path(path), manifest)

    def call(*args: Any, **kwargs: Any) -> Any:
        return manifest.unflatten(run(manifest.flatten(args, kwargs)))

    return call
