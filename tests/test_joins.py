"""Every way in which people put frames together again: numbers, and convolutions executed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from benchmarks.measure import CountConvolutions
from fxtemporal.analysis.accumulations import Reduction, Writes
from fxtemporal.analysis.families import families_of
from fxtemporal.capture.capture import capture
from tests.strictly import strictly
from tests.zoo import noise

FRAMES = 4
Forward = Callable[..., Any]


class Frames(nn.Module):
    """``forward`` is one of the functions below; ``self.body`` is what runs on each frame."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)
        self.run = forward

    def body(self, frame: Tensor) -> Tensor:
        return F.relu(self.conv(frame))

    def features(self, frame: Tensor) -> Tensor:
        return self.linear(self.body(frame).mean((-2, -1)))

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def clip(batch: int = 2, frames: int = FRAMES, size: int = 8) -> Tensor:
    return noise(batch, frames, 3, size, size)


def convolutions(model: nn.Module, *inputs: Any) -> int:
    with CountConvolutions() as counter, torch.no_grad():
        model(*inputs)
    return counter.count


def leaves(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def check(forward: Forward, make: Callable[[int], tuple[Any, ...]], expected: int = 1) -> Any:
    """Optimize, and compare at two batches, with float64 beside it; returns the result."""
    model = Frames(forward).eval()
    before = copy.deepcopy(model.state_dict())
    result = strictly(model, make(2), tune="static")
    assert convolutions(result, *make(2)) == expected
    for batch in (2, 3):
        inputs = make(batch)
        wide = copy.deepcopy(model).double()
        reference = wide(*torch.utils._pytree.tree_map_only(Tensor, Tensor.double, inputs))
        pairs = zip(leaves(result(*inputs)), leaves(model(*inputs)), leaves(reference), strict=True)
        for mine, own, best in pairs:
            mine, own, best = mine.detach(), own.detach(), best.detach()
            scale = float(best.abs().max()) or 1.0
            error = float((mine.double() - best).abs().max()) / scale
            assert error <= max(4 * float((own.double() - best).abs().max()) / scale, 2e-6)
    again = strictly(result, make(2), tune="static")
    assert not fxtemporal.report(again).by_status("applied")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    return result


# ------------------------------------------------------------------------------------ reductions


def running_sum(self: Any, x: Tensor) -> Tensor:
    total = 0
    for t in range(x.size(1)):
        total = total + self.body(x[:, t])
    return total


def running_sum_from_the_first(self: Any, x: Tensor) -> Tensor:
    total = self.body(x[:, 0])
    for t in range(1, x.size(1)):
        total = self.body(x[:, t]) + total
    return total / x.size(1)


def running_sum_in_place(self: Any, x: Tensor) -> Tensor:
    total = x.new_zeros(x.size(0), 4, 8, 8)
    for t in range(x.size(1)):
        total += self.body(x[:, t])
    return total


def sum_of_a_list(self: Any, x: Tensor) -> Tensor:
    outs = [self.features(frame) for frame in x.unbind(1)]
    return sum(outs) / len(outs)


def running_maximum(self: Any, x: Tensor) -> Tensor:
    best = self.body(x[:, 0])
    for t in range(1, x.size(1)):
        best = torch.maximum(best, self.body(x[:, t]))
    return best


def running_max_by_another_name(self: Any, x: Tensor) -> Tensor:
    best = torch.full((x.size(0), 5), -1e4)
    for t in range(x.size(1)):
        best = torch.max(best, self.features(x[:, t]))
    return best


def running_minimum(self: Any, x: Tensor) -> Tensor:
    least = self.features(x[:, 0])
    for t in range(1, x.size(1)):
        least = least.minimum(self.features(x[:, t]))
    return least


def two_totals(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    total, best = 0, None
    for t in range(x.size(1)):
        y = self.features(x[:, t])
        total = total + y
        best = y if best is None else torch.maximum(best, y)
    return total, best


def total_of_every_second(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    return outs[0] + outs[2] + outs[1] * 2, outs[1] + outs[3] + outs[0]


def total_beside_a_stack(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    outs = [self.features(x[:, t]) for t in range(x.size(1))]
    total = outs[0]
    for y in outs[1:]:
        total = total + y
    return torch.stack(outs, 1), total


REDUCTIONS = (
    running_sum,
    running_sum_from_the_first,
    running_sum_in_place,
    sum_of_a_list,
    running_maximum,
    running_max_by_another_name,
    running_minimum,
    two_totals,
    total_of_every_second,
    total_beside_a_stack,
)


@pytest.mark.parametrize("forward", REDUCTIONS, ids=lambda f: f.__name__)
def test_a_running_reduction_is_one_op(forward: Forward) -> None:
    result = check(forward, lambda batch: (clip(batch),))
    (remark,) = fxtemporal.report(result).by_status("applied")
    assert remark.reasons == ()


@pytest.mark.parametrize("forward", REDUCTIONS, ids=lambda f: f.__name__)
def test_gradients_of_a_running_reduction(forward: Forward) -> None:
    model = Frames(forward)
    result = strictly(model, (clip(),), tune="static")
    for module in (model, result):
        model.zero_grad()
        sum(out.square().sum() for out in leaves(module(clip()))).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if module is model:
            expected = gradients
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


def partial_sums(self: Any, x: Tensor) -> Tensor:
    total, outs = 0, []
    for t in range(x.size(1)):
        total = total + self.body(x[:, t])
        outs.append(total)
    return torch.stack(outs, 1)


def moving_average(self: Any, x: Tensor) -> Tensor:
    state = self.features(x[:, 0])
    for t in range(1, x.size(1)):
        state = 0.9 * state + 0.1 * self.features(x[:, t])
    return state


def sum_read_on_the_way(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(x.size(0), 5)
    half = total
    for t in range(x.size(1)):
        total += self.features(x[:, t])
        if t == 1:
            half = total * 1
    return total, half


def a_sum_of_integers(self: Any, x: Tensor) -> Tensor:
    total = 0
    for t in range(x.size(1)):
        total = total + (self.features(x[:, t]) > 0).to(torch.int32)
    return total


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (partial_sums, 1),
        (moving_average, 1),
        (sum_read_on_the_way, 1),
        (a_sum_of_integers, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_more_than_a_total_keeps_its_steps(forward: Forward, expected: int) -> None:
    check(forward, lambda batch: (clip(batch),), expected)


# ---------------------------------------------------------------------------------------- writes


def into_zeros(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), x.size(1), 4, 8, 8)
    for t in range(x.size(1)):
        out[:, t] = self.body(x[:, t])
    return out


def into_empty_of_its_kind(self: Any, x: Tensor) -> Tensor:
    out = x.new_empty(x.size(0), x.size(1), 4, x.size(3), x.size(4))
    for t in range(x.size(1)):
        out[:, t, ...] = self.body(x[:, t])
    return out.mean(1)


def into_the_first_dimension(self: Any, x: Tensor) -> Tensor:
    out = torch.empty(x.size(1), x.size(0), 5)
    for t in range(x.size(1)):
        out[t] = self.features(x[:, t])
    return out


def backwards(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), x.size(1), 5)
    for t in range(x.size(1)):
        out[:, x.size(1) - 1 - t] = self.features(x[:, t])
    return out


def into_every_second(self: Any, x: Tensor) -> Tensor:
    out = torch.ones(x.size(0), 2 * x.size(1), 5)
    for t in range(x.size(1)):
        out[:, 2 * t + 1] = self.features(x[:, t])
    return out


def with_another_dtype(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), x.size(1), 5, dtype=torch.float64)
    for t in range(x.size(1)):
        out[:, t] = self.features(x[:, t])
    return out.to(x.dtype)


WRITES = (
    into_zeros,
    into_empty_of_its_kind,
    into_the_first_dimension,
    backwards,
    into_every_second,
    with_another_dtype,
)


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_frames_written_into_a_tensor_are_one_copy(forward: Forward) -> None:
    result = check(forward, lambda batch: (clip(batch),))
    assert operator.setitem not in [node.target for node in result.graph.nodes]


def written_twice(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), 2, 5)
    for t in range(x.size(1)):
        out[:, t % 2] = self.features(x[:, t])
    return out


def read_between_writes(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), x.size(1) + 1, 5)
    total = 0
    for t in range(x.size(1)):
        out[:, t] = self.features(x[:, t])
        total = total + out.sum(1)
    return total + out.sum(1)


def written_into_its_source(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    for t in range(x.size(1)):
        x[:, t] = self.conv(x[:, t])[:, :3] + x.mean(1)
    return x


def changed_after_it_was_written(self: Any, x: Tensor) -> Tensor:
    out, seen = torch.zeros(x.size(0), x.size(1), 5), []
    for t in range(x.size(1)):
        y = self.features(x[:, t])
        out[:, t] = y
        y.mul_(2)
        seen.append(y)
    return out + torch.stack(seen, 1)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (written_twice, 1),
        (read_between_writes, 1),
        (written_into_its_source, FRAMES),
        (changed_after_it_was_written, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_writes_whose_order_counts_stay(forward: Forward, expected: int) -> None:
    check(forward, lambda batch: (clip(batch),), expected)


# ------------------------------------------------------------------------ growing, lists, indices


def growing(self: Any, x: Tensor) -> Tensor:
    out = None
    for t in range(x.size(1)):
        y = self.body(x[:, t]).unsqueeze(1)
        out = y if out is None else torch.cat([out, y], 1)
    return out


def growing_from_nothing(self: Any, x: Tensor) -> Tensor:
    out = torch.tensor([], dtype=x.dtype)
    for t in range(x.size(1)):
        out = torch.cat([out, self.features(x[:, t]).unsqueeze(1)], dim=1)
    return out


def growing_forwards_and_used_inside(self: Any, x: Tensor) -> Tensor:
    out = self.features(x[:, 0]).unsqueeze(1)
    for t in range(1, x.size(1)):
        out = torch.cat([out, self.features(x[:, t]).unsqueeze(1)], dim=-2)
    return out * out.mean(1, keepdim=True)


def by_an_index_tensor(self: Any, x: Tensor) -> Tensor:
    frames = [x.index_select(1, torch.tensor([t])).squeeze(1) for t in range(x.size(1))]
    return torch.stack([self.body(frame) for frame in frames], 1)


def with_a_constant_made_in_each_frame(self: Any, x: Tensor) -> Tensor:
    def weighted(frame: Tensor) -> Tensor:
        return self.body(frame * torch.linspace(0, 1, 8)) + torch.arange(8)

    return torch.stack([weighted(x[:, t]) for t in range(x.size(1))], 1)


@pytest.mark.parametrize(
    "forward",
    [
        growing,
        growing_from_nothing,
        growing_forwards_and_used_inside,
        by_an_index_tensor,
        with_a_constant_made_in_each_frame,
    ],
    ids=lambda f: f.__name__,
)
def test_other_spellings(forward: Forward) -> None:
    result = check(forward, lambda batch: (clip(batch),))
    (remark,) = fxtemporal.report(result).by_status("applied")
    assert "left_because" not in remark.detail


def over_a_list(self: Any, frames: list[Tensor]) -> Tensor:
    return torch.stack([self.body(frame) for frame in frames], 1)


def over_a_list_by_number(self: Any, frames: list[Tensor]) -> Tensor:
    return torch.stack([self.body(frames[t]) for t in (0, 2, 1)], 1)


@pytest.mark.parametrize("forward", [over_a_list, over_a_list_by_number])
def test_a_list_of_frames(forward: Forward) -> None:
    result = check(forward, lambda batch: (list(clip(batch).unbind(1)),))
    frames = list(clip().unbind(1))
    with pytest.raises(fxtemporal.SpecializationError):
        result([*frames[:-1], frames[-1][..., :6, :6]] if forward is over_a_list else frames[:-1])


def test_a_list_of_clips_is_not_a_list_of_frames() -> None:
    def two_streams(self: Any, clips: list[Tensor]) -> Tensor:
        color, flow = clips
        outs = [self.body(color[:, t]) + self.body(flow[:, t]) for t in range(color.size(1))]
        return torch.stack(outs, 1)

    check(two_streams, lambda batch: ([clip(batch), clip(batch) * 2],), 2)


# ----------------------------------------------------------------------------------- the analysis


def joins_of(forward: Forward) -> tuple[Any, ...]:
    return families_of(capture(Frames(forward), (clip(),))).joins


def test_what_a_reduction_is() -> None:
    (join,) = joins_of(running_sum)
    assert isinstance(join, Reduction)
    assert (join.name, len(join.nodes), len(join.parts)) == ("add", FRAMES, FRAMES)
    assert join.initial == 0
    assert not join.inplace


def test_what_writes_are() -> None:
    (join,) = joins_of(into_every_second)
    assert isinstance(join, Writes)
    assert (join.dim, join.entries) == (1, (1, 3, 5, 7))


_GIVES_ITS_INPUT: tuple[Any, ...] = (
    nn.Dropout(),
    nn.Dropout1d(),
    nn.AlphaDropout(),
    nn.FeatureAlphaDropout(),
    nn.Identity(),
    operator.pos,
)


@pytest.mark.parametrize("joined", ["stack", "list"])
@pytest.mark.parametrize("passing", _GIVES_ITS_INPUT, ids=str)
def test_frames_that_only_pass_are_copied_where_the_model_copies(passing: Any, joined: str) -> None:
    """At one frame a view in contiguous memory is the input itself, if nobody copies."""

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passing = passing

        def forward(self, x: Tensor) -> Any:
            frames = [self.passing(x[:, t]) for t in range(x.size(1))]
            return torch.stack(frames) if joined == "stack" else frames

    model = Passing().eval()
    fast = strictly(model, (torch.randn(2, 3, 4, 5),), tune="static")
    for frames in (3, 1, 2):
        x = torch.randn(2, frames, 4, 5, requires_grad=True)
        with torch.no_grad():
            try:
                expected, found = model(x), fast(x)
            except fxtemporal.SpecializationError:  # a list of T frames
                assert frames != 3
                continue
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.requires_grad == theirs.requires_grad
            shared = x.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
            assert shared == (joined == "list")


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_pooling_of_single_samples_takes_no_channel_as_torch_does(kind: str, n: int) -> None:
    """(C, H, W) without a channel is pooled by torch, (T, 0, H, W) is refused."""
    pool = getattr(F, f"adaptive_{kind}_pool{n}d")

    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([pool(x[:, t], 2) for t in range(x.size(1))], 1)

    model, sizes = Pooled().eval(), (6,) * n
    fast = strictly(model, (torch.randn(3, 4, *sizes),), tune="static")
    assert fxtemporal.report(fast).by_status("applied")
    for channels in (3, 1, 0, 5):
        for frames in (4, 2):
            x = torch.randn(channels, frames, *sizes)
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        lambda f: f.unfold(1, 2, 1),
        lambda f: f.unfold(1, 2, 1).transpose(0, 1),
        lambda f: f[:, ::2],
        lambda f: f[:, :1].expand(-1, 3, -1, -1),
        lambda f: f.transpose(1, 3),
        lambda f: f,
        lambda f: f[:, ::2].transpose(1, 2),
    ],
)
def test_frames_that_go_out_lie_as_the_models_do(view: Callable[[Tensor], Tensor]) -> None:
    """With gaps, or entries that share memory, too: those are views of a frame of their own."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [view(self.layer(x[:, t]).relu()) for t in range(x.size(1))]

    model = Views().eval()
    fast = strictly(model, (torch.randn(2, 3, 3, 4, 5),), tune="static")
    assert fxtemporal.report(fast).by_status("applied")
    for batch in (2, 1):
        x = torch.randn(batch, 3, 3, 4, 5)
        expected, found = model(x), fast(x)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.shape == theirs.shape
            for dim in range(mine.dim()):
                assert mine.shape[dim] == 1 or mine.stride(dim) == theirs.stride(dim)
        addresses = {mine.untyped_storage().data_ptr() for mine in found}
        assert len(addresses) == len(found)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("join", [torch.add, torch.maximum, torch.minimum])
def test_what_is_read_of_a_running_value_on_the_way(
    join: Callable[[Tensor, Tensor], Tensor], every: int
) -> None:
    """Each stretch between two readings is one op, which goes on from the one before it."""

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            total, read = None, []
            for t in range(x.size(1)):
                y = self.layer(x[:, t])
                total = y if total is None else join(total, y)
                if t % every == 0:
                    read.append(total * 2)
            return torch.stack(read)

    model = Running().eval()
    fast = strictly(model, (torch.randn(2, 8, 4),), tune="static")
    assert fxtemporal.report(fast).by_status("applied")
    fast.graph.lint()
    double = model.double()
    for batch in (2, 3):
        x = torch.randn(batch, 8, 4, dtype=torch.float64)
        torch.testing.assert_close(fast.double()(x), double(x))


@pytest.mark.parametrize("verify", [True, False])
def test_a_write_into_a_view_with_gaps_is_done_once(verify: bool) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
            frames = [self.layer(x[:, t])[:, ::2].add_(1) for t in range(x.size(1))]
            return frames, torch.stack([frame * 2 for frame in frames])

    model, x = Adds().eval(), torch.randn(2, 3, 3, 4, 5)
    fast = strictly(model, (x,), tune="static", verify=verify)
    torch.testing.assert_close(fast(x), model(x))
