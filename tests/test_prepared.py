"""Prepared weights are computed once, and again as soon as a source is not what it was."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxtemporal.ir.leaf import leaf_function
from fxtemporal.ir.prepared import Prepared

CALLS: list[int] = []


@leaf_function
def scaled(weight: Tensor, factor: Tensor | None, *, times: float = 1.0) -> tuple[Tensor, Tensor]:
    CALLS.append(1)
    result = weight * times if factor is None else weight * factor * times
    return result, result.sum()


@leaf_function
def product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


class Holder(nn.Module):
    """A large and a small source: not every entry of the large one is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 48))
        self.register_buffer("factor", torch.randn(48))
        self.prepared = Prepared(scaled, times=2.0)

    def forward(self) -> Tensor:
        return self.prepared(self.weight, self.factor)[0]


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def expected(holder: Holder) -> Tensor:
    return holder.weight.detach() * holder.factor * 2.0


def test_it_is_computed_once() -> None:
    holder = Holder()
    with torch.no_grad():
        first, second = holder(), holder()
    assert first is second
    assert len(CALLS) == 1
    torch.testing.assert_close(first, expected(holder), rtol=0, atol=0)
    assert not list(holder.prepared.state_dict())
    assert not list(holder.prepared.buffers())


def in_place(holder: Holder) -> None:
    with torch.no_grad():
        holder.weight[3, 5] += 1


def in_place_on_a_view(holder: Holder) -> None:
    with torch.no_grad():
        holder.weight[3].view(-1)[5:6].zero_()


def in_place_on_the_small_one(holder: Holder) -> None:
    holder.factor[7] = 3.0


def optimizer_step(holder: Holder) -> None:
    holder.weight.grad = torch.ones_like(holder.weight)
    torch.optim.Adam([holder.weight], lr=0.1).step()


def fused_step(holder: Holder) -> None:
    holder.weight.grad = torch.ones_like(holder.weight)
    torch.optim.SGD([holder.weight], lr=0.1, fused=True).step()


def load(holder: Holder) -> None:
    holder.load_state_dict(Holder().state_dict())


def load_by_assignment(holder: Holder) -> None:
    holder.load_state_dict(Holder().state_dict(), assign=True)


def new_data(holder: Holder) -> None:
    holder.weight.data = torch.randn_like(holder.weight)


def new_data_twice(holder: Holder) -> None:
    """The allocator likes to give the same address again."""
    for _ in range(4):
        holder.weight.data = torch.randn_like(holder.weight)


def write_through_data(holder: Holder) -> None:
    holder.weight.data.mul_(3)


def write_through_numpy(holder: Holder) -> None:
    holder.factor.numpy()[11] = 5.0


def new_parameter(holder: Holder) -> None:
    holder.weight = nn.Parameter(torch.randn(64, 48))


def transposed_data(holder: Holder) -> None:
    holder.weight.data = holder.weight.data.view(48, 64).t()


def other_dtype(holder: Holder) -> None:
    holder.double()


def there_and_back(holder: Holder) -> None:
    holder.half().float()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_on_a_view,
        in_place_on_the_small_one,
        optimizer_step,
        fused_step,
        load,
        load_by_assignment,
        new_data,
        new_data_twice,
        write_through_data,
        write_through_numpy,
        new_parameter,
        transposed_data,
        other_dtype,
        there_and_back,
    ],
)
def test_every_change_of_a_source_is_noticed(change: Callable[[Holder], None]) -> None:
    holder = Holder()
    with torch.no_grad():
        before = holder().clone()
    change(holder)
    with torch.no_grad():
        after, again = holder(), holder()
    assert after is again
    torch.testing.assert_close(after, expected(holder), rtol=0, atol=0)
    assert before.dtype != after.dtype or not torch.equal(before, after)


@given(changes=st.lists(st.sampled_from([in_place, new_data, load, other_dtype]), max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_changes_is_followed(changes: list[Callable[[Holder], None]]) -> None:
    holder = Holder()
    for change in changes:
        change(holder.float() if change is load else holder)
        with torch.no_grad():
            torch.testing.assert_close(holder(), expected(holder), rtol=0, atol=0)


def test_gradients_flow_through_it() -> None:
    holder = Holder()
    with torch.no_grad():
        holder()
    holder().square().sum().backward()
    gradient = 2 * expected(holder) * holder.factor * 2.0
    torch.testing.assert_close(holder.weight.grad, gradient)


def test_what_is_kept_can_be_saved_for_backward_wherever_it_was_computed() -> None:
    holder = Holder()
    holder.weight.requires_grad_(False)
    with torch.inference_mode():
        holder()
    x = torch.randn(3, 64, requires_grad=True)
    (x @ holder()).sum().backward()
    assert len(CALLS) == 1
    torch.testing.assert_close(x.grad, expected(holder).sum(1).expand(3, -1))


def test_autocast_leaves_no_trace_in_it() -> None:
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    prepared = Prepared(product)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert prepared(left, right).dtype == torch.float32


def test_a_source_may_be_absent() -> None:
    prepared = Prepared(scaled)
    weight = torch.randn(3)
    assert torch.equal(prepared(weight, None)[0], weight)
    assert torch.equal(prepared(weight, weight)[0], weight * weight)
    assert torch.equal(prepared(weight, None)[0], weight)


def test_copies_keep_nothing() -> None:
    holder = Holder()
    with torch.no_grad():
        kept = holder()
        for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
            assert other() is not kept
            torch.testing.assert_close(other(), kept, rtol=0, atol=0)
            other.weight.fill_(1.0)
            torch.testing.assert_close(other(), expected(other), rtol=0, atol=0)
        assert holder() is kept


def test_fake_tensors_are_not_kept() -> None:
    holder = Holder()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(holder(), FakeTensor)
    with torch.no_grad():
        torch.testing.assert_close(holder(), expected(holder), rtol=0, atol=0)


def test_under_transforms_and_traces_it_is_part_of_the_graph() -> None:
    holder = Holder()
    holder.weight.requires_grad_(False)
    with torch.no_grad():
        holder()
    other = torch.randn(64, 48)
    swapped = torch.func.functional_call(holder, {"weight": other})
    torch.testing.assert_close(swapped, other * holder.factor * 2.0)
    stacked = torch.randn(3, 64, 48)
    mapped = torch.func.vmap(lambda w: holder.prepared(w, holder.factor)[0])(stacked)
    torch.testing.assert_close(mapped, stacked * holder.factor * 2.0)
    gradient = torch.func.grad(lambda w: holder.prepared(w, holder.factor)[1])(other)
    torch.testing.assert_close(gradient, (holder.factor * 2.0).expand(64, -1))

    compiled = torch.compile(holder, backend="eager", fullgraph=True)
    exported = torch.export.export(holder, ()).module()

    plain = fx.symbolic_trace(holder)
    with torch.no_grad():
        for module in (compiled, exported, plain):
            holder.factor.mul_(2)
            if module is exported:
                module.factor.copy_(holder.factor)
            torch.testing.assert_close(module(), expected(holder))


def test_threads_get_the_right_value() -> None:
    holder = Holder()
    wrong: list[Tensor] = []
    right = expected(holder)

    def work() -> None:
        with torch.no_grad():
            for step in range(200):
                if step % 5 == 0:
                    holder.prepared.forget()
                if not torch.equal(holder(), right):
                    wrong.append(holder())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
