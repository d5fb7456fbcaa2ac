"""The gradients of a result are the model's, or it refuses to be trained and says why."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxtemporal
from fxtemporal.support.errors import GradientError
from tests.zoo import noise


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(x[:, t]).mean((2, 3)) for t in range(x.size(1))], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Reversed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Reverse.apply(self.features(x)))


class Quantized(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(StraightThrough.apply(self.features(x) * 8))


class InTheLoop(Base):
    def features(self, x: Tensor) -> Tensor:
        out = [Reverse.apply(self.layer(x[:, t])).mean((2, 3)) for t in range(x.size(1))]
        return torch.stack(out, 1)


class Checkpointed(Base):
    def features(self, x: Tensor) -> Tensor:
        frames = [
            checkpoint(self.layer, x[:, t], use_reentrant=True).mean((2, 3))
            for t in range(x.size(1))
        ]
        return torch.stack(frames, 1)


class Hooked(Base):
    def features(self, x: Tensor) -> Tensor:
        out = []
        for t in range(x.size(1)):
            y = self.layer(x[:, t])
            if y.requires_grad:
                y.register_hook(lambda g: g * 0.5)
            out.append(y.mean((2, 3)))
        return torch.stack(out, 1)


class HookedAtTheEnd(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.features(x))
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return y


class InFloat32Alone(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Reverse.apply(self.features(x)).float())


class OfZeros(Base):
    """Its gradients are zeros, which are not the same as none for an optimizer with momentum."""

    def forward(self, x: Tensor) -> Tensor:
        return Reverse.apply(self.head(self.features(x))).angle()


REFUSED = [Reversed, Quantized, InTheLoop, Checkpointed, Hooked, HookedAtTheEnd, InFloat32Alone]
REFUSED += [OfZeros]


@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:`isinstance")
@pytest.mark.parametrize("kind", REFUSED)
def test_other_gradients_are_refused(kind: type[Base]) -> None:
    model, x = kind(), noise(2, 4, 3, 8, 8)
    result = fxtemporal.optimize(model, (x,), tune="static")
    report = fxtemporal.report(result)
    assert report.gradients
    assert "Not for training" in str(report)
    assert report.to_dict()["gradients"] == report.gradients
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x))
    others = [result, copy.deepcopy(result)]
    if report.frontend == "fx":
        others.append(pickle.loads(pickle.dumps(result)))
    for other in others:
        y = other(x.clone().requires_grad_())
        assert y.requires_grad
        with pytest.raises(GradientError, match="not its gradients"):
            y.sum().backward()


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layer.requires_grad_(False)


class Detached(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).detach())


class WithoutGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(x)
        return self.head(features)


class Recomputed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.features, x, use_reentrant=False))


@pytest.mark.parametrize("kind", [Base, Frozen, Detached, WithoutGradients, Recomputed])
def test_the_same_gradients_are_not(kind: type[Base]) -> None:
    model, x = kind(), noise(2, 4, 3, 8, 8)
    result = fxtemporal.optimize(model, (x,), tune="static")
    assert fxtemporal.report(result).gradients is None
    got = []
    for module in (model, result):
        module.zero_grad()
        module(x).square().sum().backward()
        got.append([p.grad for p in module.parameters()])
        got[-1] = [None if g is None else g.clone() for g in got[-1]]
    for one, other in zip(*got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one)


def test_an_unread_call_that_is_not_known_here_asks_for_no_gradient() -> None:
    """torch.vsplit of a frame that nobody reads: NaN in it must not come into the weights."""

    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for t in range(x.size(1)):
                last = torch.vsplit(self.layer(x[:, t]), 2)[1]
            return last

    model = Splits()
    fast = fxtemporal.optimize(model, (torch.rand(2, 4, 4),), tune="static")
    for frame in range(4):
        x = torch.rand(2, 4, 4)
        x[:, frame] = float("nan")
        found = []
        for net in (model, fast):
            model.zero_grad()
            net(x).sum().backward()
            found.append(model.layer.weight.grad.clone())
        assert torch.equal(found[0].isnan(), found[1].isnan())
        assert bool(found[0].isnan().any()) == (frame == 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "named",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
)
def test_an_unread_call_of_a_reparametrized_layer_asks_for_no_gradient(named: Any) -> None:
    """Every other frame is read; Inf in the rest must give no NaN in the gradients."""

    class EveryOther(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = named(nn.Conv2d(3, 2, 3, padding=1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total: Any = 0
            for t in range(x.size(1)):
                f = self.conv(x[:, t] * y[:, t])
                total = total + f if t % 2 == 0 else total
            return total

    model = EveryOther().eval()
    fast = fxtemporal.optimize(model, (noise(2, 4, 3, 5, 5), noise(2, 4, 3, 5, 5)), tune="static")
    assert fxtemporal.report(fast).by_status("applied")
    x, y = (noise(2, 4, 3, 5, 5).requires_grad_() for _ in range(2))
    x.data[:, 1] = float("inf")
    found = [torch.autograd.grad(net(x, y).sum(), (x, y)) for net in (model, fast)]
    torch.testing.assert_close(found[1], found[0])
    assert found[0][1].isfinite().all()
