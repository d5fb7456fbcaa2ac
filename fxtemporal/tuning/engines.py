"""The engines that can run a graph, for timing choices on them.

::

    compiled = compile_with(ENGINES["openvino"], model, (clip,))
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
from fxtemporal.tuning.sessions import Session, onnxruntime_session, openvino_session

__all__ = ["ENGINES", "Compiled", "Engine", "compile_with", "reset", "versions"]

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Engine:
    """One engine.

    ``build`` makes a callable of a module, ``packages`` are required besides torch, ``scope`` is
    entered around building and the first call, before the clock starts.
    """

    name: str
    build: Callable[[nn.Module, Inputs], Callable[..., Any]]
    packages: tuple[str, ...] = ()
    scope: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Compiled:
    """A model on an engine: ``run`` calls it, ``seconds`` is the time to its first result."""

    run: Callable[..., Any]
    seconds: float


def _eager(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    return model


def _inductor(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
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


def _openvino(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    return _by_position(openvino_session(_converted(model, inputs)))


def _onnxruntime(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    import onnx  # noqa: F401  # the exporter needs both, but its error names only one
    import onnxscript  # noqa: F401

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    return _by_position(onnxruntime_session(program.model_proto.SerializeToString()))


def _by_position(session: Session) -> Callable[..., Any]:
    """``session`` as a function that is called like a module: it returns a tensor or a tuple."""

    def run(*args: Tensor) -> Any:
        tensors = session(args)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    return run


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
def compile_with(engine: Engine, model: nn.Module, inputs: Inputs) -> Compiled:
    """``model`` ready to run on an engine, and how long that took.

    Raises:
        ImportError: the engine is not installed.
        Exception: whatever the engine raises on this model.
    """

    def built() -> Callable[..., Any]:
        run = engine.build(model, inputs)
        run(*inputs)
        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about the LSTM
        with engine.scope():
            run, seconds = timed(built)
    return Compiled(run, seconds)


def reset() -> None:
    """Drop all compilations of Inductor, which keeps at most 8 of one forward."""
    torch.compiler.reset()


def versions(engines: Iterable[Engine]) -> dict[str, str]:
    """The versions of the packages that these engines run on, as installed."""
    found = {}
    for package in (package for engine in engines for package in engine.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
