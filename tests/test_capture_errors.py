"""What cannot be captured is an error that says what, where and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxtemporal
from fxtemporal import CaptureError
from fxtemporal.capture.capture import capture
from tests.capture_cases import Case, Forward, X, snapshot
from tests.capture_inputs import starred_inputs
from tests.zoo import BROKEN, IndexedFrames, noise


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: nn.Linear(5, 5).to("meta"), (X.to("meta"),)),
        (lambda: nn.LazyLinear(3), (X,)),
        (lambda: nn.Linear(5, 5), (X[0].to_sparse(),)),
        (lambda: torch.compile(nn.Linear(5, 5), backend="eager"), (X,)),
    ],
    ids=["meta", "lazy", "sparse", "compiled"],
)
def test_what_cannot_be_captured_is_a_capture_error_or_right(build: Any, inputs: Any) -> None:
    model = build()
    try:
        result = fxtemporal.optimize(model, inputs, tune="static")
    except CaptureError:
        return
    torch.testing.assert_close(result(*inputs), model(*inputs))


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_model_that_fails_by_itself_is_told_from_one_that_cannot_be_traced(cls: Any) -> None:
    model = cls.build()
    with pytest.raises(cls.fails):
        model(*model.example())
    with pytest.raises(CaptureError) as caught:
        fxtemporal.optimize(model, model.example())
    message = str(caught.value)
    module, cure = {
        "ClipIntoConv2d": ("'conv'", ("TimeDistributed", "flatten(0, 1)")),
        "MapsIntoLSTM": ("'lstm'", ("flatten(2)",)),
    }[cls.__name__]
    assert f"in module {module}" in message
    assert "wrong.py:" in message
    assert all(word in message for word in cure)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, which: str = "norm") -> Tensor:
        return getattr(self, which)(x)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((noise(2, 3, 3, 4, 4), "norm"), ("'norm'", "TimeDistributed", "flatten(0, 1)")),
        ((noise(2, 3, 3, 4, 4), "pool"), ("'pool'", "TimeDistributed")),
        ((noise(2, 3), "linear"), ("'linear'",)),
        ((noise(2, 3), "nothing"), ("nothing",)),
    ],
)
def test_wrong_inputs_are_named_with_the_module(inputs: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(CaptureError) as caught:
        fxtemporal.optimize(Wide(), inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def _identity() -> nn.Module:
    return Case(lambda self, x: x).build()


WRONG_ARGUMENTS: dict[str, tuple[Callable[[], Any], Any, Any, str]] = {
    "a tensor": (_identity, X, None, r"optimize\(model, \(x,\)\)"),
    "a dict": (_identity, {"x": X}, None, "must be a tuple"),
    "too many": (_identity, (X, X), None, "do not fit"),
    "too few": (_identity, (), None, "do not fit"),
    "an unknown keyword": (_identity, (X,), {"y": X}, "do not fit"),
    "keywords in a list": (_identity, (X,), [("y", X)], "example_kwargs must be a dict"),
    "a function": (lambda: F.relu, (X,), None, "expected an nn.Module"),
    "a class": (lambda: nn.ReLU, (X,), None, "expected an nn.Module"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(name: str) -> None:
    make, args, kwargs, words = WRONG_ARGUMENTS[name]
    for function in (fxtemporal.optimize, fxtemporal.audit):
        with pytest.raises(CaptureError, match=words):
            function(make(), args, kwargs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(5, 5), X)
    with pytest.raises(CaptureError, match="TorchScript"):
        fxtemporal.optimize(scripted, (X,))


NEITHER: dict[str, Forward] = {
    "branch on data": lambda self, x: x if x.sum() > 0 else -x,
    "float(tensor)": lambda self, x: x * float(x.sum()),
    "numpy()": lambda self, x: torch.from_numpy(x.detach().numpy() * 2),
    "branch on a random number": lambda self, x: x if torch.rand(1) > 0.5 else -x,
    "tolist": lambda self, x: [x * v for v in x.sum((1, 2)).tolist() if v > 0],
}


@pytest.mark.parametrize("forward", NEITHER.values(), ids=NEITHER.keys())
def test_what_neither_front_end_can_capture_is_an_error_with_line_and_cause(
    forward: Forward,
) -> None:
    line = forward.__code__.co_firstlineno
    with pytest.raises(CaptureError) as caught:
        fxtemporal.optimize(Case(forward).build(), (X,), tune="static")
    message = str(caught.value)
    assert f"test_capture_errors.py:{line}" in message
    assert "the tracer" in message
    assert "torch.export" in message


def test_without_inputs_what_needs_sizes_is_an_error_that_asks_for_them() -> None:
    with pytest.raises(CaptureError, match=r"spellings\.py:\d+.*Give example inputs"):
        capture(IndexedFrames.build())
    with pytest.raises(CaptureError, match="example inputs"):
        capture(Case(starred_inputs).build())


def test_a_failing_optimize_leaves_the_model_and_torch_alone() -> None:
    model = Case(lambda self, x: x if x.sum() > 0 else -x).build()
    before, zeros, tensor = snapshot(model), torch.zeros, torch.is_tensor
    state = torch.get_rng_state()
    with pytest.raises(CaptureError):
        fxtemporal.optimize(model, (X,))
    assert snapshot(model) == before
    assert (torch.zeros, torch.is_tensor) == (zeros, tensor)
    assert isinstance is __builtins__["isinstance"]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("rows", "taken"), [(64, True), (65, False)])
def test_many_numbers_handed_to_python_are_refused_at_once(rows: int, taken: bool) -> None:
    """torch.export makes a symbol of each, and takes a minute for two thousand."""

    class Lists(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1]
            return torch.tensor(x.tolist())

    original = FakeTensor.tolist
    if taken:
        assert capture(Lists(), (torch.randn(rows, 4),)).frontend == "export"
    else:
        with pytest.raises(CaptureError, match=rf"tolist\(\) at .* hands {4 * rows} numbers"):
            capture(Lists(), (torch.randn(rows, 4),))
    assert FakeTensor.tolist is original
