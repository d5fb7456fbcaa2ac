"""A result sees what is done to its model, or to itself, behind PyTorch's back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal.support.errors import SpecializationError
from tests.zoo import noise

Write = Callable[[nn.Module], Any]


def folded() -> tuple[nn.Module, Any, Tensor]:
    """A model, its result with a BatchNorm folded that was called once, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    x = noise(1, 16, 8, 8)
    result = fxtemporal.optimize(model, (x,), tune="static")
    with torch.no_grad():
        result(x)
    return model, result, x


def numpy_entry(m: Any) -> None:
    m[0].weight.detach().numpy()[3, 5, 1, 1] = 99.0


def data_entry(m: Any) -> None:
    m[0].weight.data[3, 5, 1, 1] = 99.0


def data_mask(m: Any) -> None:
    m[0].weight.data[m[0].weight.abs() > 0.0829] = 3.0


def data_kernel(m: Any) -> None:
    m[0].weight.data[3, 5] = 9.0


def assigned(m: Any) -> None:
    m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True)


def replaced(m: Any) -> None:
    m[1].bias = nn.Parameter(m[1].bias.detach() + 1)


def statistics(m: Any) -> None:
    m[1].running_var = m[1].running_var * 2


WRITES = [
    numpy_entry,
    data_entry,
    data_mask,
    data_kernel,
    assigned,
    replaced,
    statistics,
    lambda m: m[0].bias.data.add_(1),
    lambda m: m[1].weight.data.__setitem__(0, 7.0),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen_at_the_next_call(write: Write) -> None:
    model, result, x = folded()
    write(model)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_write_after_many_calls_is_seen_after_a_switch_of_modes_or_a_refresh() -> None:
    for look in (lambda m: m.eval(), fxtemporal.refresh):
        model, result, x = folded()
        with torch.no_grad():
            for _ in range(50):
                result(x)
            data_entry(model)
            look(result)
            torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("eps", 1.0), ("momentum", 0.5), ("affine", False), ("num_features", 8)]
)
def test_a_changed_setting_is_refused(name: str, value: Any) -> None:
    _, result, x = folded()
    setattr(result.get_submodule("1"), name, value)
    with pytest.raises((SpecializationError, AttributeError), match=name):
        result(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.norm(self.conv(x[:, t])).mean((2, 3)) for t in range(x.size(1))]
        return self.head(torch.stack(frames, 1))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("name", ["conv", "norm"])
def test_a_hook_on_what_the_graph_does_not_call_so_warns(name: str, kind: str) -> None:
    result = fxtemporal.optimize(Net().eval(), (noise(2, 4, 3, 8, 8),), tune="static")
    for other in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        part = other.get_submodule(name)
        with pytest.warns(UserWarning, match=f"does not call '{name}'"):
            getattr(part, f"register_{kind}")(lambda *given: None)


def test_a_hook_that_runs_as_in_the_model_does_not_warn() -> None:
    x = noise(2, 4, 3, 8, 8)
    result = fxtemporal.optimize(Net().eval(), (x,), tune="static")
    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.head.register_forward_hook(lambda *given: seen.append("head"))
        result.register_forward_hook(lambda *given: seen.append("root"))
    result(x)
    assert seen == ["head", "root"]
