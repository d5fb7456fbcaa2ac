"""Any name of a part is taken as it is, or refused with an error that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import CaptureError
from fxtemporal.capture.capture import capture
from tests.capture_cases import OTHERS, X, assert_same
from tests.zoo import noise

NAMES = ("graph", "code", "meta", "recompile", "_graph", "lambda", "in", "None", "a-b", "1", "x")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["parameter", "buffer", "module", "entry"])
def test_any_name_is_taken_or_named_in_the_error(name: str, kind: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            match kind:
                case "parameter":
                    self.register_parameter(name, nn.Parameter(noise(5)))
                case "buffer":
                    self.register_buffer(name, noise(5))
                case "module":
                    self.add_module(name, nn.Linear(5, 5))
                case "entry":
                    self.inner = nn.ModuleDict({name: nn.Linear(5, 5)})

        def forward(self, x: Tensor) -> Tensor:
            part = self.inner[name] if kind == "entry" else getattr(self, name)
            return part(x) if isinstance(part, nn.Module) else x * part

    model = Named()
    try:
        result = fxtemporal.optimize(model, (X,), tune="static")
    except CaptureError as error:
        message = str(error)
    else:
        message = name
        assert_same(result(*OTHERS[0]), model(*OTHERS[0]))
        assert list(result.state_dict()) == list(model.state_dict())
    assert name in message


@pytest.mark.parametrize(
    "name",
    [
        'a"b',
        "a\\b",
        "a\nb",
        "a\x1b[31mb",
        "a\u2028b",
        "a\u202eb",
        'x") or 1 / 0 or getattr(self, "',
    ],
)
def test_a_name_that_would_be_code_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    with pytest.raises(CaptureError, match="cannot use: rename it"):
        fxtemporal.optimize(model, (torch.ones(1, 2),), tune="static")
    with pytest.raises(CaptureError, match="cannot use: rename it"):
        capture(model, (torch.ones(1, 2),), frontend="export")


@pytest.mark.parametrize("name", ["a b", "a'b", "a|b`c", "<img src=x>", "é", "a=b", "{x}", "%s"])
def test_a_name_that_is_no_identifier_stays_as_it_is(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Conv3d(2, 2, 3))
    x = torch.ones(1, 2, 3, 4, 4)
    result = fxtemporal.optimize(model, (x,), tune="static")
    assert torch.equal(result(x), model(x))
    report = fxtemporal.report(result)
    assert "<img" not in report.to_html()
    assert "<img" not in report.to_markdown()
    assert name in {remark.target for remark in report.remarks}


@fx.wrap
def loosely(x: Tensor, **more: Any) -> Tensor:
    return x * len(more)


def test_an_argument_that_would_be_code_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return loosely(x, **{"a=print(1), b": 1})

    with pytest.raises(CaptureError, match="give it by position"):
        fxtemporal.optimize(Net(), (torch.ones(2),), tune="static")
