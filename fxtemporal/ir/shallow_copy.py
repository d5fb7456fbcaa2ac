"""A second module tree over the same parameters.

``optimize`` must never change the model it is given, and its result must train the same
parameters. So the result is built from *twins*: new module objects (own training flag, own hooks,
own dictionaries) that hold the same parameter and buffer tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType

from torch import nn
from torch.jit import ScriptModule

__all__ = ["HOOK_TABLES", "carries_hooks", "forget_hooks", "runs_torch_alone", "twin"]

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps the hooks of its calls, and how to call them."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_LAYERS = (
    "torch.nn.modules.",
    "torch.nn.utils.",
    "torch.nn.functional",
    "torch._C",
    "fxtemporal.",
)
"""The homes of torch's layers, parametrizations, hooks and activations, and of this package."""

_CONTAINERS = (dict, list, set, OrderedDict)


def carries_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself carries hooks, which run at every call of it."""
    return any(getattr(module, name, None) for name in _HOOKS)


def forget_hooks(module: nn.Module) -> None:
    """Remove the hooks of calls of ``module`` itself, without changing tables that others share."""
    vars(module).update((name, OrderedDict()) for name in HOOK_TABLES)


def runs_torch_alone(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs only code of torch's layers and of this package.

    The classes of all its parts count with their bases, as a parametrized layer's class is torch's,
    and its base may be the user's; so do hooks, and functions that are attributes. Modules of torch
    that run a user's code (graphs, scripts) or keep state in eval mode (observers) are no layers.
    """
    for part in module.modules():
        hooks = [hook for name in _HOOKS for hook in (getattr(part, name, None) or {}).values()]
        functions = [value for value in vars(part).values() if callable(value)]
        code = (*type(part).__mro__[:-1], *functions, *hooks)
        homes = [getattr(value, "__module__", None) or type(value).__module__ for value in code]
        if not all(home == "torch" or home.startswith(_LAYERS) for home in homes):
            return False
    return True


def twin(module: nn.Module) -> nn.Module:
    """A tree of new modules that shares every tensor with ``module``, and has the same ties."""
    memo: dict[int, nn.Module] = {}
    result = _twin(module, memo)
    for copy in memo.values():
        for holder in (vars(copy), *(v for v in vars(copy).values() if isinstance(v, dict))):
            for name, value in list(holder.items()):
                if isinstance(value, MethodType) and id(value.__self__) in memo:
                    holder[name] = MethodType(value.__func__, memo[id(value.__self__)])
    return result


def _twin(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, ScriptModule):
        return module  # its compiled code refers to it: it cannot be copied
    copy = object.__new__(type(module))  # GraphModule.__new__ would make an empty class
    memo[id(module)] = copy
    copy.__dict__ = {
        name: value.copy() if type(value) in _CONTAINERS else value  # a subclass may hold more
        for name, value in module.__dict__.items()
    }
    copy.__dict__["_modules"] = {
        name: None if child is None else _twin(child, memo)
        for name, child in module._modules.items()
    }
    return copy
