"""A layer over a frame joined with a state becomes two, and the frames' half runs once.

Everything runs in float64, where a right rewrite is right to 1e-12 and a wrong one is not, and
unverified: verification is a net, and a net is not what makes a rewrite right.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxtemporal
from benchmarks.measure import CountConvolutions
from fxtemporal.ir.reasons import Code
from fxtemporal.passes.split_concat import SplitConcat
from tests.zoo import noise

IN, HIDDEN, FRAMES, SIDE = 3, 4, 6, 5

# nn.Conv2d itself warns that "same" with an even kernel copies its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- cells -----------------------------------------------------------------------------------------

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvLSTM(nn.Module):
    """The gates from one convolution over ``[x_t, h]``; ``extents`` 1, 2 or 3 dimensions."""

    def __init__(self, channels: int = IN, extents: int = 2, **settings: Any) -> None:
        super().__init__()
        settings = {"kernel_size": 3, "padding": 1, **settings}
        self.conv = CONVOLUTIONS[extents](channels + HIDDEN, 4 * HIDDEN, **settings)

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat([x, h], dim=1)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(self.joined(x, h)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def run(self, frames: Any) -> list[Tensor]:
        h = c = frames[0].new_zeros(frames[0].size(0), HIDDEN, *frames[0].shape[2:])
        outs = []
        for x in frames:
            h, c = self.step(x, h, c)
            outs.append(h)
        return outs

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.run([x[:, t] for t in range(x.size(1))]), dim=1)


class StateFirst(ConvLSTM):
    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat((h, x), dim=-3)


class JoinReadTwice(ConvLSTM):
    """The join has another reader, for which it stays."""

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        both = torch.cat([x, h], dim=1)
        self.mean = both.mean(dim=1, keepdim=True)
        return both

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, h], dim=1)
        i, f, o, g = self.conv(both).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g) + both.mean(1, keepdim=True)
        return torch.sigmoid(o) * torch.tanh(c), c


class ThreeParts(ConvLSTM):
    """Frames, two tensors computed of them, and the state, in any order."""

    def __init__(self, order: str = "xhy") -> None:
        super().__init__(2 * IN)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, x.size(3), x.size(4))
        outs = []
        for t in range(x.size(1)):
            parts = {"x": x[:, t], "y": torch.tanh(x[:, t]), "z": x[:, t].sin(), "h": h}
            i, _f, _o, g = self.conv(torch.cat([parts[k] for k in self.order], 1)).chunk(4, 1)
            h = torch.sigmoid(i) * torch.tanh(g)
            outs.append(h)
        return torch.stack(outs, dim=1)


class TwoStates(ConvLSTM):
    """``[h, x_t, c]``: the state stands at both ends."""

    def __init__(self) -> None:
        super().__init__(IN + HIDDEN)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(torch.cat([h, x, c], dim=1)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Peephole(ConvLSTM):
    """Gates that see the memory too, through weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.peep = nn.Parameter(noise(3, HIDDEN, 1, 1).double())

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(torch.cat([x, h], dim=1)).split(HIDDEN, dim=1)
        i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        return torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c), c


class ConvGRU(nn.Module):
    """Two convolutions over ``[x_t, h]``, one over ``[x_t, r * h]``."""

    def __init__(self) -> None:
        super().__init__()
        self.reset, self.update, self.new = (
            nn.Conv2d(IN + HIDDEN, HIDDEN, 3, padding=1) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), HIDDEN, x.size(3), x.size(4), dtype=x.dtype)
        outs = []
        for frame in x.unbind(1):
            both = torch.cat([frame, h], dim=1)
            z, r = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([frame, r * h], dim=1)))
            outs.append(h)
        return torch.stack(outs, dim=1)


class LinearLSTM(nn.Module):
    """An LSTM by hand: one linear layer over ``[x_t, h]``, (B, T, F)."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.gates = nn.Linear(IN + HIDDEN, 4 * HIDDEN)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        outs = []
        for t in range(x.size(1)):
            both = torch.cat([x[:, t], h], dim=-1)
            if self.functional:
                gates = F.linear(both, self.gates.weight, self.gates.bias)
            else:
                gates = self.gates(both)
            i, f, o, g = gates.chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outs.append(h)
        return torch.stack(outs, dim=1)


class Direct(nn.Module):
    """The state is the layer's own result: nothing stands between the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN + HIDDEN, HIDDEN, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, x.size(3), x.size(4))
        for t in range(x.size(1)):
            h = self.conv(torch.cat([x[:, t], h], dim=1))
        return h


class Features(ConvLSTM):
    """Frames go through a convolution, batch norm and an in-place ReLU first."""

    def __init__(self) -> None:
        super().__init__(5)
        self.body = nn.Sequential(
            nn.Conv2d(IN, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), HIDDEN, x.size(3), x.size(4))
        for t in range(x.size(1)):
            h, c = self.step(self.body(x[:, t]), h, c)
        return h


class TwoLayers(nn.Module):
    """The second layer reads the states of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvLSTM(IN), ConvLSTM(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Bidirectional(nn.Module):
    """Forwards, and backwards; with ``shared`` by the same cell."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.ahead = ConvLSTM()
        self.back = self.ahead if shared else ConvLSTM()

    def forward(self, x: Tensor) -> Tensor:
        frames = [x[:, t] for t in range(x.size(1))]
        ahead, back = self.ahead.run(frames), self.back.run(frames[::-1])[::-1]
        return torch.stack([torch.cat(p, 1) for p in zip(ahead, back, strict=True)], dim=1)


class TimeMajor(ConvLSTM):
    """(T, B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.run([x[t] for t in range(x.size(0))]))


class OneVideo(ConvLSTM):
    """(T, C, H, W): frames have no batch, and channels are dimension 0."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(HIDDEN, *x.shape[2:])
        outs = []
        for t in range(x.size(0)):
            i, _f, _o, g = self.conv(torch.cat([x[t], h], dim=0)).chunk(4, dim=0)
            h = torch.sigmoid(i) * torch.tanh(g)
            outs.append(h)
        return torch.stack(outs)


class Coordinates(nn.Module):
    """The state is a constant: each frame is joined with the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN + 2, HIDDEN, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.size(3), dtype=x.dtype)[:, None] + 2 * x.new_zeros(x.size(4))
        grid = torch.stack([rows, rows.cos()]).expand(x.size(0), -1, -1, -1)
        outs = [self.conv(torch.cat([x[:, t], grid], 1)).relu() for t in range(x.size(1))]
        return torch.stack(outs, dim=1)


class ComputedWeight(ConvLSTM):
    """One weight for all steps, which is no parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * 2
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t in range(x.size(1)):
            gates = F.conv2d(torch.cat([x[:, t], h], 1), weight, self.conv.bias, padding=1)
            h = torch.tanh(gates[:, :HIDDEN])
        return h


class Apart(nn.Module):
    """``wx(x_t) + wh(h)``: what the rule makes of a cell, spelled so by its author."""

    def __init__(self) -> None:
        super().__init__()
        self.wx = nn.Conv2d(IN, HIDDEN, 3, padding=1)
        self.wh = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t in range(x.size(1)):
            h = torch.tanh(self.wx(x[:, t]) + self.wh(h))
        return h


def clip(batch: int = 2, frames: int = FRAMES, extents: int = 2) -> Tensor:
    return noise(batch, frames, IN, *[SIDE] * extents).double()


def time_major(batch: int = 2, frames: int = FRAMES) -> Tensor:
    return clip(batch, frames).transpose(0, 1)


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


def optimized(model: nn.Module, *inputs: Any, **more: Any) -> fx.GraphModule:
    return fxtemporal.optimize(model, inputs, tune="static", **{"verify": False, **more})


@cache
def split(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """A model and what becomes of it; for tests that change neither."""
    model = CASES[name].model()
    return model, optimized(model, CASES[name].inputs(2))


def remarks(fast: nn.Module) -> list[fxtemporal.Remark]:
    return [r for r in fxtemporal.report(fast).remarks if r.rule == "split-concat"]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def convolutions(model: nn.Module, x: Tensor) -> int:
    with CountConvolutions() as counter:
        model(x)
    return counter.count


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
    assert "test_split_concat.py:" in remark.location
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


# -- layouts, and what is written ------------------------------------------------------------------


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


class WrittenState(Direct):
    """One tensor is the state of each step, written between them."""

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_ones(x.size(0), HIDDEN + 1, *x.shape[3:])
        state = memory[:, 1:]
        outs = []
        for t in range(x.size(1)):
            outs.append(self.conv(torch.cat([x[:, t], state], 1)))
            memory.mul_(2)
        return torch.stack(outs, 1)


def test_a_state_that_is_written_is_read_at_each_step() -> None:
    model = WrittenState().double()
    fast = optimized(model, clip())
    assert [remark.status for remark in remarks(fast)] == ["missed"]
    assert "visible-write" in {str(r.code) for remark in remarks(fast) for r in remark.reasons}
    assert convolutions(fast, clip()) == FRAMES
    close(fast(clip(3)), model(clip(3)))


def test_coordinates_are_no_state_and_the_join_is_batched_whole() -> None:
    model = Coordinates().double()
    fast = optimized(model, clip())
    assert "split-concat" not in {r.rule for r in remarks(fast) if r.status == "applied"}
    assert convolutions(fast, clip()) == 1
    close(fast(clip(3)), model(clip(3)))


class WeightOfFrame(ConvLSTM):
    """All steps share a weight that the first frame makes."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * x[:, 0].mean()
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t in range(x.size(1)):
            h = F.conv2d(torch.cat([x[:, t], h], 1), weight, padding=1)[:, :HIDDEN]
        return h


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


# -- refused ---------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    model = ConvLSTM()
    model.conv.register_forward_hook(lambda module, args, out: out * 2)
    return model


def parametrized() -> nn.Module:
    model = ConvLSTM()
    parametrizations.weight_norm(model.conv)
    return model


def replaced() -> nn.Module:
    model = ConvLSTM()
    plain = model.conv.forward
    model.conv.forward = lambda x: plain(x) * 2
    return model


def grouped() -> nn.Module:
    return ConvLSTM(channels=HIDDEN, groups=2)


class WritesJoin(ConvLSTM):
    """The join is written before the layer reads it."""

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        both = torch.cat([x, h], dim=1)
        both[:, :1].mul_(2)
        return both


class WritesState(ConvLSTM):
    """A part is written between the join and the layer."""

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        h = h * 1
        both = torch.cat([x, h], dim=1)
        h.zero_()
        return both


class WritesFrames(ConvLSTM):
    """The clip is written when the first step has been taken."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        frames = [x[:, t] for t in range(x.size(1))]
        h = c = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for frame in frames:
            h, c = self.step(frame, h, c)
            x.mul_(2)
        return h


class MixedDtypes(ConvLSTM):
    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat([x.float(), h], dim=1)


class TrainedBody(Features):
    """Batch norm in training mode keeps the frames apart."""

    def eval(self) -> TrainedBody:
        return self.train()


def group_inputs(batch: int) -> Tensor:
    return noise(batch, FRAMES, HIDDEN, SIDE, SIDE).double()


REFUSED: dict[str, tuple[Callable[[], nn.Module], Code, Callable[[int], Tensor]]] = {
    "hooks": (hooked, Code.HOOKED_MODULE, clip),
    "parametrization": (parametrized, Code.PARAMETRIZED_MODULE, clip),
    "forward replaced": (replaced, Code.SUBCLASS, clip),
    "groups": (grouped, Code.UNSUPPORTED_OP, group_inputs),
    "join written": (WritesJoin, Code.VISIBLE_WRITE, clip),
    "state written": (WritesState, Code.VISIBLE_WRITE, clip),
    "frames written": (WritesFrames, Code.VISIBLE_WRITE, clip),
    "dtypes": (MixedDtypes, Code.UNSUPPORTED_OP, clip),
    "batch norm in training": (TrainedBody, Code.TRAINING_BATCHNORM, clip),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_the_same_numbers(name: str) -> None:
    build, code, inputs = REFUSED[name]
    model = build().double().eval()
    fast = optimized(model, inputs(2))
    (remark,) = remarks(fast)
    assert remark.status == "missed"
    assert {reason.code for reason in remark.reasons} == {code}
    assert remark.detail["steps"] == FRAMES
    close(fast(inputs(3).clone()), model(inputs(3).clone()))


# -- no candidates ---------------------------------------------------------------------------------


class JoinedFrames(nn.Module):
    """All parts are frames: the loop is re-rolled as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * IN, HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.conv(torch.cat([x[:, t], x[:, t].relu()], 1)) for t in range(x.size(1))]
        return torch.stack(outs, 1)


class OwnConvolutions(nn.Module):
    """Each step has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(IN + HIDDEN, HIDDEN, 3, padding=1) for _ in range(FRAMES)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        for t, conv in enumerate(self.convs):
            h = torch.tanh(conv(torch.cat([x[:, t], h], 1)))
        return h


class StatesAlone(nn.Module):
    """No part is a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * IN, IN, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = g = x[:, 0]
        for _ in range(4):
            h, g = torch.tanh(self.conv(torch.cat([h, g], 1))), h
        return h


class OtherDimension(nn.Module):
    """Frame and state are joined along a dimension of space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN, IN, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.size(1)):
            h = torch.tanh(self.conv(torch.cat([x[:, t], h], 2))[:, :, :SIDE])
        return h


class OneStep(ConvLSTM):
    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN, *x.shape[3:])
        return self.step(x[:, 0], h, h)[0]


@pytest.mark.parametrize(
    "kind",
    [JoinedFrames, OwnConvolutions, StatesAlone, OtherDimension, OneStep, WeightOfFrame],
)
def test_nothing_to_split(kind: type[nn.Module]) -> None:
    model = kind().double()
    fast = optimized(model, clip())
    assert not remarks(fast)
    close(fast(clip(3)), model(clip(3)))


class FourFrames(ConvLSTM):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv.weight.new_zeros(2, HIDDEN, SIDE, SIDE)
        for t in range(4):
            h = torch.tanh(self.conv(torch.cat([x[:, t], h], 1))[:, :HIDDEN])
        return h


def test_without_example_inputs_there_are_no_frames() -> None:
    model = FourFrames().double()
    fast = fxtemporal.optimize(model)
    assert not remarks(fast)
    close(fast(clip()), model(clip()))


def test_the_rule_is_stateless_and_named() -> None:
    assert SplitConcat().name == "split-concat"
    assert SplitConcat.exact
    assert not vars(SplitConcat())
