"""The tracer for code that was generated from a graph.

It also records buffers, tensor factories (``torch.zeros``) and einops.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import einops
import torch
from torch import fx, nn

from fxtemporal.ir.source import is_user_file
from fxtemporal.support.torch_private import symbolic_trace

__all__ = ["RecordingTracer", "namespaces", "one_capture", "swap", "swap_item"]

_FACTORIES = """
    arange bartlett_window blackman_window empty eye full hamming_window hann_window linspace
    logspace normal ones rand randint randn randperm scalar_tensor tensor tril_indices triu_indices
    zeros
""".split()
_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack")


one_capture = threading.RLock()
"""Lock that lets one capture run at a time: what a capture patches is global to the process."""


@contextmanager
def in_this_thread_alone() -> Iterator[None]:
    """Limit the patches of torch.fx to this thread: other threads see the original functions.

    ``Tracer.trace`` replaces ``nn.Module.__call__`` and ``__getattr__``, and sets a flag. Here its
    patcher installs functions, and a flag, that first ask which thread calls.
    """
    owner = threading.get_ident()

    class Patcher(symbolic_trace.Patcher):
        def __init__(self) -> None:
            super().__init__()
            symbolic_trace.module._is_fx_tracing_flag = _InThread(owner)  # type: ignore[assignment]

        def patch_method(
            self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True
        ) -> None:
            original = getattr(cls, name)

            def here(*args: Any, **kwargs: Any) -> Any:
                function = new_fn if threading.get_ident() == owner else original
                return function(*args, **kwargs)

            super().patch_method(cls, name, here, deduplicate)

    with swap(symbolic_trace.module, "_new_patcher", Patcher):
        yield


class _InThread:
    """A flag that is true in one thread only."""

    def __init__(self, owner: int) -> None:
        self._owner = owner

    def __bool__(self) -> bool:
        return threading.get_ident() == self._owner


class RecordingTracer(fx.Tracer):
    """An fx tracer that also records buffers, tensor factories (``torch.zeros``) and einops.

    Unpickling a :class:`torch.fx.GraphModule` traces its code again; this is the tracer for that.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._inside_leaf = False

    def trace(  # type: ignore[override]
        self, root: nn.Module, concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        with one_capture, self._patched(root), in_this_thread_alone():
            return super().trace(root, concrete_args)

    @contextmanager
    def _patched(self, root: nn.Module) -> Iterator[None]:
        """Replace the factories by recording ones, wherever the forwards of ``root`` see them."""
        originals = [(torch, name) for name in _FACTORIES] + [(einops, name) for name in _EINOPS]
        recorded = {
            id(getattr(owner, name)): self._recorded(getattr(owner, name))
            for owner, name in originals
        }
        with ExitStack() as stack:
            for namespace in namespaces(root):
                for key, value in list(namespace.items()):
                    if id(value) in recorded:
                        stack.enter_context(swap_item(namespace, key, recorded[id(value)]))
            for owner, name in originals:
                stack.enter_context(swap(owner, name, recorded[id(getattr(owner, name))]))
            yield

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        owner = threading.get_ident()

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            elsewhere = threading.get_ident() != owner
            if elsewhere or self._inside_leaf or not hasattr(self, "graph"):
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return wrapper


def namespaces(root: nn.Module) -> list[dict[str, Any]]:
    """The globals of the code that the forwards of ``root`` are written in."""
    found: dict[int, dict[str, Any]] = {}

    def visit(namespace: dict[str, Any]) -> None:
        if is_user_file(str(namespace.get("__file__", "")) or "?"):
            found.setdefault(id(namespace), namespace)

    for module in root.modules():
        for base in type(module).__mro__:
            forward = vars(base).get("forward")
            if isinstance(forward, types.FunctionType):
                visit(inspect.unwrap(forward).__globals__)
    for namespace in list(found.values()):
        for value in list(namespace.values()):
            if isinstance(value, types.FunctionType):
                visit(value.__globals__)
    return list(found.values())


@contextmanager
def swap(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def swap_item(namespace: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    missing = object()
    original = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        if original is missing:
            del namespace[name]
        else:
            namespace[name] = original
