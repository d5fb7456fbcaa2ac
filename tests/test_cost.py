"""FLOPs are those of the formulas in books; predictions follow what re-rolling saves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxtemporal
from fxtemporal.analysis.cost import Costs
from fxtemporal.capture.capture import capture


def cost_of(model: nn.Module, *inputs: Tensor):
    program = capture(model.eval(), inputs)
    return Costs().total(program)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_takes_two_flops_a_weight_and_output(batch: int) -> None:
    conv = nn.Conv3d(3, 8, (3, 5, 5), padding=(1, 2, 2))
    x = torch.randn(batch, 3, 4, 6, 6)
    assert cost_of(nn.Sequential(conv), x).flops == 2 * conv.weight.numel() * batch * 4 * 6 * 6


def test_a_grouped_and_strided_convolution() -> None:
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
    x = torch.randn(2, 8, 6, 6)
    assert cost_of(nn.Sequential(conv), x).flops == 2 * conv.weight.numel() * 2 * 3 * 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_layer_meets_each_weight_once_a_step(
    kind: type[nn.Module], layers: int
) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = kind(5, 7, num_layers=layers, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0]

    model = First()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert cost_of(model, torch.randn(3, 4, 5)).flops == 2 * 3 * 4 * weights


def test_attention_is_counted() -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    n, d = 9, 4
    assert cost_of(Attends(), torch.randn(2, 3, n, d)).flops == 2 * 3 * 4 * n * n * d


def test_elementwise_ops_take_time_but_no_flops() -> None:
    cost = cost_of(nn.Sequential(nn.ReLU(), nn.Sigmoid()), torch.randn(2, 3, 8, 8))
    assert cost.flops == 0
    assert cost.calls == 2
    assert cost.milliseconds > 0


def test_a_view_costs_less_than_a_copy() -> None:
    class Folds(nn.Module):
        def __init__(self, copy: bool) -> None:
            super().__init__()
            self.copy = copy

        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous() if self.copy else x.flatten(0, 1)

    x = torch.randn(4, 64, 64, 64)
    view, copy = cost_of(Folds(copy=False), x), cost_of(Folds(copy=True), x)
    assert copy.milliseconds > 20 * view.milliseconds


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.size(1))], 1)


def test_a_loop_keeps_its_flops_and_is_predicted_to_be_faster() -> None:
    x = torch.randn(1, 16, 3, 12, 12)
    report = fxtemporal.audit(Loop().eval(), (x,))
    (remark,) = report.by_status("applied")
    assert remark.cost is not None
    assert remark.cost.before.flops == remark.cost.after.flops > 0
    assert remark.cost.speedup > 2
    assert report.structure is not None
    assert report.structure.cost_before.calls > 10 * report.structure.cost_after.calls
    (body,) = [b for b in report.structure.before if b.module == "body.0"]
    assert body.times == 16
    (body,) = [b for b in report.structure.after if b.module == "body.0"]
    assert body.times == 1


def test_the_cost_of_a_prepared_weight_is_not_that_of_a_call() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)).eval()
    x = torch.randn(1, 3, 4, 8, 8)
    report = fxtemporal.audit(model, (x,), passes=["fold-batchnorm"])
    (remark,) = report.by_status("applied")
    assert remark.cost is not None
    assert remark.cost.after.milliseconds < remark.cost.before.milliseconds
    assert report.structure is not None
    assert report.structure.cost_after.flops == report.structure.cost_before.flops


def test_alike_calls_are_metered_once() -> None:
    class Runs(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.of: Counter[object] = Counter()

        def __torch_function__(self, function: Any, _: Any, args: Any, kwargs: Any = None) -> Any:
            self.of[function] += 1
            return function(*args, **(kwargs or {}))

    program = capture(Loop().eval(), (torch.randn(1, 16, 3, 12, 12),))
    with Runs() as runs:
        Costs().total(program)
    assert runs.of[torch.conv2d] == 2  # the layers of the body, not those of each frame


def test_without_inputs_nothing_is_priced() -> None:
    report = fxtemporal.audit(nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3))))
    assert report.structure is None
    assert all(remark.cost is None for remark in report.remarks)
    assert report.gain is None
