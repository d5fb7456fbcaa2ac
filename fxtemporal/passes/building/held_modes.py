"""Training modes that a model must keep after a rewrite."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fxtemporal.ir.guards import Specialization
from fxtemporal.support.torch_private.layers import Dropout, Norm

__all__ = ["modes_of_folded"]


def modes_of_folded(model: nn.Module) -> Mapping[str, Specialization]:
    """The modes of layers on folded frames that, in the other mode, would mix all frames."""
    kinds = (Norm, Dropout)
    why = "a loop was re-rolled, and in the other mode it would see all its frames at once"
    return {
        path: Specialization(f"{path}.training", module.training, None, why)
        for path, module in model.named_modules()
        if isinstance(module, kinds) or getattr(module, "dropout", False)
    }
