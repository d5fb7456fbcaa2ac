"""The verifier lets rounding pass, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxtemporal import Comparison, SpecializationError
from fxtemporal.verification.bisect import culprits
from fxtemporal.verification.comparison import Sample, Tolerance
from fxtemporal.verification.verifier import Verifier
from tests.zoo import noise

X = noise(3, 4, 5)
INF, NAN = float("inf"), float("nan")


class Model(nn.Module):
    """``function(x)`` as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def compared(
    original: Callable[..., Any] | nn.Module,
    candidate: Callable[..., Any] | nn.Module,
    *args: Any,
    **more: Any,
) -> Comparison:
    first = original if isinstance(original, nn.Module) else Model(original)
    second = candidate if isinstance(candidate, nn.Module) else Model(candidate)
    return Verifier(first, (args or (X,), {})).compare(second, **more)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Result:
    logits: Tensor
    number: int


def raised(x: Tensor) -> Tensor:
    raise RuntimeError("no\nmore of it")


def raised_without_words(x: Tensor) -> Tensor:
    raise AssertionError


def only_at_four(x: Tensor) -> Tensor:
    if x.size(1) != 4:
        raise SpecializationError("four frames")
    return x * 2


def never(x: Tensor) -> Tensor:
    raise SpecializationError("never")


def writes(x: Tensor) -> Tensor:
    return x.add_(1) * 2


def writes_an_entry(d: dict[str, Tensor]) -> Tensor:
    return d["a"].add_(1) * 2


def in_float32_only(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError("only float32")
    return x * 2


def asserts_float32(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return x * 2


def other_in_float64(x: Tensor) -> Tensor:
    return x * 2 if x.dtype == torch.float32 else x


def needs_attribute(x: Tensor) -> Tensor:
    return x * {torch.float32: 2}[x.dtype]


EQUAL: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "the same": (lambda x: x * 2, lambda x: x + x),
    "another order of adding": (lambda x: x.sum(), lambda x: x.flip(0).sum()),
    "rounding of a division": (lambda x: x / 3, lambda x: x * (1 / 3)),
    "NaN and inf at the same places": (lambda x: x / 0 * 0, lambda x: x / 0 * 0),
    "infinities": (lambda x: torch.cat([x, x / 0]), lambda x: torch.cat([x + 0.0, x / 0])),
    "None": (lambda x: None, lambda x: None),
    "numbers and text": (lambda x: (3, "a", x), lambda x: (3, "a", x)),
    "NaN as a number": (lambda x: (x, NAN), lambda x: (x, NAN)),
    "a dataclass": (lambda x: Result(x * 2, 3), lambda x: Result(x + x, 3)),
    "a namedtuple": (lambda x: Pair(x, {"a": [x]}), lambda x: Pair(x, {"a": [x]})),
    "a slice and a dtype": (lambda x: (slice(3), x.dtype), lambda x: (slice(3), x.dtype)),
    "empty": (lambda x: x[:0], lambda x: x[:0] * 2),
    "integers": (lambda x: x.argmax(1), lambda x: (x * 2).argmax(1)),
    "booleans": (lambda x: x > 0, lambda x: x * 2 > 0),
    "complex": (lambda x: torch.fft.rfft(x) / 3, lambda x: torch.fft.rfft(x) * (1 / 3)),
    "conjugated": (lambda x: torch.fft.rfft(x).conj(), lambda x: torch.fft.rfft(x).conj() * 1),
    "zeros": (lambda x: x * 0, lambda x: x * 0 + 1e-9),
    "one dimension less": (lambda x: x.sum(), lambda x: x.sum()),
    "bfloat16": (lambda x: x.bfloat16() / 3, lambda x: (x / 3).bfloat16()),
    "float64 beside float32": (lambda x: (x, x.double() / 3), lambda x: (x, x.double() * (1 / 3))),
    "strides": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1).contiguous()),
    "a write": (writes, writes),
    "only float32": (in_float32_only, lambda x: x + x),
    "an assertion of float32": (asserts_float32, lambda x: x + x),
    "float64 is not in its table": (needs_attribute, lambda x: x + x),
    "another path in float64": (other_in_float64, lambda x: x + x),
    "random numbers, drawn alike": (lambda x: x + torch.rand(5), lambda x: x + torch.rand(5)),
    "normal numbers, drawn alike": (lambda x: x + torch.randn(5), lambda x: torch.randn(5) + x),
    "fixed at other sizes": (lambda x: x * 2, only_at_four),
}

DIFFERENT: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a thousandth": (lambda x: x * 2, lambda x: x * 2.002),
    "one entry": (lambda x: x, lambda x: x.clone().index_fill_(1, torch.tensor(0), 0.0)),
    "only at another size": (lambda x: x, lambda x: x if x.size(0) == 3 else x * 1.1),
    "only at another number of frames": (lambda x: x, lambda x: x if x.size(1) == 4 else -x),
    "NaN": (lambda x: x, lambda x: x * NAN),
    "NaN in place of inf": (lambda x: x / 0, lambda x: x / 0 * 0),
    "another sign of inf": (lambda x: x / 0, lambda x: -x / 0),
    "inf": (lambda x: x, lambda x: x / 0),
    "finite in place of NaN": (lambda x: x * NAN, lambda x: x),
    "finite in place of inf": (lambda x: x / 0, lambda x: x),
    "shape": (lambda x: x, lambda x: x.flatten()),
    "rank": (lambda x: x.sum(), lambda x: x.sum().view(1)),
    "dtype": (lambda x: x, lambda x: x.double()),
    "integer dtype": (lambda x: x.argmax(1), lambda x: x.argmax(1).int()),
    "integers": (lambda x: x.argmax(1), lambda x: x.argmin(1)),
    "complex": (lambda x: torch.complex(x, x), lambda x: torch.complex(x, x * 1.01)),
    "one more output": (lambda x: (x, x), lambda x: (x, x, x)),
    "tuple for a list": (lambda x: (x, [x]), lambda x: (x, (x,))),
    "tensor for a tuple": (lambda x: (x,), lambda x: x),
    "other keys": (lambda x: {"a": x}, lambda x: {"b": x}),
    "None for a tensor": (lambda x: x, lambda x: None),
    "a tensor for None": (lambda x: None, lambda x: x),
    "another number": (lambda x: (x, 3), lambda x: (x, 4)),
    "True for 1": (lambda x: (x, 1), lambda x: (x, True)),
    "another text": (lambda x: (x, "a"), lambda x: (x, "b")),
    "the second output": (lambda x: (x * 1e6, x * 1e-3), lambda x: (x * 1e6, x * 1.1e-3)),
    "a field of a dataclass": (lambda x: Result(x, 3), lambda x: Result(x, 4)),
    "a tensor in a dataclass": (lambda x: Result(x, 3), lambda x: Result(x * 2, 3)),
    "another dataclass": (lambda x: Result(x, 3), lambda x: Pair(x, 3)),
    "a namedtuple for a tuple": (lambda x: (x, x), lambda x: Pair(x, x)),
    "zero in place of a small number": (lambda x: x * 1e-20, lambda x: x * 0),
    "zeros": (lambda x: x * 0, lambda x: x * 0 + 1e-3),
    "an error": (lambda x: x, raised),
    "an error without words": (lambda x: x, raised_without_words),
    "fixed at the example's size": (lambda x: x * 2, never),
    "no write": (writes, lambda x: (x + 1) * 2),
    "a write too much": (lambda x: (x + 1) * 2, writes),
    "another path in float64": (other_in_float64, lambda x: x),
    "random numbers": (lambda x: x + torch.rand(5), lambda x: x + torch.rand(5) * 1.01),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name: str) -> None:
    comparison = compared(*EQUAL[name])
    assert comparison.equal, comparison
    assert all(sample.problem is None for sample in comparison.samples)
    assert comparison.samples


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name: str) -> None:
    comparison = compared(*DIFFERENT[name])
    assert not comparison.equal
    bad = next(sample for sample in comparison.samples if not sample.equal)
    assert bad.problem or bad.relative_error > bad.bound


def test_what_is_wrong_is_said() -> None:
    def problem(candidate: Callable[..., Any], original: Any = lambda x: x) -> str:
        sample = compared(original, candidate).samples[0]
        return str(sample.problem)

    assert problem(raised) == "raised RuntimeError: no"
    assert problem(lambda x: x[:1]) == (
        "gave (1, 4, 5) of torch.float32, not (3, 4, 5) of torch.float32"
    )
    assert problem(lambda x: x.int(), lambda x: x.int() + 1) == "integers differ"
    assert "nested" in problem(lambda x: [x])


def test_errors_are_relative_to_the_largest_value() -> None:
    sample = compared(lambda x: x * 100, lambda x: x * 100 + 1).samples[0]
    largest = float(X.abs().max()) * 100
    assert sample.max_abs_error == pytest.approx(1, rel=1e-3)
    assert sample.relative_error == pytest.approx(1 / largest, rel=1e-3)


def test_the_originals_own_error_stands_beside_it() -> None:
    comparison = compared(lambda x: (x * 3.7).exp() / 3, lambda x: (x * 3.7).exp() * (1 / 3))
    assert comparison.original_error is not None
    assert 0 < comparison.original_error < 1e-5
    assert comparison.equal
    without = compared(lambda x: x.double() / 3, lambda x: x.double() * (1 / 3), X.double())
    assert without.original_error is None
    assert without.equal


def test_another_float64_path_is_no_yardstick() -> None:
    comparison = compared(other_in_float64, lambda x: x + x)
    assert comparison.equal
    assert comparison.max_abs_error == 0
    assert max(sample.bound for sample in comparison.samples) < 1e-3


# -------------------------------------------------------------------------- on which inputs


class Recorder(nn.Module):
    """Keeps the shapes that it is called with; takes those that ``fits`` says."""

    def __init__(self, fits: Callable[[Tensor], bool] = lambda x: True) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.fits = fits

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        if not self.fits(x):
            raise ValueError("no")
        self.shapes.append(tuple(x.shape))
        return x * 2


def shapes_of(candidate: Recorder) -> set[tuple[int, ...]]:
    return set(candidate.shapes)


@pytest.mark.parametrize(
    ("shape", "others"),
    [
        ((3, 4, 5), {(2, 4, 5), (1, 5, 5), (1, 4, 6)}),
        ((2, 4, 5), {(3, 4, 5), (2, 5, 5), (2, 4, 6)}),
        ((1, 4), {(2, 4)}),
        ((5,), {(2,)}),
        ((), set()),
    ],
)
def test_it_runs_on_the_example_and_on_other_sizes(shape: Any, others: Any) -> None:
    queue: SimpleQueue[tuple[int, ...]] = SimpleQueue()  # a list would be put back

    def candidate(x: Tensor) -> Tensor:
        queue.put(tuple(x.shape))
        return x * 2

    x = noise(*shape) if shape else torch.tensor(1.0)
    assert compared(lambda x: x * 2, candidate, x).equal
    seen = [queue.get() for _ in range(queue.qsize())]
    assert seen[0] == shape
    assert set(seen[1:]) == others


def test_the_batch_is_changed_in_every_input() -> None:
    queue: SimpleQueue[Any] = SimpleQueue()

    def candidate(x: Tensor, y: Tensor, d: dict[str, Tensor]) -> Tensor:
        queue.put((tuple(x.shape), tuple(y.shape), tuple(d["m"].shape)))
        return x + y + d["m"][:, None]

    def original(x: Tensor, y: Tensor, d: dict[str, Tensor]) -> Tensor:
        return x + y + d["m"][:, None]

    inputs = (noise(2, 4, 5), noise(2, 1, 5), {"m": noise(2, 5)})
    assert compared(original, candidate, *inputs).equal
    seen = [queue.get() for _ in range(queue.qsize())]
    assert ((3, 4, 5), (3, 1, 5), (3, 5)) in seen


def test_sizes_that_the_original_refuses_are_left_out() -> None:
    def original(x: Tensor) -> Tensor:
        if x.size(0) != 3:
            raise ValueError("three")
        return x.view(3, -1)

    comparison = compared(original, lambda x: x.view(3, -1))
    assert comparison.equal
    assert [sample.inputs for sample in comparison.samples] == ["the example inputs"]


def test_a_fixed_size_is_left_out_but_not_the_example() -> None:
    comparison = compared(lambda x: x * 2, only_at_four)
    assert comparison.equal
    assert "the example inputs" in [sample.inputs for sample in comparison.samples]
    assert len(comparison.samples) < 4
    assert not compared(lambda x: x * 2, never).equal


def test_on_the_example_alone() -> None:
    verifier = Verifier(Model(lambda x: x), ((X,), {}))
    candidate = Model(lambda x: x if x.size(0) == 3 else -x)
    assert verifier.compare(candidate, example_only=True).equal
    assert not verifier.compare(candidate).equal


def test_a_slow_model_is_run_at_two_other_sizes_at_once() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.25)
        return x + 1

    def compared_on(candidate: Callable[[Tensor], Tensor]) -> list[str]:
        verifier = Verifier(Model(slow), ((noise(4, 8, 3),), {}))
        comparison = verifier.compare(Model(candidate))
        assert comparison.equal
        return [sample.inputs for sample in comparison.samples]

    both = ["a batch of 2, 7 entries in dimension 1", "a batch of 2, 4 entries in dimension 2"]
    assert compared_on(lambda x: x + 1) == ["the example inputs", *both]

    def fixed(x: Tensor) -> Tensor:
        if x.shape[2] != 3:
            raise SpecializationError("fixed")
        return x + 1

    assert compared_on(fixed) == ["the example inputs", both[0]]

    def alone(x: Tensor) -> Tensor:
        if x.shape[0] != 4 and x.shape[1:] != (8, 3):
            raise SpecializationError("not at once")
        return x + 1

    assert compared_on(alone) == ["the example inputs", "a batch of 2"]


def test_fresh_inputs_are_drawn_from_the_example() -> None:
    """Tokens must stay tokens, and a mask must stay a mask."""
    embedding = nn.Embedding(4, 3)
    assert compared(embedding, embedding, torch.tensor([[3, 1], [0, 2]])).equal
    assert compared(lambda m: m.any(1), lambda m: m.any(1), X > 0).equal


def test_keyword_arguments() -> None:
    model = Model(lambda x, scale=None: x * scale)
    verifier = Verifier(model, ((X,), {"scale": noise(3, 1, 1)}))
    assert verifier.compare(model).equal
    assert not verifier.compare(Model(lambda x, scale=None: x)).equal


# ------------------------------------------------------------------------- nothing is changed


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0
        self.kept: list[Tensor] = []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(x)
        self.total = self.total + 1
        return self.dropout(self.norm(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_original_and_the_candidate_are_left_alone(training: bool) -> None:
    original, candidate = Stateful().train(training), Stateful().train(training)
    state = torch.get_rng_state()
    kept = X.clone()
    for model in (original, candidate):
        total = model.total
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        Verifier(original, ((X,), {})).compare(candidate)
        assert (model.calls, model.kept, model.total is total) == (0, [], True)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(X, kept)


class Moves(nn.Module):
    """Adds ``step`` to a buffer at each call in training."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.total += self.step
        return x * 2


def test_buffers_count_in_training() -> None:
    assert compared(Moves(1), Moves(1)).equal
    assert not compared(Moves(1), Moves(2)).equal
    assert compared(Moves(1).eval(), Moves(2).eval()).equal


def test_the_flags_of_the_candidate_do_not_matter_for_what_is_compared() -> None:
    assert compared(nn.Sequential(nn.ReLU()).eval(), nn.Sequential(nn.ReLU()).train()).equal


def test_random_models_see_the_same_seed() -> None:
    assert compared(nn.Dropout(0.5), nn.Dropout(0.5)).equal
    assert not compared(nn.Dropout(0.5), nn.Dropout(0.4)).equal


def test_gradients_are_not_needed_and_not_in_the_way() -> None:
    linear = nn.Linear(5, 5)
    assert compared(linear, linear, X.clone().requires_grad_()).equal
    parameter = nn.Parameter(noise(3))
    assert compared(lambda x: (x, parameter), lambda x: (x, parameter)).equal


# ---------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_follows_the_dtype(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    tolerance = Tolerance()
    assert tolerance.bound(dtype, 0.0) == tolerance.ulps * eps
    assert tolerance.bound(dtype, 100 * eps) == tolerance.times * 100 * eps
    assert tolerance.bound(dtype, None) >= tolerance.alone * eps
    assert Tolerance(times=1, ulps=1, alone=1).bound(dtype, 0.0) == eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_excuse(dtype: torch.dtype) -> None:
    """Sixteen units in the last place are an eighth of a bfloat16."""
    assert compared(lambda x: x / 3, lambda x: x * (1 / 3), X.to(dtype)).equal
    for factor in (1.1, 1.01, 1.001):
        wrong = compared(lambda x: x, lambda x, factor=factor: x * factor, X.to(dtype))
        assert not wrong.equal, factor
    linear = nn.Linear(5, 5).to(dtype)
    without = nn.Linear(5, 5, bias=False).to(dtype)
    without.weight = linear.weight
    assert not compared(linear, without, X.to(dtype)).equal


def test_a_tolerance_of_ones_own() -> None:
    verifier = Verifier(Model(lambda x: x), ((X,), {}), Tolerance(ulps=1e7))
    assert verifier.compare(Model(lambda x: x * 1.1)).equal


def test_comparisons() -> None:
    good = Sample("a", 1.0, 1e-7, 5e-8, 1e-6)
    bad = Sample("b", 2.0, 1e-5, None, 1e-6)
    broken = Sample("c", 0.0, 0.0, None, 0.0, "integers differ")
    assert (good.equal, bad.equal, broken.equal) == (True, False, False)
    assert not Sample("d", NAN, NAN, None, 1.0).equal
    both = Comparison((good, bad))
    assert (both.equal, both.max_abs_error, both.relative_error) == (False, 2.0, 1e-5)
    assert both.original_error == 5e-8
    assert Comparison((good,)).to_dict()["equal"] is True
    assert Comparison((bad,), exact=False).to_dict()["equal"] is None
    assert both.to_dict()["samples"][1]["inputs"] == "b"
    empty = Comparison(())
    assert (empty.max_abs_error, empty.relative_error, empty.original_error) == (0.0, 0.0, None)


# ------------------------------------------------------------------------------------ bisecting


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, 39)))))
def test_culprits_are_all_found_and_nobody_else(case: tuple[int, set[int]]) -> None:
    count, wrong = case
    items = list(range(count))
    tries: list[int] = []

    def passes(chosen: Sequence[int]) -> bool:
        tries.append(len(chosen))
        assert list(chosen) == sorted(chosen)
        return not wrong & set(chosen)

    guilty = sorted(wrong & set(items))
    assert sorted(culprits(items, passes)) == guilty
    assert len(tries) <= 1 + len(guilty) * (math.ceil(math.log2(max(count, 2))) + 1)


def test_a_pair_that_is_wrong_only_together_loses_one() -> None:
    found = culprits("abcdef", lambda chosen: not {"b", "e"} <= set(chosen))
    assert found == ["e"]


def test_nothing_to_blame() -> None:
    assert culprits([], lambda chosen: False) == []
    assert culprits([1, 2], lambda chosen: True) == []


def test_what_moves_with_the_last_bits_asks_for_gradients_as_the_model_does() -> None:
    """Else a forward that does something else without gradients would excuse any error."""

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.requires_grad else x

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1

    example: Any = ((torch.randn(2, 3).requires_grad_(),), {})
    comparison = Verifier(Asks(), example, gradients=True).compare(Plain())
    assert not comparison.equal
    assert comparison.relative_error == pytest.approx(0.5)
