"""The models that the smoke benchmark and the tests run, at the sizes people run them.

A model that loops over frames is a :class:`PerFrame`: ``frame`` is what happens to one frame and
``head`` what happens to the sequence. :class:`FoldedByHand` calls the same two methods of the same
module with frames folded into the batch, which is what a person would write, and what re-rolling
should reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._torchvision import resnet18, video_model

__all__ = ["MODELS", "Case", "FoldedByHand", "PerFrame", "clip_case", "seeded"]


@dataclass(frozen=True)
class Case:
    """One model to run.

    ``build`` returns it seeded and in eval mode, ``inputs`` its seeded example inputs. ``loops``
    says that it runs a python loop over frames; ``hand_batched`` then makes of such a model one
    that shares its parameters and has no loop.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loops: bool = False
    hand_batched: Callable[[nn.Module], nn.Module] | None = None


class PerFrame(nn.Module):
    """Runs ``frame`` on each frame of (B, T, ...) in a python loop, then ``head`` on the stack."""

    def frame(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def head(self, sequence: Tensor) -> Tensor:
        return sequence

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for t in range(x.size(1)):
            outputs.append(self.frame(x[:, t]))
        return self.head(torch.stack(outputs, dim=1))


class FoldedByHand(nn.Module):
    """The same module with its frames folded by hand: (B, T, ...) -> (B·T, ...) -> (B, T, ...)."""

    def __init__(self, model: PerFrame) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        outputs = self.model.frame(x.flatten(0, 1))
        return self.model.head(outputs.unflatten(0, (batch, frames)))


class ResNetLSTM(PerFrame):
    """(B, T, 3, H, W) -> (B, classes): ResNet-18 on each frame, then an LSTM."""

    def __init__(self, hidden: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.resnet = resnet18(num_classes=hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def frame(self, x: Tensor) -> Tensor:
        return self.resnet(x)

    def head(self, sequence: Tensor) -> Tensor:
        return self.classifier(self.lstm(sequence)[0][:, -1])


class SmallCNNLSTM(PerFrame):
    """(B, T, 3, 32, 32) -> (B, 2): the tutorial's two convolutions, LSTM and classifier."""

    def __init__(self, hidden: int = 128, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.lstm = nn.LSTM(64 * 6 * 6, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def frame(self, x: Tensor) -> Tensor:
        return self.features(x)

    def head(self, sequence: Tensor) -> Tensor:
        return self.classifier(self.lstm(sequence)[0][:, -1])


class TimeDistributedConv2d(PerFrame):
    """(B, T, 3, H, W) -> (B, T, 64, H-2, W-2): one convolution, the same for every frame.

    Memory traffic decides here: the frames are large, and there is a single layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)

    def frame(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResNetFrames(PerFrame):
    """(B, T, 3, H, W) -> (B, T, classes), for a number of frames fixed when it is built.

    The constant lets plain ``torch.fx.symbolic_trace`` unroll the loop.
    """

    def __init__(self, frames: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.frames = frames
        self.resnet = resnet18(num_classes=classes)

    def frame(self, x: Tensor) -> Tensor:
        return self.resnet(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.frame(x[:, t]) for t in range(self.frames)], dim=1)


class VolumeSeriesLSTM(PerFrame):
    """(B, T, 1, D, H, W) -> (B, 2): a Conv3d on each volume of a series of scans, then an LSTM."""

    def __init__(self, hidden: int = 64, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d((2, 4, 4)),
            nn.Flatten(),
        )
        self.lstm = nn.LSTM(8 * 2 * 4 * 4, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def frame(self, x: Tensor) -> Tensor:
        return self.features(x)

    def head(self, sequence: Tensor) -> Tensor:
        return self.classifier(self.lstm(sequence)[0][:, -1])


class SensorGridLSTM(PerFrame):
    """(B, T, 1, 5, 5) -> (B, 6): a pressure mat over time; so little work that calls dominate."""

    def __init__(self, hidden: int = 64, classes: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.Flatten(),
        )
        self.lstm = nn.LSTM(32 * 3 * 3, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def frame(self, x: Tensor) -> Tensor:
        return self.features(x)

    def head(self, sequence: Tensor) -> Tensor:
        return self.classifier(self.lstm(sequence)[0][:, -1])


class TemporalReduction(nn.Module):
    """(B, T, 3, H, W) -> (B, classes): a kernel over all T frames leaves one image for a ResNet."""

    def __init__(self, frames: int = 100, hidden: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.temporal = nn.Conv3d(3, hidden, (frames, 1, 1))
        self.relu = nn.ReLU()
        self.spatial = nn.Conv3d(hidden, 3, (1, 3, 3), padding=(0, 1, 1))
        self.resnet = resnet18(num_classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.temporal(x.transpose(1, 2)))
        return self.resnet(self.spatial(x).squeeze(2))


class Conv3dBlock(nn.Module):
    """(B, 3, T, H, W) -> (B, 8, T-1, H-2, W-2): one dense Conv3d over two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, (2, 3, 3))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Conv2Plus1dBlock(nn.Module):
    """The (2+1)D counterpart of :class:`Conv3dBlock`: a spatial Conv3d, then a temporal one."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(3, 8, (1, 3, 3))
        self.temporal = nn.Conv3d(8, 8, (2, 1, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.temporal(self.relu(self.spatial(x))))


def _vary_batchnorms(model: nn.Module) -> None:
    """As after training: fresh statistics are zeros and ones, which would hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` returns, the same at every call, with varied BatchNorms and in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        _vary_batchnorms(model)
    return model.eval()


def _clip(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)),)


def clip_case(name: str, build: Callable[[], nn.Module], *shape: int) -> Case:
    """A model of one clip."""
    return Case(name, partial(seeded, build), partial(_clip, *shape))


def _loop(name: str, build: Callable[[], nn.Module], *shape: int) -> Case:
    return Case(name, partial(seeded, build), partial(_clip, *shape), True, FoldedByHand)


MODELS: dict[str, Case] = {
    case.name: case
    for case in (
        clip_case("r3d_18", partial(video_model, "r3d_18"), 1, 3, 16, 112, 112),
        clip_case("mc3_18", partial(video_model, "mc3_18"), 1, 3, 16, 112, 112),
        clip_case("r2plus1d_18", partial(video_model, "r2plus1d_18"), 1, 3, 16, 112, 112),
        clip_case("s3d", partial(video_model, "s3d"), 1, 3, 16, 224, 224),
        _loop("resnet18_lstm", ResNetLSTM, 1, 16, 3, 64, 64),
        _loop("small_cnn_lstm", SmallCNNLSTM, 2, 10, 3, 32, 32),
        _loop("time_distributed_conv2d", TimeDistributedConv2d, 32, 10, 3, 128, 128),
        _loop("resnet18_frames", ResNetFrames, 2, 8, 3, 64, 64),
        _loop("volume_series_lstm", VolumeSeriesLSTM, 2, 6, 1, 8, 32, 32),
        _loop("sensor_grid_lstm", SensorGridLSTM, 8, 50, 1, 5, 5),
        clip_case("temporal_reduction", TemporalReduction, 2, 100, 3, 16, 701),
        clip_case("conv3d_block", Conv3dBlock, 1, 3, 6, 72, 108),
        clip_case("conv2plus1d_block", Conv2Plus1dBlock, 1, 3, 6, 72, 108),
    )
}
