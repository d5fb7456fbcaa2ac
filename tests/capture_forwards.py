"""Forwards of one clip, sorted by what they do: read sizes, call layers, write, draw."""

from __future__ import annotations

import collections
import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture_cases import Forward, Pair, Result

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
    "a negative base": lambda self, x: x * (-1) ** torch.arange(5) + (-0.5) ** x.abs().ceil(),
    "a negative base of a size": lambda self, x: x * (-2) ** x.size(1) + (-1.5) ** x.dim(),
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
