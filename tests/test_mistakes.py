"""Each usual mistake is named on its line, with its cure; what is written well gives no finding."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxtemporal
from fxtemporal import Finding, Mistake
from fxtemporal.capture.capture import capture
from fxtemporal.mistakes import CHECKS, find


def marked(model: nn.Module) -> str:
    """``file:line`` of the line of the model's forward that is marked as the wrong one."""
    lines, first = inspect.getsourcelines(type(model).forward)
    (offset,) = [i for i, line in enumerate(lines) if line.rstrip().endswith("# wrong")]
    return f"test_mistakes.py:{first + offset}"


def found(model: nn.Module, *inputs: Tensor) -> tuple[Finding, ...]:
    return fxtemporal.audit(model.eval(), inputs).findings


# -- models that have one --------------------------------------------------------------------------


class ConvOnClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # wrong


class LinearOnClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # wrong


class LinearAlongWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x.flatten(0, 1)))
        return self.head(x)  # wrong


class Conv3dOnFrames(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # wrong


class LSTMOnFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).mean((-2, -1))
        return self.lstm(features)[0]  # wrong


class LSTMOnMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # wrong


class LSTMOnFlattenedMap(nn.Module):
    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.conv = nn.Conv2d(3, 128, 3, padding=1)
        self.lstm = nn.LSTM(128 if pooled else 128 * 64, 128, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        features = maps.mean((-2, -1)) if self.pooled else maps.flatten(2)
        return self.lstm(features)[0]  # wrong


class BatchInView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 4, -1)  # wrong


class LoopOverBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for sample in range(x.size(0)):  # wrong
            out.append(self.conv(x[sample]))
        return torch.stack(out)


class LoopOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for frame in range(x.size(1)):  # wrong
            out.append(self.conv(x[:, frame]))
        return torch.stack(out, 1)


class ThereAndBack(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 1, 3, 4)
        y = F.relu(y) * 2
        return y.transpose(1, 2)  # wrong


class ContiguousBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 3)
        self.second = nn.Conv3d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.contiguous(memory_format=torch.channels_last_3d))
        y = F.relu(y).contiguous()  # wrong
        return self.second(y)


class FramesByView(nn.Module):
    """(B, C, T, H, W) read as (B·T, C, H, W): what it calls frames are not."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = x.reshape(b * t, c, h, w)  # wrong
        return self.conv(y)


class FramesBackByView(nn.Module):
    """(B·T, C, H, W) read as (B, C, T, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1))
        return y.view(x.shape[0], 8, x.shape[1], 8, 8)  # wrong


class PixelsByView(nn.Module):
    """(B, C, T, H, W) read as (B·H·W, C, T), which a temporal Conv1d takes."""

    def __init__(self) -> None:
        super().__init__()
        self.temporal = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = x.contiguous().view(b * h * w, c, t)  # wrong
        return self.temporal(y)


class LastStates(nn.Module):
    """The states of both directions, (2, B, H), read as (B, 2·H)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x)
        return h.view(x.shape[0], -1)  # wrong


class FlattenedBlock(nn.Module):
    """A (2+1)D block by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(3, 4, 3, padding=1)
        self.temporal = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        y = torch.relu(self.spatial(y))
        y = y.unflatten(0, (b, t)).permute(0, 3, 4, 2, 1).reshape(b * h * w, -1, t)
        y = self.temporal(y)  # wrong
        return y.unflatten(0, (b, h, w)).permute(0, 3, 4, 1, 2)


class Collapsing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)  # wrong
        return F.relu(y).squeeze(2)


CLIP = (2, 4, 3, 8, 8)
WRONG: dict[str, tuple[Mistake, Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d on a clip": (Mistake.FRAME_LAYER_ON_CLIP, ConvOnClip, CLIP),
    "linear on a clip": (Mistake.FRAME_LAYER_ON_CLIP, LinearOnClip, CLIP),
    "linear along the width": (Mistake.FRAME_LAYER_ON_CLIP, LinearAlongWidth, CLIP),
    "conv3d on frames": (Mistake.MISSING_TIME_AXIS, Conv3dOnFrames, (2, 3, 8, 8)),
    "conv3d on what passes": (Mistake.MISSING_TIME_AXIS, Conv3dOnFrames, (3, 3, 8, 8)),
    "lstm on features": (Mistake.MISSING_TIME_AXIS, LSTMOnFeatures, (2, 3, 8, 8)),
    "lstm on a map": (Mistake.MAP_INTO_RECURRENCE, LSTMOnMap, (2, 4, 4, 6, 6)),
    "lstm on a flattened map": (Mistake.MAP_INTO_RECURRENCE, LSTMOnFlattenedMap, CLIP),
    "batch in a view": (Mistake.FIXED_BATCH_SIZE, BatchInView, (2, 4, 6)),
    "loop over the batch": (Mistake.FIXED_BATCH_SIZE, LoopOverBatch, (2, 3, 8, 8)),
    "loop over time": (Mistake.FIXED_FRAMES, LoopOverTime, CLIP),
    "there and back": (Mistake.PERMUTES_UNDONE, ThereAndBack, (2, 3, 4, 8, 8)),
    "contiguous between": (Mistake.LAYOUT_DESTROYED, ContiguousBetween, (2, 3, 8, 8, 8)),
    "frames by view": (Mistake.AXES_MIXED, FramesByView, (2, 3, 5, 8, 8)),
    "frames by view, powers of two": (
        Mistake.AXES_MIXED,
        lambda: FramesByView(8),
        (2, 8, 4, 8, 8),
    ),
    "frames back by view": (Mistake.AXES_MIXED, FramesBackByView, CLIP),
    "pixels by view": (Mistake.AXES_MIXED, PixelsByView, (2, 4, 8, 8, 8)),
    "both directions by view": (Mistake.AXES_MIXED, LastStates, (4, 5, 6)),
    "a (2+1)D block by hand": (Mistake.FLATTENED_2PLUS1D, FlattenedBlock, (2, 3, 4, 8, 8)),
    "one frame left": (Mistake.SQUEEZED_CONV3D, Collapsing, (2, 3, 4, 8, 8)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_on_its_line_with_its_cure(name: str) -> None:
    mistake, build, shape = WRONG[name]
    model = build()
    (finding,) = found(model, torch.randn(shape))
    assert finding.code == mistake
    assert finding.location is not None
    assert finding.location.endswith(marked(model))
    assert finding.text
    assert finding.cure


def test_every_mistake_has_a_model() -> None:
    assert {mistake for mistake, _, _ in WRONG.values()} == set(Mistake)


STOPPED = ("conv2d on a clip", "linear on a clip", "conv3d on frames", "lstm on a map")


@pytest.mark.parametrize("name", STOPPED)
def test_a_forward_that_fails_because_of_one_says_so(name: str) -> None:
    mistake, build, shape = WRONG[name]
    report = fxtemporal.audit(build().eval(), (torch.randn(shape),))
    assert report.stopped is not None
    assert report.remarks == ()
    assert "fails on the example inputs" in report.stopped
    assert str(mistake) in str(report)


@pytest.mark.parametrize(
    ("layer", "shape", "mistake"),
    [
        (nn.BatchNorm2d(3), CLIP, Mistake.FRAME_LAYER_ON_CLIP),
        (nn.MaxPool2d(2), CLIP, Mistake.FRAME_LAYER_ON_CLIP),
        (nn.ConvTranspose2d(3, 4, 2), CLIP, Mistake.FRAME_LAYER_ON_CLIP),
        (nn.BatchNorm3d(3), (2, 3, 8, 8), Mistake.MISSING_TIME_AXIS),
        (nn.ConvTranspose3d(3, 4, 2), (2, 3, 8, 8), Mistake.MISSING_TIME_AXIS),
        (nn.GRU(8, 4, batch_first=True), CLIP, Mistake.MAP_INTO_RECURRENCE),
        (nn.Linear(5, 4), CLIP, Mistake.FRAME_LAYER_ON_CLIP),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_refuse_their_input(
    layer: nn.Module, shape: tuple[int, ...], mistake: Mistake
) -> None:
    report = fxtemporal.audit(nn.Sequential(layer).eval(), (torch.randn(shape),))
    assert report.stopped is not None
    assert [finding.code for finding in report.findings] == [mistake]


def test_a_forward_that_fails_for_another_reason_is_an_error() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.zeros(3, 3)

    with pytest.raises(fxtemporal.ForwardError, match=r"test_mistakes.py:\d+"):
        found(Raises(), torch.randn(2, 4))


# -- models that have none -------------------------------------------------------------------------


class FoldedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        y = torch.relu(self.conv(x.reshape(b * t, *x.shape[2:])))
        y = y.mean((-2, -1)).view(b, t, -1)
        return self.head(self.lstm(y)[0][:, -1])


class Block2Plus1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.norm = nn.BatchNorm3d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.temporal(self.spatial(x))))
        return self.head(F.adaptive_avg_pool3d(y, 1).flatten(1))


class ChannelsLastNorm(nn.Module):
    """A LayerNorm over the channels needs them last: the permutations are there for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 4, 1)
        return self.mix(self.norm(y)).permute(0, 4, 1, 2, 3)


class ChannelsLastConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 3)
        self.second = nn.Conv3d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.contiguous(memory_format=torch.channels_last_3d))
        return self.second(F.relu(y)).contiguous()


class HeadsByView(nn.Module):
    """Attention splits its channels into heads: whole neighbours, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 16)


class Windows(nn.Module):
    """Windows as Swin cuts them: each axis taken apart, then a permutation."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        y = x.view(b, t // 2, 2, h // 4, 4, w // 4, 4, c)
        return y.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 32, c)


class BothDirections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x)
        return h.transpose(0, 1).reshape(x.shape[0], -1)


class Shuffle(nn.Module):
    """A channel shuffle is a view, a transposition and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.conv(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return y.flatten(1)


CLEAN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "folded by hand": (FoldedByHand, CLIP),
    "a (2+1)D block": (Block2Plus1d, (2, 3, 4, 8, 8)),
    "a LayerNorm over channels": (ChannelsLastNorm, (2, 3, 4, 8, 8)),
    "channels_last": (ChannelsLastConv, (2, 3, 8, 8, 8)),
    "attention": (HeadsByView, (2, 9, 16)),
    "windows": (Windows, (2, 4, 8, 8, 8)),
    "states of both directions": (BothDirections, (4, 5, 6)),
    "a channel shuffle": (Shuffle, (2, 6, 8, 8)),
    "an LSTM on pooled maps": (lambda: LSTMOnFlattenedMap(pooled=True), CLIP),
    "a batch of one": (FoldedByHand, (1, *CLIP[1:])),
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_written_well_gives_no_finding(name: str) -> None:
    build, shape = CLEAN[name]
    assert found(build(), torch.randn(shape)) == ()


def test_training_statistics_in_a_loop_are_missed_with_their_line_and_cure() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.norm(x[:, t]) for t in range(x.size(1))], 1)  # wrong

    model = Normed().train()
    (remark,) = fxtemporal.audit(model, (torch.randn(CLIP),)).by_status("missed")
    (reason,) = remark.reasons
    assert reason.code == fxtemporal.Code.TRAINING_BATCHNORM
    assert reason.location is not None
    assert reason.location.endswith(marked(model))
    assert "model.eval()" in str(fxtemporal.audit(model, (torch.randn(CLIP),)))


def test_looking_changes_nothing() -> None:
    model = LoopOverTime().eval()
    program = capture(model, (torch.randn(CLIP),))
    before = str(program.graph)
    values = [node.meta.get("val") for node in program.graph.nodes]
    find(program)
    assert str(program.graph) == before
    assert all(
        node.meta.get("val") is value
        for node, value in zip(program.graph.nodes, values, strict=True)
    )


def test_without_shapes_there_is_nothing_to_find_and_no_error() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    program = capture(Plain())
    assert all(list(check(program)) == [] for check in CHECKS)


@pytest.mark.parametrize(
    ("change", "mistakes"),
    [
        (lambda y: y.as_strided_((2, 2), (1, 2)), 0),
        (lambda y: y.squeeze_(2), 1),
        (lambda y: y.unsqueeze_(0), 0),
        (lambda y: y.transpose_(1, 2), 0),
    ],
)
def test_a_result_whose_shape_is_changed_in_place(
    change: Callable[[Tensor], Tensor], mistakes: int
) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 1, (4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return change(self.conv(x))

    model = Changed()
    x = torch.rand(2, 3, 4, 3, 3)
    assert [f.code for f in found(model, x)] == [Mistake.SQUEEZED_CONV3D] * mistakes
    torch.testing.assert_close(fxtemporal.optimize(model, (x,), tune="static")(x), model(x))
