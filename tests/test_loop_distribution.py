"""What only reads the states of a recurrence, and other independent calls of a layer, run once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxtemporal
from fxtemporal import Code
from tests.zoo import noise

FRAMES = 5
Body = Callable[[Any, Tensor], Any]


class Recurrent(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.Conv2d(7, 4, 3, padding=1)
        self.second, self.own = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)
        self.causal = nn.Conv3d(3, 4, (3, 1, 1))
        self.register_buffer("seen", torch.zeros(1))
        self.body = body

    def step(self, frame: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.cell(torch.cat([frame, h], 1)))

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.size(0), 4, *x.shape[3:])

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def clip(batch: int = 2, frames: int = FRAMES) -> Tensor:
    return noise(batch, frames, 3, 6, 6).double()


def head_after_the_state(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(self.fc(F.relu(self.head(h), inplace=True).mean((-2, -1))))
    return torch.stack(outs, 1)


def head_with_a_norm(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(F.relu_(self.norm(self.head(h))))
    return torch.stack(outs, 1)


def loss_of_each_step(self: Any, x: Tensor) -> Tensor:
    h, total = self.start(x), x.new_zeros(())
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        total = total + (self.head(h) - x[:, t, :2, 1:-1, 1:-1]).square().mean()
    return total


def two_layers(self: Any, x: Tensor) -> Tensor:
    h, g, outs = self.start(x), self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        g = torch.tanh(self.second(h) + self.own(g))
        outs.append(g)
    return torch.stack(outs, 1)


def cached(self: Any, x: Tensor) -> Tensor:
    cache, outs = x.new_zeros(x.size(0), 3, 2, *x.shape[3:]), []
    for t in range(x.size(1)):
        seen = torch.cat([cache, x[:, t].unsqueeze(2)], 2)
        outs.append(self.causal(seen))
        cache = seen[:, :, 1:]
    return torch.cat(outs, 2)


def both_ways(self: Any, x: Tensor) -> Tensor:
    there, back = [self.start(x)], [self.start(x)]
    for t in range(x.size(1)):
        there.append(self.step(x[:, t], there[-1]))
        back.append(self.step(x[:, -1 - t], back[-1]))
    both = zip(there, back[::-1], strict=True)
    return torch.stack([self.head(a) + self.head(b) for a, b in both], 1)


def named(body: Body) -> str:
    return body.__name__


BODIES = {
    head_after_the_state: FRAMES + 1 + 2,  # a call for each state, one for all frames, two heads
    loss_of_each_step: FRAMES + 1 + 1,
    two_layers: 2 * FRAMES + 1 + 1,
    cached: 1,
    both_ways: None,
}


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def layers(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), Counting() as counting:
        model(x)
    return counting.calls


def applied(result: nn.Module) -> list[Any]:
    found = fxtemporal.report(result).remarks
    assert not [remark for remark in found if remark.status == "failed"]
    mine = [remark for remark in found if remark.rule == "loop-distribution"]
    return [remark for remark in mine if remark.status == "applied"]


@pytest.mark.parametrize("body", BODIES, ids=named)
def test_the_numbers_and_the_gradients(body: Body) -> None:
    model = Recurrent(body).double().eval()
    before = copy.deepcopy(model.state_dict())
    result = fxtemporal.optimize(model, (clip(),), tune="static", verify=False)
    assert applied(result)
    assert layers(result, clip()) < layers(model, clip())
    if (count := BODIES[body]) is not None:
        assert layers(result, clip()) <= count
    for batch in (1, 2, 3):
        x, y = clip(batch).requires_grad_(), clip(batch).requires_grad_()
        mine, theirs = result(x), model(y)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        weights = [model.cell.weight] if body is not cached else [model.causal.weight]
        ours = torch.autograd.grad(mine.square().sum(), [x, *weights])
        wanted = torch.autograd.grad(theirs.square().sum(), [y, *weights])
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("body", BODIES, ids=named)
def test_twice_changes_nothing(body: Body) -> None:
    model = Recurrent(body).double().eval()
    once = fxtemporal.optimize(model, (clip(),), tune="static")
    twice = fxtemporal.optimize(once, (clip(),), tune="static")
    assert not applied(twice)
    torch.testing.assert_close(twice(clip()), model(clip()))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_behind_the_head(training: bool) -> None:
    """Batched in eval mode alone: in training each step has statistics of its own."""
    model = Recurrent(head_with_a_norm).double().train(training)
    reference = copy.deepcopy(model)
    result = fxtemporal.optimize(model, (clip(),), tune="static")
    torch.testing.assert_close(result(clip()), reference(clip()))
    torch.testing.assert_close(result.norm.running_mean, reference.norm.running_mean)


def writes_the_frame_later(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    frames, h, outs = [x[:, t] for t in range(x.size(1))], self.start(x), []
    for frame in frames:
        x.mul_(1.5)
        h = self.step(frame, h)
        outs.append(self.head(F.pad(frame, (0, 0, 0, 0, 0, 1)) + h))
    return torch.stack(outs, 1)


def writes_the_state(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(self.head(h))
        h = h.mul_(0.5)
    return torch.stack(outs, 1)


def counts_the_steps(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(self.head(h) * self.seen)
        self.seen.add_(1)
    return torch.stack(outs, 1)


def draws_in_the_head(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(F.dropout(self.head(h), 0.5, True))
        h = F.dropout(h, 0.5, True)
    return torch.stack(outs, 1)


def writes_into_an_input(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(self.head(h))
        x[:, t, 0, 0, 0] = outs[-1].mean()
    return torch.stack(outs, 1)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (writes_the_frame_later, None),
        (writes_the_state, Code.VISIBLE_WRITE),
        (counts_the_steps, None),
        (draws_in_the_head, Code.RANDOMNESS),
        (writes_into_an_input, Code.UNSUPPORTED_OP),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_happens_in_between_is_seen(body: Body, code: Code | None) -> None:
    model = Recurrent(body).double().eval()
    reference = copy.deepcopy(model)
    result = fxtemporal.optimize(model, (clip(),), tune="static", verify=False)
    for batch in (2, 1):
        x, y = clip(batch), clip(batch)
        torch.manual_seed(1)
        mine = result(x)
        torch.manual_seed(1)
        torch.testing.assert_close(mine, reference(y))
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(model.seen, reference.seen)
    found = [r for r in fxtemporal.report(result).remarks if r.rule == "loop-distribution"]
    if code is not None:
        assert code in {reason.code for remark in found for reason in remark.reasons}


def detached_but_one(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        out = self.head(h)
        outs.append(out if t == 2 else out.detach())
    return torch.stack(outs, 1)


def test_calls_without_a_gradient_are_not_joined_with_others() -> None:
    model = Recurrent(detached_but_one).double().eval()
    result = fxtemporal.optimize(model, (clip(),), tune="static")
    bad = clip()
    bad[:, 4] = float("inf")
    for x in (clip(), bad):
        grads = []
        for net in (result, model):
            given = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(net(given)[:, 2].sum(), given)[0])
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program(dynamic: bool) -> None:
    model = Recurrent(head_after_the_state).eval()
    x = clip().float()
    sizes = {"x": {0: torch.export.Dim("batch", min=1, max=8)}} if dynamic else None
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes)
    result = fxtemporal.optimize(exported, (x,), tune="static")
    assert applied(result)
    for batch in (1, 2, 3) if dynamic else (2,):
        x = clip(batch).float()
        torch.testing.assert_close(result(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compilers_take_the_stack_at_any_batch() -> None:
    model = Recurrent(head_after_the_state).eval()
    compiled = torch.compile(model, backend="fxtemporal")
    for batch in (2, 3, 4):
        x = clip(batch).float()
        torch.testing.assert_close(compiled(x), model(x))
    result = fxtemporal.optimize(model, (clip().float(),), tune="static")
    traced = torch.jit.trace(result, (clip().float(),))
    torch.testing.assert_close(traced(clip().float()), model(clip().float()))


def updates_statistics(self: Any, x: Tensor) -> Tensor:
    h, outs = self.start(x) + self.norm(x[:, 0, :2]).mean(), []
    for t in range(x.size(1)):
        h = self.step(x[:, t], h)
        outs.append(self.head(h))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_call_of_another_size_can_still_run_the_original(training: bool) -> None:
    """The stack checks shapes, which it may not do behind an update of statistics."""
    model = Recurrent(updates_statistics).double().train(training)
    reference = copy.deepcopy(model)
    result = fxtemporal.optimize(model, (clip(),), tune="static")
    assert bool(applied(result)) is not training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(result(clip(frames=4)), reference(clip(frames=4)))
    torch.testing.assert_close(result.norm.running_mean, reference.norm.running_mean)


class HeadWithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(4):
            h = torch.tanh(self.cell(h) + x[:, t])
            torch._C._set_grad_enabled(False)
            out = self.head(h)
            torch._C._set_grad_enabled(True)
            outs.append(out + h)
        return torch.stack(outs, 1)


def test_no_call_moves_past_a_switch_of_the_mode() -> None:
    """As in the graphs of Dynamo: ``torch.no_grad()`` is two calls that return nothing."""
    model = HeadWithoutGradients()
    graph = fx.Graph()
    x = graph.placeholder("x")
    h, outs = graph.call_function(torch.zeros_like, (graph.call_method("select", (x, 1, 0)),)), []
    for t in range(4):
        frame = graph.call_method("select", (x, 1, t))
        h = graph.call_function(torch.add, (graph.call_module("cell", (h,)), frame))
        h = graph.call_function(torch.tanh, (h,))
        graph.call_function(torch._C._set_grad_enabled, (False,))
        out = graph.call_module("head", (h,))
        graph.call_function(torch._C._set_grad_enabled, (True,))
        outs.append(graph.call_function(torch.add, (out, h)))
    graph.output(graph.call_function(torch.stack, (outs, 1)))
    given = fx.GraphModule(model, graph)
    x = noise(2, 4, 4)
    result = fxtemporal.optimize(given, (x,), tune="static", verify=False)
    model(x).sum().backward()
    wanted = model.cell.weight.grad.clone()
    assert model.head.weight.grad is None
    model.zero_grad()
    result(x).sum().backward()
    assert model.head.weight.grad is None
    torch.testing.assert_close(model.cell.weight.grad, wanted)


class Squeezed(nn.Module):
    """With one clip, the states lose their batch: another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.ones(1, 4, dtype=x.dtype), []
        for t in range(x.size(1)):
            h = torch.tanh(self.cell(h) + x[:, t]).squeeze()
            outs.append(self.head(h))
        return torch.stack(outs, -1)


class Broadcast(Squeezed):
    """The first state has one sample, the others have as many as the clip: one in the example."""

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.ones(1, 4, dtype=x.dtype), []
        for t in range(x.size(1)):
            outs.append(self.head(h) + x[:, t])
            h = torch.tanh(self.cell(h) + x[:, t])
        return torch.stack(outs, 1)


@pytest.mark.parametrize(("kind", "batch"), [(Squeezed, 2), (Broadcast, 1)])
def test_shapes_that_another_batch_changes(kind: type[nn.Module], batch: int) -> None:
    model = kind().double().eval()
    result = fxtemporal.optimize(model, (noise(batch, 5, 4).double(),), tune="static", verify=False)
    assert applied(result)
    for size in (1, 2, 4):
        x = noise(size, 5, 4).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(result(x), model(x))


def two_of_a_kind(self: Any, x: Tensor) -> Tensor:
    h = self.step(x[:, 0], self.start(x))
    g = self.step(x[:, 1], h)
    return self.head(h) + self.head(g)


def other_shapes(self: Any, x: Tensor) -> list[Tensor]:
    h, outs = self.start(x), []
    for t in range(3):
        h = self.step(x[:, t], h)
        outs.append(self.head(h[..., t:]))
    return outs


@pytest.mark.parametrize("body", [two_of_a_kind, other_shapes])
def test_what_is_no_site(body: Body) -> None:
    model = Recurrent(body).double().eval()
    result = fxtemporal.optimize(model, (clip(),), tune="static")
    assert not [r for r in fxtemporal.report(result).remarks if r.rule == "loop-distribution"]
    torch.testing.assert_close(result(clip()), model(clip()))


def test_a_hook_on_the_head_is_called_at_each_step() -> None:
    model = Recurrent(head_after_the_state).double().eval()
    seen: list[torch.Size] = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    result = fxtemporal.optimize(model, (clip(),), tune="static")
    seen.clear()
    result(clip())
    assert len(seen) == FRAMES
