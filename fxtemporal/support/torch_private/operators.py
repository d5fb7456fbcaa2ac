"""Torch's private namespaces of ops. Required: graphs call functions in them."""

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx._pytree import tree_flatten_spec

from fxtemporal.support.torch_private import needed

__all__ = ["NN", "VF", "HigherOrderOperator", "OpOverload", "check", "tree_flatten_spec"]

VF = needed("torch._VF")
"""Functions that ``nn.LSTM`` and other recurrent layers call."""
NN = needed("torch._C._nn")
"""Functions that ``torch.nn.functional`` re-exports."""


def check(condition: bool) -> None:
    """Make torch.export assume ``condition`` on sizes, and check it at each call."""
    torch._check(condition)  # type: ignore[no-untyped-call]
