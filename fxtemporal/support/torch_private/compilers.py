"""Private parts of Dynamo and Inductor. Imported when used: each takes seconds to import."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fxtemporal.support.torch_private import needed

__all__ = [
    "compile_package",
    "dynamo_backend",
    "dynamo_knows_functions",
    "in_fresh_cache",
    "inductor_backend",
    "is_compiled",
    "is_static",
    "load_package",
]


def is_compiled(model: object) -> bool:
    """Whether ``model`` is a module that ``torch.compile`` returned."""
    return isinstance(model, torch._dynamo.OptimizedModule)


def inductor_backend(mode: str | None, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Inductor, as torch.compile's backend."""
    found: Callable[..., Any] = needed("torch._TorchCompileInductorWrapper")(
        mode, dict(options), None
    )
    return found


def dynamo_backend(name: str | Callable[..., Any]) -> Callable[..., Any]:
    """The backend of torch.compile called ``name``; a callable is returned as it is."""
    found: Callable[..., Any] = needed("torch._dynamo.backends.registry.lookup_backend")(name)
    return found


def dynamo_knows_functions() -> bool:
    """Make Dynamo build its tables of torch's functions; False if this torch builds them otherwise.

    It builds them at first use: a function that is replaced at that moment would be missing in them
    as long as the process lives.
    """
    try:
        needed("torch._dynamo.trace_rules.lookup")(torch.is_grad_enabled)
        module = "torch._dynamo.variables.torch.TorchInGraphFunctionVariable"
        return torch.is_grad_enabled in needed(module)._get_handlers()
    except (ImportError, AttributeError):
        return False


def is_static(tensor: Tensor) -> bool:
    """Whether Dynamo treats a tensor as a parameter or buffer of the model."""
    return needed("torch._dynamo.utils.get_static_address_type")(tensor) is not None


def in_fresh_cache(folder: str, **config: Any) -> list[AbstractContextManager[Any]]:
    """Contexts in which Inductor starts from an empty cache in ``folder``, with these settings."""
    fresh_cache = needed("torch._inductor.utils.fresh_cache")
    return [
        fresh_cache(dir=folder, delete=False),
        needed("torch._inductor.config").patch(**config),
    ]


def compile_package(program: ExportedProgram, path: str, config: Mapping[str, Any]) -> None:
    """Compile a program ahead of time, into a file."""
    needed("torch._inductor.aoti_compile_and_package")(
        program, package_path=path, inductor_configs=dict(config)
    )


def load_package(path: str) -> Callable[..., Any]:
    """A callable for the file that :func:`compile_package` wrote."""
    found: Callable[..., Any] = needed("torch._inductor.aoti_load_package")(path)
    return found
