"""Forwards that take more than one tensor: numbers, containers, keywords, odd tensors."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor, nn

from tests.capture_cases import OTHERS, Case, Pair, Result, X
from tests.zoo import noise


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
