"""A layer over a frame joined with a state becomes two, and the frames' half runs once.

Everything runs in float64, where a right rewrite is right to 1e-12 and a wrong one is not, and
unverified: verification is a net, and a net is not what makes a rewrite right.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal.passes.split_concat import SplitConcat
from tests.split_concat_cells import (
    FRAMES,
    HIDDEN,
    IN,
    SIDE,
    Apart,
    Bidirectional,
    ComputedWeight,
    ConvGRU,
    ConvLSTM,
    Direct,
    Features,
    JoinReadTwice,
    LinearLSTM,
    OneVideo,
    Peephole,
    StateFirst,
    ThreeParts,
    TimeMajor,
    TwoLayers,
    TwoStates,
    clip,
    close,
    convolutions,
    optimized,
    remarks,
    time_major,
)

pytestmark = [
    pytest.mark.usefixtures("in_float64"),
    # nn.Conv2d itself warns that "same" with an even kernel copies its input.
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]


# -- what every split must keep --------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``sites`` cells are split; the result runs ``left`` convolutions (the clip has 6 frames)."""

    build: Callable[[], nn.Module]
    left: int
    sites: int = 1
    inputs: Callable[[int], Tensor] = clip
    parts: str = "frame, state"

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().double().eval()


def layer(**settings: Any) -> Case:
    """A ConvLSTM whose convolution has ``settings``."""
    return Case(partial(ConvLSTM, **settings), 1 + FRAMES)


CASES: dict[str, Case] = {
    "ConvLSTM": Case(ConvLSTM, 1 + FRAMES),
    "ConvGRU": Case(ConvGRU, 3 + 3 * FRAMES, sites=3),
    "peephole": Case(Peephole, 1 + FRAMES),
    "linear": Case(LinearLSTM, 0, inputs=partial(clip, extents=0)),
    "functional": Case(partial(LinearLSTM, True), 0, inputs=partial(clip, extents=0)),
    "1-d": Case(partial(ConvLSTM, extents=1), 1 + FRAMES, inputs=partial(clip, extents=1)),
    "3-d": Case(partial(ConvLSTM, extents=3), 1 + FRAMES, inputs=partial(clip, extents=3)),
    "state first": Case(StateFirst, 1 + FRAMES, parts="state, frame"),
    "frames around": Case(partial(ThreeParts, "yhz"), 1 + FRAMES, parts="frame, state, frame"),
    "frames adjacent": Case(partial(ThreeParts, "yzh"), 1 + FRAMES, parts="frame, frame, state"),
    "one of the clip": Case(partial(ThreeParts, "hyx"), 2 + FRAMES, parts="state, frame, frame"),
    "two states": Case(TwoStates, 1 + FRAMES, parts="state, frame, state"),
    "direct": Case(Direct, 1 + FRAMES),
    "features": Case(Features, 2 + FRAMES),
    "two layers": Case(TwoLayers, 1 + 2 * FRAMES),
    "bidirectional": Case(Bidirectional, 2 + 2 * FRAMES, sites=2),
    "one cell for both": Case(partial(Bidirectional, True), 1 + 2 * FRAMES),
    "time-major": Case(TimeMajor, 1 + FRAMES, inputs=time_major),
    "one video": Case(OneVideo, 1 + FRAMES, inputs=lambda batch: clip(1)[0]),
    "computed weight": Case(ComputedWeight, 1 + FRAMES),
    "join read twice": Case(JoinReadTwice, 1 + FRAMES),
    "no bias": layer(bias=False),
    "dilated": layer(dilation=2, padding=2),
    "same": layer(padding="same", kernel_size=(4, 3)),
    "reflect": layer(padding_mode="reflect"),
    "circular, wide": layer(padding_mode="circular", kernel_size=5, padding=2),
    "replicate, same": layer(padding_mode="replicate", kernel_size=(2, 3), padding="same"),
    "oblong": layer(kernel_size=(1, 3), padding=(0, 1)),
    "oblong, reflect": layer(kernel_size=(5, 3), padding=(2, 1), padding_mode="reflect"),
}


@cache
def split(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """A model and what becomes of it; for tests that change neither."""
    model = CASES[name].model()
    return model, optimized(model, CASES[name].inputs(2))


def listing(gm: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in gm.graph.nodes]


@pytest.mark.parametrize("name", CASES)
def test_each_cell_is_split_and_its_frames_run_once(name: str) -> None:
    case = CASES[name]
    _, fast = split(name)
    assert [remark.status for remark in remarks(fast)] == ["applied"] * case.sites
    assert {remark.detail["parts"] for remark in remarks(fast)} == {case.parts}
    assert convolutions(fast, case.inputs(2)) == case.left
    assert fxtemporal.report(fast).by_status("failed") == ()


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_the_originals_at_each_batch(name: str) -> None:
    model, fast = split(name)
    for batch in (2, 1, 3):
        x = CASES[name].inputs(batch)
        close(fast(x), model(x))


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_near_to_float64_as_the_original(name: str) -> None:
    model, x = CASES[name].model().float(), CASES[name].inputs(2).float()
    fast = fxtemporal.optimize(model, (x,), tune="static")
    comparison = fxtemporal.report(fast).comparison
    assert comparison is not None
    assert comparison.equal
    assert fxtemporal.report(fast).by_status("failed") == ()
    assert fast(x).dtype == torch.float32
    expected = CASES[name].model()(x.double())
    torch.testing.assert_close(fast(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_same_parameters(name: str) -> None:
    model = CASES[name].model()
    other = copy.deepcopy(model)
    x = CASES[name].inputs(2)
    fast = optimized(model, x)
    theirs, mine = (x.clone().requires_grad_() for _ in range(2))
    other(theirs).square().sum().backward()
    fast(mine).square().sum().backward()
    close(mine.grad, theirs.grad)
    parameters = dict(model.named_parameters())
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    for path, parameter in other.named_parameters():
        close(parameters[path].grad, parameter.grad)


@pytest.mark.parametrize("name", CASES)
def test_the_state_dict_and_the_original_stay(name: str) -> None:
    model = CASES[name].model()
    x = CASES[name].inputs(2)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    fast = optimized(model, x)
    assert list(fast.state_dict()) == list(before)
    close(dict(fast.state_dict()), dict(before))
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    close(fast(x), model(x))


@pytest.mark.parametrize("name", CASES)
def test_a_copy_and_a_pickle_compute_the_same(name: str) -> None:
    _, fast = split(name)
    x = CASES[name].inputs(3)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(again(x), fast(x))
        assert remarks(again) == remarks(fast)


@pytest.mark.parametrize("name", CASES)
def test_twice_changes_nothing_more(name: str) -> None:
    _, fast = split(name)
    x = CASES[name].inputs(2)
    again = optimized(fast, x)
    assert not remarks(again)
    close(again(CASES[name].inputs(3)), fast(CASES[name].inputs(3)))
    only = SplitConcat()
    once = optimized(CASES[name].model(), x, passes=[only])
    assert listing(optimized(once, x, passes=[only])) == listing(once)


@pytest.mark.parametrize("name", CASES)
def test_audit_says_the_same_each_time(name: str) -> None:
    model, fast = split(name)
    found = [fxtemporal.audit(model, (CASES[name].inputs(2),)).remarks for _ in range(2)]
    assert found[0] == found[1] == fxtemporal.report(fast).remarks


def test_the_remark_names_the_layer_its_line_and_its_parts() -> None:
    _, fast = split("ConvLSTM")
    (remark,) = remarks(fast)
    assert remark.target == "conv"
    assert remark.location is not None
    assert "split_concat_cells.py:" in remark.location
    assert remark.detail == {"steps": FRAMES, "parts": "frame, state", "channels": "3, 4"}


def test_the_weight_is_cut_once_for_all_steps() -> None:
    for name, pieces in (("ConvLSTM", 2), ("linear", 2), ("frames around", 3), ("ConvGRU", 6)):
        _, fast = split(name)
        narrowed = [n for n in fast.graph.nodes if n.target == "narrow"]
        cuts = [n for n in narrowed if n.args[0].op == "get_attr"]
        assert len(cuts) == pieces, name


def test_nothing_is_left_of_a_join_that_had_no_other_reader() -> None:
    assert not [n for n in split("ConvLSTM")[1].graph.nodes if n.target is torch.cat]
    kept = [n for n in split("join read twice")[1].graph.nodes if n.target is torch.cat]
    assert len(kept) == FRAMES


@pytest.mark.parametrize("name", ["two layers", "ConvGRU", "dilated", "3-d", "linear"])
def test_a_graph_of_torch_export(name: str) -> None:
    model, x = CASES[name].model(), CASES[name].inputs(2)
    fast = optimized(torch.export.export(model, (x,), strict=False), x)
    assert [remark.status for remark in remarks(fast)] == ["applied"] * CASES[name].sites
    close(fast(x), model(x))
    exported = torch.export.export(fast, (x,), strict=False).module()
    close(exported(x), model(x))


def test_halves_spelled_apart_need_no_split() -> None:
    model, x = Apart().double(), clip()
    fast = optimized(model, x)
    assert not remarks(fast)
    assert (convolutions(model, x), convolutions(fast, x)) == (2 * FRAMES, 1 + FRAMES)
    close(fast(clip(3)), model(clip(3)))


# -- layouts -------------------------------------------------------------------------------------


class ViewedGates(ConvLSTM):
    """Gates are taken by a view, which needs the layout that the join gave the layer."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, SIDE, SIDE)
        for t in range(x.size(1)):
            frame = x[:, t].contiguous(memory_format=torch.channels_last)
            gates = self.conv(torch.cat([frame, h], 1)).view(x.size(0), -1)
            h = torch.tanh(gates[:, : HIDDEN * SIDE * SIDE]).view(-1, HIDDEN, SIDE, SIDE)
        return h


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_layer_hands_on_the_layout_of_the_join(dtype: torch.dtype) -> None:
    model, x = ViewedGates().to(dtype), clip().to(dtype)
    fast = optimized(model, x)
    assert [remark.status for remark in remarks(fast)] == ["applied"]
    torch.testing.assert_close(fast(clip(3).to(dtype)), model(clip(3).to(dtype)))


# -- strides ---------------------------------------------------------------------------------------


class Strided(nn.Module):
    """A strided layer; its state is brought back to the size of the frame."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN + HIDDEN, HIDDEN, 3, **settings)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t in range(x.size(1)):
            y = self.conv(torch.cat([x[:, t], h], 1)).tanh()
            h = F.interpolate(y, size=(SIDE, SIDE))
        return h


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"stride": (1, 2), "padding": "valid"},
        {"stride": 2, "dilation": 2, "padding": (2, 1)},
        {"stride": 2, "padding": 2, "padding_mode": "circular"},
    ],
)
def test_strides_stay(settings: dict[str, Any]) -> None:
    model = Strided(**settings).double()
    fast = optimized(model, clip())
    assert [remark.status for remark in remarks(fast)] == ["applied"]
    assert convolutions(fast, clip()) == 1 + FRAMES
    close(fast(clip(3)), model(clip(3)))


def test_the_rule_is_stateless_and_named() -> None:
    assert SplitConcat().name == "split-concat"
    assert SplitConcat.exact
    assert not vars(SplitConcat())
