"""Checks on the model and the example inputs that a user gave, and their binding to the forward."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxtemporal.support.errors import CaptureError
from fxtemporal.support.torch_private.compilers import is_compiled

__all__ = [
    "Model",
    "behind_pre_hooks",
    "bind_example",
    "check_arguments",
    "check_types",
    "example_of",
]

Model = nn.Module | fx.GraphModule | ExportedProgram


def example_of(
    model: Model, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The example inputs to use: those given, or those that an ExportedProgram carries."""
    if args is not None or kwargs is not None:
        return args or (), dict(kwargs or {})
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        own_args, own_kwargs = model.example_inputs
        return tuple(own_args), dict(own_kwargs)
    return None


def bind_example(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """``{parameter: value}`` of ``model.forward(*args, **kwargs)``, defaults left out."""
    signature = inspect.signature(model.forward)
    named = [p.name for p in signature.parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        near = [
            f"; {key!r} may be {match!r}"
            for key in kwargs
            if key not in named
            for match in difflib.get_close_matches(key.lower(), named, 1)
        ]
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
            f"{''.join(near)}"
        ) from error
    return dict(bound.arguments)


def check_arguments(model: Any, args: Any, kwargs: Any) -> None:
    """Raise :class:`CaptureError` unless these are a model with Python to trace, and its inputs."""
    check_types(model, args, kwargs)
    if is_compiled(model):
        raise CaptureError(
            "a module that torch.compile returned: give the original (its _orig_mod), and compile "
            "the result"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python to trace: give the original module")


def check_types(model: Any, args: Any, kwargs: Any) -> None:
    """Raise :class:`CaptureError` unless these are a model, a tuple and a dict."""
    if not isinstance(model, nn.Module | ExportedProgram):
        raise CaptureError(
            f"expected an nn.Module, a torch.fx.GraphModule or an ExportedProgram, "
            f"got {type(model).__name__}"
        )
    scripted = isinstance(model, torch.jit.ScriptModule)
    if isinstance(model, nn.Module) and not scripted and "_parameters" not in vars(model):
        raise CaptureError(
            f"{type(model).__name__}.__init__ does not call super().__init__(): call it first in it"
        )
    if args is not None and not isinstance(args, tuple | list):
        raise CaptureError(
            f"example_inputs must be a tuple of the forward's arguments, got "
            f"{type(args).__name__}: write (x,) for one, as in optimize(model, (x,))"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(f"example_kwargs must be a dict, got {type(kwargs).__name__}")


def behind_pre_hooks(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """``(args, kwargs)`` that the forward pre-hooks of ``model`` pass on to the forward.

    The graph is traced from these: the compiled model keeps its hooks, which run before the graph.
    """
    for number, hook in model._forward_pre_hooks.items():
        if number in model._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(model, args, kwargs) or (args, kwargs)
            continue
        changed = hook(model, args)
        if changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs
