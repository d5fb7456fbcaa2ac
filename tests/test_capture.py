"""What is captured is the model: the same numbers at every size, or an error that says why not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import CaptureError, FxTemporalError, SpecializationError
from fxtemporal.capture.arguments import bind_example
from fxtemporal.capture.capture import capture
from tests.capture_cases import OTHERS, Case, Forward, Layers, X, assert_same, call, check, clone
from tests.capture_forwards import (
    ASKED,
    ASSIGNMENTS,
    CALLED,
    EXPORTED,
    GRADIENTS,
    MADE,
    RANDOM,
    READ_THE_BATCH,
    RETURNED,
    SIZES,
    WRITES,
)
from tests.capture_inputs import INPUTS, with_default
from tests.capture_states import STATES
from tests.strictly import strictly
from tests.zoo import CAPTURE, noise


def _table(forwards: dict[str, Forward], **more: Any) -> dict[str, Case]:
    return {name: Case(forward, **more) for name, forward in forwards.items()}


CASES: dict[str, Case] = {
    **{
        f"size: {name}": Case(forward, reads_batch=name in READ_THE_BATCH)
        for name, forward in SIZES.items()
    },
    **{f"asked: {k}": v for k, v in _table(ASKED, frontend="?").items()},
    **{f"called: {k}": v for k, v in _table(CALLED).items()},
    **{f"returned: {k}": v for k, v in _table(RETURNED, frontend="?").items()},
    **{f"written: {k}": v for k, v in _table(WRITES).items()},
    **{f"assigned: {k}": v for k, v in _table(ASSIGNMENTS, frontend="?").items()},
    **{f"random: {k}": v for k, v in _table(RANDOM).items()},
    **{f"gradients: {k}": v for k, v in _table(GRADIENTS).items()},
    **{f"export: {k}": v for k, v in _table(EXPORTED, frontend="export").items()},
    **{f"made: {k}": v for k, v in _table(MADE, frontend="?").items()},
    **{f"input: {k}": v for k, v in INPUTS.items()},
    **{f"state: {k}": v for k, v in STATES.items()},
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.export's own
@every_case
def test_the_result_is_the_model(case: Case) -> None:
    def make(model: nn.Module) -> nn.Module:
        return strictly(model, case.args, dict(case.kwargs), tune="static")

    result = check(case, make)
    report = fxtemporal.report(result)
    assert case.frontend in (report.frontend, "?")
    assert (report.note is None) == (report.frontend == "fx")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@every_case
def test_the_capture_alone_is_the_model(case: Case) -> None:
    """With no verification behind it to mend what the capture got wrong."""
    check(case, lambda model: capture(model, case.args, dict(case.kwargs)).gm)


@every_case
def test_without_example_inputs_it_is_the_model_or_an_error(case: Case) -> None:
    try:
        check(case, lambda model: capture(model).gm, blind=True)
    except CaptureError as error:
        message = str(error)
    else:
        message = "xample inputs"
    assert any(words in message for words in ("xample inputs", "a graph cannot carry it"))


class OwnCall(Layers):
    """What a call gives is not what forward gives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


@pytest.mark.parametrize("verify", [True, False])
def test_a_class_with_a_call_of_its_own(verify: bool) -> None:
    model = OwnCall()
    result = strictly(model, (X,), tune="static", verify=verify)
    for args in OTHERS:
        assert_same(result(*args), model(*args))


def test_a_tensor_as_default() -> None:
    def with_tensor(self: Any, x: Tensor, y: Tensor = noise(5)) -> Tensor:  # noqa: B008
        return x * y

    check(Case(with_tensor), lambda model: strictly(model, (X,), tune="static"))


def generator_without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.linear(x)
    return y + noise(5)


ODD: dict[str, Forward] = {
    "func.grad": lambda self, x: torch.func.grad(lambda y: (y**2).sum())(x),
    "a generator": lambda self, x: x + noise(3, 4, 5),
    "a python generator": lambda self, x: (row for row in x),
    "a default of nan": lambda self, x, fill=float("nan"): x.masked_fill(x > 0, fill),
    "inference mode": torch.inference_mode()(lambda self, x: self.linear(x)),
    "a generator, where the tracer stops": generator_without_gradients,
    "functional_call": lambda self, x: torch.func.functional_call(
        self.linear, {"weight": self.linear.weight * 2}, (x,)
    ),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("forward", ODD.values(), ids=ODD.keys())
def test_odd_forwards_are_refused_or_right_at_every_call(forward: Forward, verify: bool) -> None:
    model = Case(forward).build()
    x = X[:1]
    try:
        result = strictly(model, (x,), tune="static", verify=verify)
    except FxTemporalError:
        return
    for _ in range(3):
        assert_same(result(x), model(x))


@pytest.mark.parametrize("cls", CAPTURE, ids=lambda cls: cls.__name__)
def test_models_that_are_hard_to_capture(cls: Any) -> None:
    model = cls.build()
    example = model.example(*cls.sizes[0])
    result = strictly(model, example, tune="static")
    if cls.__name__ == "DataDependentBranch":
        report = fxtemporal.report(result)
        assert report.frontend == "parts"
        assert re.search(r"hard_to_capture\.py:\d+", report.note)
    for batch, frames in cls.sizes:
        inputs = model.example(batch, frames)
        try:
            actual = result(*clone(inputs))
        except SpecializationError:
            assert frames != cls.sizes[0][1]
        else:
            assert_same(actual, model(*clone(inputs)))


DATA_DEPENDENT: dict[str, Forward] = {
    "boolean mask": lambda self, x: x[x > 0],
    "nonzero": lambda self, x: x.nonzero(),
    "item": lambda self, x: x * x.sum().item(),
}


@pytest.mark.parametrize("forward", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT.keys())
def test_sizes_that_depend_on_data_stay_free(forward: Forward) -> None:
    case = Case(forward, others=OTHERS[:1])
    result = strictly(case.build(), (X,), tune="static")
    assert_same(call(result, OTHERS[0], {}), call(case.build(), OTHERS[0], {}))


def test_bind_example_leaves_defaults_out() -> None:
    model = Case(with_default).build()
    assert list(bind_example(model, (X,), {})) == ["x"]
    assert list(bind_example(model, (X,), {"s": 3.0})) == ["x", "s"]


class Residuals(nn.Module):
    """Sixty additions in a row, and a question about the last one."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(60):
            x = x + torch.relu(x)
        return x.flatten() if len(x.shape) > 2 else x


def test_a_specialization_of_a_deep_residual_network_is_said_in_few_words() -> None:
    program = capture(Residuals(), (torch.ones(2, 3, 4),))
    texts = [str(fixed) for fixed in program.specializations]
    assert texts
    assert max(map(len, texts)) < 1000
