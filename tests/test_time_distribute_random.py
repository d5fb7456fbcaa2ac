"""Random loops compute the same when they are re-rolled, or say why they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxtemporal.ir.ops import Trait, ops_with
from tests.rerolling import differs, optimized, remarks
from tests.zoo import noise

pytestmark = pytest.mark.usefixtures("in_float64")


@dataclass(frozen=True)
class Spec:
    """A random loop. ``ops`` are pairs (name, dimension); an op that does not fit is dropped."""

    source: str
    ops: tuple[tuple[str, int], ...]
    lane_by_lane: bool
    join: str
    dim: int
    elsewhere: tuple[tuple[int, int], ...]
    kept: int | None
    batch: int
    length: int
    sizes: tuple[int, ...]

    def example(self, batch: int, length: int) -> tuple[Tensor]:
        time = {"deep": 2, "time_major": 0}.get(self.source, 1)
        shape = [batch, *self.sizes]
        shape.insert(time, length)
        return (noise(*shape, seed=batch * 10 + length),)


class Lap:
    """What an op of a random loop may ask for: frame ``t`` at stage ``k`` of one call.

    ``built`` holds the parameters and the numbers that the first call, on real tensors, makes.
    """

    def __init__(self, model: RandomLoop, x: Tensor) -> None:
        self.model, self.x = model, x
        self.values: dict[tuple[int, int], Tensor] = {}
        batched = 1 if model.spec.source == "time_major" else 0
        self.batch = x.size(batched)
        self.mean = x.mean(1 - batched)

    def parameter(self, name: str, *shape: Any) -> Tensor:
        name = f"{name}_{self.k}"
        if self.model.building and not hasattr(self.model, name):
            setattr(self.model, name, nn.Parameter(noise(*shape, seed=self.k)))
        return getattr(self.model, name)

    def number(self, value: Callable[[], int]) -> int:
        if self.model.building:
            self.model.numbers[self.k] = value()
        return self.model.numbers[self.k]

    def at(self, k: int, t: int, otherwise: Tensor) -> Tensor:
        return self.values.get((k, t), otherwise)

    def apply(self, name: str, dim: int, k: int, t: int) -> Tensor:
        self.k, self.t = k, t
        y = self.values[k - 1, t]
        return OPS[name](self, y, min(dim, max(y.dim() - 1, 0)))


def _added(lap: Lap, y: Tensor, d: int) -> Tensor:
    y += 1
    return y


def _scaled(lap: Lap, y: Tensor, d: int) -> Tensor:
    y *= lap.mean
    return y


def _residual_write(lap: Lap, y: Tensor, d: int) -> Tensor:
    y += lap.at(lap.k - 2, lap.t, y)
    return y


def _accumulated(lap: Lap, y: Tensor, d: int) -> Tensor:
    total = torch.zeros(y.size(0), *[1] * (y.dim() - 1)).expand(y.shape).clone()
    total += y
    return total


def _zeros_written(lap: Lap, y: Tensor, d: int) -> Tensor:
    total = torch.zeros(y.shape[0], y.shape[-1])
    total += y.reshape(y.size(0), -1, y.size(-1)).sum(1)
    return total


def _twice(lap: Lap, y: Tensor, d: int) -> Tensor:
    a, b = torch.sin(y), torch.sin(y)
    a = a.mul_(2)
    return a - b


def _gated(lap: Lap, y: Tensor, d: int) -> Tensor:
    a, b = y.chunk(2, d)
    return a * b


def _slice_written(lap: Lap, y: Tensor, d: int) -> Tensor:
    y = torch.sin(y)
    y[:, :1].mul_(2)
    return y


def _gru(lap: Lap, y: Tensor, d: int) -> Tensor:
    width = lap.number(lambda: y.shape[-1])
    weights = [lap.parameter("ih", 6, width), lap.parameter("hh", 6, 2)]
    state = torch.zeros(1, lap.batch, 2)
    return torch.gru(y, state, weights, False, 1, 0.0, False, False, True)[d % 2]


def _masked(lap: Lap, y: Tensor, d: int) -> Tensor:
    mask = lap.parameter("mask", y.shape[0] if d else 1, y.shape[1], y.shape[1])
    return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)


def _ones(y: Tensor) -> list[int]:
    return [1] * (y.dim() - 1)


OPS: dict[str, Callable[[Lap, Tensor, int], Tensor]] = {
    "tanh": lambda lap, y, d: y.tanh(),
    "relu": lambda lap, y, d: torch.relu(y),
    "relu_": lambda lap, y, d: F.relu_(y),
    "add_": _added,
    "mul_": _scaled,
    "residual_": _residual_write,
    "buffer_": _accumulated,
    "zeros_": _zeros_written,
    "twice_": _twice,
    "slice_": _slice_written,
    "conv": lambda lap, y, d: F.conv2d(y, lap.parameter("w", 3, y.shape[1], 3, 3), padding=1),
    "linear": lambda lap, y, d: F.linear(y, lap.parameter("w", 3, y.shape[-1])),
    "bias": lambda lap, y, d: y + lap.parameter("b", y.shape[-1]),
    "channels": lambda lap, y, d: y + lap.parameter("b", y.shape[1], *_ones(y)[1:]),
    "samples": lambda lap, y, d: y * lap.parameter("b", y.shape[0], *_ones(y)),
    "spread": lambda lap, y, d: y * lap.parameter("b", 2, 1, *_ones(y)),
    "as_long": lambda lap, y, d: y * lap.parameter("b", lap.model.spec.length, *_ones(y)),
    "context": lambda lap, y, d: y + lap.mean,
    "position": lambda lap, y, d: y + lap.parameter("p", 8, y.shape[-1])[lap.t],
    "weigh": lambda lap, y, d: y * lap.parameter("p", 8)[lap.t],
    "index": lambda lap, y, d: y * (lap.t + 1),
    "flatten": lambda lap, y, d: y.flatten(1),
    "view_batch": lambda lap, y, d: y.reshape(lap.batch, -1),
    "view_own": lambda lap, y, d: y.reshape(y.size(0), -1),
    "view_input": lambda lap, y, d: y.reshape(lap.x.size(0), -1),
    "view_two": lambda lap, y, d: y.reshape(y.shape[0], y.shape[1], -1),
    "view_rest": lambda lap, y, d: y.reshape(-1, lap.number(lambda: y[0].numel())),
    "view_literal": lambda lap, y, d: y.reshape(lap.number(lambda: y.shape[0]), -1),
    "view_merged": lambda lap, y, d: y.reshape(-1, lap.number(lambda: y.shape[-1])),
    "permute": lambda lap, y, d: y.permute(0, *reversed(range(1, y.dim()))),
    "transpose": lambda lap, y, d: y.transpose(d, (d + 1) % max(y.dim(), 1)),
    "unsqueeze": lambda lap, y, d: y.unsqueeze(d),
    "squeeze": lambda lap, y, d: y.squeeze(d),
    "mean": lambda lap, y, d: y.mean(d),
    "mean_kept": lambda lap, y, d: y.mean(d, keepdim=True),
    "sum": lambda lap, y, d: y.sum(),
    "amax": lambda lap, y, d: y.amax((d, -1) if d + 1 < y.dim() else d),
    "softmax": lambda lap, y, d: y.softmax(d),
    "cumsum": lambda lap, y, d: y.cumsum(d),
    "maximum": lambda lap, y, d: y.max(d).values,
    "argmax": lambda lap, y, d: y.max(d)[1].to(y.dtype),
    "gated": _gated,
    "half": lambda lap, y, d: y.chunk(2, d)[0],
    "select": lambda lap, y, d: y.select(d, -1),
    "every_second": lambda lap, y, d: y[:, ::2],
    "listed": lambda lap, y, d: y[:, [0, 0, -1]],
    "apart": lambda lap, y, d: y[:, [0, 0], :, [0, -1]],
    "flip": lambda lap, y, d: y.flip(d),
    "cat": lambda lap, y, d: torch.cat([y, y * 2], d),
    "stack": lambda lap, y, d: torch.stack([y, y + 1], d),
    "cat_context": lambda lap, y, d: torch.cat([y, lap.mean], d),
    "matmul": lambda lap, y, d: y @ lap.parameter("w", y.shape[-1], 3),
    "matmul_many": lambda lap, y, d: y @ lap.parameter("w", d + 1, y.shape[-1], 3),
    "matmul_left": lambda lap, y, d: lap.parameter("w", d + 1, 3, y.shape[-2]) @ y,
    "gram": lambda lap, y, d: y @ y.transpose(-1, -2),
    "einsum": lambda lap, y, d: torch.einsum("bij,jk->bik", y, lap.parameter("w", y.shape[-1], 2)),
    "layer_norm": lambda lap, y, d: F.layer_norm(y, (lap.number(lambda: y.shape[-1]),)),
    "group_norm": lambda lap, y, d: F.group_norm(y, 1),
    "pad": lambda lap, y, d: F.pad(y, (1, 0)),
    "pool": lambda lap, y, d: F.max_pool2d(y, 2),
    "adaptive": lambda lap, y, d: F.adaptive_avg_pool2d(y, 1),
    "interpolate": lambda lap, y, d: F.interpolate(y, scale_factor=2),
    "where": lambda lap, y, d: torch.where(y > 0, y, lap.parameter("b", y.shape[-1])),
    "expand": lambda lap, y, d: y.unsqueeze(1).expand(y.size(0), 2, *[-1] * (y.dim() - 1)),
    "repeat": lambda lap, y, d: y.repeat(*[2 if i == d else 1 for i in range(y.dim())]),
    "contiguous": lambda lap, y, d: y.contiguous(),
    "clone": lambda lap, y, d: y.clone(),
    "dropout": lambda lap, y, d: F.dropout(y, training=False),
    "by_size": lambda lap, y, d: y / y.size(0) + y.shape[-1],
    "zeros": lambda lap, y, d: y + torch.zeros(y.size(0), *_ones(y)),
    "rearrange": lambda lap, y, d: einops.rearrange(y, "b c h w -> b (h w) c"),
    "residual": lambda lap, y, d: y + lap.at(lap.k - 2, lap.t, y),
    "previous": lambda lap, y, d: y - lap.at(lap.k - 1, lap.t - 1, y),
    "following": lambda lap, y, d: y - lap.at(lap.k - 1, lap.t + 1, y),
    "cat_previous": lambda lap, y, d: torch.cat([y, lap.at(lap.k - 1, lap.t - 1, y)], d),
    "state": lambda lap, y, d: y + lap.at(lap.k, lap.t - 1, y),
    "previous_frame": lambda lap, y, d: y + lap.at(-1, lap.t - 1, y),
    "gru": _gru,
    "attention": lambda lap, y, d: F.scaled_dot_product_attention(y, y, y),
    "masked": _masked,
}

SOURCES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "index": lambda x: [x[:, t] for t in range(x.size(1))],
    "select": lambda x: [x.select(1, t) for t in range(x.size(1))],
    "unbind": lambda x: list(x.unbind(1)),
    "split": lambda x: [part.squeeze(1) for part in x.split(1, 1)],
    "kept": lambda x: [x[:, t : t + 1] for t in range(x.size(1))],
    "negative": lambda x: [x[:, t] for t in (-2, -1)],
    "last_two": lambda x: [x.unbind(1)[-1], x.unbind(1)[-2]],
    "reversed": lambda x: [x[:, t] for t in reversed(range(x.size(1)))],
    "second": lambda x: [x[:, t] for t in range(0, x.size(1), 2)],
    "constant": lambda x: [x[:, t] for t in range(2)],
    "time_major": lambda x: [x[t] for t in range(x.size(0))],
    "transposed": lambda x: [x.transpose(0, 1)[t] for t in range(x.size(1))],
    "deep": lambda x: [x[:, :, t] for t in range(x.size(2))],
    "windows": lambda x: [x[:, t : t + 2] for t in range(x.size(1) - 1)],
    "windows_apart": lambda x: [x[:, t : t + 2] for t in range(0, x.size(1), 2)],
    "scaled": lambda x: list((x * 2).unbind(1)),
    "halves": lambda x: list(x.chunk(2, 1)),
}


def _stack_written(y: list[Tensor], d: int) -> Any:
    joined = torch.stack(y, d)
    joined += 1
    return joined, y[0]


def _looped_again(y: list[Tensor], d: int) -> Any:
    joined = torch.stack(y, 0).tanh()
    return torch.stack([torch.exp(joined[t]) for t in range(len(y))])


JOINS: dict[str, Callable[[list[Tensor], int], Any]] = {
    "stack": torch.stack,
    "cat": lambda y, d: torch.cat(y, min(d, y[0].dim() - 1)),
    "list": lambda y, d: y,
    "sum": lambda y, d: sum(y),
    "last": lambda y, d: y[-1],
    "backwards": lambda y, d: torch.stack(y[::-1], d),
    "some": lambda y, d: torch.stack(y[::2], d),
    "relu_": lambda y, d: torch.stack(y, d).relu_(),
    "add_": _stack_written,
    "again": _looped_again,
    "unequal": lambda y, d: [torch.sin(y[0]), *y[1:]],
}


MOVING = frozenset(
    """
        apart cat cat_context cat_previous clone contiguous dropout every_second expand flatten half
        listed pad permute rearrange repeat select squeeze stack transpose unsqueeze view_batch
        view_input view_literal view_merged view_own view_rest view_two
    """.split()
)
"""Ops that only move data: a loop of nothing else has no computation to share."""


class RandomLoop(nn.Module):
    """The loop that ``spec`` says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.ops: tuple[tuple[str, int], ...] = ()
        self.numbers: dict[int, int] = {}
        self.building = True
        for entry in spec.ops:
            before = self.ops
            self.ops = (*before, entry)
            if not self.runs():
                self.ops = before
        self.building = False
        self.eval()

    def runs(self) -> bool:
        try:
            with torch.no_grad():
                self(*self.spec.example(self.spec.batch, self.spec.length))
        except (RuntimeError, IndexError, ValueError, TypeError, einops.EinopsError):
            return False
        return True

    def forward(self, x: Tensor) -> Any:
        spec, lap = self.spec, Lap(self, x)
        taken = SOURCES[spec.source](x)
        lap.values |= {(-1, t): frame for t, frame in enumerate(taken)}
        stages, lanes = range(len(self.ops)), range(len(taken))
        order = [(k, t) for k in stages for t in lanes]
        if spec.lane_by_lane:
            order = [(k, t) for t in lanes for k in stages]
        for k, t in order:
            lap.values[k, t] = lap.apply(*self.ops[k], k, t)
        last = len(self.ops) - 1
        outs = [lap.values[last, t] for t in lanes]
        result = [JOINS[spec.join](outs, min(spec.dim, outs[0].dim()))]
        result += [lap.values[place] * 3 for place in spec.elsewhere if place in lap.values]
        if spec.kept is not None and spec.kept <= last:
            result += [lap.values[spec.kept, t] for t in lanes]
        return result


def specs() -> st.SearchStrategy[Spec]:
    side = st.sampled_from([2, 3, 4])
    sizes = st.one_of(
        st.tuples(st.integers(1, 4), side, side), st.tuples(side, side), st.tuples(side)
    )
    return st.builds(
        Spec,
        source=st.sampled_from(sorted(SOURCES)),
        ops=st.lists(
            st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 3)), min_size=1, max_size=6
        ).map(tuple),
        lane_by_lane=st.booleans(),
        join=st.sampled_from(sorted(JOINS)),
        dim=st.integers(0, 2),
        elsewhere=st.lists(
            st.tuples(st.integers(-1, 4), st.integers(0, 3)), max_size=2, unique=True
        ).map(tuple),
        kept=st.none() | st.integers(0, 4),
        batch=st.integers(1, 4),
        length=st.integers(2, 4),
        sizes=sizes,
    )


def works(node: fx.Node) -> bool:
    """Whether ``node`` does more than to move data or to ask for a size."""
    name = str(getattr(node.target, "__name__", node.target))
    asks = "dimensions guard getattr length size getitem".split()
    return (
        bool(node.users)
        and node.op.startswith("call")
        and name not in {*ops_with(Trait.MOVES), *asks}
    )


def problems(spec: Spec) -> list[str]:
    """Everything that is wrong with what becomes of a random loop."""
    model = RandomLoop(spec)
    if not model.ops or not model.runs():
        return []
    try:
        fast = optimized(model, spec.example(spec.batch, spec.length))
    except Exception as error:
        return [f"optimize raised {type(error).__name__}: {error}"]
    found = [f"failed: {r.reasons}" for r in remarks(fast) if r.status == "failed"]
    found += [f"no reason: {r}" for r in remarks(fast) if r.status == "missed" and not r.reasons]
    taken = SOURCES[spec.source](*spec.example(spec.batch, spec.length))
    if len(taken) > 1 and len({frame.shape for frame in taken}) == 1:
        alone = len(spec.elsewhere) + (spec.join == "unequal")  # what is done to single lanes
        alone += len(model.ops) if spec.join == "last" else 0  # the others are never computed
        listed = spec.join in ("last", "list", "unequal")
        idle = listed and sum(map(works, fast.graph.nodes)) <= alone
        alike = [name for name, _ in model.ops]
        if len(taken) == 2 and "cat_previous" in alike:  # from there on one of two holds both
            alike = alike[: alike.index("cat_previous")]
        idle |= all(name in MOVING for name in alike)
        found += [] if remarks(fast) or idle else ["no remark"]
    for size in dict.fromkeys(
        ((spec.batch, spec.length), (1, spec.length), (3, spec.length), (2, spec.length))
    ):
        free = size[0] != spec.batch and _fixes_its_batch(model)
        found += [
            f"{size}: {text}" for text in [differs(model, fast, spec.example(*size), free)] if text
        ]
    for length in (spec.length + 1, spec.length - 1):
        text = differs(model, fast, spec.example(spec.batch, length), free=True)
        found += [f"{length} frames: {text}"] if text else []
    return found


def _fixes_its_batch(model: RandomLoop) -> bool:
    """Whether it asks for the rank of what squeeze() gave, which depends on the batch."""
    return any(name == "squeeze" for name, _ in model.ops)


def random_loops(examples: int) -> Callable[[Callable[[Spec], None]], Callable[[], None]]:
    def decorate(test: Callable[[Spec], None]) -> Callable[[], None]:
        profile = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return profile(hypothesis.given(specs())(test))

    return decorate


@random_loops(60)
def test_random_loops_compute_the_same_or_say_why_they_stay(spec: Spec) -> None:
    assert problems(spec) == []


@pytest.mark.long
@random_loops(2000)
def test_two_thousand_random_loops_compute_the_same(spec: Spec) -> None:
    assert problems(spec) == []
