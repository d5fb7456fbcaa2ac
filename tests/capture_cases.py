"""What the tests of capture share: the layers that forwards call, a case, and how it is checked."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxtemporal import SpecializationError
from tests.zoo import noise

Forward = Callable[..., Any]
Setup = Callable[[Any], object]

X = noise(2, 4, 5)
OTHERS = ((noise(3, 4, 5),), (noise(2, 6, 5),), (noise(1, 1, 5),))
"""Another batch, another number of frames, ones."""


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Result:
    logits: Tensor
    frames: int


class Layers(nn.Module):
    """What the forwards of the tests may call."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 5)
            self.stack = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
            self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
            self.named = nn.ModuleDict({"a": nn.Linear(5, 5)})
            self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
            self.lstm = nn.LSTM(5, 5, batch_first=True)
            self.embedding = nn.Embedding(7, 5)
        self.scales = nn.ParameterList([nn.Parameter(noise(5, seed=i)) for i in (2, 3)])
        self.scale_of = nn.ParameterDict({"a": nn.Parameter(noise(5, seed=4))})
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("table", noise(16, 5, seed=5))
        self.register_buffer("passing", noise(5, seed=6), persistent=False)
        self.constant = noise(5, seed=7)
        self.constants = [noise(5, seed=8)]
        self.counter = 0
        self.eval()


@dataclass(frozen=True)
class Case:
    """A forward, the inputs that it is traced with, and others that it is then called with.

    At each of ``others`` the result must equal the model or raise SpecializationError; the latter
    not at the first of OTHERS, another batch, unless the forward reads the batch. ``frontend`` is
    what has to capture it ("?": either).
    """

    forward: Forward
    args: tuple[Any, ...] = (X,)
    others: tuple[tuple[Any, ...], ...] = OTHERS
    frontend: str = "fx"
    reads_batch: bool = False
    setup: Setup | None = None
    train: bool = False
    kwargs: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        cls = type("Model", (Layers,), {"forward": self.forward})
        model = cls().train(self.train)
        if self.setup is not None:
            self.setup(model)
        return model


def clone(value: Any) -> Any:
    def one(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    memo: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda t: memo.setdefault(id(t), one(t)), value)


def assert_same(mine: Any, theirs: Any) -> None:
    """Equal in type, nesting and numbers."""
    assert type(mine) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
        assert mine.requires_grad == theirs.requires_grad
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for key in theirs:
            assert_same(mine[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    elif dataclasses.is_dataclass(theirs):
        assert_same(vars(mine), vars(theirs))
    else:
        assert mine == theirs


def call(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """The outputs, the inputs after the call, the buffers after the call."""
    inputs = clone((args, dict(kwargs)))
    torch.manual_seed(0)
    outputs = model(*inputs[0], **inputs[1])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return outputs, inputs, buffers


def snapshot(model: nn.Module) -> Any:
    """All that optimize must leave alone, and the very objects that it is made of."""
    return {
        path: {
            name: copy.copy(value) if isinstance(value, dict | list | set | int) else id(value)
            for name, value in vars(module).items()
        }
        for path, module in model.named_modules(remove_duplicate=False)
    }


def numbers(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += [(name, value) for name, value in vars(model).items() if isinstance(value, Tensor)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def step(*models: nn.Module) -> None:
    """As an optimizer: other numbers in the same parameters."""
    with torch.no_grad():
        for model in models:
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.01 * (i + 1))


def check(case: Case, make: Callable[[nn.Module], nn.Module], *, blind: bool = False) -> nn.Module:
    """``make(model)`` computes what the model computes, and left the model alone.

    ``blind``: it did not see the inputs, and need not take them.
    """
    model = case.build()
    before, values, state = snapshot(model), numbers(model), torch.get_rng_state()
    result = make(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    assert_same(numbers(model), values)
    reference = case.build()  # what the model would have gone through without us
    ran = False
    for place, args in enumerate((case.args, *case.others)):
        try:
            expected = call(reference, args, case.kwargs)
        except Exception:  # the model itself does not take these
            with pytest.raises(Exception):  # noqa: B017, PT011
                call(result, args, case.kwargs)
            continue
        try:
            actual = call(result, args, case.kwargs)
        except KeyError:
            assert blind
        except SpecializationError:
            assert place > 0 or blind
            free = case.others is OTHERS and not case.reads_batch
            assert place != 1 or not free or blind, "the batch is free"
            for buffer, other in zip(reference.buffers(), result.buffers(), strict=True):
                other.data.copy_(buffer.data)
        else:
            assert_same(actual, expected)
            ran = place == 0 or ran
    if ran:
        step(model, reference)
        assert_same(*(call(m, case.args, case.kwargs)[0] for m in (result, reference)))
    return result


def linear(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)


def stack(self: Any, x: Tensor) -> Tensor:
    return self.stack(x)


def named(forwards: dict[str, Forward]) -> list[Any]:
    return [pytest.param(forward, id=name) for name, forward in forwards.items()]
