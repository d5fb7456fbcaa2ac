"""Unrolled frames are recovered as families of lanes: which, at which offset, at what cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxtemporal.analysis.families import Families, Family, Lane, Uniform, families_of
from fxtemporal.capture.capture import capture
from fxtemporal.ir.program import Program
from tests.zoo import noise


def program_of(forward: Callable[..., Any], *inputs: Tensor, **parts: nn.Module) -> Program:
    model = type("Model", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(model, name, part)
    return capture(model.eval(), inputs or (noise(2, 4, 6),))


def families(forward: Callable[..., Any], *inputs: Tensor, **parts: nn.Module) -> Families:
    return families_of(program_of(forward, *inputs, **parts))


def named(found: Families, name: str) -> list[Family]:
    return [family for family in found.all if family.op is not None and family.op.name == name]


def source_of(found: Families) -> Family:
    (family,) = (family for family in found.all if family.source)
    return family


# -- lanes -----------------------------------------------------------------------------------------


def test_copies_of_a_body_are_lanes_of_one_family() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(x[:, t]) for t in range(x.size(1))], 1)

    found = families(forward)
    (tanh,) = named(found, "tanh")
    assert sorted(tanh.lanes) == [0, 1, 2, 3]
    assert tanh.operands == (Lane(source_of(found), 0),)
    assert tanh.first is tanh.lanes[0]


@pytest.mark.parametrize(
    "frames",
    [
        lambda x: [x[:, t] for t in range(4)],
        lambda x: [x.select(1, t) for t in range(4)],
        lambda x: [x.select(-2, t) for t in range(4)],
        lambda x: list(x.unbind(1)),
        lambda x: list(torch.unbind(x, -2)),
        lambda x: [x[..., t, :] for t in range(4)],
    ],
)
def test_a_frame_is_a_frame_in_every_spelling(frames: Callable[[Tensor], list[Tensor]]) -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.tanh(frame) for frame in frames(x)]

    found = families(forward)
    source = source_of(found).source
    assert source is not None
    assert (source.base.name, source.dim, source.length) == ("x", 1, None)
    assert sorted(source_of(found).lanes) == [0, 1, 2, 3]
    assert len(named(found, "tanh")) == 1


@pytest.mark.parametrize(
    ("frames", "lanes", "length"),
    [
        (lambda x: [x[:, t : t + 1] for t in range(4)], [0, 1, 2, 3], 1),
        (lambda x: list(x.split(1, 1)), [0, 1, 2, 3], 1),
        (lambda x: list(x.chunk(2, 1)), [0, 2], 2),
        (lambda x: [x[:, t : t + 3] for t in range(2)], [0, 1], 3),
        (lambda x: [x.narrow(1, t, 2) for t in (0, 2)], [0, 2], 2),
        (lambda x: [x[:, t : t + 2] for t in range(4)], [0, 1, 2], 2),
    ],
)
def test_a_piece_of_the_clip_is_a_lane_of_that_length(
    frames: Callable[[Tensor], list[Tensor]], lanes: list[int], length: int
) -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.tanh(frame) for frame in frames(x)]

    found = families(forward)
    (family,) = (f for f in found.all if f.source and f.source.length == length)
    assert sorted(family.lanes) == lanes
    assert family.equal_shapes()


def test_frames_counted_from_the_end_keep_their_distance_to_it() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.tanh(x[:, t]) for t in (-3, -2, -1)] + [torch.tanh(x[:, 0])]

    (tanh, *rest) = sorted(named(families(forward), "tanh"), key=lambda f: -len(f.lanes))
    assert sorted(tanh.lanes)[:3] in ([-3, -2, -1], [0, 1, 2], [1, 2, 3])
    lanes = {node.args[0].args[1][1]: lane for lane, node in tanh.lanes.items()}
    assert lanes[-1] - lanes[-3] == 2
    assert len(rest) <= 1


def test_sources_of_two_clips_and_of_two_dimensions_are_apart() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.tanh(x[:, t]) + torch.tanh(y[:, t]) + torch.tanh(x[:, :, t]) for t in (0, 1)]

    found = families(forward, noise(3, 3, 3), noise(3, 3, 3))
    sources = {(f.source.base.name, f.source.dim) for f in found.all if f.source}
    assert sources == {("x", 1), ("y", 1), ("x", 2)}
    assert len(named(found, "tanh")) == 3


def test_rows_of_a_parameter_are_frames_too() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(noise(8, 6))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x[:, t] + self.table[t] for t in range(x.size(1))]

    found = families_of(capture(Positions(), (noise(2, 4, 6),)))
    (add,) = named(found, "add")
    assert sorted(add.lanes) == [0, 1, 2, 3]
    first, second = add.operands
    assert isinstance(first, Lane)
    assert isinstance(second, Lane)
    assert (first.offset, second.offset) == (0, 0)
    source = second.family.source
    assert source is not None
    assert (source.base.op, source.dim, source.length) == ("get_attr", 0, None)


# -- what parts families ---------------------------------------------------------------------------


def test_another_argument_is_another_family() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [x[:, t] * (t + 1) for t in range(4)]

    assert [len(family.lanes) for family in named(families(forward), "mul")] == [1] * 4


@pytest.mark.parametrize(("value", "count"), [(1, 2), (1.0, 2), (2.0, 1)])
def test_numbers_are_compared_with_their_type(value: float, count: int) -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [x[:, 0] * 2.0, x[:, 1] * value]

    assert len(named(families(forward), "mul")) == count


def test_another_module_is_another_family() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [layer(x[:, t]) for t, layer in enumerate(self.layers)]

    layers = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
    assert len(named(families(forward, layers=layers), "linear")) == 4


def test_modules_with_tied_parameters_are_one_family() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [layer(x[:, t]) for t, layer in enumerate(self.layers)]

    layers = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
    for layer in layers[1:]:
        layer.weight, layer.bias = layers[0].weight, layers[0].bias
    (linear,) = named(families(forward, layers=layers), "linear")
    assert len(linear.lanes) == 4


def test_another_invariant_is_another_family() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [x[:, t] + x.mean() * 2 for t in range(2)] + [x[:, 0] + x.sum(1)]

    assert len(named(families(forward), "add")) == 3


def test_an_op_that_draws_random_numbers_is_never_the_same() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.nn.functional.dropout(x[:, t]) for t in range(4)]

    assert len(named(families(forward), "dropout")) == 4


# -- offsets ---------------------------------------------------------------------------------------


def test_a_neighbour_is_read_at_an_offset() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        y = [torch.tanh(x[:, t]) for t in range(4)]
        return [y[t] - y[t - 1] for t in range(1, 4)]

    found = families(forward)
    (tanh,), (sub,) = named(found, "tanh"), named(found, "sub")
    assert sorted(sub.lanes) == [1, 2, 3]
    assert sub.operands == (Lane(tanh, 0), Lane(tanh, -1))


def test_the_edges_of_a_stencil_are_families_of_their_own() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [x[:, t] - x[:, max(t - 1, 0)] for t in range(4)]

    assert sorted(len(family.lanes) for family in named(families(forward), "sub")) == [1, 3]


def test_a_state_never_forms_a_family() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = x[:, 0]
        for t in range(1, 4):
            state = torch.tanh(state + x[:, t])
        return state

    found = families(forward)
    assert [len(family.lanes) for family in named(found, "tanh")] == [1, 1, 1]


# -- joins and sizes -------------------------------------------------------------------------------


def test_what_joins_the_lanes_is_an_invariant() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        y = torch.stack([torch.tanh(x[:, t]) for t in range(4)], 1)
        return [torch.exp(y[:, t]) for t in range(4)]

    found = families(forward)
    assert named(found, "stack") == []
    assert len([family for family in found.all if family.source]) == 2
    assert len(found.regions()) == 2
    (exp,) = named(found, "exp")
    assert len(exp.lanes) == 4


def test_a_join_in_every_lane_is_a_family() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.cat([x[:, t], x[:, t + 1]], 1) for t in range(3)]

    (cat,) = named(families(forward), "cat")
    assert [operand.offset for operand in cat.lane_operands()] == [0, 1]
    assert len(cat.lanes) == 3


def test_the_size_of_a_frame_is_uniform() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        outs = []
        for t in range(4):
            y = torch.tanh(x[:, t])
            outs.append(y.view(y.size(0), 2, 3))
        return outs

    found = families(forward)
    (size,), (view,) = named(found, "size"), named(found, "view")
    assert size.uniform
    assert sorted(view.lanes) == [0, 1, 2, 3]
    assert any(isinstance(operand, Uniform) for operand in view.operands)


def test_sizes_asked_anew_in_every_lap_do_not_part_a_family() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.tanh(x[:, t]).view(x.size(0), -1) for t in range(4)]

    (view,) = named(families(forward), "view")
    assert len(view.lanes) == 4


def test_the_same_view_taken_anew_is_one_source() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [torch.tanh(x.transpose(0, 1)[t]) for t in range(4)]

    found = families(forward)
    assert len(source_of(found).lanes) == 4
    assert len(named(found, "tanh")) == 1


def test_a_single_frame_is_no_region() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.tanh(x[:, 0])

    assert families(forward).regions() == []


def test_numbers_that_differ_from_frame_to_frame_are_not_uniform() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        outs = []
        for t in range(4):
            clip = x[:, t : t + 2]  # the last is one frame long
            outs.append(clip.sum(1) / clip.size(1))
        return outs

    found = families(forward)
    for family in named(found, "size"):
        assert len({node.meta["val"] for node in family.nodes}) == 1


# -- order and cost --------------------------------------------------------------------------------


def test_families_stand_in_an_order_in_which_they_can_be_computed() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        y = [torch.tanh(x[:, t]) for t in reversed(range(4))]
        z = [a * b.size(0) for a, b in pairwise(y)]
        return [torch.cat([a, b], 1) for a, b in zip(z, y, strict=False)]

    found = families(forward)
    for family in found.all:
        for operand in family.operands:
            if not isinstance(operand, torch.fx.Node):
                assert operand.family.number < family.number
    assert [family.number for family in found.all] == list(range(len(found.all)))
    for node, (family, lane) in found.of.items():
        assert node in family.nodes
        assert lane in family.lanes


def test_the_cost_is_linear_in_the_number_of_frames() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = [torch.tanh(x[:, t] + 1) for t in range(x.size(1))]
        y = [y[t] - y[t - 1] for t in range(1, x.size(1))]
        return torch.stack([a.view(a.size(0), -1) for a in y], 1)

    class Counting(Program):
        asked = 0

        def op(self, node: torch.fx.Node) -> Any:
            self.asked += 1
            return super().op(node)

    def cost(frames: int) -> float:
        program = program_of(forward, noise(2, frames, 6))
        counting = Counting(program.gm, program.fake_mode, program.frontend)
        families_of(counting)
        assert counting.asked
        return counting.asked / frames

    assert cost(128) <= 1.2 * cost(16)
