"""Patches that answer Python's questions about proxies as the real values would.

``isinstance(x, Tensor)``, ``type(x)`` and ``torch.finfo(x.dtype)`` get the answer of the real
value. A read of ``self.training`` is answered and recorded: the trace is right for that mode only.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import TraceError

from fxtemporal.capture.tracing.base_tracer import namespaces, swap, swap_item
from fxtemporal.capture.tracing.errors import GradientModeError, StatefulError
from fxtemporal.capture.tracing.shape_proxy import ReadingTracer, ShapeProxy
from fxtemporal.capture.tracing.short_circuit import makes_no_difference
from fxtemporal.ir.guards import Specialization
from fxtemporal.ir.source import is_user_file, short_location
from fxtemporal.support.errors import CaptureError
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.compilers import dynamo_knows_functions
from fxtemporal.support.torch_private.fake_tensors import FakeTensor

__all__ = [
    "answering",
    "custom_functions",
    "gradient_questions",
    "modes_read",
    "refusing_long_lists",
    "refusing_seeds",
    "user_location",
]

_OUTSIDE = "fxtemporal.capture.capture"
"""The module that starts a trace: stack frames outside it do not belong to the forward."""


_LONGEST_LIST = 256
_ASKED_MODE = "the forward asks whether gradients are recorded"


@contextmanager
def answering(tracer: ReadingTracer, root: nn.Module) -> Iterator[None]:
    """Answer as real values would, in all code that the forwards of ``root`` are written in."""
    is_tensor = partial(_isinstance, kinds=torch.Tensor)
    with ExitStack() as stack:
        stack.enter_context(swap(torch, "is_tensor", is_tensor))
        stack.enter_context(swap(torch.jit, "isinstance", _of_values(torch.jit.isinstance)))
        autocast = _reading(tracer, torch.autocast.__init__)
        stack.enter_context(swap(torch.autocast, "__init__", autocast))
        for function in (torch.finfo, torch.iinfo):
            stack.enter_context(swap(torch, function.__name__, _reading(tracer, function)))
        grad_mode = _grad_mode(torch.is_grad_enabled, tracer.grad_mode)
        stack.enter_context(swap(torch, "is_grad_enabled", grad_mode))
        for namespace in namespaces(root):
            stack.enter_context(swap_item(namespace, "isinstance", _isinstance))
            stack.enter_context(swap_item(namespace, "type", _Type))
        yield


def _isinstance(value: Any, kinds: Any) -> bool:
    """isinstance() that sees through a proxy."""
    if builtins.type(value) is ShapeProxy:
        if not value.known:
            raise TraceError("isinstance() of an input, and no example inputs were given")
        is_parameter = value.node.op == "get_attr" and kinds is nn.Parameter
        return is_parameter or isinstance(value.val, kinds)
    return isinstance(value, kinds)


def _of_values(jit_isinstance: Callable[..., bool]) -> Callable[..., bool]:
    """torch.jit.isinstance() that sees through proxies, in lists and dicts too."""

    def value(leaf: Any) -> Any:
        if builtins.type(leaf) is not ShapeProxy:
            return leaf
        if not leaf.known:
            raise TraceError("isinstance() of an input, and no example inputs were given")
        return leaf.val

    return lambda obj, kinds: jit_isinstance(pytree.tree_map(value, obj), kinds)


def _reading(tracer: ReadingTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that needs real values: torch.autocast of ``x.device.type``."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        why = f"{function.__qualname__}()"
        read = partial(pytree.tree_map_only, ShapeProxy, lambda proxy: tracer.read(proxy, why))
        return function(*(read(arg) for arg in args), **read(kwargs))

    return wrapper


class _TypeOfValues(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], ShapeProxy):
            return type(*args, **kwargs)
        if not args[0].known:
            raise TraceError("type() of an input, and no example inputs were given")
        if args[0].node.op == "get_attr":
            return nn.Parameter if isinstance(args[0].val, nn.Parameter) else torch.Tensor
        value = args[0].val
        return torch.Tensor if isinstance(value, torch.Tensor) else type(value)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, type)


class _Type(type, metaclass=_TypeOfValues):
    """type() that sees through a proxy."""


def _grad_mode(is_grad_enabled: Callable[[], bool], answer: bool | None) -> Callable[[], bool]:
    """Answers user code as if the caller's mode were ``answer``; with None, it is refused."""
    owner = threading.get_ident()

    def wrapper() -> bool:
        asker = sys._getframe(1)
        on = is_grad_enabled()  # off where the forward itself switches gradients off
        if not on or threading.get_ident() != owner or not is_user_file(asker.f_code.co_filename):
            return on
        if answer is None and not makes_no_difference(asker):
            raise GradientModeError(_ASKED_MODE, answerable=True)
        return answer is not False

    return wrapper


@contextmanager
def gradient_questions() -> Iterator[list[str]]:
    """Collect what user code asks of gradients during torch.export, which answers for its own mode.

    The questions are ``torch.is_grad_enabled()`` and, of a fake tensor, ``requires_grad`` and the
    like.
    """
    owner, asked = threading.get_ident(), list[str]()

    def note(question: str, asker: types.FrameType) -> None:
        if threading.get_ident() == owner and is_user_file(asker.f_code.co_filename):
            asked.append(question)

    is_grad_enabled = torch.is_grad_enabled

    def grad_mode() -> bool:
        note(_ASKED_MODE, sys._getframe(1))
        return is_grad_enabled()

    def noted(name: str) -> property:
        known = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor) -> Any:
            note(f"the forward reads {name}", sys._getframe(1))
            return known.__get__(tensor)

        return property(read, known.__set__ if name == "requires_grad" else None)

    with ExitStack() as stack:
        if dynamo_knows_functions():
            stack.enter_context(swap(torch, "is_grad_enabled", grad_mode))
        for name in ("requires_grad", "grad_fn", "is_leaf"):
            setattr(FakeTensor, name, noted(name))
            stack.callback(delattr, FakeTensor, name)
        yield asked


@contextmanager
def modes_read(
    root: nn.Module, counts: Callable[[], bool] = lambda: True
) -> Iterator[dict[str, Specialization]]:
    """Collect the modules of ``root`` whose forwards read or set a ``training`` flag, by path.

    A flag is recorded only while ``counts()`` is true. One that the forward sets before any read
    (``sets``) holds in every mode.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    found: dict[str, Specialization] = {}
    known: set[str] = set()

    def note(module: nn.Module, mode: bool, **what: Any) -> None:
        path = paths.get(id(module))
        if path is None or path in found or not _in_a_forward():
            return
        if counts():
            name = f"{path}.training" if path else "training"
            found[path] = Specialization(name, mode, user_location(), **what)
        known.add(path)

    def read(module: nn.Module) -> bool:
        try:
            mode = bool(vars(module)["training"])
        except KeyError:
            raise AttributeError("training") from None
        note(module, mode, why="the forward read it")
        return mode

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode
        first = paths.get(id(module)) not in known
        note(module, mode, why="the forward sets it", sets=first)

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield found
    finally:
        del nn.Module.training


@contextmanager
def custom_functions() -> Iterator[list[str]]:
    """Collect the ``torch.autograd.Function``s this thread calls: a graph lacks their backward."""
    owner, called = threading.get_ident(), []
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == owner:
            called.append(cls.__name__)
        return original.__get__(None, cls)(*args, **kwargs)

    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010
    try:
        yield called
    finally:
        setattr(torch.autograd.Function, "apply", original)  # noqa: B010


@contextmanager
def refusing_seeds() -> Iterator[None]:
    """Refuse a forward, in this thread, that seeds torch's generator: a graph cannot hold that."""
    names = ("manual_seed", "seed", "set_rng_state")
    with ExitStack() as stack:
        for owner, name in itertools.product((torch, torch.random), names):
            stack.enter_context(swap(owner, name, _refusing_to_seed(getattr(owner, name))))
        yield


def _refusing_to_seed(function: Callable[..., Any]) -> Callable[..., Any]:
    owner = threading.get_ident()

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == owner and is_user_file(sys._getframe(1).f_code.co_filename):
            raise StatefulError("the forward seeds torch's random numbers")
        return function(*args, **kwargs)

    return wrapper


@contextmanager
def refusing_long_lists() -> Iterator[None]:
    """Refuse ``tolist()`` of many numbers during torch.export: each would become a symbol.

    Raises:
        CaptureError: inside of the forward, in this thread.
    """
    owner, original = threading.get_ident(), FakeTensor.tolist

    @functools.wraps(original)
    def tolist(tensor: FakeTensor) -> Any:
        count: Any = tensor.numel()
        count = count.node.hint or 0 if isinstance(count, torch.SymInt) else count  # no guard on it
        if threading.get_ident() == owner and count > _LONGEST_LIST:
            where = user_location()
            raise CaptureError(
                f"tolist(){f' at {where}' if where else ''} hands {count} numbers to "
                "Python, and a graph would need a step for each: keep them in a tensor"
            )
        return original(tensor)

    with swap(FakeTensor, "tolist", tolist):
        yield


def _frames() -> Iterator[types.FrameType]:
    """The stack frames from the caller out to where the tracing began."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") != _OUTSIDE:
        yield frame
        frame = frame.f_back


def _in_a_forward() -> bool:
    call = nn.Module._call_impl.__code__
    tracing = "fxtemporal.capture.tracing.shape_tracer"
    return any(f.f_code is call or f.f_globals.get("__name__") == tracing for f in _frames())


def user_location() -> str | None:
    """The innermost line of the user's code that is running inside the traced forward."""
    for frame in _frames():
        if is_user_file(frame.f_code.co_filename):
            return short_location(frame.f_code.co_filename, frame.f_lineno)
    return None
