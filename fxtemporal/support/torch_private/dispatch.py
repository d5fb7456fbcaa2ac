"""Detects modes that record ops. Required: recorded values must not be computed beforehand."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxtemporal.support.torch_private import needed

__all__ = [
    "DisableTorchFunction",
    "TorchDispatchMode",
    "is_dispatched",
    "is_intercepted",
    "is_traced",
]

DisableTorchFunction = needed("torch._C.DisableTorchFunction")
"""A context in which no ``__torch_function__`` is called."""


def is_dispatched() -> bool:
    """Whether a ``TorchDispatchMode`` sees each op."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_intercepted() -> bool:
    """Whether a ``TorchFunctionMode`` sees each call."""
    return torch._C._len_torch_function_stack() > 0


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records."""
    return torch._C._get_tracing_state() is not None
