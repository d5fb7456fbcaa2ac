"""What an awkward loop is: a forward with its layers, and the inputs that it is traced on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxtemporal.ir.reasons import Code
from tests.zoo import noise


@dataclass(frozen=True, eq=False)
class Case:
    """A forward with its layers: what it becomes, traced at ``at``.

    ``left`` is the number of convolutions that a call still executes, ``code`` a reason that the
    report must give; ``parts`` are made anew for each test. ``fixed``: the model itself branches on
    the batch.
    """

    forward: Callable[..., Any]
    parts: dict[str, Callable[[], Any]]
    inputs: Callable[[int, int], tuple[Any, ...]]
    at: tuple[int, int]
    left: int | None
    code: Code | None
    trains: bool
    fixed: bool

    def build(self) -> nn.Module:
        kind = type(self.forward.__name__, (nn.Module,), {"forward": self.forward})
        model = kind()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, make in self.parts.items():
                value = make()
                buffer = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
                model.register_buffer(name, value) if buffer else setattr(model, name, value)
        return model.train(self.trains)


def frames(*shape: int, dim: int = 1) -> Callable[[int, int], tuple[Tensor]]:
    """Clips (B, T, *shape), or with time at another dimension."""

    def inputs(batch: int, length: int) -> tuple[Tensor]:
        sizes = [batch, *shape]
        sizes.insert(dim, length)
        return (noise(*sizes),)

    return inputs


images = frames(3, 8, 8)
vectors = frames(6)
tokens = frames(5, 6)


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(noise(*shape, seed=5))


def buffer(*shape: int) -> Callable[[], Tensor]:
    return lambda: noise(*shape, seed=6).abs() + 0.5


class Cases(list[Case]):
    """The loops of one file, in the order in which they stand there."""

    def declare(
        self,
        inputs: Callable[[int, int], tuple[Any, ...]] = images,
        at: tuple[int, int] = (2, 4),
        left: int | None = None,
        code: Code | None = None,
        trains: bool = False,
        fixed: bool = False,
        **parts: Callable[[], Any],
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def declared(forward: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Case(forward, parts, inputs, at, left, code, trains, fixed))
            return forward

        return declared
