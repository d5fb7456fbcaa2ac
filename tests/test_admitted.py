"""A number of frames is admitted by tracing the forward at it, never guessed from others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxtemporal.ir.admitted import AdmittedFrames
from fxtemporal.support.errors import SpecializationError
from tests.strictly import strictly
from tests.zoo import noise


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.positions = nn.Parameter(noise(100, 4))
        self.weights = [1.0] * 40 + [0.5] * 100


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(x[:, t]) for t in range(x.size(1))], 1)


class Late(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = [self.layer(x[:, t]) * (2 if t >= 40 else 1) for t in range(x.size(1))]
        return torch.stack(out, 1)


class Table(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = [self.layer(x[:, t]) * self.weights[t] for t in range(x.size(1))]
        return torch.stack(out, 1)


class Clipped(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = [self.layer(x[:, t]) + self.positions[min(t, 39)] for t in range(x.size(1))]
        return torch.stack(out, 1)


class AtMost(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(x[:, t]) for t in range(x.size(1))][:40], 1)


class Break(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = []
        for t in range(x.size(1)):
            if t == 40:
                break
            out.append(self.layer(x[:, t]))
        return torch.stack(out, 1)


class Long(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = [self.layer(x[:, t]) for t in range(x.size(1))]
        return torch.stack(out, 1) / (2 if len(out) > 64 else 1)


class Memory(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(x[:, t]) for t in range(x.size(1))][-40:], 1).mean(1)


class Nth(Base):
    """Something else at every 37th frame: a key frame."""

    def forward(self, x: Tensor) -> Tensor:
        out = [self.layer(x[:, t]) * (3 if t % 37 == 36 else 1) for t in range(x.size(1))]
        return torch.stack(out, 1)


LATE = [Late, Table, Clipped, AtMost, Break, Long, Memory, Nth]


def optimized(model: nn.Module, *inputs: Tensor, **settings: Any) -> Any:
    return strictly(model, inputs, tune="static", **settings)


def checks(result: nn.Module) -> AdmittedFrames:
    (found,) = (part for part in result.modules() if isinstance(part, AdmittedFrames))
    return found


@pytest.mark.parametrize("kind", LATE)
def test_what_happens_at_later_frames_is_not_guessed(kind: type[Base]) -> None:
    model = kind()
    result = optimized(model, noise(2, 16, 4))
    for frames in (1, 2, 9, 30):
        x = noise(3, frames, 4)
        torch.testing.assert_close(result(x), model(x))
    with pytest.raises(SpecializationError, match="at 90 the forward gave another graph"):
        result(noise(2, 90, 4))
    x = noise(2, 16, 4)
    torch.testing.assert_close(result(x), model(x))


def test_a_number_is_traced_once_and_remembered() -> None:
    model = Plain()
    result = optimized(model, noise(2, 16, 4))
    assert 90 not in checks(result).counts
    x = noise(3, 90, 4)
    torch.testing.assert_close(result(x), model(x))
    assert 90 in checks(result).counts
    checks(result)._same_graph = None
    torch.testing.assert_close(result(x), model(x))


def test_numbers_can_be_asked_for() -> None:
    result = optimized(Plain(), noise(2, 5, 4), frames=(1, 12))
    assert set(range(1, 13)) <= checks(result).counts


def test_a_pickle_runs_at_what_was_admitted_and_a_copy_at_more() -> None:
    model = Plain()
    result = optimized(model, noise(2, 5, 4))
    loaded = pickle.loads(pickle.dumps(result))
    x = noise(2, 3, 4)
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.raises(SpecializationError, match="could not be traced again"):
        loaded(noise(2, 11, 4))
    x = noise(2, 11, 4)
    torch.testing.assert_close(copy.deepcopy(result)(x), model(x))


def test_a_first_call_in_inference_mode_or_under_a_transform() -> None:
    model = Plain().eval()
    result = optimized(model, noise(2, 5, 4))
    with torch.inference_mode():
        x = noise(2, 12, 4)
        torch.testing.assert_close(result(x), model(x))
    with pytest.raises(SpecializationError):
        torch.vmap(result, in_dims=0)(noise(2, 3, 13, 4))  # nothing can be traced in there
    x = noise(2, 3, 12, 4)
    torch.testing.assert_close(torch.vmap(result)(x), torch.vmap(model)(x))


class OverTargets(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.layer(x[:, t]) for t in range(y.size(1))], 1)


class Zipped(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(x.unbind(1), y.unbind(1), strict=False)
        return torch.stack([self.layer(a) for a, _ in pairs], 1)


class Summed(Base):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return sum(self.layer(x[:, t]) for t in range(y.size(1)))


class Both(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.layer(x[:, t]) + y[:, t] for t in range(x.size(1))], 1)


@pytest.mark.parametrize("kind", [OverTargets, Zipped, Summed, Both])
def test_two_inputs_of_one_length_are_checked_to_have_one(kind: type[Base]) -> None:
    model = kind()
    result = optimized(model, noise(2, 8, 4), noise(2, 8, 4))
    for frames in (8, 3, 11):
        inputs = noise(3, frames, 4), noise(3, frames, 4)
        torch.testing.assert_close(result(*inputs), model(*inputs))
    for one, other in ((8, 5), (5, 8), (3, 2)):
        with pytest.raises(SpecializationError):
            result(noise(2, one, 4), noise(2, other, 4))
