"""How torch holds its ops. Needed: a graph of torch.export calls overloads, and others methods."""

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx._pytree import tree_flatten_spec

from fxtemporal.support.torch_private import needed

__all__ = ["NN", "VF", "HigherOrderOperator", "OpOverload", "check", "tree_flatten_spec"]

VF = needed("torch._VF")
"""Functions that ``nn.LSTM`` and its kind call."""
NN = needed("torch._C._nn")
"""Functions that ``torch.nn.functional`` hands on."""


def check(condition: bool) -> None:
    """Have torch.export take ``condition`` of sizes for true, and check it at each call."""
    torch._check(condition)  # type: ignore[no-untyped-call]
