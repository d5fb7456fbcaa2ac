"""What the models of the zoo are made of."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxtemporal.ir.reasons import Code

CHANNELS, SIDE, WIDTH, FEATURES = 3, 8, 4, 5


class Awkward(nn.Module):
    """Base of the zoo.

    ``blocker`` is the reason that must keep a loop from being re-rolled as a whole; None means that
    it must be re-rolled. ``sizes`` are pairs (batch, frames) that it runs at. ``trains`` leaves the
    model in training mode. ``fails`` names the error that the model itself raises.
    """

    blocker: ClassVar[Code | None] = None
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((2, 4), (3, 4), (2, 6))
    trains: ClassVar[bool] = False
    fails: ClassVar[type[Exception] | None] = None

    @classmethod
    def build(cls, seed: int = 0) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    _vary(module)
        return model.train(cls.trains)

    def example(self, batch: int = 2, frames: int = 4) -> tuple[Any, ...]:
        return (noise(batch, frames, CHANNELS, SIDE, SIDE),)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal noise that is the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _vary(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """A fresh BatchNorm is the identity in eval mode, which would hide mistakes."""
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)


def body() -> nn.Sequential:
    """(B, 3, 8, 8) -> (B, 5): the plainest body a frame can have."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(WIDTH * (SIDE // 2) ** 2, FEATURES),
    )


class WithBody(Awkward):
    """An :class:`Awkward` whose frames go through one :func:`body`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()


def double(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook that changes what a module returns."""
    return output * 2
