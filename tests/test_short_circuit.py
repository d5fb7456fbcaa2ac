"""Questions whose answer is lost in the expression that asks them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxtemporal.capture.capture import capture
from fxtemporal.capture.tracing.shape_tracer import ShapeTracer
from fxtemporal.capture.tracing.short_circuit import makes_no_difference

answers: list[bool] = []


def asked() -> bool:
    answers.append(makes_no_difference(sys._getframe(1)))
    return True


class Named(nn.Module):
    """What the questions are about."""

    off = False

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self.none: Any = None
        self.config = SimpleNamespace(off=False, on=True)
        self.counted = 0

    @property
    def runs_code(self) -> bool:
        self.counted += 1
        return False

    def __getattr__(self, name: str) -> Any:
        if name == "computed":
            self.counted += 1
            return False
        return super().__getattr__(name)


def in_a_test(self: Named) -> int:
    if asked() and self.off:
        return 1
    return 0


def in_a_value(self: Named) -> Any:
    return asked() and self.off


def behind_a_true_one(self: Named) -> int:
    return 1 if asked() and self.on and self.config.off else 0


def with_none_in_a_test(self: Named) -> int:
    while asked() and self.none:
        return 1
    return 0


def of_a_training_flag(self: Named) -> Any:
    return asked() and self.training


@pytest.mark.parametrize(
    "question",
    [in_a_test, in_a_value, behind_a_true_one, with_none_in_a_test, of_a_training_flag],
)
def test_lost(question: Callable[[Named], Any]) -> None:
    answers.clear()
    question(Named().eval())
    assert answers == [True]


def of_what_is_true(self: Named) -> int:
    return 1 if asked() and self.on else 0


def of_none_as_a_value(self: Named) -> Any:
    return asked() and self.none


def of_a_property(self: Named) -> Any:
    return asked() and self.runs_code


def of_a_computed_attribute(self: Named) -> Any:
    return asked() and self.computed


def of_a_call(self: Named) -> Any:
    return asked() and self.config.off.bit_length() > 3


def of_either(self: Named) -> Any:
    return asked() or self.off


def alone(self: Named) -> int:
    mode = asked()
    return 1 if mode and self.off else 0


def negated(self: Named) -> int:
    return 1 if not asked() and self.off else 0


@pytest.mark.parametrize(
    "question",
    [
        of_what_is_true,
        of_none_as_a_value,
        of_a_property,
        of_a_computed_attribute,
        of_a_call,
        of_either,
        alone,
        negated,
    ],
)
def test_not_lost(question: Callable[[Named], Any]) -> None:
    answers.clear()
    model = Named().train()
    question(model)
    assert answers == [False]
    assert model.counted <= 1  # by the question itself: looking ran no code


def test_code_without_its_source() -> None:
    answers.clear()
    here: dict[str, Any] = {"asked": asked}
    exec("def question(self):\n    return asked() and self.off\n", here)
    here["question"](Named())
    assert answers == [False]


class Checkpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return torch.utils.checkpoint.checkpoint(self.conv, x)  # type: ignore[no-any-return]
        with torch.no_grad():
            shift = 1 if torch.is_grad_enabled() else 2
        return self.conv(x) + shift


def test_the_tracer_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, trace = [], ShapeTracer.trace
    monkeypatch.setattr(ShapeTracer, "trace", lambda *args: traces.append(1) or trace(*args))
    model, x = Checkpoints(), torch.rand(1, 2, 8)
    program = capture(model, (x,), {})
    assert program.frontend == "fx"
    assert len(traces) == 1
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            assert torch.equal(program.gm(x), model(x))
