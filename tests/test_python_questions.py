"""What a forward asks Python about its tensors: the tracer answers as the real values would."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal.capture.capture import capture
from tests.zoo import noise

CLIP = noise(2, 3, 4, 6, 6)


class Asking(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.pass_on = nn.Identity()
        self.kept = {"cpu": torch.arange(6.0)}
        self.table = [torch.ones(6), torch.full((6,), 2.0)]
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.conv(x))


def jit_isinstance(self: Any, y: Tensor) -> Tensor:
    if torch.jit.isinstance(y, torch.Tensor):
        return y * 2
    return y


def jit_isinstance_of_a_list(self: Any, y: Tensor) -> Tensor:
    parts = [y, y + 1]
    return torch.cat(parts) if torch.jit.isinstance(parts, list[Tensor]) else y


def numpy_of_sizes(self: Any, y: Tensor) -> Tensor:
    count = np.prod([y.shape[2], y.shape[3], y.shape[4]])
    return y.reshape(y.shape[0], y.shape[1], count) / math.sqrt(np.prod(y.shape[2:]))


def numpy_as_another_dtype(self: Any, y: Tensor) -> Tensor:
    return y * float(np.asarray(y.shape[2], dtype=np.float32) / 3)


def autocast_of_its_device(self: Any, y: Tensor) -> Tensor:
    with torch.autocast(y.device.type, enabled=False):
        return y * 2


def autocast_by_keyword(self: Any, y: Tensor) -> Tensor:
    with torch.autocast(device_type=y.device.type, dtype=torch.bfloat16, enabled=False):
        return y.float() * 2


def a_list_through_identity(self: Any, y: Tensor) -> Tensor:
    parts = self.pass_on([y, y * 2])
    parts[0] = parts[0] + 1
    return torch.cat(parts)


def a_tensor_in_a_dict(self: Any, y: Tensor) -> Tensor:
    first, second = (y + self.kept[str(y.device)]).split([2, 2], dim=1)
    return first * second


def tensors_in_a_list(self: Any, y: Tensor) -> Tensor:
    for scale in self.table:
        batch, channels, frames, *_ = (y * scale).shape
        y = (y * scale).view(batch, channels, frames, -1).view_as(y)
    return y


@pytest.mark.parametrize(
    "body",
    [
        jit_isinstance,
        jit_isinstance_of_a_list,
        numpy_of_sizes,
        numpy_as_another_dtype,
        autocast_of_its_device,
        autocast_by_keyword,
        a_list_through_identity,
        a_tensor_in_a_dict,
        tensors_in_a_list,
    ],
)
def test_the_tracer_answers(body: Callable[[Any, Tensor], Any]) -> None:
    model = Asking(body).eval()
    assert capture(model, (CLIP,), {}, only="fx").frontend == "fx"
    fast = fxtemporal.optimize(model, (CLIP,), tune="static")
    torch.testing.assert_close(fast(CLIP), model(CLIP))
    other = noise(3, 3, 4, 6, 6)
    torch.testing.assert_close(fast(other), model(other))


def test_a_kept_tensor_is_the_model_s_own() -> None:
    """Not a copy: what the model's owner writes into it, the result reads."""
    model = Asking(a_tensor_in_a_dict).eval()
    fast = fxtemporal.optimize(model, (CLIP,), tune="static")
    with torch.no_grad():
        model.kept["cpu"].mul_(3)
    torch.testing.assert_close(fast(CLIP), model(CLIP))


def test_a_hook_put_on_identity_is_called() -> None:
    model = Asking(a_list_through_identity).eval()
    model.pass_on.register_forward_hook(lambda module, args, out: [2 * part for part in out])
    fast = fxtemporal.optimize(model, (CLIP,), tune="static")
    torch.testing.assert_close(fast(CLIP), model(CLIP))
