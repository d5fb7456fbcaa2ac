"""What the trace fixed is listed with the user's line, and held to at every call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Specialization, SpecializationError
from fxtemporal.ir.guards import guard, specializations
from tests.strictly import strictly
from tests.zoo import BODIES, SPELLINGS, ShapeBranch, noise

X = noise(2, 4, 5)


class Model(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def fixed(gm: nn.Module) -> dict[str, Specialization]:
    found = fxtemporal.report(gm).specializations
    return {s.expression: s for s in found if not s.expression.endswith(".dim()")}


def optimized(forward: Callable[..., Any], *example: Any) -> fx.GraphModule:
    return strictly(Model(forward), example or (X,), tune="static")


def line_of(function: Callable[..., Any]) -> str:
    return f"test_specializations.py:{function.__code__.co_firstlineno}"


def ranged(x: Tensor) -> Tensor:
    return torch.stack([x[:, t] for t in range(x.size(1))])  # 1


def branched(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 3 else x  # 1


def indexed(x: Tensor) -> Tensor:
    return x[:, [1, 2][x.size(1) // 4]]  # 1


def converted(x: Tensor) -> Tensor:
    return x * int(x.size(1) / 3)  # 1


def floated(x: Tensor) -> Tensor:
    return x * float(x.size(1))  # 1


def measured(x: Tensor) -> Tensor:
    return x * len(x)  # 1


def iterated(x: Tensor) -> Tensor:
    return sum(row for row in x)  # 1


def of_two(x: Tensor) -> Tensor:
    t, f = x.size(1), x.size(2)
    return x * 2 if t == f - 1 else x  # 2


CASES: dict[str, tuple[Callable[..., Any], str, Any, int]] = {
    "range": (ranged, "x.size(1)", 4, 1),
    "branch": (branched, "(x.shape[1] > 3)", True, 1),
    "index": (indexed, "(x.size(1) // 4)", 1, 1),
    "int": (converted, "(x.size(1) / 3)", 4 / 3, 1),
    "float": (floated, "x.size(1)", 4, 1),
    "len": (measured, "x.size(0)", 2, 1),
    "iteration": (iterated, "x.size(0)", 2, 1),
    "two sizes": (of_two, "(x.size(1) == (x.size(2) - 1))", True, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_each_reading_is_listed_with_expression_value_and_line(name: str) -> None:
    function, expression, value, line = CASES[name]
    found = fixed(optimized(function))
    assert expression in found, list(found)
    entry = found[expression]
    assert entry.value == value
    first = function.__code__.co_firstlineno
    assert entry.location is not None
    assert entry.location.endswith(f"test_specializations.py:{first + line}")
    assert entry.why


@pytest.mark.parametrize("name", CASES)
def test_a_call_at_another_size_raises_and_says_where(name: str) -> None:
    function, expression, _, _ = CASES[name]
    result = optimized(function)
    messages: list[str] = []
    for shape in ((2, 2, 5), (2, 9, 5), (5, 4, 5), (2, 4, 9), (1, 1, 1)):
        x = noise(*shape)
        try:
            actual = result(x)
        except SpecializationError as error:
            messages.append(str(error))
        else:
            torch.testing.assert_close(actual, function(x))
    assert messages
    assert all(expression in text and "optimize again" in text for text in messages)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("len", "iteration")])
def test_the_batch_is_free(name: str) -> None:
    function = CASES[name][0]
    result = optimized(function)
    for batch in (1, 3, 7):
        x = noise(batch, 4, 5)
        torch.testing.assert_close(result(x), function(x))


def test_other_branches_and_sizes_that_agree_are_free() -> None:
    result = optimized(branched)
    for frames in (4, 5, 9):
        torch.testing.assert_close(result(noise(2, frames, 5)), branched(noise(2, frames, 5)))
    with pytest.raises(SpecializationError):
        result(noise(2, 3, 5))


@pytest.mark.filterwarnings("ignore:the optimized graph does not call")
def test_nothing_is_computed_before_the_check_fails() -> None:
    model = ShapeBranch.build()
    result = strictly(model, model.example(2, 6), tune="static")
    calls: list[int] = []
    for module in result.modules():
        if module is not result:
            module.register_forward_pre_hook(lambda m, a: calls.append(1))
    with pytest.raises(SpecializationError):
        result(*model.example(2, 4))
    assert not calls


def test_the_rank_and_the_kind_of_each_input_is_held_to() -> None:
    result = optimized(lambda x: x.flatten(1))
    for wrong in (noise(2, 4), noise(2, 4, 5, 6)):
        with pytest.raises(SpecializationError, match=r"x\.dim\(\) == 3"):
            result(wrong)


def test_a_size_that_no_code_read_is_not_listed() -> None:
    assert not fixed(optimized(lambda x: x.reshape(x.size(0) * x.size(1), -1) * x.size(2)))


def test_one_reading_is_listed_once() -> None:
    def thrice(x: Tensor) -> Tensor:
        size = x.size(1)
        return x * len(range(size)) + len(range(size)) + (1 if size > 2 else 0)

    found = fxtemporal.report(optimized(thrice)).specializations
    assert len(set(found)) == len(found)
    assert sum(s.expression == "x.size(1)" for s in found) == 1


def test_audit_lists_the_same() -> None:
    for name in CASES:
        function = CASES[name][0]
        assert fxtemporal.audit(Model(function), (X,)).specializations == (
            fxtemporal.report(optimized(function)).specializations
        )


def test_the_checks_survive_copies_and_pickles() -> None:
    model = ShapeBranch.build()
    result = strictly(model, model.example(2, 6), tune="static")
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        with pytest.raises(SpecializationError, match=r"hard_to_capture\.py:\d+"):
            other(*model.example(2, 4))
        assert specializations(other.graph) == specializations(result.graph)


def test_the_checks_survive_dead_code_elimination_and_recompilation() -> None:
    result = optimized(branched)
    result.graph.eliminate_dead_code()
    result.recompile()
    with pytest.raises(SpecializationError):
        result(noise(2, 3, 5))


@pytest.mark.parametrize("cls", SPELLINGS + BODIES, ids=lambda cls: cls.__name__)
def test_loops_of_the_zoo_at_sizes_that_they_were_not_traced_at(cls: Any) -> None:
    model = cls.build()
    result = strictly(model, model.example(2, 4), tune="static")
    for batch, frames in ((3, 4), (1, 4), (2, 6), (2, 3), (2, 1), (5, 7)):
        inputs = model.example(batch, frames)
        try:
            expected = model(*inputs)
        except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
            continue
        try:
            actual = result(*inputs)
        except SpecializationError:
            assert frames != 4, "the batch is free"
        else:
            torch.testing.assert_close(actual, expected)


# --------------------------------------------------------------------------------- the pieces


def test_expect() -> None:
    assert guard(3, 3, "x.size(1)", "a.py:1", "range() read it") is None
    with pytest.raises(SpecializationError) as caught:
        guard(4, 3, "x.size(1)", "a.py:1", "range() read it")
    assert "x.size(1) == 3 (range() read it at a.py:1)" in str(caught.value)
    assert "called with 4" in str(caught.value)


def test_expect_tells_true_from_one_only_by_value() -> None:
    with pytest.raises(SpecializationError):
        guard("a", "b", "mode", None, "it is text")
    with pytest.raises(SpecializationError):
        guard(torch.ones(2), None, "y", None, "left at its default")


def test_a_specialization_as_text_and_dict() -> None:
    with_place = Specialization("x.size(1)", 4, "model.py:3", "range() read it")
    without = Specialization("mode", torch.float32, None, "its default")
    assert str(with_place) == "x.size(1) == 4 (range() read it at model.py:3)"
    assert str(without) == "mode == torch.float32 (its default)"
    assert with_place.to_dict() == {
        "expression": "x.size(1)",
        "value": 4,
        "location": "model.py:3",
        "why": "range() read it",
    }
    assert without.to_dict()["value"] == "torch.float32"


def test_specializations_of_a_graph_by_hand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for value in (4, 4, 5):
        size = graph.call_method("size", (x, 1))
        graph.call_function(guard, (size, value, "x.size(1)", None, "by hand"))
    graph.output(x)
    assert [s.value for s in specializations(graph)] == [4, 5]
