"""Cells called step after step become one call; what is no such chain stays, and says why.

Everything runs in float64 and with ``verify=False``: verification is a net, and a net is not what
makes a rewrite right.
"""

from __future__ import annotations

import copy
import operator
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxtemporal
from fxtemporal import Code, Remark
from fxtemporal.analysis.cell_chains import CELLS
from fxtemporal.ir.program import Program
from fxtemporal.passes import recurrent_cells
from fxtemporal.passes.recurrent_cells import RecurrentCells
from tests.zoo import body, noise

# Exporting an LSTM with a free batch: oneDNN's kernel is not used while it is traced.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with symbolic sizes")

IN, HIDDEN, STEPS = 3, 5, 4

KINDS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def clip(batch: int = 2, steps: int = STEPS, seed: int = 1) -> Tensor:
    return noise(batch, steps, IN, seed=seed).to(torch.get_default_dtype())


def state(batch: int = 2, seed: int = 7) -> Tensor:
    return noise(batch, HIDDEN, seed=seed).to(torch.get_default_dtype())


# ------------------------------------------------------------------------------------- the models

MODELS: dict[str, type[Model]] = {}
"""Models that become one call for each entry of ``calls``."""


class Model(nn.Module):
    """One cell; ``kind`` says which, ``calls`` how many sequence ops must be left of the loop."""

    calls = 1
    batches = (2, 3, 1)

    def __init__(self, kind: str = "lstm", bias: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.cell = KINDS[kind](IN, HIDDEN, bias=bias)
            self.second = KINDS[kind](HIDDEN, HIDDEN, bias=bias)
            self.same = KINDS[kind](IN, IN, bias=bias)
            self.head = nn.Linear(HIDDEN, 2)
            self.feedback = nn.Linear(HIDDEN, IN)
            self.start = nn.Parameter(noise(1, HIDDEN, seed=3).to(torch.get_default_dtype()))
        self.nested = kind == "lstm"
        self.eval()

    def h(self, hx: Any) -> Tensor:
        return hx[0] if self.nested else hx

    def both(self, h: Tensor) -> Any:
        return (h, h * 0.5) if self.nested else h

    def example(self, batch: int = 2) -> tuple[Any, ...]:
        return (clip(batch),)


def model(cls: type[Model]) -> type[Model]:
    MODELS[cls.__name__] = cls
    return cls


@model
class StateLeftOut(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t]) if hx is None else self.cell(x[:, t], hx)
            outs.append(self.h(hx))
        return torch.stack(outs, 1), hx


@model
class StateNone(Model):
    def forward(self, x: Tensor) -> Any:
        hx = None
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
        return self.h(hx)


@model
class StateOfZeros(Model):
    def forward(self, x: Tensor) -> Any:
        hx = self.both(x.new_zeros(x.size(0), HIDDEN))
        outs = []
        for frame in x.unbind(1):
            hx = self.cell(frame, hx)
            outs.append(self.h(hx))
        return torch.stack(outs)


@model
class StateAsInput(Model):
    def forward(self, x: Tensor, h: Tensor) -> Any:
        hx, outs = self.both(h), []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            outs.append(self.h(hx))
        return torch.stack(outs, 2), hx

    def example(self, batch: int = 2) -> tuple[Any, ...]:
        return clip(batch), state(batch)


@model
class StateAsTuple(Model):
    def forward(self, x: Tensor, hx: Any) -> Any:
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
        return hx

    def example(self, batch: int = 2) -> tuple[Any, ...]:
        h = state(batch)
        return clip(batch), (h, state(batch, 8)) if self.nested else h


@model
class LearnedState(Model):
    """Expanded over the batch: not contiguous."""

    def forward(self, x: Tensor) -> Any:
        hx, outs = self.both(self.start.expand(x.size(0), HIDDEN)), []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            outs.append(self.h(hx))
        return torch.cat(outs, 1)


@model
class TimeFirst(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(0)):
            hx = self.cell(x[t], hx)
            outs.append(self.h(hx))
        return torch.stack(outs, 0)

    def example(self, batch: int = 2) -> tuple[Any, ...]:
        return (clip(batch).transpose(0, 1),)


@model
class Backwards(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in reversed(range(x.size(1))):
            hx = self.cell(x[:, t], hx)
            outs.append(self.h(hx))
        return torch.stack(outs[::-1], 1), torch.stack(outs, 1)


@model
class BothWays(Model):
    calls = 2

    def forward(self, x: Tensor) -> Any:
        there, back, forth, return_ = None, None, [], []
        for t in range(x.size(1)):
            there = self.cell(x[:, t], there)
            back = self.same(x[:, -1 - t], back)
            forth.append(self.h(there))
            return_.append(self.h(back))
        return torch.cat([torch.stack(forth, 1), torch.stack(return_[::-1], 1)], 2)


@model
class EverySecondFrame(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(0, x.size(1), 2):
            hx = self.cell(x[:, t], hx)
            outs.append(self.h(hx))
        return torch.stack(outs, 1), x


@model
class AFewFrames(Model):
    """The number of frames is not read: more may come, and are not used."""

    def forward(self, x: Tensor) -> Any:
        hx = None
        for t in range(3):
            hx = self.cell(x[:, t], hx)
        return self.h(hx)


@model
class UnevenFrames(Model):
    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in (0, 1, 3, 3):
            hx = self.cell(x[:, t], hx)
            outs.append(self.h(hx))
        return torch.stack([outs[0], outs[1], outs[3]], 1), torch.stack(outs[1:3], 1)


@model
class ComputedInputs(Model):
    """Each input is computed in the loop, behind the step before."""

    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t].sin() * (t + 1) if t % 2 else x[:, t].exp(), hx)
            outs.append(self.head(self.h(hx)))
        return torch.stack(outs, 1)


@model
class StackedCells(Model):
    calls = 2

    def forward(self, x: Tensor) -> Any:
        first, second, outs = None, None, []
        for t in range(x.size(1)):
            first = self.cell(x[:, t], first)
            second = self.second(self.h(first), second)
            outs.append(self.h(second))
        return torch.stack(outs, 1), first, second


@model
class ResidualCells(Model):
    calls = 2

    def forward(self, x: Tensor) -> Any:
        first, second, outs = None, None, []
        for t in range(x.size(1)):
            first = self.cell(x[:, t], first)
            second = self.second(self.h(first).tanh(), second)
            outs.append(self.h(second) + self.h(first))
        return torch.stack(outs, 1)


@model
class EncoderDecoder(Model):
    """A second cell starts with the state that the first one ended with."""

    calls = 2

    def forward(self, x: Tensor) -> Any:
        hx, last = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
        for t in range(3):
            hx = self.second(self.start.expand(x.size(0), -1) * t, hx)
            last.append(self.h(hx))
        return torch.stack(last, 1)


@model
class TwoLoops(Model):
    """One cell in two loops: the state starts anew."""

    calls = 2

    def forward(self, x: Tensor) -> Any:
        first, second = None, None
        for t in range(x.size(1)):
            first = self.cell(x[:, t], first)
        for t in range(x.size(1)):
            second = self.cell(x[:, t] * 2, second)
        return self.h(first) + self.h(second)


@model
class StateReset(Model):
    calls = 2

    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], None if t == 2 else hx)
            outs.append(self.h(hx))
        return torch.stack(outs, 1)


@model
class CopiedState(Model):
    """What the state passes on its way gives the numbers it gets."""

    def forward(self, x: Tensor) -> Any:
        hx = self.both(x.new_zeros(x.size(0), HIDDEN))
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            if self.nested:
                hx = F.dropout(hx[0], 0.5, self.training).contiguous(), hx[1].clone()
            else:
                hx = F.dropout(hx, 0.5, self.training).contiguous()
        return self.h(hx)


@model
class Readers(Model):
    """h is read by all kinds of things, while the loop runs and behind it."""

    def forward(self, x: Tensor) -> Any:
        hx, outs, total = None, [], x.new_zeros(x.size(0), HIDDEN)
        for t in range(x.size(1)):
            hx = self.cell(x[:, t], hx)
            h = self.h(hx)
            total = total + h.view(-1, HIDDEN) * t
            outs.append(h)
        return total, outs, [h.unsqueeze(1) for h in outs], outs[1].sum(), torch.stack(outs)


@model
class RandomInputs(Model):
    """Draws of random numbers keep their order among themselves."""

    def forward(self, x: Tensor) -> Any:
        hx = None
        for t in range(x.size(1)):
            hx = self.cell(F.dropout(x[:, t], 0.5, True), hx)
        return F.dropout(self.h(hx), 0.5, True)


@model
class OneClip(Model):
    """(T, F): no batch."""

    batches = (1,)

    def forward(self, x: Tensor) -> Any:
        hx, outs = None, []
        for t in range(x.size(0)):
            hx = self.cell(x[t], hx)
            outs.append(self.h(hx))
        return torch.stack(outs), torch.stack(outs, 1), hx, outs[1]

    def example(self, batch: int = 2) -> tuple[Any, ...]:
        return (clip(1)[0],)


@model
class OneClipAndState(Model):
    batches = (1,)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        hx = self.both(h)
        for t in range(x.size(0)):
            hx = self.cell(x[t], hx)
        return hx

    def example(self, batch: int = 2) -> tuple[Any, ...]:
        return clip(1)[0], state(1)[0]


# ------------------------------------------------------------------------------- what tests ask


def optimized(module: Any, *example: Any, **more: Any) -> fx.GraphModule:
    return fxtemporal.optimize(module, example, tune="static", verify=False, **more)


def remarks(module: nn.Module, status: str | None = None) -> list[Remark]:
    found = [r for r in fxtemporal.report(module).remarks if r.rule == "recurrent-cells"]
    return [r for r in found if status in (None, r.status)]


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def outcome(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*inputs)


class Counting(TorchDispatchMode):
    """How often each ATen op runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func._schema.name.partition("::")[2]] += 1
        return func(*args, **kwargs or {})


def executed(module: nn.Module, *inputs: Any) -> Counter[str]:
    with torch.no_grad(), Counting() as counting:
        outcome(module, inputs)
    return counting.ops


def ops(gm: fx.GraphModule) -> Counter[str]:
    """The recurrent ops of a graph, by name."""
    known = {*CELLS, *CELLS.values()}
    program = Program(gm, torch._subclasses.FakeTensorMode(), "given")
    described = [program.op(n) for n in gm.graph.nodes if n.op.startswith("call")]
    return Counter(op.name for op in described if op is not None and op.name in known)


@cache
def sequenced(name: str, kind: str) -> tuple[Model, fx.GraphModule]:
    """A model and its result: for tests that change neither."""
    plain = MODELS[name](kind)
    return plain, optimized(plain, *plain.example())


every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("kind", KINDS)
one_or_two_states = pytest.mark.parametrize("kind", ["lstm", "gru"])


# --------------------------------------------------------------------------------- what is done


@every_kind
@every_model
def test_the_steps_become_one_call(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    assert ops(result) == {kind: plain.calls}
    found = remarks(result)
    assert [r.status for r in found] == ["applied"] * plain.calls
    for remark in found:
        assert remark.detail["kind"] == kind
        assert remark.detail["steps"] >= 2
        assert remark.target in ("cell", "second", "same")
        assert remark.location is not None
        assert "test_recurrent_cells.py:" in remark.location


@every_kind
@every_model
def test_the_numbers_at_every_batch(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    for batch in plain.batches:
        inputs = plain.example(batch)
        close(outcome(result, inputs), outcome(plain, inputs))


@one_or_two_states
@every_model
def test_gradients_reach_the_same_parameters(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    grads = []
    for module in (plain, result):
        inputs = pytree.tree_map(lambda t: t.requires_grad_(), plain.example(plain.batches[-1]))
        leaves = pytree.tree_leaves(outcome(module, inputs))
        sum(leaf.square().sum() for leaf in leaves).backward()
        grads.append([t.grad for t in (*pytree.tree_leaves(inputs), *plain.parameters())])
        plain.zero_grad(set_to_none=True)
    close(grads[1], grads[0], 1e-10)


@one_or_two_states
@every_model
def test_outputs_are_memory_of_their_own(name: str, kind: str) -> None:
    """Writing one output must not change another, as it does not with the cells."""
    plain, result = sequenced(name, kind)
    for index in range(len(pytree.tree_leaves(outcome(plain, plain.example())))):
        with torch.no_grad():
            both = [pytree.tree_leaves(outcome(m, plain.example())) for m in (plain, result)]
            for leaves in both:
                leaves[index].add_(1.0)
        close(both[1], both[0])
        strides = [[leaf.stride() for leaf in leaves] for leaves in both]
        assert strides[0] == strides[1]


@one_or_two_states
@every_model
def test_twice_changes_nothing(name: str, kind: str) -> None:
    plain, once = sequenced(name, kind)
    twice = optimized(once, *plain.example(), passes=["recurrent-cells"])
    assert remarks(twice) == []
    assert [n.target for n in twice.graph.nodes] == [n.target for n in once.graph.nodes]
    close(outcome(twice, plain.example()), outcome(once, plain.example()))


@every_model
def test_the_model_and_its_state_dict_stay_as_they_are(name: str) -> None:
    before = MODELS[name]("lstm")
    plain, result = sequenced(name, "lstm")
    assert list(result.state_dict()) == list(plain.state_dict())
    mine, theirs = dict(result.named_parameters()), dict(plain.named_parameters())
    assert all(mine[key] is theirs[key] for key in theirs)
    close(outcome(plain, plain.example()), outcome(before, plain.example()))
    assert repr(plain) == repr(before)


@every_model
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    plain, result = sequenced(name, "lstm")
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert ops(again) == ops(result)
        close(outcome(again, plain.example(1)), outcome(plain, plain.example(1)))
        assert fxtemporal.report(again).remarks == fxtemporal.report(result).remarks


@one_or_two_states
@pytest.mark.parametrize("name", ["StateLeftOut", "StateAsInput", "StackedCells", "Backwards"])
def test_the_result_can_be_exported_with_a_free_batch(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    inputs = plain.example()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(result, inputs, dynamic_shapes=shapes, strict=False)
    close(program.module()(*plain.example(5)), outcome(plain, plain.example(5)))


@one_or_two_states
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("OneClip")])
def test_programs_of_torch_export(name: str, kind: str) -> None:
    plain = MODELS[name](kind)
    program = torch.export.export(plain, plain.example(), strict=False)
    result = optimized(program, *plain.example())
    assert ops(result) == {kind: plain.calls}
    close(outcome(result, plain.example()), outcome(plain, plain.example()))


@every_kind
def test_without_bias(kind: str) -> None:
    plain = StateLeftOut(kind, bias=False)
    result = optimized(plain, *plain.example())
    assert ops(result) == {kind: 1}
    close(result(clip(3)), plain(clip(3)))


@every_kind
def test_in_training_mode(kind: str) -> None:
    plain = StackedCells(kind).train()
    result = optimized(plain, *plain.example())
    assert ops(result) == {kind: 2}
    close(result(clip(3)), plain(clip(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    plain = StackedCells(kind).to(dtype)
    x = clip().to(dtype)
    result = fxtemporal.optimize(plain, (x,), tune="static")  # verified, also in float64
    assert ops(result) == {kind: 2}
    wide = copy.deepcopy(plain).double()(x.double())
    tolerance = 8 * torch.finfo(dtype).eps
    close(pytree.tree_map(Tensor.double, result(x)), wide, tolerance)
    result(x)[0].sum().backward()
    assert plain.cell.weight_ih.grad is not None


@every_kind
def test_a_batch_of_none(kind: str) -> None:
    plain, result = sequenced("StateLeftOut", kind)
    close(result(clip()[:0]), plain(clip()[:0]))


def test_other_numbers_of_frames() -> None:
    plain, result = sequenced("AFewFrames", "lstm")
    close(result(clip(2, 7)), plain(clip(2, 7)))
    with pytest.raises((RuntimeError, IndexError)):
        result(clip(2, 2))
    _, held = sequenced("StateLeftOut", "lstm")
    with pytest.raises(fxtemporal.SpecializationError):
        held(clip(2, 7))


def test_lanes_of_one_tensor_are_not_stacked_again() -> None:
    for name in ("StateLeftOut", "StateOfZeros", "TimeFirst", "AFewFrames", "Backwards"):
        _, result = sequenced(name, "lstm")
        targets = [n.target for n in result.graph.nodes]
        assert torch.stack not in targets
        assert ("narrow" in targets) == (name == "AFewFrames")


# ------------------------------------------------------------------------------ with other passes


class Video(nn.Module):
    """Features of each frame, a cell, a classifier on each state."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = body()
            self.cell = nn.LSTMCell(5, HIDDEN)
            self.head = nn.Linear(HIDDEN, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        outs = []
        for t in range(x.size(1)):
            h, c = self.cell(self.body(x[:, t]), (h, c))
            outs.append(h)
        return self.head(torch.stack(outs, 1))


def test_behind_time_distribute() -> None:
    plain, x = Video(), noise(2, 6, 3, 8, 8).double()
    result = fxtemporal.optimize(plain, (x,), tune="static")
    assert ops(result) == {"lstm": 1}
    assert executed(plain, x)["convolution"] == 6
    assert executed(result, x)["convolution"] == 1
    assert torch.stack not in [n.target for n in result.graph.nodes]
    other = noise(3, 6, 3, 8, 8, seed=4).double()
    close(result(other), plain(other))
    again = optimized(result, x)
    assert not fxtemporal.report(again).by_status("applied")


class ClassifiesEachFrame(Video):
    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        outs = []
        for t in range(x.size(1)):
            h, c = self.cell(self.body(x[:, t]), (h, c))
            outs.append(self.head(h))
        return torch.stack(outs, 1)


def test_what_reads_every_state_is_batched_behind_it() -> None:
    plain, x = ClassifiesEachFrame(), noise(2, 6, 3, 8, 8).double()
    result = fxtemporal.optimize(plain, (x,), tune="static")
    applied = [r.rule for r in fxtemporal.report(result).by_status("applied")]
    assert applied == ["time-distribute", "recurrent-cells", "time-distribute"]
    assert sum(n.target == "head" for n in result.graph.nodes) == 1
    other = noise(3, 6, 3, 8, 8, seed=4).double()
    close(result(other), plain(other))
    assert not fxtemporal.report(optimized(result, x)).by_status("applied")


def test_a_body_that_is_not_batched_moves_up() -> None:
    """Features that stay in the loop are computed before the first step."""
    plain, x = Video(), noise(2, 4, 3, 8, 8).double()
    result = optimized(plain, x, passes=["recurrent-cells"])
    assert ops(result) == {"lstm": 1}
    close(result(x[:1]), plain(x[:1]))


# ------------------------------------------------------------------------------ what is refused

REFUSED: dict[str, tuple[type[Model], Code, str]] = {}


def refused(code: Code, text: str) -> Callable[[type[Model]], type[Model]]:
    def enter(cls: type[Model]) -> type[Model]:
        REFUSED[cls.__name__] = cls, code, text
        return cls

    return enter


@refused(Code.RECURRENCE, r"cell \(\S*test_recurrent_cells.py:\d+\): its input depends on")
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


@pytest.mark.parametrize(
    ("recurrent", "products", "rounds"),
    [("tf32", "none", True), ("tf32", "tf32", False), ("none", "none", False)],
)
def test_tf32_counts_as_another_precision(
    monkeypatch: pytest.MonkeyPatch, recurrent: str, products: str, rounds: bool
) -> None:
    class Setting:
        fp32_precision = recurrent

    class Matmul:
        fp32_precision = products

    monkeypatch.setattr(recurrent_cells.torch.backends.cudnn, "rnn", Setting(), raising=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        value = torch.empty(2, 3, device="meta", dtype=torch.float32)
    assert not recurrent_cells._rounds_to_tf32(value)

    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float32

    assert recurrent_cells._rounds_to_tf32(OnCuda()) is rounds  # type: ignore[arg-type]


def test_audit_says_what_optimize_does() -> None:
    for name in ("StackedCells", "TwoLoops"):
        plain, result = sequenced(name, "lstm")
        assert fxtemporal.audit(plain, plain.example()).remarks == fxtemporal.report(result).remarks


def test_the_rule_is_stateless_and_named() -> None:
    assert RecurrentCells().name == "recurrent-cells"
    assert RecurrentCells.exact
    assert not vars(RecurrentCells())
