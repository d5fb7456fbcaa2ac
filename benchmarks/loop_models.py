"""Loops over time as people write them, each with a counterpart that was batched by hand.

Every counterpart shares the parameters of its loop and computes the same numbers. Builders take
their sizes, so that tests can be quick; :data:`LOOPS` has the sizes that are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._torchvision import resnet18
from benchmarks.models import Case, FoldedByHand, ResNetLSTM, SmallCNNLSTM, seeded

__all__ = [
    "BUILDERS",
    "LOOPS",
    "conv_lstm",
    "encoded_conv_lstm",
    "lstm_cell",
    "nested_crops",
    "resnet18_lstm",
    "sliding_windows",
    "small_cnn_lstm",
    "two_stream",
]


class TwoStream(nn.Module):
    """(B, T, 3, H, W) and (B, T, 2, H, W) -> (B, classes): a frame and its optical flow.

    The networks' answers are added for each frame, and averaged over time.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.rgb = resnet18(num_classes=classes)
        self.flow = resnet18(num_classes=classes)
        self.flow.conv1 = nn.Conv2d(2, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, frames: Tensor, flow: Tensor) -> Tensor:
        scores = []
        for t in range(frames.size(1)):
            scores.append(self.rgb(frames[:, t]) + self.flow(flow[:, t]))
        return torch.stack(scores, dim=1).mean(dim=1)


class TwoStreamByHand(nn.Module):
    """Each network once, on all frames."""

    def __init__(self, model: TwoStream) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, flow: Tensor) -> Tensor:
        scores = self.model.rgb(frames.flatten(0, 1)) + self.model.flow(flow.flatten(0, 1))
        return scores.unflatten(0, frames.shape[:2]).mean(dim=1)


class ConvLSTM(nn.Module):
    """(B, T, C, H, W) -> (B, hidden, H, W): the last state of a ConvLSTM (arXiv 1506.04214)."""

    def __init__(self, channels: int = 3, hidden: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = hidden
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)

    def start(self, x: Tensor) -> Tensor:
        """A state of zeros, (B, hidden, H, W)."""
        return x.new_zeros(x.size(0), self.hidden, x.size(3), x.size(4))

    def step(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The next h and c from the four gates, (B, 4·hidden, H, W), and c."""
        i, f, o, g = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward(self, x: Tensor) -> Tensor:
        h = c = self.start(x)
        for t in range(x.size(1)):
            gates = self.conv(torch.cat([x[:, t], h], dim=1))
            h, c = self.step(gates, c)
        return h


class ConvLSTMByHand(nn.Module):
    """The input's half of the convolution runs once, on all frames; the state's half stays."""

    def __init__(self, model: ConvLSTM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model, conv = self.model, self.model.conv
        of_input, of_state = conv.weight.split((model.channels, model.hidden), dim=1)
        given = nn.functional.conv2d(x.flatten(0, 1), of_input, conv.bias, padding=1)
        given = given.unflatten(0, x.shape[:2])
        h = c = model.start(x)
        for t in range(x.size(1)):
            gates = given[:, t] + nn.functional.conv2d(h, of_state, padding=1)
            h, c = model.step(gates, c)
        return h


class EncodedConvLSTM(ConvLSTM):
    """(B, T, 3, H, W) -> (B, hidden, H/4, W/4): each frame is encoded, then goes into the cell."""

    def __init__(self, channels: int = 32, hidden: int = 32) -> None:
        super().__init__(channels, hidden)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = c = None
        for t in range(x.size(1)):
            features = self.encoder(x[:, t])
            if h is None or c is None:
                h = c = self.start(features.unsqueeze(1))
            gates = self.conv(torch.cat([features, h], dim=1))
            h, c = self.step(gates, c)
        assert h is not None
        return h


class EncodedConvLSTMByHand(nn.Module):
    """The encoder and the input's half of the convolution on all frames."""

    def __init__(self, model: EncodedConvLSTM) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.cell = ConvLSTMByHand(model)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x.flatten(0, 1))
        h: Tensor = self.cell(features.unflatten(0, x.shape[:2]))
        return h


class LSTMCellLoop(nn.Module):
    """(B, T, features) -> (B, T, hidden): an ``nn.LSTMCell`` called once a step."""

    def __init__(self, features: int = 128, hidden: int = 128) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(features, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), self.cell.hidden_size)
        outputs = []
        for t in range(x.size(1)):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class LSTMCellByHand(nn.Module):
    """An ``nn.LSTM`` that holds the cell's own parameters."""

    def __init__(self, model: LSTMCellLoop) -> None:
        super().__init__()
        cell = model.cell
        self.lstm = nn.LSTM(cell.input_size, cell.hidden_size, batch_first=True)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.lstm, f"{name}_l0", getattr(cell, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class SlidingWindows(nn.Module):
    """(B, T, 3, H, W) -> (B, N, classes): overlapping clips of w frames, one every s frames.

    The loop computes the features of a frame again in each of the w/s clips that hold it.
    """

    def __init__(self, window: int = 16, step: int = 4, features: int = 64, classes: int = 10):
        super().__init__()
        self.window = window
        self.step = step
        self.resnet = resnet18(num_classes=features)
        self.temporal = nn.Conv1d(features, features, 3, padding=1)
        self.classifier = nn.Linear(features, classes)

    def head(self, features: Tensor) -> Tensor:
        """(B, w, features) -> (B, classes)."""
        mixed = self.temporal(features.transpose(1, 2)).relu()
        return self.classifier(mixed.mean(dim=2))

    def forward(self, x: Tensor) -> Tensor:
        scores = []
        for start in range(0, x.size(1) - self.window + 1, self.step):
            clip = x[:, start : start + self.window]
            features = [self.resnet(clip[:, t]) for t in range(self.window)]
            scores.append(self.head(torch.stack(features, dim=1)))
        return torch.stack(scores, dim=1)


class SlidingWindowsByHand(nn.Module):
    """The features of each frame once, then all clips at once."""

    def __init__(self, model: SlidingWindows) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        features = model.resnet(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        clips = features.unfold(1, model.window, model.step).transpose(2, 3)  # (B, N, w, features)
        return model.head(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


class NestedCrops(nn.Module):
    """(B, crops, T, 3, H, W) -> (B, classes): every frame of every crop, averaged.

    Videos are tested this way: a few crops, a few frames of each.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.resnet = resnet18(num_classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        crops = []
        for crop in range(x.size(1)):
            frames = []
            for t in range(x.size(2)):
                frames.append(self.resnet(x[:, crop, t]))
            crops.append(torch.stack(frames, dim=1).mean(dim=1))
        return torch.stack(crops, dim=1).mean(dim=1)


class NestedCropsByHand(nn.Module):
    """The network once, on all frames of all crops."""

    def __init__(self, model: NestedCrops) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model.resnet(x.flatten(0, 2)).unflatten(0, x.shape[:3])
        return scores.mean(dim=2).mean(dim=1)


def _random(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _case(
    name: str,
    build: Callable[[], nn.Module],
    by_hand: Callable[..., nn.Module],
    *shapes: tuple[int, ...],
) -> Case:
    return Case(name, partial(seeded, build), partial(_random, *shapes), True, by_hand)


def small_cnn_lstm(name: str, frames: int = 10, batch: int = 1) -> Case:
    return _case(name, SmallCNNLSTM, FoldedByHand, (batch, frames, 3, 32, 32))


def resnet18_lstm(name: str, frames: int = 16, size: int = 64) -> Case:
    return _case(name, ResNetLSTM, FoldedByHand, (1, frames, 3, size, size))


def two_stream(name: str, frames: int = 16, size: int = 64) -> Case:
    shapes = (1, frames, 3, size, size), (1, frames, 2, size, size)
    return _case(name, TwoStream, TwoStreamByHand, *shapes)


def conv_lstm(name: str, frames: int = 16, size: int = 32) -> Case:
    return _case(name, ConvLSTM, ConvLSTMByHand, (1, frames, 3, size, size))


def encoded_conv_lstm(name: str, frames: int = 16, size: int = 64) -> Case:
    return _case(name, EncodedConvLSTM, EncodedConvLSTMByHand, (1, frames, 3, size, size))


def lstm_cell(name: str, frames: int = 64, features: int = 128) -> Case:
    build = partial(LSTMCellLoop, features, features)
    return _case(name, build, LSTMCellByHand, (1, frames, features))


def sliding_windows(
    name: str, frames: int = 64, window: int = 16, step: int = 4, size: int = 64
) -> Case:
    build = partial(SlidingWindows, window, step)
    return _case(name, build, SlidingWindowsByHand, (1, frames, 3, size, size))


def nested_crops(name: str, crops: int = 3, frames: int = 8, size: int = 64) -> Case:
    return _case(name, NestedCrops, NestedCropsByHand, (1, crops, frames, 3, size, size))


BUILDERS: tuple[Callable[..., Case], ...] = (
    small_cnn_lstm,
    resnet18_lstm,
    two_stream,
    conv_lstm,
    encoded_conv_lstm,
    lstm_cell,
    sliding_windows,
    nested_crops,
)

LOOPS: Mapping[str, Case] = {
    case.name: case
    for case in (
        small_cnn_lstm("small_cnn_lstm_t10", frames=10),
        small_cnn_lstm("small_cnn_lstm_t64", frames=64),
        resnet18_lstm("resnet18_lstm_64", size=64),
        resnet18_lstm("resnet18_lstm_112", size=112),
        resnet18_lstm("resnet18_lstm_224", size=224),
        two_stream("two_stream"),
        conv_lstm("conv_lstm"),
        encoded_conv_lstm("encoded_conv_lstm"),
        lstm_cell("lstm_cell"),
        sliding_windows("sliding_windows"),
        nested_crops("nested_crops"),
    )
}
