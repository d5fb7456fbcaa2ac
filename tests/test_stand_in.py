"""The model that is optimized or audited is only looked at: nothing that its forward writes stays.

``COUNT``, ``STORE`` and the class attributes below are what forwards write outside of any model.
"""

from __future__ import annotations

import collections
import copy
import io
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal.ir.stand_in import StandIn
from fxtemporal.support.errors import FxTemporalError
from tests.zoo import noise

COUNT = 0
STORE: dict[str, Any] = {}
Write = Callable[[Any, Tensor], None]


class Holder:
    held: Any = None


class Slotted:
    __slots__ = ("held",)


class Model(nn.Module):
    calls = 0
    shared: list[Any] = []  # noqa: RUF012 - a list of the class is what is tested

    def __init__(self, write: Write | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.plain = torch.ones(4)
        self.list, self.nested = [1], {"k": [2]}
        self.deque = collections.deque([3], maxlen=3)
        self.holder, self.slotted = Holder(), Slotted()
        self.slotted.held = None
        self.elsewhere = [nn.Linear(2, 2)]
        self.random = random.Random(0)
        self.numpy = np.ones(3)
        self.bytes = bytearray(3)
        self.file = io.StringIO()
        variable = [0]
        self.read = lambda: variable
        self.in_hooks: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for t in range(x.size(1)):
            y = self.layer(x[:, t])
            if self.write is not None:
                self.write(self, y)
            out.append(y)
        return torch.stack(out, 1)


def count(self: Model, y: Tensor) -> None:
    global COUNT
    COUNT += 1


def scale(self: Model, y: Tensor) -> None:
    with torch.no_grad():
        self.layer.weight.mul_(0.5)


def class_attribute(self: Model, y: Tensor) -> None:
    Model.calls += 1


WRITES: dict[str, Write] = {
    "a parameter": scale,
    "a parameter's data": lambda self, y: self.layer.weight.data.mul_(0.5) and None,
    "a buffer": lambda self, y: self.seen.add_(1) and None,
    "a buffer, anew": lambda self, y: setattr(self, "seen", self.seen + 1),
    "a plain tensor": lambda self, y: self.plain.add_(1) and None,
    "an attribute": lambda self, y: setattr(self, "last", y.detach()),
    "a list": lambda self, y: self.list.append(y),
    "a list in a dict": lambda self, y: self.nested["k"].append(y),
    "a deque": lambda self, y: self.deque.append(y.detach()),
    "a plain object": lambda self, y: setattr(self.holder, "held", y),
    "an object with slots": lambda self, y: setattr(self.slotted, "held", y),
    "another module": lambda self, y: setattr(self.elsewhere[0], "held", y),
    "a closure": lambda self, y: self.read().append(y),
    "a random generator": lambda self, y: self.random.random() and None,
    "an array": lambda self, y: self.numpy.fill(2.0),
    "bytes": lambda self, y: self.bytes.append(1),
    "a file in memory": lambda self, y: self.file.write("x") and None,
    "a global": count,
    "a global dict": lambda self, y: STORE.update(held=y),
    "a class attribute": class_attribute,
    "a list of the class": lambda self, y: self.shared.append(y),
    "Python's random": lambda self, y: random.random() and None,
    "NumPy's random": lambda self, y: np.random.rand() and None,
    "torch's random": lambda self, y: torch.rand(1) and None,
    "a raise": lambda self, y: self.list.append(y) or 1 / 0,  # type: ignore[func-returns-value]
}


def state(model: Model) -> Any:
    """All that a write may change, as plain values."""
    return copy.deepcopy(
        (
            [t.tolist() for t in (*model.parameters(), *model.buffers(), model.plain)],
            [t.requires_grad for t in model.parameters()],
            sorted(vars(model)),
            sorted(vars(model.elsewhere[0])),
            (model.list, model.nested, list(model.deque), model.read(), list(model.numpy)),
            (bytes(model.bytes), model.file.getvalue()),
            (vars(model.holder), model.slotted.held, model.random.getstate()),
            (COUNT, STORE, Model.calls, Model.shared, model.training),
            (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        )
    )


@pytest.mark.parametrize("what", [fxtemporal.audit, fxtemporal.optimize])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_nothing_that_a_forward_writes_stays(write: Write, what: Any) -> None:
    model, x = Model(write), noise(2, 4, 4)
    identity = [id(t) for t in (*model.parameters(), *model.buffers())]
    before = state(model)
    settings = {} if what is fxtemporal.audit else {"tune": "static"}
    try:
        result = what(model, (x,), **settings)
    except FxTemporalError:
        result = None
    assert state(model) == before
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identity
    if isinstance(result, nn.Module):
        other = copy.deepcopy(model)
        expected = other(x)
        torch.testing.assert_close(result(x), expected)


@pytest.mark.parametrize("what", [fxtemporal.audit, fxtemporal.optimize])
def test_what_hooks_keep_stays_as_it_was(what: Any) -> None:
    model, x, seen = Model(), noise(2, 4, 4), []
    model.layer.register_forward_hook(lambda m, a, o: seen.append(o))
    model.layer.register_forward_pre_hook(lambda m, a: model.in_hooks.append(a))
    what(model, (x,))
    assert seen == []
    assert model.in_hooks == []
    model(x)
    assert len(seen) == len(model.in_hooks) == 4


def test_a_copy_is_of_the_same_structure() -> None:
    model = Model()
    model.tied = model.layer
    model.view = model.plain[1:]
    model.method = model.layer.forward
    model.register_forward_hook(lambda m, a, o: o)
    copied = StandIn(model).module
    assert copied.tied is copied.layer is not model.layer
    assert copied.view.data_ptr() == copied.plain[1:].data_ptr() != model.view.data_ptr()
    assert copied.method.__self__ is copied.layer
    assert list(copied._forward_hooks) == list(model._forward_hooks)
    assert list(copied.state_dict()) == list(model.state_dict())
    x = noise(2, 3, 4)
    assert torch.equal(copied(x), model(x))
    shared = StandIn(model, share_parameters=True).module
    assert shared.layer.weight is model.layer.weight
    assert shared.seen is not model.seen


def test_another_thread_is_served_while_one_optimizes() -> None:
    served = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Asks()).eval()
    y, stop, wrong = noise(2, 3, 8, 8), threading.Event(), []
    with torch.no_grad():
        expected = served(y)

    def serve() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    got = served(y)
                if type(got) is not Tensor or not torch.equal(got, expected):
                    wrong.append(got)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            fxtemporal.optimize(Model().eval(), (noise(2, 24, 4),), tune="static")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


class Asks(nn.Module):
    """Asks what a capture answers in its own thread: gradients, types, new tensors, sizes."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not isinstance(x, Tensor) or type(x) is not Tensor:
            return torch.zeros(1)
        return x + torch.ones(x.shape[1], 1, 1) * torch.finfo(x.dtype).eps


def test_two_threads_that_optimize_wait_for_each_other() -> None:
    before = {name: getattr(torch, name) for name in ("zeros", "ones", "rand", "is_tensor")}
    call, failed = nn.Module.__call__, []

    def optimize() -> None:
        try:
            for _ in range(2):
                x = noise(2, 5, 4)
                model = Model().eval()
                result = fxtemporal.optimize(model, (x,), tune="static")
                torch.testing.assert_close(result(x), model(x))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=optimize) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert {name: getattr(torch, name) for name in before} == before
    assert nn.Module.__call__ is call
    assert "training" not in vars(nn.Module)


def test_the_seed_that_cuda_will_start_with_is_the_users() -> None:
    """``torch.manual_seed`` queues a seed for CUDA where that is not in use yet."""
    queued = list(torch.cuda._queued_calls)
    model = nn.Sequential(nn.Conv3d(2, 3, (1, 3, 3)), nn.ReLU())
    fxtemporal.optimize(model, (torch.randn(1, 2, 3, 5, 5),), tune="static")
    assert len(torch.cuda._queued_calls) == len(queued)
