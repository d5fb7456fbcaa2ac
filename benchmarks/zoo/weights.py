"""Random weights with which outputs depend on inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.zoo.case import Built

__all__ = ["noisy", "settled"]


def noisy(model: nn.Module) -> nn.Module:
    """The model in eval mode, with noise on the weights that start at zero, one or a tiny value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def settled(model: nn.Module, *args: Any) -> Built:
    """The model in eval mode, its batch norms set to the statistics of one call with ``args``.

    With the statistics of a fresh model, the signal fades from layer to layer, until the output no
    longer depends on the input.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain average over the calls
        norm.train()
    with torch.no_grad():
        model(*args)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return Built(model, args)
