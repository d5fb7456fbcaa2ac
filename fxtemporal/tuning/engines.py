"""The engines that run a graph while choices are measured for them.

::

    compiled = compile_with("openvino", model, (clip,))
    compiled.run(clip)        # tensors in, tensors out, whatever runs in between
    compiled.seconds          # from the module to its first result

Every engine runs in float32 on torch's number of threads, with the input sizes fixed. OpenVINO and
ONNX Runtime take and give NumPy arrays, which share memory with the tensors; only OpenVINO's
results are copied, lest the next call overwrite them. Both engines are optional, and imported only
when asked for.
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

    ``build`` makes of a module what runs it, ``packages`` are what it needs beside torch, and
    ``scope`` is entered around building and the first call, before the clock starts.
    """

    name: str
    build: Callable[[nn.Module, Inputs], Callable[..., Any]]
    packages: tuple[str, ...] = ()
    scope: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Compiled:
    """A model on an engine: ``run`` calls it, ``seconds`` is what its first result took."""

    run: Callable[..., Any]
    seconds: float


def _eager(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    return model


def _inductor(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    return torch.compile(_of_its_own(model), dynamic=False)


def _of_its_own(model: nn.Module) -> nn.Module:
    """``model`` behind a forward that no other module has.

    Dynamo keeps what it compiled with the code of a forward, 8 times at most; modules of one class
    share that code, and the ninth would run in eager mode.
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
    """Frozen weights and empty caches, so that no compilation profits from an earlier one.

    A first, tiny compilation pays for what is paid once a machine, the precompiled headers.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        for context in in_fresh_cache(folder, freezing=True):
            stack.enter_context(context)
        torch.compile(_increment, dynamic=False)(torch.zeros(8))
        yield


def _converted(model: nn.Module, inputs: Inputs) -> Any:
    """An OpenVINO model of fixed input sizes.

    Converted from the module, which keeps an ``nn.LSTM`` whole. Where ``torch.jit.trace`` refuses
    the module (it knows no comparison of booleans), from an exported program, which does not.
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
    import onnx  # noqa: F401  # both are needed by the exporter, which names only one of them
    import onnxscript  # noqa: F401

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    return _by_position(onnxruntime_session(program.model_proto.SerializeToString()))


def _by_position(session: Session) -> Callable[..., Any]:
    """Called like a module: a tensor if there is one result, else a tuple of them."""

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
        warnings.simplefilter("ignore")  # the exporters warn of what they did to the LSTM
        with chosen.scope():
            run, seconds = timed(built)
    return Compiled(run, seconds)


def reset() -> None:
    """Forget what Inductor compiled so far: it keeps 8 forms of one forward, and no more."""
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
