"""torch.compile(model, backend="fxtemporal"): rewritten, trained, right at every size."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_lowering import Frames, clip
from torch import Tensor, fx, nn

from fxtemporal import PassError, Report

pytestmark = pytest.mark.filterwarnings(  # Inductor's own, when it is imported
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)

EAGER = {"backend": "aot_eager"}
"""Runs what it is given, through the machinery of training, without a C++ compiler."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that keeps the graphs it is given, and runs them."""

    def __init__(self) -> None:
        self.seen: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.seen.append(gm)
        return gm.forward

    def calls(self, function: Any) -> int:
        nodes = [node for gm in self.seen for node in gm.graph.nodes]
        return sum(node.target is function for node in nodes)


class PerFrameCell(nn.Module):
    """An LSTMCell over what a loop made of each frame, and a Conv3d."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 6, (1, 3, 3))
        self.cell = nn.LSTMCell(6, 5)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.conv(clip.transpose(1, 2)).mean((3, 4))
        h, c = x.new_zeros(x.size(0), 5), x.new_zeros(x.size(0), 5)
        for t in range(x.size(2)):
            h, c = self.cell(x[:, :, t], (h, c))
        return h


def compiled(model: nn.Module, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(model, backend="fxtemporal", dynamic=dynamic, options={**EAGER, **options})


def test_it_is_found_by_its_name_and_rewrites_the_graph() -> None:
    graphs, reports = Graphs(), []
    model = Frames().eval()
    run = compiled(model, backend=graphs, on_report=reports.append)
    torch.testing.assert_close(run(clip(2)), model(clip(2)))
    assert graphs.calls(torch.conv2d) == 1
    assert [type(found) for found in reports] == [Report]
    loops = [r for r in reports[0].remarks if r.rule == "time-distribute"]
    assert [loop.status for loop in loops] == ["applied"]
    assert loops[0].location is not None
    assert "test_lowering.py:" in loops[0].location


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("model", [Frames, PerFrameCell])
def test_other_batches_and_frames(model: Callable[[], nn.Module], dynamic: bool | None) -> None:
    module = model().eval()
    run = compiled(module, dynamic=dynamic)
    for batch, frames in ((2, 3), (4, 3), (1, 3), (5, 3), (2, 4), (3, 5)):
        x = clip(batch, frames)
        torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", [Frames, PerFrameCell])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_gradients_equal_those_of_eager_mode(
    model: Callable[[], nn.Module], training: bool, inner: str
) -> None:
    module = model().train(training)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    run = compiled(module, backend=inner)
    results = []
    for call in (run, module):
        module.load_state_dict(state)
        module.zero_grad()
        x = clip(3).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        results.append((y.detach(), x.grad, gradients, buffers))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_step_of_training_and_a_new_parameter_are_seen() -> None:
    module = Frames().eval()
    run = compiled(module)
    run(clip())
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    run(clip()).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(run(clip()), module(clip()))
    module.head.weight = nn.Parameter(torch.ones(4, 8))
    torch.testing.assert_close(run(clip()), module(clip()))
    module.head = nn.Linear(8, 4)
    torch.testing.assert_close(run(clip()), module(clip()))


def test_one_parameter_at_two_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.second(self.first(x[:, t])) for t in range(3)], 1)

    module, x = Tied(), torch.randn(2, 3, 4)
    run = compiled(module)
    run(x).sum().backward()
    assert module.first.weight.grad is not None
    gradient = module.first.weight.grad.clone()
    module.zero_grad()
    module(x).sum().backward()
    torch.testing.assert_close(gradient, module.first.weight.grad)


def test_a_function_and_a_write_into_its_input() -> None:
    weight = torch.randn(4, 4)

    def function(x: Tensor) -> Tensor:
        x += 1
        return torch.stack([x[:, t] @ weight for t in range(3)], 1)

    x = torch.randn(2, 3, 4)
    mine, theirs = x.clone(), x.clone()
    result = torch.compile(function, backend="fxtemporal", options=EAGER)(mine)
    torch.testing.assert_close(result, function(theirs))
    torch.testing.assert_close(mine, theirs)


def test_inductor_is_the_default() -> None:
    module = Frames().eval()
    run = torch.compile(module, backend="fxtemporal")
    with torch.no_grad():
        for x in (clip(2), clip(3)):
            torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-6)


def test_passes_are_chosen() -> None:
    graphs = Graphs()
    module = Frames().eval()
    run = compiled(module, backend=graphs, passes=["conv3d-forms"])
    torch.testing.assert_close(run(clip()), module(clip()))
    assert graphs.calls(torch.conv2d) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [({"pases": []}, "no option 'pases'; there are backend"), ({"passes": ["x"]}, "no pass is")],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says) as raised:
        compiled(Frames().eval(), **options)(clip())
    chain = [raised.value, raised.value.__cause__, getattr(raised.value, "inner_exception", None)]
    assert any(isinstance(error, PassError) for error in chain)


def test_what_cannot_be_captured_is_compiled_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(Frames):
        def forward(self, clip: Tensor, factor: int) -> Tensor:
            return super().forward(clip) * factor

    module, graphs = Scaled().eval(), Graphs()
    run = compiled(module, backend=graphs, dynamic=True)
    with caplog.at_level(logging.WARNING, "fxtemporal"):
        torch.testing.assert_close(run(clip(), 5), module(clip(), 5))
    assert graphs.calls(torch.conv2d) == 3
    assert re.search(r"left as it is: \w+ is a number that is no size of an input", caplog.text)
