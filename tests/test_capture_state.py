"""State that a graph cannot carry is refused or right: attributes, chance, hooks, hidden layers."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import CaptureError, VerificationError
from tests.capture_cases import (
    Case,
    Forward,
    X,
    assert_same,
    call,
    check,
    linear,
    named,
    numbers,
    snapshot,
    stack,
)


def replace_the_forward(model: Any) -> None:
    model.forward = lambda x: model.linear(x) * 3


def counts(self: Any, x: Tensor) -> Tensor:
    self.counter += 1
    return x * self.counter


def keeps_a_history(self: Any, x: Tensor) -> Tensor:
    self.constants.append(x)
    return x * len(self.constants)


def keeps_the_last(self: Any, x: Tensor) -> Tensor:
    last = getattr(self, "last", x)
    self.last = x * 2
    return self.last + last


def keeps_what_nobody_reads(self: Any, x: Tensor) -> Tensor:
    self.last = (x * 2).detach()
    return x * 2


def replaces_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.table = self.table + 1
    return x + self.table[0]


def adds_to_a_constant(self: Any, x: Tensor) -> Tensor:
    self.constant.add_(1)
    return x + self.constant


def draws_with_a_generator(self: Any, x: Tensor) -> Tensor:
    return x + torch.randn(5, generator=torch.Generator().manual_seed(0))


def sets_what_it_reads_in_its_dict(self: Any, x: Tensor) -> Tensor:
    vars(self)["count"] = 2
    self.steps = [0]
    self.steps[0] += 1 if "steps" in self.__dict__ else 0
    return x * self.count * self.steps[0]


def counts_in_its_dict(self: Any, x: Tensor) -> Tensor:
    self.__dict__["count"] = self.__dict__.get("count", 0) + 1
    self.other = 1
    return x * self.count


def goes_through_its_dict(self: Any, x: Tensor) -> Tensor:
    known = sum(isinstance(value, float) for value in self.__dict__.values())
    self.factor = float(known)
    return x * known


STATEFUL: dict[str, Forward] = {
    "set in __dict__": sets_what_it_reads_in_its_dict,
    "counted in __dict__": counts_in_its_dict,
    "found in __dict__": goes_through_its_dict,
    "a number": counts,
    "a list": keeps_a_history,
    "a tensor": keeps_the_last,
    "a tensor that nobody reads": keeps_what_nobody_reads,
    "another buffer": replaces_a_buffer,
    "a plain tensor": adds_to_a_constant,
    "a generator": draws_with_a_generator,
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("forward", named(STATEFUL))
def test_state_in_python_is_refused_or_right_at_every_call(forward: Forward, verify: bool) -> None:
    case = Case(forward)
    model, reference = case.build(), case.build()
    before, values = snapshot(model), numbers(model)
    try:
        result = fxtemporal.optimize(model, (X,), tune="static", verify=verify)
    except (CaptureError, VerificationError):
        result = None
    assert snapshot(model) == before
    assert_same(numbers(model), values)
    for _ in range(3 if result is not None else 0):
        assert_same(call(result, (X,), {}), call(reference, (X,), {}))


def test_a_question_about_another_name_in_the_dict_reads_nothing() -> None:
    """As ``__getattr__`` of a library asks for ``"config" in self.__dict__`` at each attribute."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.index = [0] if "config" not in self.__dict__ else [1]
        self.index[0] += 1
        return x * self.index[0]

    case = Case(forward)
    result = fxtemporal.optimize(case.build(), (X,), tune="static")
    assert_same(call(result, (X,), {}), call(case.build(), (X,), {}))


RANDOM_ELSEWHERE: dict[str, Forward] = {
    "random": lambda self, x: x * random.random(),
    "numpy": lambda self, x: x * float(np.random.rand()),
    "a depth by chance": lambda self, x: x if random.random() < 0.5 else x * 2,
    "a layer by choice": lambda self, x: random.choice((torch.sin, torch.cos))(x),
    "frames in an order": lambda self, x: torch.stack(
        [x[t] for t in np.random.permutation(len(x))]
    ),
}
SEEDING: dict[str, Forward] = {
    "manual_seed": lambda self, x: (torch.manual_seed(3), x + torch.rand(1))[1],
    "seed": lambda self, x: (torch.seed(), x + torch.rand(1))[1],
    "set_rng_state": lambda self, x: (
        torch.set_rng_state(torch.get_rng_state()),
        x + torch.rand(1),
    )[1],
    "torch.random": lambda self, x: (torch.random.manual_seed(3), x + torch.rand(1))[1],
}


@pytest.mark.parametrize("forward", named(RANDOM_ELSEWHERE))
def test_random_numbers_of_python_and_numpy_are_not_frozen(forward: Forward) -> None:
    with pytest.raises(CaptureError, match="the forward draws from"):
        fxtemporal.optimize(Case(forward).build(), (X,), tune="static")


@pytest.mark.parametrize("example", [(X,), None], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("forward", named(SEEDING))
def test_a_seed_in_the_forward_is_not_left_out(forward: Forward, example: Any) -> None:
    with pytest.raises(CaptureError, match="the forward seeds"):
        fxtemporal.optimize(Case(forward).build(), example, tune="static")


def test_hooks_run_once_at_every_call_and_never_during_optimize() -> None:
    calls: list[str] = []
    model = Case(stack).build()
    model.register_forward_pre_hook(lambda m, a: calls.append("root before"))
    model.stack.register_forward_hook(lambda m, a, o: calls.append("stack"))
    model.stack[0].register_forward_pre_hook(lambda m, a: calls.append("layer"))
    model.register_forward_hook(lambda m, a, o: calls.append("root after"))
    result = fxtemporal.optimize(model, (X,), tune="static", verify=False)
    calls.clear()
    result(X)
    result(X)
    assert calls == ["root before", "layer", "stack", "root after"] * 2


def test_hooks_added_to_the_result_stay_with_the_result() -> None:
    model = Case(linear).build()
    result = fxtemporal.optimize(model, (X,), tune="static")
    result.register_forward_hook(lambda m, a, o: o * 2)
    torch.testing.assert_close(result(X), model(X) * 2)
    assert not model._forward_hooks


def test_backward_hooks_see_the_same_gradients() -> None:
    seen: dict[str, list[Tensor]] = {"model": [], "result": []}
    model = Case(linear).build()
    log = "model"

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        seen[log].append(grad_output[0])

    model.linear.register_full_backward_hook(hook)
    result = fxtemporal.optimize(model, (X,), tune="static")
    model(X.clone().requires_grad_()).square().sum().backward()
    log = "result"
    result(X.clone().requires_grad_()).square().sum().backward()
    assert len(seen["model"]) == 1
    assert_same(seen["result"], seen["model"])


def test_a_forward_that_closes_over_the_model_is_refused_or_follows_its_weights() -> None:
    case = Case(linear, setup=replace_the_forward, frontend="?")
    try:
        check(case, lambda model: fxtemporal.optimize(model, (X,), tune="static"))
    except CaptureError as error:
        assert "does not reach through self" in str(error)  # noqa: PT017


def keeps_layers_to_itself(model: Any) -> None:
    torch.manual_seed(1)
    model.hidden = [nn.Linear(5, 5)]


def test_a_layer_that_is_not_registered_is_refused_or_not_frozen() -> None:
    case = Case(lambda self, x: self.hidden[0](x), setup=keeps_layers_to_itself)
    model = case.build()
    try:
        result = fxtemporal.optimize(model, (X,), tune="static")
    except CaptureError:
        return
    assert_same(result(X), model(X))
    with torch.no_grad():
        model.hidden[0].weight.add_(1)
    assert_same(result(X), model(X))


def keeps_a_norm_to_itself(model: Any) -> None:
    model.hidden = [nn.BatchNorm1d(4)]


@pytest.mark.parametrize("verify", [True, False])
def test_a_norm_that_is_not_registered_counts_once_a_call(verify: bool) -> None:
    case = Case(lambda self, x: self.hidden[0](x), setup=keeps_a_norm_to_itself, train=True)
    model, reference = case.build(), case.build()
    result = fxtemporal.optimize(model, (X,), tune="static", verify=verify)
    assert_same(dict(model.hidden[0].named_buffers()), dict(reference.hidden[0].named_buffers()))
    for _ in range(2):
        assert_same(result(X), reference(X))
    assert_same(dict(model.hidden[0].named_buffers()), dict(reference.hidden[0].named_buffers()))


class Ticker(threading.Thread):
    """Counts on, as the monitor of a progress bar does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ticks = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.ticks += 1


TICKER = Ticker()


def test_a_thread_that_the_forward_knows_goes_on() -> None:
    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert TICKER.is_alive()
            return torch.stack([x[:, t] * 2 for t in range(x.size(1))], 1)

    TICKER.start()
    try:
        result = fxtemporal.optimize(Watched(), (X,), tune="static")
        ticks = TICKER.ticks
        while TICKER.ticks == ticks:  # nobody put its state back, and it goes on
            pass
        assert torch.equal(result(X), X * 2)
    finally:
        TICKER.over.set()
