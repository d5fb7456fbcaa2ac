"""Shapes that were computed before, of the same code on tensors of the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxtemporal.capture.capture import capture
from fxtemporal.ir.shape_memo import ShapeMemo
from tests.zoo import noise


class Blocks(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def keys(model: nn.Module, x: Tensor) -> list[Any]:
    program = capture(model, (x,))
    nodes = [node for node in program.graph.nodes if node.op == "call_module"]
    return [program.shapes.key(node, program.gm, anywhere=True) for node in nodes]


X = noise(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("layers", "alike"),
    [
        ((nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)), True),
        ((nn.BatchNorm2d(4), nn.BatchNorm2d(4)), True),
        ((nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, dilation=2)), False),
        ((nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)), False),
        ((nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).train()), False),
        ((nn.MaxPool2d(1), nn.AvgPool2d(1)), False),
    ],
)
def test_layers_of_one_kind_share_a_key(layers: tuple[nn.Module, ...], alike: bool) -> None:
    one, two = keys(Blocks(*layers), X)
    assert one is not None
    assert (one == two) is alike


def test_the_key_holds_what_decides_a_dtype() -> None:
    (one,) = keys(Blocks(nn.Conv2d(4, 4, 1)), X)
    (two,) = keys(Blocks(nn.Conv2d(4, 4, 1).double()), X.double())
    assert one != two
    torch.set_default_dtype(torch.float64)
    try:
        (three,) = keys(Blocks(nn.Conv2d(4, 4, 1).float()), X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert one != three
    with torch.autocast("cpu"):
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = X
        conv = graph.call_module("layers.0", (x,))
        inside = ShapeMemo(capture(Blocks(nn.Conv2d(4, 4, 1)), (X,)).fake_mode)
        assert inside.key(conv, Blocks(nn.Conv2d(4, 4, 1)), anywhere=True) != one


class Own(nn.Conv2d):
    """Another forward under a name of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


def with_a_hook() -> nn.Module:
    layer = nn.Conv2d(4, 4, 1)
    layer.register_forward_hook(lambda module, args, out: out[:, :1])
    return layer


def with_its_own_forward() -> nn.Module:
    layer = nn.Conv2d(4, 4, 1)
    layer.forward = lambda x: x[:, :1]  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("make", [lambda: Own(4, 4, 1), with_a_hook, with_its_own_forward])
def test_other_code_has_no_key_that_holds_anywhere(make: Any) -> None:
    assert all(key is None for key in keys(Blocks(make()), X))


def test_another_capture_uses_what_was_found() -> None:
    model = Blocks(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).eval()
    first = capture(model, (X,))
    known = first.shapes.known
    found = len(known)
    second = capture(model, (X,), shapes=known)
    assert len(known) == found > 0
    for one, two in zip(first.graph.nodes, second.graph.nodes, strict=True):
        if isinstance(one.meta.get("val"), Tensor):
            assert one.meta["val"].shape == two.meta["val"].shape
            assert one.meta["val"].stride() == two.meta["val"].stride()
            assert one.meta["val"].dtype == two.meta["val"].dtype
    capture(model, (noise(3, 4, 8, 8),), shapes=known)
    assert len(known) > found
