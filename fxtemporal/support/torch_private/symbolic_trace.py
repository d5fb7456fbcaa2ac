"""Private parts of torch.fx's tracer. Required: to make its patches safe between threads."""

from torch.fx import _symbolic_trace as module
from torch.fx._symbolic_trace import _Patcher as Patcher

__all__ = ["Patcher", "module", "wrapped_functions"]


def wrapped_functions() -> dict[tuple[int, str], dict[str, object]]:
    """The functions under ``torch.fx.wrap``, each with its namespace."""
    found: dict[tuple[int, str], dict[str, object]] = module._wrapped_fns_to_patch
    return found
