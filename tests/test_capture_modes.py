"""A captured forward follows the modes that it was written for: training, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from fxtemporal import CaptureError, FxTemporalError, SpecializationError, VerificationError
from fxtemporal.support.torch_private.fake_tensors import FakeTensor
from tests.capture_cases import Case, Forward, X, assert_same, call
from tests.capture_forwards import without_gradients
from tests.strictly import strictly


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.dropout(self.linear(x), 0.5, self.training),
        lambda self, x: self.linear(x) * 2 if self.training else x,
        lambda self, x: self.norm(x.transpose(1, 2)) * (1 + self.norm.training),
    ],
)
def test_a_mode_that_the_forward_reads_is_not_frozen_silently(
    forward: Forward, training: bool
) -> None:
    case = Case(forward, train=training)
    model, reference = case.build(), case.build()
    result = strictly(model, (X,), tune="static")
    try:
        result.train(not training)
        actual = call(result, (X,), {})[0]
    except (SpecializationError, FxTemporalError):
        return
    assert_same(actual, call(reference.train(not training), (X,), {})[0])


def _evaluates_first(self: Any, x: Tensor) -> Tensor:
    self.norm.eval()
    return self.norm(x.transpose(1, 2))


def _drops_always(self: Any, x: Tensor) -> Tensor:
    self.dropout.train()
    return self.dropout(self.linear(x))


def _evaluates_late(self: Any, x: Tensor) -> Tensor:
    before = self.norm(x.transpose(1, 2))
    self.norm.eval()
    return before + self.norm(x.transpose(1, 2))


def _sets_and_reads(self: Any, x: Tensor) -> Tensor:
    self.norm.eval()
    return self.norm(x.transpose(1, 2)) * (2 if self.norm.training else 1)


def _puts_back(self: Any, x: Tensor) -> Tensor:
    was = self.norm.training
    self.norm.eval()
    before = self.norm(x.transpose(1, 2))
    self.norm.train(was)
    return self.norm(before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("forward", "refuses"),
    [
        (_evaluates_first, False),
        (_drops_always, False),
        (_evaluates_late, True),
        (_sets_and_reads, False),
        (_puts_back, True),
    ],
)
def test_a_mode_that_the_forward_sets_is_set(
    forward: Forward, refuses: bool, training: bool
) -> None:
    case = Case(forward, train=training)
    model, reference = case.build(), case.build()
    result = strictly(model, (X,), tune="static")
    assert_same(call(result, (X,), {})[0], call(reference, (X,), {})[0])
    refused = 0
    for mode in (not training, training, True):
        try:
            actual = call(result.train(mode), (X,), {})[0]
        except SpecializationError:
            refused += 1
            reference.train(training)
        else:
            assert_same(actual, call(reference.train(mode), (X,), {})[0])
    assert refuses or not refused


def test_the_mode_of_a_part_is_held_at_every_call() -> None:
    case = Case(lambda self, x: F.dropout(x, 0.5, self.norm.training))
    result = strictly(case.build().eval(), (X,), tune="static")
    assert any(
        "norm.training == False" in str(s) for s in fxtemporal.report(result).specializations
    )
    result.norm.train()
    with pytest.raises(SpecializationError, match=r"eval mode.*norm\.training"):
        result(X)


def test_a_forward_that_computes_something_else_for_gradients_is_refused() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.requires_grad else x * 3

    with pytest.raises(fxtemporal.VerificationError) as raised:
        strictly(Asks(), (torch.randn(2, 3),), tune="static")
    assert "reads requires_grad" in str(raised.value)
    assert "computes something else where gradients are asked for" in str(raised.value)
    assert "self.training" in str(raised.value)


def test_gradients_stop_where_the_model_stops_them() -> None:
    case = Case(without_gradients)
    model = case.build()
    result = strictly(model, (X,), tune="static")
    model(X).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    result(X).sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(actual) == set(expected) == {"named.a.weight", "named.a.bias"}
    assert_same(actual, expected)


def retains_a_gradient(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    if y.requires_grad:
        y = y * 2
    return y


def asks_for_grad_mode(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * (2 if torch.is_grad_enabled() else 3)


@pytest.mark.parametrize("forward", [retains_a_gradient, asks_for_grad_mode])
@pytest.mark.parametrize("verify", [True, False])
def test_a_branch_on_gradients_is_right_with_and_without_them(
    forward: Forward, verify: bool
) -> None:
    model = Case(forward).build()
    try:
        result = strictly(model, (X,), tune="static", verify=verify)
    except (CaptureError, VerificationError):
        return
    ran = 0
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            try:
                actual = result(X)
            except SpecializationError:
                continue
            ran += 1
            assert_same(actual, model(X))
    assert ran


def checkpoints_if_asked(self: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and self.counter:
        return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)
    return self.linear(x)


def names_its_mode(self: Any, x: Tensor) -> Tensor:
    mode = "with" if torch.is_grad_enabled() else "without"
    return self.linear(x) + (0 if mode else 1)


def steps_out_of_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax() * (1 if torch.is_grad_enabled() else 2)
    return self.linear(x) * scale


def makes_a_constant(self: Any, x: Tensor) -> Tensor:
    torch.is_grad_enabled()
    return self.linear(x) + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(
    "forward",
    [checkpoints_if_asked, names_its_mode, steps_out_of_gradients, makes_a_constant],
)
def test_a_question_whose_answer_makes_no_difference(forward: Forward) -> None:
    model, reference = Case(forward).build(), Case(forward).build()
    result = strictly(model, (X,), tune="static")
    assert fxtemporal.report(result).frontend == "fx"
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_same(result(X), reference(X))


def makes_another_constant(self: Any, x: Tensor) -> Tensor:
    shift = torch.tensor([1.0, 2.0]) if torch.is_grad_enabled() else torch.tensor([1.0, 3.0])
    return self.linear(x)[..., :2] + shift


def test_another_constant_is_another_graph() -> None:
    model, reference = Case(makes_another_constant).build(), Case(makes_another_constant).build()
    try:
        result = strictly(model, (X,), tune="static")
    except (CaptureError, VerificationError):
        return
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_same(result(X), reference(X))


class ChunkedByItsSize(nn.Module):
    """Works on eight frames of all clips at a time, and asks what the tracer cannot answer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if torch.empty(0, requires_grad=torch.is_grad_enabled()).requires_grad:
            x = x + 0
        frames = x.flatten(0, 1)
        return torch.cat([self.conv(part) for part in frames.split(8)]).unflatten(0, x.shape[:2])


def test_a_guard_of_a_wider_batch_is_not_the_model_s() -> None:
    model = ChunkedByItsSize()
    x = torch.rand(1, 7, 3, 6, 6)
    result = strictly(model, (x,), tune="static")
    assert_same(result(x), model(x))


def normalizes_by_the_grad_mode(self: Any, x: Tensor) -> Tensor:
    self.norm.train(torch.is_grad_enabled())
    return self.norm(x.transpose(1, 2))


def sets_a_layer_by_the_grad_mode(self: Any, x: Tensor) -> Tensor:
    self.norm.eps = 1e-5 if torch.is_grad_enabled() else 2.0
    return self.norm(x.transpose(1, 2))


def asks_and_then_maps(self: Any, x: Tensor) -> Tensor:
    factor = 2 if torch.is_grad_enabled() else 3
    return torch.vmap(self.linear)(x) * factor


def maps_and_then_asks(self: Any, x: Tensor) -> Tensor:
    return torch.vmap(self.linear)(x) * (2 if torch.is_grad_enabled() else 3)


def maps_and_then_reads(self: Any, x: Tensor) -> Tensor:
    y = torch.vmap(self.linear)(x)
    return y * (2 if y.requires_grad else 3)


def maps_and_then_looks_for_a_graph(self: Any, x: Tensor) -> Tensor:
    y = torch.vmap(self.linear)(x)
    return y * (3 if y.grad_fn is None else 2)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        normalizes_by_the_grad_mode,
        sets_a_layer_by_the_grad_mode,
        asks_and_then_maps,
        maps_and_then_asks,
        maps_and_then_reads,
        maps_and_then_looks_for_a_graph,
    ],
)
def test_an_answer_that_shows_in_no_code(forward: Forward, verify: bool) -> None:
    with pytest.raises((CaptureError, VerificationError)):
        strictly(Case(forward).build(), (X,), tune="static", verify=verify)


def maps_and_asks_in_vain(self: Any, x: Tensor) -> Tensor:
    y = torch.vmap(self.linear)(x)
    return y.clone() if torch.is_grad_enabled() and y.is_leaf else y


def test_a_question_to_torch_export_that_makes_no_difference() -> None:
    model = Case(maps_and_asks_in_vain).build()
    result = strictly(model, (X,), tune="static")
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_same(result(X), model(X))
    compiled = torch.compile(result, backend="eager", fullgraph=True)  # Dynamo's tables are whole
    assert_same(compiled(X), model(X))
    for name in ("requires_grad", "grad_fn", "is_leaf"):
        assert name not in vars(FakeTensor)
