"""The engines that can run a graph, for timing choices on them.

::

    compiled = compile_with("openvino", model, (clip,))
    compiled.run(clip)        # tensors in, tensors out, on every engine
    compiled.seconds          # from the module to its first result

Every engine runs in float32 on torch's number of threads, with the input sizes fixed. OpenVINO and
ONNX Runtime take and return NumPy arrays, which share memory with the tensors; only OpenVINO's
results are copied, so that the next call does not overwrite them. Both engines are optional, and
imported only when used.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from fxtemporal.support.clock import timed
from fxtemporal.support.torch_private.compilers import in_fresh_cache

__all__ = ["ENGINES", "Compiled", "Engine", "compile_with", "reset", "versions"]

Inputs = tuple[Tensor, ...]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Engine:
    """One engine.

    ``build`` makes a callable of a module, ``packages`` are required besides torch, ``scope`` is
    entered around building and the first call, before the clock starts.
    """

    name: str
    build: Callable[[nn.Module, Inputs], Run]
    packages: tuple[str, ...] = ()
    scope: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Compiled:
    """A model on an engine: ``run`` calls it, ``seconds`` is the time to its first result."""

    run: Run
    seconds: float


def _eager(model: nn.Module, inputs: Inputs) -> Run:
    return model


def _inductor(model: nn.Module, inputs: Inputs) -> Run:
    return torch.compile(_of_its_own(model), dynamic=False)


def _of_its_own(model: nn.Module) -> nn.Module:
    """``model`` wrapped in a module with its own forward.

    Dynamo keeps at most 8 compilations with the code of a forward. Modules of one class share that
    code, and the ninth would run in eager mode.
    """

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Tensor) -> Any:
            return self.model(*args)

    Alone.forward.__code__ = Alone.forward.__code__.replace()
    return Alone()


def _increment(x: Tensor) -> Tensor:
    return x + 1


@contextmanager
def _inductor_scope() -> Iterator[None]:
    """Freeze weights and use empty caches, so that no compilation profits from an earlier one.

    A first, tiny compilation does the work that is done once a machine: precompiled headers.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        for context in in_fresh_cache(folder, freezing=True):
            stack.enter_context(context)
        torch.compile(_increment, dynamic=False)(torch.zeros(8))
        yield


def _converted(model: nn.Module, inputs: Inputs) -> Any:
    """An OpenVINO model of fixed input sizes.

    Converted from the module, which keeps an ``nn.LSTM`` as one op. If ``torch.jit.trace`` refuses
    the module (it cannot compare booleans), it is converted from an exported program, which does
    not keep it.
    """
    import openvino

    try:
        converted = openvino.convert_model(model, example_input=inputs)
    except RuntimeError:
        converted = openvino.convert_model(torch.export.export(model, inputs))
    converted.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
    return converted


def _openvino(model: nn.Module, inputs: Inputs) -> Run:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 on CPUs that have it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(_converted(model, inputs), "CPU", settings)

    def run(*args: Tensor) -> Any:
        results = compiled([x.numpy() for x in args], share_inputs=True)
        return _tensors([results[i] for i in range(len(compiled.outputs))])

    return run


def _onnxruntime(model: nn.Module, inputs: Inputs) -> Run:
    import onnx  # noqa: F401  # the exporter needs both, but its error names only one
    import onnxruntime
    import onnxscript  # noqa: F401

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads spin while a call runs, as by default, but stop before the next engine's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]

    def run(*args: Tensor) -> Any:
        arrays = {name: x.numpy() for name, x in zip(names, args, strict=True)}
        return _tensors(session.run(None, arrays))

    return run


def _tensors(arrays: list[Any]) -> Any:
    """The array as a tensor if there is one, else a tuple of tensors."""
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    return tensors[0] if len(tensors) == 1 else tensors


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("eager", _eager),
        Engine("inductor", _inductor, scope=_inductor_scope),
        Engine("openvino", _openvino, ("openvino",)),
        Engine("onnxruntime", _onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    )
}


@torch.no_grad()
def compile_with(engine: str, model: nn.Module, inputs: Inputs) -> Compiled:
    """``model`` ready to run on an engine of :data:`ENGINES`, and how long that took.

    Raises:
        ImportError: the engine is not installed.
        Exception: whatever the engine raises on this model.
    """
    chosen = ENGINES[engine]

    def built() -> Callable[..., Any]:
        run = chosen.build(model, inputs)
        run(*inputs)
        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about the LSTM
        with chosen.scope():
            run, seconds = timed(built)
    return Compiled(run, seconds)


def reset() -> None:
    """Drop all compilations of Inductor, which keeps at most 8 of one forward."""
    torch.compiler.reset()


def versions(engines: Iterable[str]) -> dict[str, str]:
    """The versions of the packages that these engines run on, as installed."""
    found = {}
    known = [ENGINES[name] for name in engines if name in ENGINES]
    for package in (package for engine in known for package in engine.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
