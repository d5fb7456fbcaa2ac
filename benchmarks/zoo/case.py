"""One model of the zoo: how to build it small, with random weights, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Built", "ZooCase", "configured"]


@dataclass(frozen=True)
class Built:
    """A model and the arguments of one call of it."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class ZooCase:
    """A model that a package defines, in a small random configuration.

    ``batch`` and ``frames`` are the dimensions of the inputs that hold samples and frames; None if
    there is no such dimension. ``method`` is called in place of ``forward``.
    """

    package: str
    name: str
    build: Callable[[], Built]
    method: str | None = None
    batch: int | None = 0
    frames: int | None = 2


def configured(
    package: str,
    make: Callable[[str, dict[str, Any]], nn.Module],
    name: str,
    config: dict[str, Any],
    shape: tuple[int, ...] | None,
    inputs: Callable[[], dict[str, Any]] = dict,
    *,
    variant: str = "",
    method: str | None = None,
    batch: int | None = 0,
    frames: int | None = 2,
) -> ZooCase:
    """``make(name, config)``, called with a random tensor of ``shape``, if any, and ``inputs``."""

    def build() -> Built:
        args = () if shape is None else (torch.randn(shape),)
        return Built(make(name, config), args, inputs())

    full_name = name.rpartition(".")[2] + variant + (f".{method}" if method else "")
    return ZooCase(package, full_name, build, method, batch, frames)
