"""Ops in which the samples of a frame meet run through ``torch.vmap``: numbers, gradients, more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from benchmarks.measure import CountConvolutions
from tests.zoo import noise

Forward = Callable[..., Any]


class Frames(nn.Module):
    def __init__(self, each: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.conv(x[:, t]).mean((-2, -1)) for t in range(x.size(1))]  # (B, 4)
        return torch.stack([self.each(self, frame) for frame in frames], 0)


EACH: dict[str, Forward] = {
    "mean over the batch": lambda self, y: y - y.mean(0),
    "mean over all": lambda self, y: y / y.std(),
    "softmax over the batch": lambda self, y: y.softmax(0),
    "softmax, by keyword": lambda self, y: torch.softmax(input=y * 1, dim=0),
    "functional": lambda self, y: F.normalize(y, dim=0),
    "gram matrix": lambda self, y: y @ y.t(),
    "matmul": lambda self, y: torch.matmul(y.t(), y),
    "flip": lambda self, y: y.flip(0),
    "roll": lambda self, y: torch.roll(y, 1, 0),
    "cumulative sum": lambda self, y: y.cumsum(0),
    "a weight beside it": lambda self, y: (y.t() @ y) @ self.weight,
    "the best of the batch": lambda self, y: y.amax(0, keepdim=True),
    "sum over the batch, and more": lambda self, y: torch.tanh(y.sum(0)).sqrt().nan_to_num(),
}


@pytest.mark.parametrize("each", EACH.values(), ids=EACH.keys())
def test_the_op_runs_on_each_frame_apart(each: Forward) -> None:
    model = Frames(each).eval()
    result = fxtemporal.optimize(model, (noise(2, 4, 3, 6, 6),), tune="static")
    for batch in (1, 2, 5):
        x = noise(batch, 4, 3, 6, 6)
        with CountConvolutions() as counter:
            mine = result(x)
        assert counter.count == 1
        wide = copy.deepcopy(model).double()(x.double()).detach()
        scale = float(wide.abs().nan_to_num().max()) or 1.0
        mine, theirs = mine.detach(), model(x).detach()
        own = float((theirs.double() - wide).abs().nan_to_num().max()) / scale
        error = float((mine.double() - wide).abs().nan_to_num().max()) / scale
        assert error <= max(4 * own, 2e-6)
        assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize(
    ("each", "folds"),
    [
        (lambda self, y: y / y.max(), True),
        (lambda self, y: y - torch.min(y), True),
        (lambda self, y: y * y.median(), False),
        (lambda self, y: y + torch.nanmedian(y), False),
        (lambda self, y: y - y.sort(0)[0], False),
    ],
)
def test_equal_numbers_share_a_gradient_as_in_the_model(each: Forward, folds: bool) -> None:
    model = Frames(each).eval()
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias.copy_(torch.tensor([1.0, 2.0, 2.0, 1.0]))  # every sample, every frame
    x = noise(2, 4, 3, 6, 6)
    result = fxtemporal.optimize(model, (x,), tune="static", verify=False)
    ends = noise(4, 2, 4)
    for module in (model, result):
        (module(x) * ends).sum().backward()
        if module is model:
            expected = model.conv.bias.grad.clone()
            model.conv.bias.grad = None
    torch.testing.assert_close(result.get_parameter("conv.bias").grad, expected)
    if folds:
        assert len(fxtemporal.report(result).by_status("applied")) == 1


def test_a_batch_written_out_is_refused() -> None:
    model = Frames(lambda self, y: y.view(2, 2, 2).sum(1)).eval()
    result = fxtemporal.optimize(model, (noise(2, 4, 3, 6, 6),), tune="static")
    x = noise(2, 4, 3, 6, 6)
    torch.testing.assert_close(result(x), model(x))
    (remark,) = fxtemporal.report(result).by_status("applied")
    assert "fixed-batch" in [entry["code"] for entry in remark.detail["left_because"]]


def test_gradients_pickles_copies_and_export() -> None:
    model = Frames(EACH["gram matrix"])
    x = noise(2, 4, 3, 6, 6)
    result = fxtemporal.optimize(model, (x,), tune="static")
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    result(x).square().sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        torch.testing.assert_close(other(x), model(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(result.eval(), (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(
        exported.module()(noise(3, 4, 3, 6, 6)), model.eval()(noise(3, 4, 3, 6, 6))
    )


@pytest.mark.parametrize(
    ("each", "count"),
    [
        (lambda self, y: y * torch.rand(4), 1),
        (lambda self, y: y[y[:, 0] > 0].sum(0), 1),
        (lambda self, y: y[torch.argsort(y[:, 0])], 1),
    ],
    ids=["random", "as many as the data says", "sorted"],
)
def test_what_vmap_cannot_do_stays_in_the_loop(each: Forward, count: int) -> None:
    model = Frames(each).eval()
    x = noise(2, 4, 3, 6, 6)
    try:
        result = fxtemporal.optimize(model, (x,), tune="static")
    except fxtemporal.FxTemporalError:
        return
    with CountConvolutions() as counter:
        torch.manual_seed(0)
        mine = result(x)
    assert counter.count in (count, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(mine, model(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_within_a_frame(batch_first: bool, need_weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            outs = []
            for t in range(x.size(1)):
                y = x[:, t]
                z, weights = self.attention(y, y, y, need_weights=need_weights)
                outs.append(z if weights is None else z + weights.sum())
            return torch.stack(outs, 1)

    model = Attention().eval()
    result = fxtemporal.optimize(model, (noise(2, 5, 3, 4),), tune="static")
    for batch in (2, 3):
        x = noise(batch, 5, 3, 4)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)
    calls = [n for n in result.graph.nodes if str(n.target).startswith("attention")]
    assert len(calls) == (1 if batch_first else 5)
