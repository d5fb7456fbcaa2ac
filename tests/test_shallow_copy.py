"""Modules whose calls run only code of torch's layers, and modules that run a user's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.ao.quantization import MinMaxObserver
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import fxtemporal
from fxtemporal.analysis.aliasing import written_by
from fxtemporal.ir.program import Program
from fxtemporal.ir.shallow_copy import runs_torch_alone
from fxtemporal.nn import TimeDistributed


class Own(nn.Conv2d):
    """A layer of the user."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1))


class Doubled(nn.Module):
    """A parametrization of the user."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def replaced() -> nn.Module:
    layer = nn.Conv2d(3, 3, 1)
    layer.forward = lambda x: x.add_(1)
    return layer


def hooked() -> nn.Module:
    layer = nn.Conv2d(3, 3, 1)
    layer.register_forward_hook(lambda module, args, result: result.add_(1))
    return layer


def parametrized() -> nn.Module:
    layer = nn.Conv2d(3, 3, 1)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


ALONE: dict[str, Any] = {
    "a layer": lambda: nn.Conv2d(3, 3, 1),
    "layers": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()),
    "an activation": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
    "a function of torch": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=torch.relu),
    "torch's parametrization": lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
    "torch's hook": lambda: spectral_norm(nn.Conv2d(3, 3, 1)),
    "this package's module": lambda: TimeDistributed(nn.Conv2d(3, 3, 1)),
}
NOT_ALONE: dict[str, Any] = {
    "a class": lambda: Own(3, 3, 1),
    "a part": lambda: nn.Sequential(Own(3, 3, 1)),
    "a part of this package's module": lambda: TimeDistributed(Own(3, 3, 1)),
    "a forward": replaced,
    "a hook": hooked,
    "a parametrization": parametrized,
    "a parametrized class": lambda: parametrizations.weight_norm(Own(3, 3, 1)),
    "an activation": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=lambda x: x),
    "a graph": lambda: fx.symbolic_trace(nn.Sequential(Own(3, 3, 1))),
    "an observer": MinMaxObserver,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ALONE)
def test_torch_alone(name: str) -> None:
    assert runs_torch_alone(ALONE[name]())


@pytest.mark.parametrize("name", NOT_ALONE)
def test_a_users_code_is_a_part_of_it(name: str) -> None:
    assert not runs_torch_alone(NOT_ALONE[name]())


@pytest.mark.parametrize("name", ["a class", "a forward", "a hook"])
def test_a_users_code_may_write_what_it_is_given(name: str) -> None:
    """Before anything was run, so that no value tells."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_module("0", (x,))
    graph.output(called)
    root = nn.Sequential(NOT_ALONE[name]())
    program = Program(fx.GraphModule(root, graph), FakeTensorMode(), "given")
    assert written_by(program, called) == [x]


def test_an_encoder_with_an_activation_of_the_user_stays_a_loop() -> None:
    class PerFrame(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mixes = lambda x: x - x.mean(0)  # noqa: E731  # over the samples
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, activation=mixes, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.encoder(x[:, t]) for t in range(x.size(1))], 1)

    model, x = PerFrame().eval(), torch.randn(2, 4, 3, 8)
    result = fxtemporal.optimize(model, (x,), tune="static", verify=False)
    assert [remark.status for remark in fxtemporal.report(result).remarks] == ["missed"]
    torch.testing.assert_close(result(x), model(x))
