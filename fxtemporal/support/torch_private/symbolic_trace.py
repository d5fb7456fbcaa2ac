"""The tracer of torch.fx from within. Needed: its patches are made safe between threads."""

from torch.fx import _symbolic_trace as module
from torch.fx._symbolic_trace import _Patcher as Patcher

__all__ = ["Patcher", "module", "wrapped_functions"]


def wrapped_functions() -> dict[tuple[int, str], dict[str, object]]:
    """The functions under ``torch.fx.wrap``, with the namespace that each stands in."""
    found: dict[tuple[int, str], dict[str, object]] = module._wrapped_fns_to_patch
    return found
