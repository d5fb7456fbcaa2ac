"""A chain of cells that cannot become one call stays, and says why."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxtemporal
from fxtemporal import Code
from fxtemporal.analysis.cell_chains import CELLS
from tests.recurrent_models import (
    HIDDEN,
    IN,
    KINDS,
    STEPS,
    Model,
    StateLeftOut,
    clip,
    close,
    every_kind,
    ops,
    optimized,
    outcome,
    remarks,
)

pytestmark = pytest.mark.usefixtures("in_float64")

REFUSED: dict[str, tuple[type[Model], Code, str]] = {}


def refused(code: Code, text: str) -> Callable[[type[Model]], type[Model]]:
    def enter(cls: type[Model]) -> type[Model]:
        REFUSED[cls.__name__] = cls, code, text
        return cls

    return enter


@refused(Code.RECURRENCE, r"cell \(\S*test_recurrent_cells_refused.py:\d+\): its input depends on")
class Autoregressive(Model):
    def forward(self, x: Tensor) -> Any:
        hx, y, outs = None, x[:, 0], []
        for _ in range(x.size(1)):
            hx = self.cell(y, hx)
            y = self.feedback(self.h(hx))
            outs.append(y)
        return torch.stack(outs, 1)


@refused(Code.RECURRENCE, r"its state is not just .*: dropout made it \(\S*\.py:\d+\)")
class DropoutOnState(Model):
    def forward(self, x: Tensor) -> Any:
        hx = None
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            h = F.dropout(self.h(hx), 0.5, True)
            hx = (h, hx[1]) if self.nested else h
        return self.h(hx)


@refused(Code.RECURRENCE, "mul made it")
class MaskedState(Model):
    def forward(self, x: Tensor) -> Any:
        hx = self.both(x.new_zeros(x.size(0), HIDDEN))
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            mask = (x[:, t, :1] > 0).to(x.dtype)
            hx = (hx[0] * mask, hx[1] * mask) if self.nested else hx * mask
        return self.h(hx)


@refused(Code.RECURRENCE, "detach made it")
class DetachedState(Model):
    """The same numbers, other gradients."""

    def forward(self, x: Tensor) -> Any:
        hx = self.both(x.new_zeros(x.size(0), HIDDEN))
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            hx = (hx[0].detach(), hx[1].detach()) if self.nested else hx.detach()
        return self.h(hx)


@refused(Code.HOOKED_MODULE, "cell .* hooks")
class HookedCell(Model):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cell.register_forward_hook(lambda m, a, o: (o[0], o[1]) if kind == "lstm" else o * 2)

    forward = StateLeftOut.forward


@refused(Code.PARAMETRIZED_MODULE, "weight anew")
class ParametrizedCell(Model):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        parametrizations.weight_norm(self.cell, "weight_hh")

    forward = StateLeftOut.forward


@refused(Code.SUBCLASS, "is not exactly")
class ReplacedForward(Model):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        plain = self.cell.forward
        self.cell.forward = lambda x, hx=None: plain(x * 2, hx)

    forward = StateLeftOut.forward


@refused(Code.VISIBLE_WRITE, "reaches a state")
class WrittenState(Model):
    """h is written behind the step; the next one reads a copy made before."""

    def forward(self, x: Tensor) -> Any:
        hx, outs = self.both(x.new_zeros(x.size(0), HIDDEN)), []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            h = self.h(hx).clone()
            outs.append(self.h(hx).mul_(2.0))
            hx = (h, hx[1]) if self.nested else h
        return torch.stack(outs, 1)


@refused(Code.VISIBLE_WRITE, "may write what")
class ReusedBuffer(Model):
    """Each input is written into the memory of the one before."""

    def forward(self, x: Tensor) -> Any:
        hx, buffer = None, x[:, 0] * 1.0
        for t in range(x.size(1)):
            hx = self.cell(buffer, hx)
            buffer.add_(x[:, t])
        return self.h(hx)


@refused(Code.RANDOMNESS, "it would be called before dropout")
class RandomOutputs(Model):
    """Inputs and outputs draw in turn."""

    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(F.dropout(x[:, t], 0.5, True), hx)
            outs.append(F.dropout(self.h(hx), 0.5, True))
        return torch.stack(outs, 1)


@pytest.mark.parametrize("name", REFUSED)
@every_kind
def test_each_refusal_says_why(name: str, kind: str) -> None:
    cls, code, text = REFUSED[name]
    plain = cls(kind)
    result = optimized(plain, *plain.example())
    (remark,) = remarks(result)
    assert remark.status == "missed"
    assert code in [reason.code for reason in remark.reasons]
    reason = next(r.text for r in remark.reasons if r.code == code)
    assert re.search(text, reason), reason
    assert remark.detail["steps"] == STEPS
    assert not ops(result).keys() & set(CELLS.values())
    for batch in (2, 3):
        close(outcome(result, plain.example(batch)), outcome(plain, plain.example(batch)))


class Spelled(Model):
    """The function, on weights of its own."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__("gru")
        self.call = call

    def forward(self, x: Tensor) -> Any:
        c, h = self.cell, x.new_zeros(x.size(0), HIDDEN)
        weights = c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh
        for t in range(x.size(1)):
            h = self.call(x[:, t], h, *weights)
        return h


def scaled(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor) -> Tensor:
    return torch.gru_cell(x, h, w_ih * 2, w_hh, *biases)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (torch.gru_cell, None),
        (torch.ops.aten.gru_cell.default, None),
        (lambda x, h, *w: torch.gru_cell(x, h, *w[:2]), None),
        (lambda x, h, *w: torch.gru_cell(x, h, *w[:3]), Code.UNSUPPORTED_OP),
    ],
    ids=["torch", "aten", "no bias", "one bias"],
)
def test_every_spelling_of_the_function(call: Any, code: Code | None) -> None:
    plain = Spelled(call)
    result = optimized(plain, clip())
    (remark,) = remarks(result)
    assert [r.code for r in remark.reasons] == ([] if code is None else [code])
    close(result(clip(3)), plain(clip(3)))


def test_weights_computed_anew_at_each_step_are_left() -> None:
    plain = Spelled(scaled)
    result = optimized(plain, clip())
    assert remarks(result) == []
    close(result(clip(3)), plain(clip(3)))


class ComputedWeight(Model):
    def forward(self, x: Tensor) -> Any:
        c, h, outs = self.cell, x.new_zeros(x.size(0), HIDDEN), []
        weight = c.weight_ih * 2
        for t in range(x.size(1)):
            h = torch.gru_cell(x[:, t], h, weight, c.weight_hh, c.bias_ih, c.bias_hh)
            outs.append(h)
        return torch.stack(outs)


def test_a_weight_computed_once_is_one_weight() -> None:
    plain = ComputedWeight("gru")
    result = optimized(plain, clip())
    assert ops(result) == {"gru": 1}
    close(result(clip(3)), plain(clip(3)))


class ReadsCells(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            outs.append(hx[1])
        return torch.stack(outs, 1)


class KeepsTuples(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            outs.append(hx)
        return outs


class CopiesCells(Model):
    """c goes to the next step through a copy, which something else reads."""

    def forward(self, x: Tensor) -> Any:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        total = 0.0
        for t in range(x.size(1)):
            h, c = self.cell(x[:, t], (h, c))
            c = c.clone()
            total = total + c.sum()
        return h, total


@pytest.mark.parametrize("cls", [ReadsCells, KeepsTuples, CopiesCells])
def test_cell_states_of_earlier_steps_are_not_to_be_had(cls: type[Model]) -> None:
    plain = cls("lstm")
    result = optimized(plain, *plain.example())
    (remark,) = remarks(result)
    assert [r.code for r in remark.reasons] == [Code.UNSUPPORTED_OP]
    assert "only that of the last" in remark.reasons[0].text
    assert ops(result) == {"lstm_cell": STEPS}


class SwappedState(Model):
    def forward(self, x: Tensor) -> Any:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        for t in range(x.size(1)):
            c, h = self.cell(x[:, t], (h, c))
        return h


def test_h_and_c_must_go_to_their_places() -> None:
    plain = SwappedState("lstm")
    result = optimized(plain, *plain.example())
    assert [r.status for r in remarks(result)] == ["missed"]
    close(result(clip(3)), plain(clip(3)))


class CellPerStep(Model):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cells = nn.ModuleList(KINDS[kind](IN, HIDDEN) for _ in range(STEPS))

    def forward(self, x: Tensor) -> Any:
        hx = None
        for t, cell in enumerate(self.cells):
            hx = cell(x[:, t], hx)
        return self.h(hx)


def test_other_weights_are_another_chain() -> None:
    plain = CellPerStep("gru")
    result = optimized(plain, *plain.example())
    assert remarks(result) == []
    close(result(clip(3)), plain(clip(3)))


def test_cells_that_share_parameters_are_one() -> None:
    plain = CellPerStep("lstm")
    for cell in plain.cells[1:]:
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(cell, name, getattr(plain.cells[0], name))
    result = optimized(plain, *plain.example())
    assert ops(result) == {"lstm": 1}
    assert list(result.state_dict()) == list(plain.state_dict())
    close(result(clip(3)), plain(clip(3)))


def test_one_shared_weight_is_not_enough() -> None:
    plain = CellPerStep("lstm")
    for cell in plain.cells[1:]:
        cell.weight_ih = plain.cells[0].weight_ih
    assert remarks(optimized(plain, *plain.example())) == []


class WarmUp(Model):
    """Frames first, then what the cell itself gives: only the first part is a chain."""

    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
        for _ in range(3):
            y = self.feedback(self.h(hx))
            hx = self.cell(y, hx)
            outs.append(y)
        return torch.stack(outs, 1)


@every_kind
def test_a_chain_ends_where_its_outputs_come_back(kind: str) -> None:
    plain = WarmUp(kind)
    result = optimized(plain, *plain.example())
    assert ops(result) == {kind: 1, f"{kind}_cell": 2}  # nothing reads the last state
    done, left = remarks(result)
    assert (done.status, done.detail["steps"]) == ("applied", STEPS)
    assert (left.status, left.detail["steps"]) == ("missed", 2)
    close(result(clip(3)), plain(clip(3)))


class Branches(Model):
    """Two steps read one state: one goes on with the chain, the other begins one."""

    def forward(self, x: Tensor) -> Any:
        hx = None
        for t in range(2):
            hx = self.cell(x[:, t], hx)
        left = right = hx
        for t in range(2, 4):
            left = self.cell(x[:, t], left)
            right = self.cell(x[:, t] * 2, right)
        return self.h(left) - self.h(right)


@every_kind
def test_a_state_that_two_steps_read(kind: str) -> None:
    plain = Branches(kind)
    result = optimized(plain, *plain.example())
    close(result(clip(3)), plain(clip(3)))
    statuses = sorted(r.status for r in remarks(result))
    assert statuses == (["applied", "missed"] if kind == "lstm" else ["applied", "applied"])


class Single(Model):
    def forward(self, x: Tensor) -> Any:
        return self.cell(x[:, 0])


def test_one_step_is_no_chain() -> None:
    plain = Single("lstm")
    assert remarks(optimized(plain, *plain.example())) == []


class Crossed(Model):
    """Each of two cells reads what the other gave."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.other = KINDS[kind](IN, IN)

    def forward(self, x: Tensor) -> Any:
        first = second = None
        right = x[:, 0]
        for t in range(x.size(1)):
            first = self.same(right, first)
            second = self.other(self.h(first) + t, second)
            right = self.h(second)
        return right


@every_kind
def test_a_detour_through_another_cell_is_a_recurrence_too(kind: str) -> None:
    plain = Crossed(kind)
    result = optimized(plain, *plain.example())
    assert [(r.target, r.status) for r in remarks(result)] == [
        ("same", "missed"),
        ("other", "missed"),
    ]
    assert {r.code for remark in remarks(result) for r in remark.reasons} == {Code.RECURRENCE}
    close(result(clip(3)), plain(clip(3)))


def test_without_example_inputs_it_is_left() -> None:
    class ThreeSteps(Model):
        def forward(self, x: Tensor) -> Any:
            hx = self.cell(x[:, 0])
            hx = self.cell(x[:, 1], hx)
            return self.h(self.cell(x[:, 2], hx))

    plain = ThreeSteps("gru")
    result = fxtemporal.optimize(plain)
    (remark,) = remarks(result)
    assert [r.code for r in remark.reasons] == [Code.SHAPES_UNKNOWN]
    close(result(clip(3)), plain(clip(3)))


def test_calls_of_unknown_things_keep_their_order() -> None:
    class Opaque(Model):
        def __init__(self) -> None:
            super().__init__("gru")
            self.before, self.behind = nn.Linear(IN, IN), nn.Linear(HIDDEN, HIDDEN)
            for layer in (self.before, self.behind):
                layer.register_forward_hook(lambda m, a, o: o * 2)

        def forward(self, x: Tensor) -> Any:
            hx, outs = None, []
            for t in range(x.size(1)):
                hx = self.cell(self.before(x[:, t]), hx)
                outs.append(self.behind(hx))
            return torch.stack(outs, 1)

    plain = Opaque()
    result = optimized(plain, *plain.example())
    (remark,) = remarks(result)
    assert [r.code for r in remark.reasons] == [Code.UNSUPPORTED_OP]
    close(result(clip(3)), plain(clip(3)))


def test_a_given_graph_with_a_switch_of_gradients() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    cell = graph.call_module("cell", (graph.call_function(operator.getitem, (x, 0)),))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    second = graph.call_function(operator.getitem, (x, 1))
    cell = graph.call_module("cell", (second, cell))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    graph.output(cell)
    root = nn.Module()
    root.cell = nn.GRUCell(IN, HIDDEN)
    result = optimized(fx.GraphModule(root, graph), clip())
    (remark,) = remarks(result)
    assert remark.status == "missed"
    assert "may change how it is computed" in remark.reasons[-1].text
