"""Models in unusual states: tied, hooked, parametrized, in training, of another dtype."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, prune

from tests.capture_cases import OTHERS, Case, Forward, X, linear, stack
from tests.zoo import noise


def tie(model: Any) -> None:
    model.named["a"].weight = model.linear.weight


def share(model: Any) -> None:
    model.again = model.linear


def replace_a_forward(model: Any) -> None:
    model.linear.forward = lambda x: x * 3


def bind_a_forward(model: Any) -> None:
    model.stack.forward = types.MethodType(lambda self, x: self[0](x) * 3, model.stack)


def configure(model: Any) -> None:
    model.config = types.SimpleNamespace(scale=2, weight=noise(5))


def doubled(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * 2

    return wrapper


def doubled_anonymously(forward: Forward) -> Forward:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) * 2

    return wrapper


@doubled
def decorated(self: Any, x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    return self.linear(x) * x.size(1)


ROWS = (noise(8, 5), (noise(3, 5), noise(4, 5)))

STATES: dict[str, Case] = {
    "tied weights": Case(lambda self, x: self.named["a"](self.linear(x)), setup=tie),
    "shared module": Case(lambda self, x: self.again(self.linear(x)), setup=share),
    "weight_norm": Case(linear, setup=lambda m: parametrizations.weight_norm(m.linear)),
    "spectral_norm": Case(
        linear, setup=lambda m: parametrizations.spectral_norm(m.linear), train=True
    ),
    "pruned": Case(linear, setup=lambda m: prune.l1_unstructured(m.linear, "weight", 0.5)),
    "parametrized weight in a function": Case(
        lambda self, x: F.linear(x, self.linear.weight),
        setup=lambda m: parametrizations.weight_norm(m.linear),
    ),
    "hook on a layer": Case(
        linear, setup=lambda m: m.linear.register_forward_hook(lambda m, a, o: o * 2)
    ),
    "hook on a container": Case(
        stack, setup=lambda m: m.stack.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    ),
    "hook on the root": Case(
        linear, setup=lambda m: m.register_forward_hook(lambda m, a, o: {"out": o * 2})
    ),
    "pre-hook on the root": Case(
        linear, setup=lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    ),
    "pre-hook with keywords": Case(
        linear,
        setup=lambda m: m.register_forward_pre_hook(
            lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True
        ),
    ),
    "pre-hook that drops frames": Case(
        lambda self, x: sum(x[:, t] for t in range(x.size(1))),
        setup=lambda m: m.register_forward_pre_hook(lambda m, a: (a[0][:, ::2],)),
    ),
    "a layer's forward replaced": Case(linear, setup=replace_a_forward),
    "a container's forward bound anew": Case(stack, setup=bind_a_forward, frontend="?"),
    "decorated": Case(decorated),
    "decorated without wraps": Case(doubled_anonymously(linear), frontend="?"),
    "BatchNorm in training": Case(
        lambda self, x: self.norm(x), (ROWS[0],), tuple((r,) for r in ROWS[1]), train=True
    ),
    "BatchNorm twice in training": Case(
        lambda self, x: self.norm(self.norm(x)), (ROWS[0],), ((ROWS[1][0],),), train=True
    ),
    "dropout in training": Case(lambda self, x: self.dropout(x), train=True),
    "one layer in training": Case(
        lambda self, x: self.dropout(x), setup=lambda m: m.dropout.train()
    ),
    "double": Case(
        lambda self, x: self.linear(x) * torch.ones(1) + torch.zeros(x.size(1), 1),
        (X.double(),),
        ((OTHERS[0][0].double(),),),
        setup=lambda m: m.double(),
    ),
    "double inside": Case(
        lambda self, x: self.linear(x.double()).float(), setup=lambda m: m.double()
    ),
    "bfloat16": Case(
        linear, (X.bfloat16(),), ((OTHERS[0][0].bfloat16(),),), setup=lambda m: m.bfloat16()
    ),
    "frozen": Case(linear, setup=lambda m: m.requires_grad_(False)),
    "a frozen layer": Case(
        lambda self, x: self.stack(self.linear(x)),
        setup=lambda m: m.linear.requires_grad_(False),
    ),
    "no buffer": Case(
        lambda self, x: x if self.none is None else x * self.none,
        setup=lambda m: m.register_buffer("none", None),
    ),
    "a size as a tensor": Case(
        lambda self, x: x * self.n, setup=lambda m: setattr(m, "n", torch.tensor(3))
    ),
    "a numpy size": Case(
        lambda self, x: x[:, : self.n], setup=lambda m: setattr(m, "n", np.int64(3))
    ),
    "a function": Case(lambda self, x: self.act(x), setup=lambda m: setattr(m, "act", F.relu)),
    "a configuration": Case(
        lambda self, x: x * self.config.scale + self.config.weight, setup=configure
    ),
}
