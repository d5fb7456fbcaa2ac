"""In-place writes: which of them something else can see, and which are private."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxtemporal.analysis.aliasing import Aliasing, written_by
from fxtemporal.capture.capture import capture
from fxtemporal.ir.program import Program
from tests.zoo import noise

Body = Callable[[Tensor], Any]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def program_of(body: Body) -> Program:
    return capture(Model(body), (noise(2, 4, 6),))


def seen_by(body: Body) -> list[str | None]:
    """For every write of the body in order: who sees it."""
    aliasing = Aliasing(program_of(body))
    return [aliasing.visible(writer, written) for writer, written in aliasing.writes()]


# -- private writes --------------------------------------------------------------------------------


def relu_of_a_fresh_tensor(x: Tensor) -> Tensor:
    return F.relu_(x + 1)


def inplace_function(x: Tensor) -> Tensor:
    return F.relu(torch.tanh(x), inplace=True)


def method(x: Tensor) -> Tensor:
    return torch.tanh(x).mul_(2)


def augmented(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y += x
    return y


def read_before_it_is_written(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    z = y.exp()
    return y.relu_() + z


def viewed_after_it_was_written(x: Tensor) -> Tensor:
    y = torch.tanh(x).relu_()
    return y.transpose(1, 2) + y.view(2, 6, 4)


def written_twice(x: Tensor) -> Tensor:
    return torch.tanh(x).add_(1).mul_(2)


def a_clone_of_the_input(x: Tensor) -> Tensor:
    return x.clone().add_(1)


def a_sum_that_is_no_view(x: Tensor) -> Tensor:
    return x.sum(1).add_(1) + x.sum(1)


@pytest.mark.parametrize(
    "body",
    [
        relu_of_a_fresh_tensor,
        inplace_function,
        method,
        augmented,
        read_before_it_is_written,
        viewed_after_it_was_written,
        written_twice,
        a_clone_of_the_input,
        a_sum_that_is_no_view,
    ],
)
def test_a_write_into_fresh_memory_is_private(body: Body) -> None:
    found = seen_by(body)
    assert found
    assert set(found) == {None}


# -- visible writes --------------------------------------------------------------------------------


def the_input(x: Tensor) -> Tensor:
    return x.add_(1)


def a_frame_of_the_input(x: Tensor) -> Tensor:
    return x[:, 0].add_(1)


def a_transposed_view_of_the_input(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0).relu_()


def what_may_be_a_view_of_the_input(x: Tensor) -> Tensor:
    return x.reshape(8, 6).mul_(2)


def what_contiguous_may_have_copied(x: Tensor) -> Tensor:
    return x.contiguous().mul_(2)


def a_piece_of_the_input(x: Tensor) -> Tensor:
    return x.unbind(1)[2].mul_(2)


def dropout_that_is_off(x: Tensor) -> Tensor:
    return F.dropout(x, training=False).mul_(2)


@pytest.mark.parametrize(
    "body",
    [
        the_input,
        a_frame_of_the_input,
        a_transposed_view_of_the_input,
        what_may_be_a_view_of_the_input,
        what_contiguous_may_have_copied,
        a_piece_of_the_input,
        dropout_that_is_off,
    ],
)
def test_a_write_into_the_input_is_visible(body: Body) -> None:
    assert "the input x" in seen_by(body)


def a_view_taken_before(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    view = y.view(2, 24)
    y.relu_()
    return view


def the_base_of_a_written_view(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y[:, 0].add_(1)
    return y


def a_sibling_of_a_written_view(x: Tensor) -> Tensor:
    first, *_, last = torch.tanh(x).split(2, 1)
    first.add_(1)
    return first.unsqueeze(0) + last


@pytest.mark.parametrize("body", [a_view_taken_before, the_base_of_a_written_view])
def test_a_write_that_another_name_of_the_memory_reads_later_is_visible(body: Body) -> None:
    (found,) = seen_by(body)
    assert found is not None
    assert "reads later" in found


def test_a_write_into_one_piece_may_reach_another() -> None:
    """The pieces of a split share one memory: that they do not overlap is not looked at."""
    assert None not in seen_by(a_sibling_of_a_written_view)


def test_a_write_into_a_parameter_is_visible() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * 2

    aliasing = Aliasing(capture(Counting(), (noise(2, 4),)))
    found = [aliasing.visible(*write) for write in aliasing.writes()]
    assert len(found) <= 1  # torch.export may have made a copy at the end of it
    assert all(text is not None and "count" in text for text in found)


def test_an_inplace_module_writes_its_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.relu(self.norm(x)), self.relu(x)

    aliasing = Aliasing(capture(Block().eval(), (noise(2, 4, 6),)))
    found = [aliasing.visible(*write) for write in aliasing.writes()]
    assert found == [None, "the input x"]


# -- sharing ---------------------------------------------------------------------------------------


def names(nodes: list[fx.Node]) -> set[str]:
    return {str(getattr(node.target, "__name__", node.target)) for node in nodes}


def test_views_share_and_copies_do_not() -> None:
    def body(x: Tensor) -> list[Tensor]:
        y = torch.tanh(x)
        return [y.transpose(0, 1), y.reshape(8, 6), y[:, 0], y.unbind(1)[0], y.clone(), y.exp()]

    program = program_of(body)
    aliasing = Aliasing(program)
    (tanh,) = (node for node in program.graph.nodes if node.target is torch.tanh)
    shared = names(aliasing.shared_with(tanh))
    assert {"tanh", "transpose", "reshape", "unbind", "getitem"} <= shared
    assert shared.isdisjoint({"clone", "exp", "x"})


def test_a_view_taken_after_a_write_derives_from_it() -> None:
    def body(x: Tensor) -> list[Tensor]:
        y = torch.tanh(x)
        before = y.transpose(0, 1)
        return [y.relu_().transpose(1, 2), before]

    program = program_of(body)
    aliasing = Aliasing(program)
    ((writer, _),) = aliasing.writes()
    before, after = (node for node in program.graph.nodes if node.target == "transpose")
    assert aliasing.derives_from(after, writer)
    assert not aliasing.derives_from(before, writer)


@pytest.mark.parametrize(
    ("body", "writes"),
    [
        (lambda x: x.add_(1), 1),
        (lambda x: torch.relu_(x), 1),
        (lambda x: F.relu(x, inplace=True), 1),
        (lambda x: F.relu(x, inplace=False), 0),
        (lambda x: x.add(1), 0),
        (lambda x: x + 1, 0),
        (lambda x: torch.special.i0(x), 0),
        (lambda x: x.index_fill_(1, torch.tensor([0]), 2.0), 1),
        (lambda x: x.size(0) + x.shape[1], 0),
    ],
)
def test_what_an_op_writes(body: Body, writes: int) -> None:
    program = program_of(lambda x: [body(x)])
    found = [w for node in program.graph.nodes for w in written_by(program, node)]
    assert len(found) == writes


@pytest.mark.parametrize(
    ("body", "writes"),
    [
        (lambda seen, x: seen.add_(1), True),
        (lambda seen, x: seen.copy_(x[0]), True),
        (lambda seen, x: F.relu(seen, inplace=True), True),
        (lambda seen, x: x.add_(seen), False),
        (lambda seen, x: seen + x, False),
    ],
)
def test_a_buffer_that_an_op_writes(body: Callable[[Tensor, Tensor], Any], writes: bool) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            body(self.seen, x)
            return x * 2

    program = capture(Holds(), (noise(2, 3),))
    found = [w.target for node in program.graph.nodes for w in written_by(program, node)]
    assert found == (["seen"] if writes else [w for w in found if w != "seen"])


def test_the_cost_is_linear_in_the_number_of_frames() -> None:
    def cost(frames: int) -> float:
        def forward(self: Any, x: Tensor) -> Tensor:
            return torch.stack([torch.tanh(x[:, t]).relu_() for t in range(frames)], 1)

        model = type("Loop", (nn.Module,), {"forward": forward})()
        program = capture(model, (noise(2, frames, 3),))
        aliasing = Aliasing(program)
        looked_at = 0
        for writer, written in aliasing.writes():
            assert aliasing.visible(writer, written) is None
            looked_at += len(aliasing.shared_with(written))
        return looked_at / frames

    assert cost(64) == cost(8)
