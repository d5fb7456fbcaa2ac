"""Folded frames in chunks: the same numbers, less memory at once, and within the limit."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxtemporal
from fxtemporal import Code, Tune
from fxtemporal.analysis.peak_memory import peak
from fxtemporal.analysis.row_regions import regions_of
from fxtemporal.capture.capture import capture
from fxtemporal.ir.row_chunks import cut, joined, shaped
from fxtemporal.lowering.pt2 import load_exported, save_exported
from fxtemporal.passes import DEFAULT_PASSES, fold_in_chunks
from fxtemporal.passes.fold_in_chunks import FoldInChunks
from fxtemporal.passes.pipeline import Outcome, run_rules
from fxtemporal.passes.time_distribute import TimeDistribute
from tests.referees import Referee, refereed
from tests.zoo import ZOO, Awkward, noise

Forward = Callable[..., Any]


class PerFrame(nn.Module):
    """``body`` on each frame of (B, T, 3, 8, 8)."""

    def __init__(self, body: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.run = body
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        self.eval()

    def forward(self, x: Tensor) -> Any:
        frames = [self.run(self, x[:, t]) for t in range(x.size(1))]
        return pytree.tree_map(lambda *lanes: torch.stack(lanes, 1), *frames)


def plain(self: Any, x: Tensor) -> Tensor:
    return self.linear(F.relu(self.norm(self.conv(x))).mean((-2, -1)))


def residual(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.norm(self.conv(x)))
    return (y + self.deep(y) * self.scale).mean((-2, -1))


def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x).relu_()
    y += 1
    y.mul_(y.mean((1, 2, 3), keepdim=True))
    return self.deep(y).amax((-2, -1))


def two_outputs(self: Any, x: Tensor) -> Any:
    y = F.relu(self.conv(x))
    return {"maps": self.deep(y), "means": self.linear(y.mean((-2, -1)))}


def a_part_of_a_map(self: Any, x: Tensor) -> Tensor:
    return self.deep(self.conv(x))[:, :, 0, 1]


def tuples(self: Any, x: Tensor) -> Tensor:
    a, b = self.conv(x).chunk(2, dim=1)
    values, places = (a * b.sigmoid()).flatten(2).topk(3, dim=-1)
    y = torch.cat([values, values.max(dim=2, keepdim=True).values], -1)
    return y * places.size(1)


def sizes(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    batch, channels, height, width = y.shape
    y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(y.size(0), -1)
    return y.view(batch, height * width, -1).mean(1) / y.size(1) * batch


def tokens(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x).flatten(2).transpose(1, 2)
    z, weights = self.attend(y, y, y)
    return self.lstm(y + z)[0][:, -1] * weights.amax((1, 2)).unsqueeze(1)


def samples_meet(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.conv(x))
    y = y - y.mean(0, keepdim=True)
    return self.linear(self.deep(y).mean((-2, -1)))


def views_alone(self: Any, x: Tensor) -> Tensor:
    return self.linear(self.deep(self.conv(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


BODIES = (
    plain,
    residual,
    in_place,
    two_outputs,
    a_part_of_a_map,
    tuples,
    sizes,
    tokens,
    samples_meet,
    views_alone,
)


def clip(batch: int = 2, frames: int = 6, side: int = 8) -> Tensor:
    return noise(batch, frames, 3, side, side)


def chunked(
    model: nn.Module,
    example: tuple[Any, ...],
    count: int | None,
    frontend: Any = None,
    rules: tuple[Any, ...] = DEFAULT_PASSES,
) -> Outcome:
    """Every region in ``count`` chunks; None: whole."""
    program = capture(model, example, {}, **({"frontend": frontend} if frontend else {}))
    keys = [region.key for region in regions_of(run_rules(program, rules).program)]
    chunks = (FoldInChunks(dict.fromkeys(keys, count)),) if count else ()
    return run_rules(program, (*rules, *chunks))


def of_chunks(outcome: Outcome) -> list[Any]:
    return [remark for (rule, _), remark in outcome.remarks if rule == "fold-in-chunks"]


def assert_as_exact(model: nn.Module, module: nn.Module, x: Tensor) -> None:
    """As close to float64 as float32 rounding explains."""
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
        actual = module(x.clone())
    expected, actual = pytree.tree_leaves(reference), pytree.tree_leaves(actual)
    assert len(expected) == len(actual)
    for want, have in zip(expected, actual, strict=True):
        assert have.shape == want.shape
        assert have.dtype == torch.float32
        error = (have.double() - want).abs().max() / want.abs().max()
        assert error < 2e-6


# ---------------------------------------------------------------------------------------- pieces


@given(rows=st.integers(0, 12), pieces=st.integers(1, 15))
def test_pieces_joined_are_the_whole(rows: int, pieces: int) -> None:
    x = torch.arange(rows * 2).view(rows, 2)
    parts = cut(x, pieces)
    assert len(parts) == pieces
    assert all(part._base is x or part._base is x._base for part in parts)
    if rows:
        assert {part.size(0) for part in parts} <= {max(1, rows // pieces), rows // pieces + 1}
    assert torch.equal(joined([part + 1 for part in parts], x), x + 1)


def test_a_shape_takes_no_memory() -> None:
    folded, piece = torch.ones(12, 3), torch.ones(2, 5, 7, dtype=torch.float64)
    stand_in = shaped(piece, folded)
    assert (tuple(stand_in.shape), stand_in.dtype) == ((12, 5, 7), torch.float64)
    assert stand_in.untyped_storage().nbytes() == 8


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_chunks_give_the_same_numbers(body: Forward, count: int) -> None:
    model = PerFrame(body)
    outcome = chunked(model, (clip(),), count)
    remarks = of_chunks(outcome)
    assert remarks
    assert all(remark.status == "applied" for remark in remarks)
    for batch in (2, 1, 5):
        assert_as_exact(model, outcome.program.gm, clip(batch))
    assert regions_of(outcome.program) == ()


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_chunks_of_exported_programs(body: Forward) -> None:
    model = PerFrame(body)
    outcome = chunked(model, (clip(),), 3, "export")
    assert of_chunks(outcome)
    assert_as_exact(model, outcome.program.gm, clip())


RANDOM = ("TrainingDropout", "AlwaysDropout")
STEADY = [cls for cls in ZOO if cls.__name__ not in RANDOM]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cls", STEADY, ids=lambda cls: cls.__name__)
def test_the_zoo_in_chunks(cls: type[Awkward]) -> None:
    model = cls.build()
    try:
        program = capture(model, model.example())
    except fxtemporal.CaptureError:
        return  # it is not to be captured
    whole = run_rules(program, DEFAULT_PASSES)
    keys = [region.key for region in regions_of(whole.program)]
    outcome = run_rules(program, (*DEFAULT_PASSES, FoldInChunks(dict.fromkeys(keys, 3))))
    assert [remark.status for remark in of_chunks(outcome)] == ["applied"] * len(keys)
    for batch, frames in model.sizes:
        x = model.example(batch, frames)
        expected, actual = (outcome_of(o.program.gm, x) for o in (whole, outcome))
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def outcome_of(module: nn.Module, x: tuple[Any, ...]) -> Any:
    """None for a size that the trace does not allow."""
    try:
        return copy.deepcopy(module)(*copy.deepcopy(x))
    except fxtemporal.SpecializationError:
        return None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_keep_the_dtype(dtype: torch.dtype) -> None:
    model = PerFrame(residual).to(dtype)
    x = clip().to(dtype)
    outcome = chunked(model, (x,), 4)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-2
    torch.testing.assert_close(outcome.program.gm(x), model(x), rtol=tolerance, atol=tolerance)


def test_gradients_reach_the_same_parameters() -> None:
    model = PerFrame(residual)
    module = chunked(model, (clip(),), 4).program.gm
    assert dict(module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    weights = list(model.conv.parameters())
    expected = torch.autograd.grad(model(clip()).square().sum(), weights)
    actual = torch.autograd.grad(module(clip()).square().sum(), weights)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_two_inputs_of_a_region_are_cut_alike() -> None:
    class Differences(PerFrame):
        def forward(self, x: Tensor) -> Tensor:
            y = [self.conv(x[:, t] - x[:, t - 1]) for t in range(1, x.size(1))]
            return torch.stack([F.relu(z).mean((-2, -1)) for z in y], 1)

    model = Differences(plain)
    outcome = chunked(model, (clip(),), 3)
    assert len(of_chunks(outcome)) == 1
    for batch in (2, 3):
        assert_as_exact(model, outcome.program.gm, clip(batch))


def test_windows_through_forms_of_conv3d_are_cut() -> None:
    class Windows(PerFrame):
        def __init__(self) -> None:
            super().__init__(plain)
            self.spatial = nn.Conv3d(3, 32, (1, 3, 3))
            self.temporal = nn.Conv3d(32, 8, (2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            windows = [x[:, t : t + 3].transpose(1, 2) for t in range(4)]
            y = [self.temporal(F.relu(self.spatial(w))).mean((2, 3, 4)) for w in windows]
            return torch.stack(y, 1)

    model = Windows()
    outcome = chunked(model, (clip(),), 2)
    (remark,) = of_chunks(outcome)
    assert remark.detail["peak_bytes_after"] < 0.8 * remark.detail["peak_bytes_before"]
    called = [getattr(n.target, "__name__", "") for n in outcome.program.graph.nodes]
    assert called.count("conv3d_spatial") == called.count("conv3d_temporal") == 2
    for batch in (2, 3):
        assert_as_exact(model, outcome.program.gm, clip(batch))


def test_frames_folded_by_hand_are_cut_too() -> None:
    class ByHand(PerFrame):
        def forward(self, x: Tensor) -> Tensor:
            batch, frames = x.shape[:2]
            return plain(self, x.reshape(batch * frames, 3, 8, 8)).view(batch, frames, -1)

    model = ByHand(plain)
    outcome = chunked(model, (clip(),), 4)
    assert of_chunks(outcome)[0].detail["frames"] == 6
    for batch in (2, 3):
        assert_as_exact(model, outcome.program.gm, clip(batch))


# ------------------------------------------------------------------------------- what is not cut


def nodes(outcome: Outcome) -> set[str]:
    return {n.name.rstrip("_0123456789") for r in regions_of(outcome.program) for n in r.nodes}


def test_a_hooked_layer_ends_a_region() -> None:
    model = PerFrame(residual)
    model.deep.register_forward_hook(lambda *_: None)
    outcome = chunked(model, (clip(),), None)
    assert not any("deep" in name for name in nodes(outcome))
    assert_as_exact(model, chunked(model, (clip(),), 3).program.gm, clip(3))


def test_a_write_that_others_see_is_not_cut() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x.flatten(0, 1))
            before = y.mean((1, 2, 3))
            seen = y.view(-1)
            y.relu_()
            z = y.sum((1, 2, 3))
            x.mul_(2)
            return before, z, seen, self.conv(x.flatten(0, 1))

    torch.manual_seed(0)
    model = Folded()
    outcome = chunked(model, (clip(),), 3)
    assert of_chunks(outcome)
    assert not any(
        node.name.startswith("relu_") for r in regions_of(outcome.program) for node in r.nodes
    )
    for batch in (2, 4):
        x, y = clip(batch), clip(batch)
        torch.testing.assert_close(outcome.program.gm(x), model(y), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, y)


def test_numbers_of_broadcast_rows_are_not_cut() -> None:
    class Weighted(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x.flatten(0, 1).exp() * by.exp()

    outcome = chunked(Weighted(), (clip(), noise(12, 1, 1, 1)), 3)
    names = [str(node.target) for node in outcome.program.graph.nodes]
    assert sum(name.endswith("mul>") or name == "mul" for name in names) == 1
    assert names.count("exp") == 1 + 3
    x, by = clip(), noise(12, 1, 1, 1)
    torch.testing.assert_close(outcome.program.gm(x, by), Weighted()(x, by))


def test_rows_that_meet_are_not_cut() -> None:
    class Meets(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x.flatten(0, 1).exp()
            return y.softmax(0), y.cumsum(0), y.flip(0), y[1:], y.sum(), y.transpose(0, 1).exp()

    outcome = chunked(Meets(), (clip(),), 4)
    for batch in (2, 3):
        torch.testing.assert_close(outcome.program.gm(clip(batch)), Meets()(clip(batch)))


# ------------------------------------------------------------------------------------ the estimate


class LivePeak(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made here and of ``given``."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.alive = [weakref.ref(x) for x in given]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.alive += [weakref.ref(x) for x in made]
        storages = {}
        for ref in self.alive:
            if (x := ref()) is not None:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


CONVOLUTIONAL = (plain, residual, in_place, two_outputs, a_part_of_a_map, sizes)
"""Of ops that make nothing besides their result."""


def measured(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), LivePeak(x) as live:
        module(x)
    return live.bytes


@pytest.mark.parametrize("count", [None, 2, 3, 6])
@pytest.mark.parametrize(
    "body",
    [plain, residual, in_place, two_outputs, a_part_of_a_map, sizes],
    ids=lambda f: f.__name__,
)
def test_the_estimate_is_what_a_call_holds(body: Forward, count: int | None) -> None:
    model, x = PerFrame(body), clip(side=16)
    program = chunked(model, (x,), count).program
    program.gm(x)
    assert peak(program).bytes == pytest.approx(measured(program.gm, x), rel=0.01)


def test_the_estimate_of_a_loop_is_what_a_call_holds() -> None:
    model, x = PerFrame(residual), clip(side=16)
    program = capture(model, (x,))
    assert peak(program).bytes == pytest.approx(measured(program.gm, x), rel=0.01)


def test_the_estimate_counts_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            y = x.exp().view(-1)  # 4 KB, and a view of it
            return (y + self.weight)[:10].relu_()

    program = capture(Two(), (torch.ones(10, 100),))
    found = peak(program)
    assert found.bytes == 3 * 4000  # the input, y, and the sum
    assert found.node is not None
    assert found.node.name == "add"
    assert peak(program, among={found.node}).bytes == 4000


@pytest.mark.parametrize("body", [plain, residual, in_place], ids=lambda f: f.__name__)
def test_more_chunks_hold_less(body: Forward) -> None:
    model, x = PerFrame(body), clip(side=16)
    bytes_of = [peak(chunked(model, (x,), n).program).bytes for n in (None, 2, 3, 6)]
    assert bytes_of == sorted(bytes_of, reverse=True)
    assert bytes_of[-1] < 0.5 * bytes_of[0]
    remark = of_chunks(chunked(model, (x,), 6))[0]
    assert remark.detail == {
        "chunks": 6,
        "frames": 6,
        "peak_bytes_before": bytes_of[0],
        "peak_bytes_after": bytes_of[-1],
    }
    assert "test_chunks.py" in remark.location


# -------------------------------------------------------------------------------------- the limit


MEASURED = Referee()


def limited(
    model: nn.Module, x: Tensor, limit: Any, referee: Any = MEASURED, seconds: float = 60.0
) -> fx.GraphModule:
    tune = Tune(seconds=seconds, memory_limit=limit, cache=False)
    return refereed(referee, model, (x,), tune, ["time-distribute"])


def remarks(module: nn.Module, rule: str) -> list[Any]:
    return [remark for remark in fxtemporal.report(module).remarks if remark.rule == rule]


def estimated(model: nn.Module, x: Tensor, count: int | None) -> int:
    return peak(chunked(model, (x,), count, rules=(TimeDistribute(),)).program).bytes


def folding_wins(before: Any, after: Any) -> float:
    """Loops lose against folded frames, which lose against nothing."""
    loops = [not any("frames" in n.meta for n in m.graph.nodes) for m in (before, after)]
    chunks = [any(n.target is cut for n in m.graph.nodes) for m in (before, after)]
    shorter = not any(chunks) and len(after.graph.nodes) < len(before.graph.nodes)
    assert not (chunks[0] and loops[1])
    return 2.0 if shorter or (loops[0] and not loops[1]) else 0.5


FOLDING_WINS = Referee(folding_wins, times=lambda name: 1.0)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_as_many_chunks_as_the_limit_asks_for(count: int) -> None:
    model, x = PerFrame(residual), clip(side=16)
    limit = estimated(model, x, count)
    result = limited(model, x, limit, FOLDING_WINS)
    (remark,) = remarks(result, "fold-in-chunks")
    assert (remark.status, remark.detail["chunks"]) == ("applied", count)
    assert remark.detail["peak_bytes_before"] == estimated(model, x, None)
    assert remark.detail["peak_bytes_after"] == limit
    assert measured(result, x) <= 1.01 * limit
    assert fxtemporal.report(result).settings["tune"]["memory_limit"] == limit
    for batch, frames in ((2, 6), (3, 6), (1, 1), (2, 9)):
        assert_as_exact(model, result, clip(batch, frames, 16))
    assert result.state_dict().keys() == model.state_dict().keys()
    assert "fold-in-chunks" in str(fxtemporal.report(result))


def test_what_fits_whole_runs_whole() -> None:
    model, x = PerFrame(residual), clip()
    result = limited(model, x, "1GiB", FOLDING_WINS)
    (remark,) = remarks(result, "fold-in-chunks")
    assert remark.status == "missed"
    assert [reason.code for reason in remark.reasons] == [Code.NOT_FASTER]
    assert "in one piece" in remark.reasons[0].text
    assert remark.detail["peak_bytes_before"] == estimated(model, x, None)
    assert not any(node.target is cut for node in result.graph.nodes)


def test_the_limit_holds_without_time_to_measure() -> None:
    model, x = PerFrame(residual), clip(side=16)
    limit = estimated(model, x, 4)
    result = limited(model, x, limit, seconds=1e-6)
    assert measured(result, x) <= 1.01 * limit
    for remark in remarks(result, "fold-in-chunks"):
        assert remark.detail["peak_bytes_after"] <= limit


def test_a_limit_that_cannot_be_met_leaves_the_loop_and_says_so() -> None:
    model, x = PerFrame(residual), clip()
    result = limited(model, x, "1KiB")
    (loop,), (whole,) = remarks(result, "time-distribute"), remarks(result, "fold-in-chunks")
    for remark in (loop, whole):
        assert remark.status == "missed"
        assert [reason.code for reason in remark.reasons] == [Code.MEMORY_LIMIT]
        assert "1 KiB" in remark.reasons[0].text
    assert whole.detail["peak_bytes_after"] > 1024
    assert sum(node.target == "conv" for node in result.graph.nodes) == 6
    assert_as_exact(model, result, x)


def test_only_the_loop_that_does_not_fit_is_left() -> None:
    class Two(PerFrame):
        """The frames of the first loop meet, so that it runs in no chunks."""

        def forward(self, x: Tensor, z: Tensor) -> Any:
            large = [(x[:, t] * x[:, t].softmax(0)).sum((1, 2, 3)) for t in range(x.size(1))]
            return torch.stack(large, 1), super().forward(z)

    model, inputs = Two(plain), (clip(side=32), clip(side=16))
    loop = peak(capture(model, inputs)).bytes
    folded = peak(chunked(model, inputs, 6).program).bytes
    assert loop < 0.8 * folded
    tune = Tune(memory_limit=(loop + folded) // 2, cache=False)
    result = refereed(FOLDING_WINS, model, inputs, tune)
    first, second = remarks(result, "time-distribute")
    assert (first.status, second.status) == ("missed", "applied")
    assert [reason.code for reason in first.reasons] == [Code.MEMORY_LIMIT]
    torch.testing.assert_close(result(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_large_activations_are_tried_in_chunks_without_a_limit() -> None:
    model, x = PerFrame(residual), clip()
    assert remarks(limited(model, x, None, FOLDING_WINS), "fold-in-chunks") == []
    small_cache = Referee(folding_wins, large=1000)
    (remark,) = remarks(limited(model, x, None, small_cache), "fold-in-chunks")
    assert [reason.code for reason in remark.reasons] == [Code.NOT_FASTER]


def test_chunks_that_are_faster_are_kept_without_a_limit() -> None:
    def race(before: Any, after: Any) -> float:
        folded = any("frames" in n.meta for n in after.graph.nodes)
        return 1.5 if folded or len(after.graph.nodes) > len(before.graph.nodes) else 0.5

    referee = Referee(race, times=lambda chunks: 1 / int(chunks), large=1000)
    model, x = PerFrame(residual), clip()
    result = limited(model, x, None, referee)
    (remark,) = remarks(result, "fold-in-chunks")
    assert (remark.status, remark.detail["chunks"]) == ("applied", 6)
    for batch, frames in ((2, 6), (3, 6), (1, 1)):
        assert_as_exact(model, result, clip(batch, frames))


def test_a_loop_that_did_not_pay_whole_comes_back_in_chunks() -> None:
    def race(before: Any, after: Any) -> float:
        return 1.5 if any(n.target is cut for n in after.graph.nodes) else 0.5

    def times(chunks: str) -> float:
        return 2.0 if chunks == "1" else 1.0

    model, x = PerFrame(residual), clip()
    whole = limited(model, x, None, Referee(race, times))
    assert remarks(whole, "time-distribute")[0].status == "missed"
    result = limited(model, x, None, Referee(race, times, large=1000))
    assert [remark.status for remark in fxtemporal.report(result).remarks] == ["applied"] * 2
    assert_as_exact(model, result, clip(3))


def test_a_loop_that_is_faster_than_chunks_that_fit_stays() -> None:
    def race(before: Any, after: Any) -> float:
        return 0.5 if any(n.target is cut for n in after.graph.nodes) else 2.0

    model, x = PerFrame(residual), clip(side=16)
    result = limited(model, x, estimated(model, x, 4), Referee(race))
    (remark,) = fxtemporal.report(result).remarks
    assert (remark.rule, remark.status) == ("time-distribute", "missed")
    assert [reason.code for reason in remark.reasons] == [Code.NOT_FASTER]
    assert "as a loop" in remark.reasons[0].text


def test_chunks_with_wrong_numbers_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_in_chunks, "joined", joined_wrongly)
    model, x = PerFrame(residual), clip(side=16)
    result = limited(model, x, estimated(model, x, 4), FOLDING_WINS)
    chunks, whole = remarks(result, "fold-in-chunks")
    assert (chunks.status, chunks.reasons[0].code) == ("failed", Code.WRONG_RESULT)
    assert (whole.status, whole.reasons[0].code) == ("missed", Code.MEMORY_LIMIT)
    assert_as_exact(model, result, x)


def joined_wrongly(pieces: Any, folded: Tensor) -> Tensor:
    return torch.cat(list(pieces)[::-1])


def test_static_never_chunks() -> None:
    result = refereed(Referee(large=1), PerFrame(plain), (clip(),), None)
    assert remarks(result, "fold-in-chunks") == []


# ------------------------------------------------------------------------------- what comes after


@pytest.mark.parametrize("count", [4, 6])
def test_chunks_export_with_a_free_batch(count: int) -> None:
    model, x = PerFrame(residual), clip()
    module = chunked(model, (x,), count).program.gm
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False).module()
    for batch in (2, 3, 5):
        torch.testing.assert_close(exported(clip(batch)), model(clip(batch)), rtol=1e-4, atol=1e-5)


def test_chunks_compile() -> None:
    model, x = PerFrame(residual), clip()
    module = chunked(model, (x,), 4).program.gm
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for batch in (2, 3):
        torch.testing.assert_close(compiled(clip(batch)), model(clip(batch)), rtol=1e-4, atol=1e-5)


def test_chunks_are_saved_and_pickled(tmp_path: Path) -> None:
    model, x = PerFrame(residual), clip()
    module = chunked(model, (x,), 4).program.gm
    save_exported(module, (x,), {}, tmp_path / "model.pt2")
    loaded = load_exported(tmp_path / "model.pt2").module()
    restored = pickle.loads(pickle.dumps(module))
    for batch in (2, 3):
        for result in (loaded(clip(batch)), restored(clip(batch))):
            torch.testing.assert_close(result, model(clip(batch)), rtol=1e-4, atol=1e-5)


def test_a_result_in_chunks_is_optimized_again() -> None:
    model, x = PerFrame(residual), clip(side=16)
    limit = estimated(model, x, 4)
    once = limited(model, x, limit, FOLDING_WINS)
    twice = limited(once, x, limit, FOLDING_WINS)
    assert [str(n.target) for n in twice.graph.nodes if n.op == "call_module"] == [
        str(n.target) for n in once.graph.nodes if n.op == "call_module"
    ]
    assert_as_exact(model, twice, clip(3, side=16))


def test_a_second_run_changes_nothing() -> None:
    model, x = PerFrame(residual), clip()
    once = chunked(model, (x,), 4).program
    twice = run_rules(once, (FoldInChunks({"0": 4, "1": 4}),))
    assert twice.remarks == ()
    assert str(twice.program.graph) == str(once.graph)


def test_the_model_is_left_as_it_was() -> None:
    model, x = PerFrame(in_place), clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chunked(model, (x,), 4)
    assert torch.equal(x, clip())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
