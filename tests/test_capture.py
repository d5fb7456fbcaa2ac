"""What is captured is the model: the same numbers at every size, or an error that says why not."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import operator
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.nn.utils import parametrizations, prune

import fxtemporal
from fxtemporal import CaptureError, FxTemporalError, SpecializationError, VerificationError
from fxtemporal.capture.arguments import bind_example
from fxtemporal.capture.capture import capture
from tests.zoo import BROKEN, CAPTURE, IndexedFrames, NestedInputs, noise

Forward = Callable[..., Any]
Setup = Callable[[Any], object]

X = noise(2, 4, 5)
OTHERS = ((noise(3, 4, 5),), (noise(2, 6, 5),), (noise(1, 1, 5),))
"""Another batch, another number of frames, ones."""

FACTOR = torch.tensor(3.0)

READ_THE_BATCH = {
    "torch.Size",
    "shape == tuple",
    "number in a shape",
    "np.prod",
    "len(x)",
    "for row in x",
    "zip(x, y)",
    "list(x)",
    "map over x",
}
"""Forwards below in which Python itself reads the batch size, so that it cannot stay free."""


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Result:
    logits: Tensor
    frames: int


class Layers(nn.Module):
    """What the forwards below may call."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 5)
            self.stack = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
            self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
            self.named = nn.ModuleDict({"a": nn.Linear(5, 5)})
            self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
            self.lstm = nn.LSTM(5, 5, batch_first=True)
            self.embedding = nn.Embedding(7, 5)
        self.scales = nn.ParameterList([nn.Parameter(noise(5, seed=i)) for i in (2, 3)])
        self.scale_of = nn.ParameterDict({"a": nn.Parameter(noise(5, seed=4))})
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("table", noise(16, 5, seed=5))
        self.register_buffer("passing", noise(5, seed=6), persistent=False)
        self.constant = noise(5, seed=7)
        self.constants = [noise(5, seed=8)]
        self.counter = 0
        self.eval()


@dataclass(frozen=True)
class Case:
    """A forward, the inputs that it is traced with, and others that it is then called with.

    At each of ``others`` the result must equal the model or raise SpecializationError; the latter
    not at the first of OTHERS, another batch, unless the forward reads the batch. ``frontend`` is
    what has to capture it ("?": either).
    """

    forward: Forward
    args: tuple[Any, ...] = (X,)
    others: tuple[tuple[Any, ...], ...] = OTHERS
    frontend: str = "fx"
    reads_batch: bool = False
    setup: Setup | None = None
    train: bool = False
    kwargs: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        cls = type("Model", (Layers,), {"forward": self.forward})
        model = cls().train(self.train)
        if self.setup is not None:
            self.setup(model)
        return model


def clone(value: Any) -> Any:
    def one(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    memo: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda t: memo.setdefault(id(t), one(t)), value)


def assert_same(mine: Any, theirs: Any) -> None:
    """Equal in type, nesting and numbers."""
    assert type(mine) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
        assert mine.requires_grad == theirs.requires_grad
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for key in theirs:
            assert_same(mine[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    elif dataclasses.is_dataclass(theirs):
        assert_same(vars(mine), vars(theirs))
    else:
        assert mine == theirs


def call(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """The outputs, the inputs after the call, the buffers after the call."""
    inputs = clone((args, dict(kwargs)))
    torch.manual_seed(0)
    outputs = model(*inputs[0], **inputs[1])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return outputs, inputs, buffers


def snapshot(model: nn.Module) -> Any:
    """All that optimize must leave alone, and the very objects that it is made of."""
    return {
        path: {
            name: copy.copy(value) if isinstance(value, dict | list | set | int) else id(value)
            for name, value in vars(module).items()
        }
        for path, module in model.named_modules(remove_duplicate=False)
    }


def numbers(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += [(name, value) for name, value in vars(model).items() if isinstance(value, Tensor)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def step(*models: nn.Module) -> None:
    """As an optimizer: other numbers in the same parameters."""
    with torch.no_grad():
        for model in models:
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.01 * (i + 1))


def check(case: Case, make: Callable[[nn.Module], nn.Module], *, blind: bool = False) -> nn.Module:
    """``make(model)`` computes what the model computes, and left the model alone.

    ``blind``: it did not see the inputs, and need not take them.
    """
    model = case.build()
    before, values, state = snapshot(model), numbers(model), torch.get_rng_state()
    result = make(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    assert_same(numbers(model), values)
    reference = case.build()  # what the model would have gone through without us
    ran = False
    for place, args in enumerate((case.args, *case.others)):
        try:
            expected = call(reference, args, case.kwargs)
        except Exception:  # the model itself does not take these
            with pytest.raises(Exception):  # noqa: B017, PT011
                call(result, args, case.kwargs)
            continue
        try:
            actual = call(result, args, case.kwargs)
        except KeyError:
            assert blind
        except SpecializationError:
            assert place > 0 or blind
            free = case.others is OTHERS and not case.reads_batch
            assert place != 1 or not free or blind, "the batch is free"
            for buffer, other in zip(reference.buffers(), result.buffers(), strict=True):
                other.data.copy_(buffer.data)
        else:
            assert_same(actual, expected)
            ran = place == 0 or ran
    if ran:
        step(model, reference)
        assert_same(*(call(m, case.args, case.kwargs)[0] for m in (result, reference)))
    return result


# ------------------------------------------------------------------------- sizes and shapes


def branch(self: Any, x: Tensor) -> Tensor:
    if x.size(1) > 4:
        x = x * 2
    return self.linear(x)


def branches(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] % 2 == 0 and 3 < x.shape[-1] < 6 and x.size(1):
        x = x * 2
    return x


def unpacked(self: Any, x: Tensor) -> Tensor:
    b, t, f = x.shape
    return self.linear(x.view(b * t, f))


def unpacked_size(self: Any, x: Tensor) -> Tensor:
    b, t, f = x.size()
    return x.reshape(b * t, f)


def starred(self: Any, x: Tensor) -> Tensor:
    *lead, f = x.shape
    return self.linear(x.reshape(-1, f)).view(*lead, -1)


def listed_shape(self: Any, x: Tensor) -> Tensor:
    sizes = list(x.shape)
    sizes[1] = 1
    return x[:, :1].reshape(sizes)


def halved(self: Any, x: Tensor) -> Tensor:
    while x.size(1) > 1:
        x = x[:, : x.size(1) // 2]
    return x


def refuses_long(self: Any, x: Tensor) -> Tensor:
    if x.size(1) > 5:
        raise ValueError("too long")
    return x * 2


def asserts(self: Any, x: Tensor) -> Tensor:
    assert x.dim() == 3
    assert x.ndim == 3
    assert x.dtype == torch.float32
    return x.sum(x.ndim - 1)


def masked_attention(self: Any, x: Tensor) -> Tensor:
    mask = torch.triu(torch.full((x.size(1), x.size(1)), float("-inf")), diagonal=1)
    scores = x @ x.transpose(1, 2) / math.sqrt(x.size(-1))
    return (scores + mask).softmax(-1) @ x


def grid(self: Any, x: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(x.size(0)), torch.arange(x.size(1)), indexing="ij")
    return x + (rows + columns)[..., None]


def split_unevenly(self: Any, x: Tensor) -> Tensor:
    first, rest = x.split([1, x.size(1) - 1], dim=1)
    return torch.cat([rest, first], 1)


def closes_over_a_size(self: Any, x: Tensor) -> Tensor:
    def scaled(y: Tensor) -> Tensor:
        return y * x.size(1)

    return scaled(x)


def divided(self: Any, x: Tensor) -> Tensor:
    quotient, rest = divmod(x.size(1), 3)
    return x * quotient + rest


SIZES: dict[str, Forward] = {
    "branch": branch,
    "branches": branches,
    "unpacked": unpacked,
    "unpacked size()": unpacked_size,
    "starred": starred,
    "starred in a call": lambda self, x: x.reshape(*x.shape[:-1], 1, -1),
    "list(shape)": listed_shape,
    "tuple(shape)": lambda self, x: x.reshape((*tuple(x.shape), 1)),
    "shape + tuple": lambda self, x: x.reshape(x.shape + (1,)),  # noqa: RUF005
    "part of a shape": lambda self, x: x.sum(-1, keepdim=True).expand(x.shape[:2] + (3,)),  # noqa: RUF005
    "torch.Size": lambda self, x: x.reshape(torch.Size([x.size(0) * x.size(1), 5])),
    "number in a shape": lambda self, x: x * 2 if 4 in x.shape else x,
    "size in a tuple": lambda self, x: x * 2 if x.size(1) in (4, 5) else x,
    "shape == tuple": lambda self, x: x * 2 if x.shape == (2, 4, 5) else x,
    "shape == shape": lambda self, x: x * 2 if x.shape == (x + 1).shape else x,
    "any() over a shape": lambda self, x: x * 2 if any(s == 4 for s in x.shape) else x,
    "not size": lambda self, x: x if not x.size(1) else x * 2,
    "comparison as a factor": lambda self, x: (x.size(1) > 3) * x,
    "size as a key": lambda self, x: x * {4: 2.0, 6: 3.0}.get(x.size(1), 7.0),
    "size in a string": lambda self, x: x * len(f"{x.size(1)}" * 3) + len(str(x.size(1))),
    "while": halved,
    "raise": refuses_long,
    "assert": asserts,
    "zeros(shape)": lambda self, x: torch.zeros(x.shape) + x,
    "zeros(*shape)": lambda self, x: torch.zeros(*x.shape) + x,
    "zeros(b, t)": lambda self, x: torch.zeros(x.size(0), x.size(1), dtype=x.dtype)[..., None] + x,
    "zeros((b, t))": lambda self, x: torch.zeros((x.size(0), x.size(1), 1), device=x.device) + x,
    "zeros(size=)": lambda self, x: torch.zeros(size=(x.size(0), x.size(1), 1)) + x,
    "new_zeros": lambda self, x: x + x.new_zeros(x.size(0), 1, 1) + x.new_ones(x.size(1), 1),
    "new_full": lambda self, x: x + x.new_full((x.size(0), 1, 1), 2.0) + x.new_tensor([3.0]),
    "zeros_like": lambda self, x: torch.zeros_like(x) + torch.ones_like(x) * x,
    "full": lambda self, x: x + torch.full((x.size(0), 1, 1), 3.0),
    "eye": lambda self, x: torch.eye(x.size(1)) @ x,
    "arange": lambda self, x: x + torch.arange(x.size(1)).view(1, -1, 1),
    "arange(0, t)": lambda self, x: x + torch.arange(0, x.size(1), dtype=x.dtype)[None, :, None],
    "linspace": lambda self, x: x * torch.linspace(0, 1, x.size(1))[:, None],
    "tensor of a size": lambda self, x: (
        x * torch.tensor([float(x.size(1))]) + torch.tensor(x.size(0))
    ),
    "tril": lambda self, x: torch.tril(torch.ones(x.size(1), x.size(1))) @ x,
    "attention mask": masked_attention,
    "meshgrid": grid,
    "sqrt of a feature size": lambda self, x: x / math.sqrt(x.size(-1)),
    "sqrt of the frames": lambda self, x: x / math.sqrt(x.size(1)),
    "np.sqrt": lambda self, x: x / float(np.sqrt(x.size(1))),
    "np.prod": lambda self, x: x / float(np.prod(x.shape)),
    "size ** -0.5": lambda self, x: x * x.size(1) ** -0.5,
    "size // 2": lambda self, x: x[:, : x.size(1) // 2],
    "int(size / 2)": lambda self, x: x[:, : int(x.size(1) / 2 + 0.5)],
    "ceil(size / 2)": lambda self, x: x[:, : math.ceil(x.size(1) / 2)],
    "round(size / 2)": lambda self, x: x[:, : round(x.size(1) / 2) + 1],
    "divmod": divided,
    "max, min, sum": lambda self, x: x * max(x.size(0), x.size(1)) + min(x.shape) + sum(x.shape),
    "sorted": lambda self, x: sorted([x.size(0), x.size(1)])[1] * x,
    "len(x)": lambda self, x: x * len(x),
    "for row in x": lambda self, x: torch.stack([row * 2 for row in x]),
    "zip(x, y)": lambda self, x: torch.stack([a + b for a, b in zip(x, x * 2, strict=True)]),
    "list(x)": lambda self, x: torch.stack(list(x)[::-1]),
    "map over x": lambda self, x: torch.stack(list(map(self.linear, x))),
    "reduce over frames": lambda self, x: functools.reduce(torch.add, x.unbind(1)),
    "sum over frames": lambda self, x: sum(x[:, t] for t in range(x.size(1))),
    "range backwards": lambda self, x: torch.stack([x[:, t] for t in range(x.size(1) - 1, -1, -1)]),
    "numel": lambda self, x: x / x.numel(),
    "stride": lambda self, x: x * x.stride(0),
    "expand": lambda self, x: self.table[0].expand(x.size(0), -1).unsqueeze(1) + x,
    "repeat": lambda self, x: x.repeat(1, x.size(1), 1),
    "split": split_unevenly,
    "chunk": lambda self, x: torch.cat([y * (i + 1) for i, y in enumerate(x.chunk(2, 1))], 1),
    "unbind": lambda self, x: torch.stack([y * (i + 1) for i, y in enumerate(x.unbind(1))], 1),
    "interpolate": lambda self, x: F.interpolate(x, size=x.size(1) * 2),
    "pad to eight": lambda self, x: F.pad(x, (0, 0, 0, max(0, 8 - x.size(1)))),
    "pad by size": lambda self, x: F.pad(x, (0, 0, x.size(1) - 1, 0)),
    "slice of a buffer": lambda self, x: x + self.table[: x.size(1)],
    "slice object": lambda self, x: x[(slice(None), slice(0, x.size(1) - 1))],
    "last frame": lambda self, x: x[:, -1] + x[:, x.size(1) - 1],
    "numpy number": lambda self, x: x[:, : np.int64(1)] * np.float32(2.0),
    "closure": closes_over_a_size,
    "no frames left": lambda self, x: x[:, :0],
}

# ----------------------------------------------------------------------- what Python asks of x


def both_ways(self: Any, x: Tensor) -> Tensor:
    try:
        return x.view(2, 20)
    except RuntimeError:
        return x * 3


ASKED: dict[str, Forward] = {
    "isinstance": lambda self, x: x * 2 if isinstance(x, Tensor) else x,
    "isinstance of others": lambda self, x: x * 2 if isinstance(x, list | tuple) else x,
    "is_tensor": lambda self, x: x * 2 if torch.is_tensor(x) else x,
    "type() is": lambda self, x: x * 2 if type(x) is Tensor else x,
    "hasattr": lambda self, x: x * 2 if hasattr(x, "shape") else x,
    "is not None": lambda self, x: x * 2 if x is not None else x,
    "dtype": lambda self, x: x * 2 if x.dtype == torch.float32 else x,
    "dtype as text": lambda self, x: x * 2 if str(x.dtype) == "torch.float32" else x,
    "device": lambda self, x: x * 2 if x.device.type == "cpu" and not x.is_cuda else x,
    "is_floating_point": lambda self, x: x * 2 if x.is_floating_point() else x,
    "is_contiguous": lambda self, x: x * 2 if x.is_contiguous() else x,
    "requires_grad of an input": lambda self, x: x * 2 + 0 if x.requires_grad else x * 2,
    "requires_grad of a parameter": lambda self, x: (
        x * 2 if self.linear.weight.requires_grad else x * 3
    ),
    "training": lambda self, x: x * 2 if self.training else x * 3,
    "scripting": lambda self, x: x * 2 if torch.jit.is_scripting() else x * 3,
    "finfo": lambda self, x: x.masked_fill(x > 0, torch.finfo(x.dtype).max),
}

# ------------------------------------------------------------------------------- what it calls


def through_containers(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
    x = self.named["a"](x)
    for scale in self.scales:
        x = x * scale
    return self.stack(x * self.scale_of["a"])


def parts_of_a_sequence(self: Any, x: Tensor) -> Tensor:
    x = self.stack[0](x)
    for layer in self.stack:
        x = layer(x)
    return x


def all_parameters(self: Any, x: Tensor) -> Tensor:
    for _, parameter in self.linear.named_parameters():
        x = x + parameter.sum()
    return x + sum(p.sum() for p in self.layers.parameters())


def lstm_with_state(self: Any, x: Tensor) -> Tensor:
    h = torch.zeros(1, x.size(0), 5)
    y, (_, c) = self.lstm(x, (h, h))
    return y + c.transpose(0, 1)


def maxima(self: Any, x: Tensor) -> Tensor:
    values, places = x.max(1)
    both = x.max(1)
    return values + both.values + places + both[1] + x.topk(1, dim=1)[0].squeeze(1)


CALLED: dict[str, Forward] = {
    "containers": through_containers,
    "parts of a Sequential": parts_of_a_sequence,
    "all parameters": all_parameters,
    "parameters in functions": lambda self, x: F.linear(
        x, self.linear.weight.t(), self.linear.bias * 2
    ),
    "weight.data": lambda self, x: F.linear(x, self.linear.weight.data),
    "shape of a weight": lambda self, x: x * self.linear.weight.shape[0] + self.linear.in_features,
    "buffers": lambda self, x: x * self.table[0] + self.passing,
    "a plain tensor": lambda self, x: x * self.constant,
    "a plain tensor in a list": lambda self, x: x * self.constants[0],
    "a global tensor": lambda self, x: x * FACTOR,
    "a tensor made here": lambda self, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
    "forward itself": lambda self, x: self.linear.forward(x),
    "keyword argument": lambda self, x: self.linear(input=x),
    "getattr with a default": lambda self, x: getattr(self, "linear")(x) * getattr(self, "no", 2),  # noqa: B009
    "attention": lambda self, x: self.attention(x, x, x)[0],
    "sdpa": lambda self, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "lstm": lambda self, x: self.lstm(x),
    "lstm with a state": lstm_with_state,
    "operators": lambda self, x: -x + abs(x) + x**2 + 2**x + x // 2 + x % 2 + 1 / (x.abs() + 1) - x,
    "logic": lambda self, x: torch.where((x > 0) & ~(x > 1) | (x < -1), x, -x),
    "einsum": lambda self, x: torch.einsum("btf,bsf->bts", x, x),
    "max, topk": maxima,
    "gather": lambda self, x: x.gather(1, x.argmax(1, keepdim=True)),
    "one_hot": lambda self, x: F.one_hot(x.argmax(-1), 5) * x,
    "mask": lambda self, x: x * (x > 0),
    "mT": lambda self, x: x.mT @ x,
    "fft": lambda self, x: torch.fft.rfft(x),
    "detach": lambda self, x: x.detach() + self.linear(x).detach() + self.linear(x),
    "to float64": lambda self, x: x.to(torch.float64).to(x.dtype) + torch.ones(1).type_as(x),
    "expand_as": lambda self, x: x.sum(1, keepdim=True).expand_as(x).reshape_as(x),
    "lambda": lambda self, x: (lambda y: y * 2)(x),
}

# ---------------------------------------------------------------------------- what it returns

RETURNED: dict[str, Forward] = {
    "itself": lambda self, x: x,
    "a view": lambda self, x: (x.view(-1), x),
    "a dict": lambda self, x: {"a": x * 2, "b": [x, (x + 1, None)], "n": 3, "s": "text"},
    "a namedtuple": lambda self, x: Pair(x * 2, x),
    "a dataclass": lambda self, x: Result(x * 2, 3),
    "an OrderedDict": lambda self, x: collections.OrderedDict(a=x, b=x * 2),
    "None": lambda self, x: None,
    "a number": lambda self, x: 3,
    "sizes": lambda self, x: (x.size(1), x.shape),
    "parameters": lambda self, x: (self.linear.weight, self.table),
    "dtypes": lambda self, x: (x, x.dtype, x.device, slice(0, 3)),
    "integers": lambda self, x: (x.argmax(1), x > 0),
    "zero dimensions": lambda self, x: x.sum(),
}


def _twice(self: Any, x: Tensor) -> Any:
    y = x * 2
    return y, y


# ------------------------------------------------------------------------------------- writing


def writes_its_input(self: Any, x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


def writes_its_input_by_sign(self: Any, x: Tensor) -> Tensor:
    x += 1
    return x * 2


def writes_a_frame_of_its_input(self: Any, x: Tensor) -> Tensor:
    x[:, 0].add_(1)
    return x * 2


def writes_behind_a_view(self: Any, x: Tensor) -> Tensor:
    y = x.view(-1)
    x.mul_(2)
    return y


def reads_before_and_after(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    first = y[:, 0]
    y.relu_()
    return first + y[:, 0]


def writes_through_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    y[:, 0].mul_(100)
    return y


def adds_to_an_alias(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y
    z += 1
    return y


def adds_to_a_view(self: Any, x: Tensor) -> Any:
    y = self.linear(x)
    z = y.view(-1, 5)
    z += 1
    z.mul_(2)
    return y, z


def adds_to_an_entry(self: Any, x: Tensor) -> Any:
    pieces = [x * 1, x * 2]
    pieces[0] += 1
    pieces += [x]
    return pieces


def writes_into_out(self: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 2, out=y)
    return y


def assigns(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    y[:, 0] = 0
    return y


def assigns_to_its_input(self: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x * 2


def assigns_frames(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), x.size(1), 5)
    for t in range(x.size(1)):
        out[:, t] = self.linear(x[:, t])
    return out


def adds_to_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.table.add_(1)
    return x + self.table[0]


def adds_to_a_buffer_by_sign(self: Any, x: Tensor) -> Tensor:
    self.table += 1
    return x + self.table[0]


def copies_into_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.passing.copy_(x.mean((0, 1)).detach())
    return x + self.passing


def assigns_a_row_of_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.table[0] = x.mean((0, 1)).detach()
    return x + self.table[0]


WRITES: dict[str, Forward] = {
    "into an input": writes_its_input,
    "into an input, by sign": writes_its_input_by_sign,
    "into a frame of an input": writes_a_frame_of_its_input,
    "behind a view": writes_behind_a_view,
    "between two readers": reads_before_and_after,
    "through a view": writes_through_a_view,
    "to an alias": adds_to_an_alias,
    "to a view": adds_to_a_view,
    "to an entry of a list": adds_to_an_entry,
    "out=": writes_into_out,
    "into a buffer": adds_to_a_buffer,
    "copy_ into a buffer": copies_into_a_buffer,
}
ASSIGNMENTS: dict[str, Forward] = {
    "into a buffer, by sign": adds_to_a_buffer_by_sign,
    "y[:, 0] = 0": assigns,
    "x[:, 0] = 0": assigns_to_its_input,
    "out[:, t] = y": assigns_frames,
    "buffer[0] = y": assigns_a_row_of_a_buffer,
}

# -------------------------------------------------------------------------------------- random


def drawn_from_a_generator(self: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return x + torch.randn(5, generator=generator)


RANDOM: dict[str, Forward] = {
    "F.dropout": lambda self, x: F.dropout(x, 0.5),
    "nn.Dropout": lambda self, x: self.dropout(x),
    "F.dropout, training": lambda self, x: F.dropout(x, 0.5, self.training),
    "rand(shape)": lambda self, x: x + torch.rand(x.shape),
    "rand_like": lambda self, x: x + torch.rand_like(x) + torch.randn_like(x),
    "randn(b, 1, 1)": lambda self, x: x + torch.randn(x.size(0), 1, 1),
    "randn(5)": lambda self, x: x + torch.randn(5),
    "randperm": lambda self, x: x[torch.randperm(x.size(0))],
    "bernoulli": lambda self, x: x * x.sigmoid().bernoulli() + torch.bernoulli(x.sigmoid()),
    "normal_": lambda self, x: x + x.clone().normal_() + x.new_empty(5).uniform_(),
}

# ------------------------------------------------------------------------------ for torch.export


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.linear(x)
    return self.named["a"](y) + x


def under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.linear(x)
    return y * 2


@torch.no_grad()
def under_no_grad(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)


GRADIENTS: dict[str, Forward] = {
    "no_grad": without_gradients,
    "decorated by no_grad": under_no_grad,
}
EXPORTED: dict[str, Forward] = {
    "autocast": under_autocast,
    "unbound method": lambda self, x: Tensor.add(self.linear(x), x),
    "vmap": lambda self, x: torch.vmap(self.linear)(x),
    "cond": lambda self, x: torch.cond(
        x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (self.linear(x),)
    ),
}

MADE: dict[str, Forward] = {
    "a module": lambda self, x: nn.ReLU()(self.linear(x)),
    "a slice of a Sequential": lambda self, x: self.stack[-1:](self.linear(x)),
}
"""Modules that the forward makes: they are not part of the model."""

# --------------------------------------------------------------------------------------- inputs


def loops(self: Any, x: Tensor, n: int) -> Tensor:
    for _ in range(n):
        x = self.linear(x)
    return x


def with_default(self: Any, x: Tensor, y: Tensor | None = None, s: float = 2.0) -> Tensor:
    return x * s if y is None else x * s + y


def keyword_only(self: Any, x: Tensor, *, mask: Tensor, scale: float | None = None) -> Tensor:
    return x * mask if scale is None else x * mask * scale


def starred_inputs(self: Any, *xs: Tensor) -> Tensor:
    return sum(x * (i + 1) for i, x in enumerate(xs))


def starred_keywords(self: Any, x: Tensor, *rest: Tensor, k: Any = None, **more: Tensor) -> Tensor:
    return x + rest[0] * k + len(more) + more["a"] - more["b"] + len(rest)


def optional_entry(self: Any, d: dict[str, Tensor]) -> Tensor:
    return d["a"] + d.get("b", 0) + (1 if d.get("c") is None else d["c"])


def ordered(self: Any, d: dict[str, Tensor]) -> Tensor:
    return torch.stack([v * (i + 1) for i, (_, v) in enumerate(d.items())]).sum(0)


INPUTS: dict[str, Case] = {
    "int": Case(lambda self, x, n: x * n, (X, 3), ((X, 4), (OTHERS[0][0], 7))),
    "int for a loop": Case(loops, (X, 3), ((X, 4),)),
    "float": Case(lambda self, x, s: x * s, (X, 0.5), ((X, 0.25),)),
    "bool": Case(lambda self, x, f: x * 2 if f else x, (X, True), ((X, False),)),
    "bool, unread": Case(lambda self, x, f: x * 2, (X, True), ((X, False),)),
    "str": Case(lambda self, x, k: x * 2 if k == "a" else x, (X, "a"), ((X, "b"),)),
    "None": Case(lambda self, x, y: x if y is None else y, (X, None), ((X, X * 2),)),
    "None in place of a tensor": Case(with_default, (X, X), ((X, None), (X,))),
    "defaults": Case(with_default, (X,), ((X, X), (X, None, 3.0))),
    "a default by keyword": Case(with_default, (X,), (), kwargs=(("s", 2.5),)),
    "keyword-only": Case(keyword_only, (X,), (), kwargs=(("mask", X > 0),)),
    "keyword-only, optional": Case(keyword_only, kwargs=(("mask", X[0] > 0), ("scale", 2.0))),
    "list": Case(
        lambda self, xs: torch.stack(xs).sum(0),
        ([X, X * 2],),
        (([X, X * 3],), ([X, X, X],), ((X, X),)),
    ),
    "tuple": Case(lambda self, xs: xs[0] - xs[1], ((X, X * 2),), (((X, X * 3),),)),
    "dict": Case(
        lambda self, d: d["a"] - d["b"],
        ({"a": X, "b": X * 2},),
        (({"a": X, "b": X * 3},), ({"a": X, "b": X, "c": X},)),
    ),
    "dict in its order": Case(ordered, ({"a": X, "b": X * 2},), (({"b": X, "a": X * 2},),)),
    "dict with optional keys": Case(optional_entry, ({"a": X},), (({"a": X, "b": X},),)),
    "nested": Case(
        lambda self, d: d["a"][0] + d["a"][1][0] * d["a"][1][1]["q"],
        ({"a": [X, (X, {"q": X})]},),
        (({"a": [X, (X * 2, {"q": X})]},),),
    ),
    "list with other things": Case(
        lambda self, xs: xs[0] * xs[1], ([X, 3, None, "q"],), (([X, 4, None, "q"],),)
    ),
    "namedtuple": Case(lambda self, p: p.first - p.second, (Pair(X, X * 2),), ((Pair(X, X),),)),
    "dataclass": Case(lambda self, r: r.logits * r.frames, (Result(X, 3),), ((Result(X, 4),),)),
    "OrderedDict": Case(
        lambda self, d: d["a"] - d["b"], (collections.OrderedDict(a=X, b=X * 2),), ()
    ),
    "*args": Case(starred_inputs, (X, X, X), ((X, X * 2, X * 3), (X, X))),
    "*args and **kwargs": Case(
        starred_keywords, (X, X), (), kwargs=(("k", X), ("a", X), ("b", X * 2))
    ),
    "a size": Case(lambda self, x, s: x[:, : s[1]], (X, (2, 4)), ((X, (2, 3)),)),
    "torch.Size": Case(lambda self, x, s: x[:, : s[1]], (X, X.shape), ((X, torch.Size([2, 3])),)),
    "dtype": Case(lambda self, x, d: x.to(d), (X, torch.float64), ((X, torch.float32),)),
    "zero dimensions": Case(
        lambda self, x, n: x * n, (X, torch.tensor(3)), ((X, torch.tensor(4)),)
    ),
    "tokens": Case(
        lambda self, ids: self.embedding(ids),
        (torch.tensor([[1, 2], [3, 4]]),),
        ((torch.tensor([[1, 2, 6]]),),),
    ),
    "bool tensor": Case(lambda self, m: (~m, m.sum(), m.int() * 2), (X > 0,), ((X[:1] > 1,),)),
    "complex": Case(
        lambda self, z: (z * z.conj(), z.abs(), z.real), (torch.complex(X, X),), ((X[:1] + 0j,),)
    ),
    "empty batch": Case(lambda self, x: self.linear(x), (X[:0],), ((X,),)),
    "no frames": Case(lambda self, x: self.linear(x).sum(1), (X[:, :0],), ((X,),)),
    "ones": Case(lambda self, x: self.linear(x).squeeze(), (X[:1, :1],), ((X,), (X[:1],))),
    "batch of one, squeezed": Case(lambda self, x: x.squeeze(0), (X[:1],), ((X,),)),
    "batch of one, broadcast": Case(lambda self, x: x + self.table.view(2, 8, 5)[:, :4], (X[:1],)),
    "batch of one, asked": Case(lambda self, x: x * 2 if x.size(0) == 1 else x, (X[:1],), ((X,),)),
    "equal sizes": Case(
        lambda self, x: (x.reshape(x.size(0), -1), x.reshape(-1, x.size(2)), x[:, : x.size(0)]),
        (noise(2, 2, 2),),
        ((noise(3, 2, 2),), (noise(2, 3, 2),), (noise(2, 2, 3),)),
    ),
    "one tensor twice": Case(lambda self, x, y: x - y * 2, (X, X), ((X, X * 3),)),
    "not contiguous": Case(lambda self, x: x.reshape(-1) * 2, (X.transpose(0, 1),), ((X,),)),
    "strides asked": Case(
        lambda self, x: x * 2 if x.is_contiguous() else x, (X.transpose(0, 1),), ((X,),)
    ),
    "with gradients": Case(lambda self, x: self.linear(x), (X.clone().requires_grad_(),)),
    "a parameter": Case(lambda self, x: self.linear(x), (nn.Parameter(X.clone()),)),
}

# --------------------------------------------------------------------------------------- states


def tie(model: Any) -> None:
    model.named["a"].weight = model.linear.weight


def share(model: Any) -> None:
    model.again = model.linear


def replace_a_forward(model: Any) -> None:
    model.linear.forward = lambda x: x * 3


def bind_a_forward(model: Any) -> None:
    model.stack.forward = types.MethodType(lambda self, x: self[0](x) * 3, model.stack)


def replace_the_forward(model: Any) -> None:
    model.forward = lambda x: model.linear(x) * 3


def configure(model: Any) -> None:
    model.config = types.SimpleNamespace(scale=2, weight=noise(5))


def linear(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)


def stack(self: Any, x: Tensor) -> Tensor:
    return self.stack(x)


def doubled(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * 2

    return wrapper


def doubled_anonymously(forward: Forward) -> Forward:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) * 2

    return wrapper


@doubled
def decorated(self: Any, x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    return self.linear(x) * x.size(1)


ROWS = (noise(8, 5), (noise(3, 5), noise(4, 5)))

STATES: dict[str, Case] = {
    "tied weights": Case(lambda self, x: self.named["a"](self.linear(x)), setup=tie),
    "shared module": Case(lambda self, x: self.again(self.linear(x)), setup=share),
    "weight_norm": Case(linear, setup=lambda m: parametrizations.weight_norm(m.linear)),
    "spectral_norm": Case(
        linear, setup=lambda m: parametrizations.spectral_norm(m.linear), train=True
    ),
    "pruned": Case(linear, setup=lambda m: prune.l1_unstructured(m.linear, "weight", 0.5)),
    "parametrized weight in a function": Case(
        lambda self, x: F.linear(x, self.linear.weight),
        setup=lambda m: parametrizations.weight_norm(m.linear),
    ),
    "hook on a layer": Case(
        linear, setup=lambda m: m.linear.register_forward_hook(lambda m, a, o: o * 2)
    ),
    "hook on a container": Case(
        stack, setup=lambda m: m.stack.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    ),
    "hook on the root": Case(
        linear, setup=lambda m: m.register_forward_hook(lambda m, a, o: {"out": o * 2})
    ),
    "pre-hook on the root": Case(
        linear, setup=lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    ),
    "pre-hook with keywords": Case(
        linear,
        setup=lambda m: m.register_forward_pre_hook(
            lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True
        ),
    ),
    "pre-hook that drops frames": Case(
        lambda self, x: sum(x[:, t] for t in range(x.size(1))),
        setup=lambda m: m.register_forward_pre_hook(lambda m, a: (a[0][:, ::2],)),
    ),
    "a layer's forward replaced": Case(linear, setup=replace_a_forward),
    "a container's forward bound anew": Case(stack, setup=bind_a_forward, frontend="?"),
    "decorated": Case(decorated),
    "decorated without wraps": Case(doubled_anonymously(linear), frontend="?"),
    "BatchNorm in training": Case(
        lambda self, x: self.norm(x), (ROWS[0],), tuple((r,) for r in ROWS[1]), train=True
    ),
    "BatchNorm twice in training": Case(
        lambda self, x: self.norm(self.norm(x)), (ROWS[0],), ((ROWS[1][0],),), train=True
    ),
    "dropout in training": Case(lambda self, x: self.dropout(x), train=True),
    "one layer in training": Case(
        lambda self, x: self.dropout(x), setup=lambda m: m.dropout.train()
    ),
    "double": Case(
        lambda self, x: self.linear(x) * torch.ones(1) + torch.zeros(x.size(1), 1),
        (X.double(),),
        ((OTHERS[0][0].double(),),),
        setup=lambda m: m.double(),
    ),
    "double inside": Case(
        lambda self, x: self.linear(x.double()).float(), setup=lambda m: m.double()
    ),
    "bfloat16": Case(
        linear, (X.bfloat16(),), ((OTHERS[0][0].bfloat16(),),), setup=lambda m: m.bfloat16()
    ),
    "frozen": Case(linear, setup=lambda m: m.requires_grad_(False)),
    "a frozen layer": Case(
        lambda self, x: self.stack(self.linear(x)),
        setup=lambda m: m.linear.requires_grad_(False),
    ),
    "no buffer": Case(
        lambda self, x: x if self.none is None else x * self.none,
        setup=lambda m: m.register_buffer("none", None),
    ),
    "a size as a tensor": Case(
        lambda self, x: x * self.n, setup=lambda m: setattr(m, "n", torch.tensor(3))
    ),
    "a numpy size": Case(
        lambda self, x: x[:, : self.n], setup=lambda m: setattr(m, "n", np.int64(3))
    ),
    "a function": Case(lambda self, x: self.act(x), setup=lambda m: setattr(m, "act", F.relu)),
    "a configuration": Case(
        lambda self, x: x * self.config.scale + self.config.weight, setup=configure
    ),
}


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
        return fxtemporal.optimize(model, case.args, dict(case.kwargs), tune="static")

    result = check(case, make)
    report = fxtemporal.report(result)
    assert case.frontend in (report.frontend, "?")
    assert (report.note is None) == (report.frontend == "fx")


def test_a_forward_that_computes_something_else_for_gradients_is_refused() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.requires_grad else x * 3

    with pytest.raises(fxtemporal.VerificationError) as raised:
        fxtemporal.optimize(Asks(), (torch.randn(2, 3),), tune="static")
    assert "reads requires_grad" in str(raised.value)
    assert "computes something else where gradients are asked for" in str(raised.value)
    assert "self.training" in str(raised.value)


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


# ------------------------------------------------------------------- what no graph can carry


def counts(self: Any, x: Tensor) -> Tensor:
    self.counter += 1
    return x * self.counter


def keeps_a_history(self: Any, x: Tensor) -> Tensor:
    self.constants.append(x)
    return x * len(self.constants)


def keeps_the_last(self: Any, x: Tensor) -> Tensor:
    last = getattr(self, "last", x)
    self.last = x * 2
    return self.last + last


def keeps_what_nobody_reads(self: Any, x: Tensor) -> Tensor:
    self.last = (x * 2).detach()
    return x * 2


def replaces_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.table = self.table + 1
    return x + self.table[0]


def adds_to_a_constant(self: Any, x: Tensor) -> Tensor:
    self.constant.add_(1)
    return x + self.constant


def draws_with_a_generator(self: Any, x: Tensor) -> Tensor:
    return x + torch.randn(5, generator=torch.Generator().manual_seed(0))


STATEFUL: dict[str, Forward] = {
    "a number": counts,
    "a list": keeps_a_history,
    "a tensor": keeps_the_last,
    "a tensor that nobody reads": keeps_what_nobody_reads,
    "another buffer": replaces_a_buffer,
    "a plain tensor": adds_to_a_constant,
    "a generator": draws_with_a_generator,
}


def named(forwards: dict[str, Forward]) -> list[Any]:
    return [pytest.param(forward, id=name) for name, forward in forwards.items()]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("forward", named(STATEFUL))
def test_state_in_python_is_refused_or_right_at_every_call(forward: Forward, verify: bool) -> None:
    case = Case(forward)
    model, reference = case.build(), case.build()
    before, values = snapshot(model), numbers(model)
    try:
        result = fxtemporal.optimize(model, (X,), tune="static", verify=verify)
    except (CaptureError, VerificationError):
        result = None
    assert snapshot(model) == before
    assert_same(numbers(model), values)
    for _ in range(3 if result is not None else 0):
        assert_same(call(result, (X,), {}), call(reference, (X,), {}))


RANDOM_ELSEWHERE: dict[str, Forward] = {
    "random": lambda self, x: x * random.random(),
    "numpy": lambda self, x: x * float(np.random.rand()),
    "a depth by chance": lambda self, x: x if random.random() < 0.5 else x * 2,
    "a layer by choice": lambda self, x: random.choice((torch.sin, torch.cos))(x),
    "frames in an order": lambda self, x: torch.stack(
        [x[t] for t in np.random.permutation(len(x))]
    ),
}
SEEDING: dict[str, Forward] = {
    "manual_seed": lambda self, x: (torch.manual_seed(3), x + torch.rand(1))[1],
    "seed": lambda self, x: (torch.seed(), x + torch.rand(1))[1],
    "set_rng_state": lambda self, x: (
        torch.set_rng_state(torch.get_rng_state()),
        x + torch.rand(1),
    )[1],
    "torch.random": lambda self, x: (torch.random.manual_seed(3), x + torch.rand(1))[1],
}


@pytest.mark.parametrize("forward", named(RANDOM_ELSEWHERE))
def test_random_numbers_of_python_and_numpy_are_not_frozen(forward: Forward) -> None:
    with pytest.raises(CaptureError, match="the forward draws from"):
        fxtemporal.optimize(Case(forward).build(), (X,), tune="static")


@pytest.mark.parametrize("example", [(X,), None], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("forward", named(SEEDING))
def test_a_seed_in_the_forward_is_not_left_out(forward: Forward, example: Any) -> None:
    with pytest.raises(CaptureError, match="the forward seeds"):
        fxtemporal.optimize(Case(forward).build(), example, tune="static")


def test_hooks_run_once_at_every_call_and_never_during_optimize() -> None:
    calls: list[str] = []
    model = Case(stack).build()
    model.register_forward_pre_hook(lambda m, a: calls.append("root before"))
    model.stack.register_forward_hook(lambda m, a, o: calls.append("stack"))
    model.stack[0].register_forward_pre_hook(lambda m, a: calls.append("layer"))
    model.register_forward_hook(lambda m, a, o: calls.append("root after"))
    result = fxtemporal.optimize(model, (X,), tune="static", verify=False)
    calls.clear()
    result(X)
    result(X)
    assert calls == ["root before", "layer", "stack", "root after"] * 2


def test_hooks_added_to_the_result_stay_with_the_result() -> None:
    model = Case(linear).build()
    result = fxtemporal.optimize(model, (X,), tune="static")
    result.register_forward_hook(lambda m, a, o: o * 2)
    torch.testing.assert_close(result(X), model(X) * 2)
    assert not model._forward_hooks


def test_backward_hooks_see_the_same_gradients() -> None:
    seen: dict[str, list[Tensor]] = {"model": [], "result": []}
    model = Case(linear).build()
    log = "model"

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        seen[log].append(grad_output[0])

    model.linear.register_full_backward_hook(hook)
    result = fxtemporal.optimize(model, (X,), tune="static")
    model(X.clone().requires_grad_()).square().sum().backward()
    log = "result"
    result(X.clone().requires_grad_()).square().sum().backward()
    assert len(seen["model"]) == 1
    assert_same(seen["result"], seen["model"])


def test_a_forward_that_closes_over_the_model_is_refused_or_follows_its_weights() -> None:
    case = Case(linear, setup=replace_the_forward, frontend="?")
    try:
        check(case, lambda model: fxtemporal.optimize(model, (X,), tune="static"))
    except CaptureError as error:
        assert "does not reach through self" in str(error)  # noqa: PT017


# --------------------------------------------------------------------------- modes and names


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.dropout(self.linear(x), 0.5, self.training),
        lambda self, x: self.linear(x) * 2 if self.training else x,
        lambda self, x: self.norm(x.transpose(1, 2)) * (1 + self.norm.training),
    ],
)
def test_a_mode_that_the_forward_reads_is_not_frozen_silently(
    forward: Forward, training: bool
) -> None:
    case = Case(forward, train=training)
    model, reference = case.build(), case.build()
    result = fxtemporal.optimize(model, (X,), tune="static")
    try:
        result.train(not training)
        actual = call(result, (X,), {})[0]
    except (SpecializationError, FxTemporalError):
        return
    assert_same(actual, call(reference.train(not training), (X,), {})[0])


def _evaluates_first(self: Any, x: Tensor) -> Tensor:
    self.norm.eval()
    return self.norm(x.transpose(1, 2))


def _drops_always(self: Any, x: Tensor) -> Tensor:
    self.dropout.train()
    return self.dropout(self.linear(x))


def _evaluates_late(self: Any, x: Tensor) -> Tensor:
    before = self.norm(x.transpose(1, 2))
    self.norm.eval()
    return before + self.norm(x.transpose(1, 2))


def _sets_and_reads(self: Any, x: Tensor) -> Tensor:
    self.norm.eval()
    return self.norm(x.transpose(1, 2)) * (2 if self.norm.training else 1)


def _puts_back(self: Any, x: Tensor) -> Tensor:
    was = self.norm.training
    self.norm.eval()
    before = self.norm(x.transpose(1, 2))
    self.norm.train(was)
    return self.norm(before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("forward", "refuses"),
    [
        (_evaluates_first, False),
        (_drops_always, False),
        (_evaluates_late, True),
        (_sets_and_reads, False),
        (_puts_back, True),
    ],
)
def test_a_mode_that_the_forward_sets_is_set(
    forward: Forward, refuses: bool, training: bool
) -> None:
    case = Case(forward, train=training)
    model, reference = case.build(), case.build()
    result = fxtemporal.optimize(model, (X,), tune="static")
    assert_same(call(result, (X,), {})[0], call(reference, (X,), {})[0])
    refused = 0
    for mode in (not training, training, True):
        try:
            actual = call(result.train(mode), (X,), {})[0]
        except SpecializationError:
            refused += 1
            reference.train(training)
        else:
            assert_same(actual, call(reference.train(mode), (X,), {})[0])
    assert refuses or not refused


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


class OwnCall(Layers):
    """What a call gives is not what forward gives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


@pytest.mark.parametrize("verify", [True, False])
def test_a_class_with_a_call_of_its_own(verify: bool) -> None:
    model = OwnCall()
    result = fxtemporal.optimize(model, (X,), tune="static", verify=verify)
    for args in OTHERS:
        assert_same(result(*args), model(*args))


def test_a_tensor_as_default() -> None:
    def with_tensor(self: Any, x: Tensor, y: Tensor = noise(5)) -> Tensor:  # noqa: B008
        return x * y

    check(Case(with_tensor), lambda model: fxtemporal.optimize(model, (X,), tune="static"))


def keeps_layers_to_itself(model: Any) -> None:
    torch.manual_seed(1)
    model.hidden = [nn.Linear(5, 5)]


def test_a_layer_that_is_not_registered_is_refused_or_not_frozen() -> None:
    case = Case(lambda self, x: self.hidden[0](x), setup=keeps_layers_to_itself)
    model = case.build()
    try:
        result = fxtemporal.optimize(model, (X,), tune="static")
    except CaptureError:
        return
    assert_same(result(X), model(X))
    with torch.no_grad():
        model.hidden[0].weight.add_(1)
    assert_same(result(X), model(X))


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
        result = fxtemporal.optimize(model, (x,), tune="static", verify=verify)
    except FxTemporalError:
        return
    for _ in range(3):
        assert_same(result(x), model(x))


def keeps_a_norm_to_itself(model: Any) -> None:
    model.hidden = [nn.BatchNorm1d(4)]


@pytest.mark.parametrize("verify", [True, False])
def test_a_norm_that_is_not_registered_counts_once_a_call(verify: bool) -> None:
    case = Case(lambda self, x: self.hidden[0](x), setup=keeps_a_norm_to_itself, train=True)
    model, reference = case.build(), case.build()
    result = fxtemporal.optimize(model, (X,), tune="static", verify=verify)
    assert_same(dict(model.hidden[0].named_buffers()), dict(reference.hidden[0].named_buffers()))
    for _ in range(2):
        assert_same(result(X), reference(X))
    assert_same(dict(model.hidden[0].named_buffers()), dict(reference.hidden[0].named_buffers()))


def test_the_mode_of_a_part_is_held_at_every_call() -> None:
    case = Case(lambda self, x: F.dropout(x, 0.5, self.norm.training))
    result = fxtemporal.optimize(case.build().eval(), (X,), tune="static")
    assert any(
        "norm.training == False" in str(s) for s in fxtemporal.report(result).specializations
    )
    result.norm.train()
    with pytest.raises(SpecializationError, match=r"eval mode.*norm\.training"):
        result(X)


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


# -------------------------------------------------------------------------------- hard models


@pytest.mark.parametrize("cls", CAPTURE, ids=lambda cls: cls.__name__)
def test_models_that_are_hard_to_capture(cls: Any) -> None:
    model = cls.build()
    example = model.example(*cls.sizes[0])
    if cls.__name__ == "DataDependentBranch":
        with pytest.raises(CaptureError, match=r"hard_to_capture\.py:\d+"):
            fxtemporal.optimize(model, example, tune="static")
        return
    result = fxtemporal.optimize(model, example, tune="static")
    for batch, frames in cls.sizes:
        inputs = model.example(batch, frames)
        try:
            actual = result(*clone(inputs))
        except SpecializationError:
            assert frames != cls.sizes[0][1]
        else:
            assert_same(actual, model(*clone(inputs)))


def test_gradients_stop_where_the_model_stops_them() -> None:
    case = Case(without_gradients)
    model = case.build()
    result = fxtemporal.optimize(model, (X,), tune="static")
    model(X).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    result(X).sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(actual) == set(expected) == {"named.a.weight", "named.a.bias"}
    assert_same(actual, expected)


def retains_a_gradient(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    if y.requires_grad:
        y = y * 2
    return y


def asks_for_grad_mode(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * (2 if torch.is_grad_enabled() else 3)


@pytest.mark.parametrize("forward", [retains_a_gradient, asks_for_grad_mode])
@pytest.mark.parametrize("verify", [True, False])
def test_a_branch_on_gradients_is_right_with_and_without_them(
    forward: Forward, verify: bool
) -> None:
    model = Case(forward).build()
    try:
        result = fxtemporal.optimize(model, (X,), tune="static", verify=verify)
    except (CaptureError, VerificationError):
        return
    ran = 0
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            try:
                actual = result(X)
            except SpecializationError:
                continue
            ran += 1
            assert_same(actual, model(X))
    assert ran


# -------------------------------------------------------------------------------------- errors


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
        "MapsIntoLSTM": ("'lstm'", ("flatten(2)", "mean((-2, -1))")),
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
    assert f"test_capture.py:{line}" in message
    assert "tracer stopped at" in message
    assert "torch.export" in message


DATA_DEPENDENT: dict[str, Forward] = {
    "boolean mask": lambda self, x: x[x > 0],
    "nonzero": lambda self, x: x.nonzero(),
    "item": lambda self, x: x * x.sum().item(),
}


@pytest.mark.parametrize("forward", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT.keys())
def test_sizes_that_depend_on_data_stay_free(forward: Forward) -> None:
    case = Case(forward, others=OTHERS[:1])
    result = fxtemporal.optimize(case.build(), (X,), tune="static")
    assert_same(call(result, OTHERS[0], {}), call(case.build(), OTHERS[0], {}))


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


def test_bind_example_leaves_defaults_out() -> None:
    model = Case(with_default).build()
    assert list(bind_example(model, (X,), {})) == ["x"]
    assert list(bind_example(model, (X,), {"s": 3.0})) == ["x", "s"]


# ------------------------------------------------------------------------------- graph modules


class Plain(nn.Module):
    """What torch.fx traces by itself; with a constant, a buffer and a layer it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        self.norm = nn.BatchNorm3d(4)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", noise(4, 1, 1, 1, seed=2))
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.norm(self.conv(x)) * self.scale + self.shift
        return {"out": out, "mean": out.mean((2, 3, 4))}


CLIP = noise(2, 3, 4, 6, 6)
CLIPS = (noise(3, 3, 4, 6, 6), noise(1, 3, 7, 6, 5))


@pytest.mark.parametrize("example", [(CLIP,), None])
def test_a_graph_module_is_taken_as_it_is(example: Any) -> None:
    given = fx.symbolic_trace(Plain().eval())
    code, nodes, before = given.code, list(given.graph.nodes), snapshot(given)
    result = fxtemporal.optimize(given, example, passes=["conv3d-forms"], tune="static")
    assert (given.code, list(given.graph.nodes), snapshot(given)) == (code, nodes, before)
    report = fxtemporal.report(result)
    assert report.frontend == "given"
    assert [remark.status for remark in report.remarks] == ["applied"]
    for clip in (CLIP, *CLIPS):
        assert_same(result(clip), given(clip))
    assert list(result.state_dict()) == list(given.state_dict())
    assert all("val" in n.meta for n in result.graph.nodes if n.op != "output") == bool(example)


def test_meta_of_a_given_graph_is_not_touched() -> None:
    given = fx.symbolic_trace(Plain().eval())
    for node in given.graph.nodes:
        node.meta["val"] = node.meta["mine"] = "theirs"
    given.meta["kept"] = 1
    result = fxtemporal.optimize(given, (CLIP,), tune="static")
    assert all(node.meta["val"] == "theirs" for node in given.graph.nodes)
    assert "fxtemporal" not in given.meta
    assert_same(result(CLIP), given(CLIP))


def test_wrong_inputs_of_a_graph_module_are_named_with_the_node() -> None:
    given = fx.symbolic_trace(Plain().eval())
    with pytest.raises(CaptureError, match="conv"):
        fxtemporal.optimize(given, (noise(2, 4, 4, 6, 6),))
    with pytest.raises(CaptureError, match="do not fit"):
        fxtemporal.optimize(given, (CLIP, CLIP, CLIP))


def test_a_graph_module_made_by_hand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.get_attr("w")
    y = graph.call_function(F.conv3d, (x, w), {"padding": (1, 0, 0)})
    y = graph.call_function(operator.add, (y, 1))
    graph.output((y, [x, {"k": y}]))
    root = nn.Module()
    root.w = nn.Parameter(noise(4, 3, 3, 1, 1))
    given = fx.GraphModule(root, graph)
    result = fxtemporal.optimize(given, (CLIP,), tune="static")
    assert fxtemporal.report(result).by_status("applied")
    for clip in (CLIP, *CLIPS):
        assert_same(result(clip), given(clip))


def test_an_optimized_module_is_optimized_again_without_change() -> None:
    once = fxtemporal.optimize(Plain().eval(), (CLIP,), tune="static")
    twice = fxtemporal.optimize(once, (CLIP,), tune="static")
    assert not fxtemporal.report(twice).by_status("applied")
    assert fxtemporal.report(twice).specializations == fxtemporal.report(once).specializations
    for clip in (CLIP, *CLIPS):
        assert_same(twice(clip), once(clip))


# ----------------------------------------------------------------------------- ExportedProgram


def exported(model: nn.Module, args: tuple[Any, ...], **more: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model, args, strict=False, **more)


@pytest.mark.parametrize("example", [(CLIP,), None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program(dynamic: bool, example: Any) -> None:
    model = Plain().eval()
    shapes = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}} if dynamic else None
    program = exported(model, (CLIP,), dynamic_shapes=shapes)
    text = str(program.graph)
    state = {name: value.detach().clone() for name, value in program.state_dict.items()}
    result = fxtemporal.optimize(program, example, passes=["conv3d-forms"], tune="static")
    assert str(program.graph) == text
    assert_same({name: value.detach().clone() for name, value in program.state_dict.items()}, state)
    assert [r.status for r in fxtemporal.report(result).remarks] == ["applied"]
    assert_same(result(CLIP), model(CLIP))
    for clip in CLIPS:
        if dynamic:
            assert_same(result(clip), model(clip))
        else:
            with pytest.raises(SpecializationError, match=r"x\.size\(0\) == 2"):
                result(clip)


def test_an_exported_program_says_what_it_was_exported_for() -> None:
    program = exported(Plain().eval(), (CLIP,))
    fixed = {str(s.expression): s.value for s in fxtemporal.audit(program).specializations}
    sizes = {f"x.size({dim})": size for dim, size in enumerate(CLIP.shape)}
    assert sizes.items() <= fixed.items()


def test_an_exported_program_with_nested_inputs_and_keywords() -> None:
    model = NestedInputs.build()
    program = exported(model, model.example(2, 4))
    result = fxtemporal.optimize(program, tune="static")
    assert_same(result(*model.example(2, 4)), model(*model.example(2, 4)))
    keyword = Case(keyword_only).build()
    program = exported(keyword, (X,), kwargs={"mask": X > 0})
    result = fxtemporal.optimize(program, (X,), {"mask": X > 0}, tune="static")
    assert_same(result(X, mask=X > 1), keyword(X, mask=X > 1))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own
def test_an_exported_program_after_decompositions() -> None:
    model = Plain().eval()
    program = exported(model, (CLIP,)).run_decompositions()
    result = fxtemporal.optimize(program, tune="static")
    assert_same(result(CLIP), model(CLIP))


def test_an_exported_program_in_training_moves_its_buffers_as_the_model_does() -> None:
    model = Plain().train()
    program = exported(copy.deepcopy(model), (CLIP,))
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    result = fxtemporal.optimize(program, tune="static")
    assert_same(dict(program.named_buffers()), before)
    assert_same(result(CLIP), model(CLIP))
    assert_same(result.norm.running_mean, model.norm.running_mean)
    assert_same(result.norm.num_batches_tracked, model.norm.num_batches_tracked)


def test_wrong_inputs_of_an_exported_program() -> None:
    program = exported(Plain().eval(), (CLIP,))
    with pytest.raises(FxTemporalError):
        fxtemporal.optimize(program, (CLIPS[0],), tune="static")


@pytest.mark.parametrize("forward", EXPORTED.values())
def test_what_the_exporter_captured_keeps_names_and_parameters(forward: Forward) -> None:
    model = Case(forward).build()
    program = capture(model, (X,))
    assert program.frontend == "export"
    assert program.note
    parameters = dict(program.gm.named_parameters())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert program.gm.state_dict().keys() == model.state_dict().keys()
    assert all(m.training == model.training for m in program.gm.modules())


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
