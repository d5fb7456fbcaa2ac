"""Models with a recurrent cell in a loop, and what the tests of recurrent-cells ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxtemporal
from fxtemporal import Remark
from fxtemporal.analysis.cell_chains import CELLS
from fxtemporal.ir.program import Program
from tests.strictly import strictly
from tests.zoo import noise

IN, HIDDEN, STEPS = 3, 5, 4

KINDS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
}


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
    return strictly(module, example, tune="static", verify=False, **more)


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


every_kind = pytest.mark.parametrize("kind", KINDS)
