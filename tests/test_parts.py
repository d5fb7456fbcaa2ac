"""Models that cannot be captured whole: the submodules that can are optimized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from benchmarks.measure import CountConvolutions
from fxtemporal import CaptureError, ForwardError
from tests.zoo import noise

CLIP, LENGTHS = noise(2, 5, 3, 8, 8), torch.tensor([5, 3])


class FrameEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(self.conv(x[:, t])) for t in range(x.size(1))], 1)


class Output(NamedTuple):
    features: Tensor
    length: int


class Base(nn.Module):
    """An encoder over frames, and then a line that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = FrameEncoder()
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.line(self.encoder(x), lengths)

    def line(self, y: Tensor, lengths: Tensor) -> Any:
        raise NotImplementedError


class Lengths(Base):
    def line(self, y: Tensor, lengths: Tensor) -> Tensor:
        for sample, length in enumerate(lengths.tolist()):
            if length < y.size(1):
                y[sample, length:] = 0
        return self.head(y.mean((-1, -2)))


class Greedy(Base):
    def line(self, y: Tensor, lengths: Tensor) -> Tensor:
        state, words = y.mean((1, 3, 4)), []
        for _ in range(10):
            words.append(self.head(state).argmax(-1))
            if int(words[-1].sum()) == 2:
                break
            state = state.roll(1, -1) + words[-1][:, None]
        return torch.stack(words, 1)


class Masked(Base):
    def line(self, y: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        mask = y.mean((1, 2, 3, 4)) > 0
        return {"all": y, "some": y[mask] if mask.any() else y}


class Packed(Base):
    def line(self, y: Tensor, lengths: Tensor) -> Output:
        rows = y.mean((-1, -2))
        packed = nn.utils.rnn.pack_padded_sequence(rows, lengths.tolist(), batch_first=True)
        return Output(packed.data, int(lengths.max()))


class Counting(Base):
    def line(self, y: Tensor, lengths: Tensor) -> Tensor:
        self.calls += 1
        return y * self.calls


EVERY: list[Callable[[], Base]] = [Lengths, Greedy, Masked, Packed, Counting]


def optimized(model: nn.Module, *inputs: Any, **settings: Any) -> nn.Module:
    return fxtemporal.optimize(model, inputs or (CLIP, LENGTHS), tune="static", **settings)


@pytest.mark.parametrize("kind", EVERY)
def test_the_encoder_s_loop_is_re_rolled_and_the_rest_runs_as_it_is(kind: type[Base]) -> None:
    model, reference = kind().eval(), kind().eval()
    result = optimized(model)
    assert type(result) is kind
    assert list(result.state_dict()) == list(model.state_dict())
    assert result.encoder.conv.weight is model.encoder.conv.weight
    report = fxtemporal.report(result)
    assert report.frontend == "parts"
    assert [(region.path, region.kind) for region in report.regions] == [
        ("encoder", "FrameEncoder")
    ]
    assert report.regions[0].applied == 2
    assert f"{kind.__name__} could not be captured" in str(report) or kind is Counting
    assert "Captured in its place: encoder (FrameEncoder, by fx)" in str(report)
    for batch, frames in ((2, 5), (3, 7), (1, 5)):
        x, lengths = noise(batch, frames, 3, 8, 8), torch.arange(frames, frames - batch, -1)
        expected = reference(x, lengths)
        actual = result(x, lengths)
        torch.testing.assert_close(actual, expected)
        assert type(actual) is type(expected)
        with CountConvolutions() as counter:
            result(x, lengths)
        assert counter.count == 1
        reference(x, lengths)
    assert model.calls == 0


def test_an_audit_says_the_same() -> None:
    report = fxtemporal.audit(Lengths().eval(), (CLIP, LENGTHS))
    assert report.mode == "audit"
    assert report.frontend == "parts"
    assert {r.rule for r in report.by_status("applied")} == {"time-distribute", "fold-batchnorm"}
    assert "encoder.conv" in report.to_json() or "encoder.getitem" in report.to_json()
    assert "could not be captured whole" in str(report)


class TestTheResultIsTheModel:
    def test_training(self) -> None:
        model, reference = Lengths().eval(), Lengths().eval()
        result = optimized(model)
        for module in (result, reference):
            module(CLIP, LENGTHS).square().sum().backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
        with pytest.warns(UserWarning, match="right only where"):
            actual = result.train()(CLIP, LENGTHS)
        torch.testing.assert_close(actual, reference.train()(CLIP, LENGTHS))

    def test_changes_of_the_model(self) -> None:
        model = Lengths().eval()
        result = optimized(model)
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        torch.testing.assert_close(result(CLIP, LENGTHS), model(CLIP, LENGTHS))
        result.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
        other = Lengths().eval()
        other.load_state_dict(result.state_dict())
        torch.testing.assert_close(result(CLIP, LENGTHS), other(CLIP, LENGTHS))
        wide = copy.deepcopy(other).double()(CLIP.double(), LENGTHS)
        torch.testing.assert_close(result.double()(CLIP.double(), LENGTHS), wide)

    def test_hooks(self) -> None:
        model = Lengths().eval()
        calls: list[str] = []
        model.encoder.register_forward_hook(lambda module, args, out: calls.append("early"))
        result = optimized(model)
        calls.clear()
        result.encoder.register_forward_hook(lambda module, args, out: calls.append("late"))
        result.register_forward_hook(lambda module, args, out: calls.append("whole"))
        result(CLIP, LENGTHS)
        assert calls == ["early", "late", "whole"]

    def test_copies_and_pickles_run_the_model_s_own_forward(self) -> None:
        model = Lengths().eval()
        result = optimized(model)
        for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            torch.testing.assert_close(other(CLIP, LENGTHS), model(CLIP, LENGTHS))
            assert fxtemporal.report(other).frontend == "parts"


class Deep(nn.Module):
    """Its decoder cannot be captured either, but a part of that can."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Lengths() for _ in range(2)])
        self.unused = FrameEncoder()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = [block(x, lengths) for block in self.blocks]
        return y[0] + y[1] if y[0].sum().item() > 0 else y[0] - y[1]


def test_parts_of_parts() -> None:
    model = Deep().eval()
    result = optimized(model)
    paths = [region.path for region in fxtemporal.report(result).regions]
    assert paths == ["blocks.0.encoder", "blocks.1.encoder"]
    torch.testing.assert_close(result(CLIP, LENGTHS), model(CLIP, LENGTHS))


def test_a_method_in_parts_and_in_its_place() -> None:
    class Captioner(Greedy):
        def caption(self, x: Tensor) -> Tensor:
            return self(x, LENGTHS)

    model = Captioner().eval()
    expected = model.caption(CLIP)
    fxtemporal.optimize_in_place(model.caption, (CLIP,), tune="static")
    with CountConvolutions() as counter:
        actual = model.caption(CLIP)
    assert counter.count == 1
    torch.testing.assert_close(actual, expected)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum().item())] if x.sum() > 0 else x


def test_errors_stay_where_no_part_can_be_captured() -> None:
    with pytest.raises(CaptureError, match="Nothing could not be captured"):
        optimized(Nothing(), torch.rand(3))
    with pytest.raises(CaptureError, match="Nothing could not be captured"):
        fxtemporal.audit(Nothing(), (torch.rand(3),))
    with pytest.raises(ForwardError):
        optimized(Lengths(), noise(2, 5, 4, 8, 8), LENGTHS)
    with pytest.raises(CaptureError):
        optimized(Lengths().eval(), freeze=True)


class Failing(Lengths):
    """A rewritten encoder is called once with what no guard admits, and its class is looked at."""

    def line(self, y: Tensor, lengths: Tensor) -> Tensor:
        assert isinstance(self.encoder, FrameEncoder)
        assert self.encoder.conv.out_channels == 4
        return super().line(y + self.encoder(y[:, :, :3]).mean(), lengths)


def test_a_part_that_is_called_in_several_ways() -> None:
    model = Failing().eval()
    result = optimized(model)
    torch.testing.assert_close(result(CLIP, LENGTHS), model(CLIP, LENGTHS))


class SetByTheParent(Lengths):
    """Its encoder reads a number that the forward sets: the same as before on the example alone."""

    class Scaled(FrameEncoder):
        scale = 5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Scaled()
        self.encoder.scale = 5

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.encoder.scale = int(lengths.max())
        return super().forward(x, lengths)


def test_a_part_whose_attributes_the_rest_sets_is_none() -> None:
    with pytest.raises(CaptureError, match="SetByTheParent could not be captured"):
        optimized(SetByTheParent().eval())
    outer = Deep().eval()
    outer.blocks[1] = SetByTheParent().eval()
    result = optimized(outer)
    assert [region.path for region in fxtemporal.report(result).regions] == ["blocks.0.encoder"]
    x, lengths = noise(2, 7, 3, 8, 8), torch.tensor([7, 3])
    torch.testing.assert_close(result(x, lengths), outer(x, lengths))


def test_a_part_with_two_names_is_one_part() -> None:
    model = Deep().eval()
    model.blocks[1].encoder = model.blocks[0].encoder
    result = optimized(model)
    assert len(fxtemporal.report(result).regions) == 1
    torch.testing.assert_close(result(CLIP, LENGTHS), model(CLIP, LENGTHS))


def test_a_lossy_request_is_not_done_in_parts() -> None:
    with pytest.raises(CaptureError):
        optimized(Lengths().eval(), factorize=fxtemporal.Factorize(flops=0.5))


def test_lazy_layers_are_not_optimized_in_parts() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(CaptureError, match="call it once"):
        optimized(model)


SEEN: list[int] = []


class LeavesTraces(Lengths):
    """What it writes while its parts are compared must not be seen by anyone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("marks", torch.zeros(1))
        self.cache: dict[str, Any] = {}

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.marks.data = self.marks.data + 1
        self.marks.add_(1)
        self.cache.setdefault("inputs", []).append(x)
        type(self).count = getattr(type(self), "count", 0) + 1
        SEEN.append(1)
        return super().forward(x, lengths)


@pytest.mark.parametrize("act", [fxtemporal.optimize, fxtemporal.audit])
def test_comparing_the_parts_leaves_no_trace(act: Any) -> None:
    model = LeavesTraces().eval()
    act(model, (CLIP, LENGTHS), progress=False)
    assert not model.marks.any()
    assert not model.cache
    assert not SEEN
    assert not hasattr(LeavesTraces, "count")


class Viewing(nn.Module):
    """Python between the parts asks for a layout: a view works for a contiguous result only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, (2, 2, 2))
        self.last = nn.Conv3d(4, 2, (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        globals()["LAST"] = globals().get("LAST", 0) + 1
        y = self.last(self.first(x))
        return y.view(y.size(0), -1) if y.is_contiguous() else y.flatten(1)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_results_of_parts_lie_as_the_model_s_at_any_size(last: bool, threads: int) -> None:
    model = Viewing().eval()
    model = model.to(memory_format=torch.channels_last_3d) if last else model
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = fxtemporal.optimize(model, (noise(2, 3, 5, 2, 2),), tune="static")
        assert fxtemporal.report(fast).frontend == "parts"
        for batch, size in ((1, 2), (2, 2), (3, 4)):
            for x in (noise(batch, 3, 5, size, size), noise(batch, 5, 3, size, size).mT):
                x = x if x.shape[1] == 3 else x.transpose(1, 2)
                mine, theirs = fast.last(fast.first(x)), model.last(model.first(x))
                assert mine.stride() == theirs.stride()
                torch.testing.assert_close(fast(x), model(x))
    finally:
        torch.set_num_threads(before)
