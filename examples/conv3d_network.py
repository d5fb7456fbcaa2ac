"""A small R(2+1)D-like network: each Conv3d is put into the exact form that is fastest here.

Parameters keep their names, so a checkpoint of the original loads into the result and back.
Run it: ``python examples/conv3d_network.py``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import fxtemporal


class SpaceThenTime(nn.Sequential):
    """A spatial (1, 3, 3) convolution, then a temporal (3, 1, 1) one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv3d(outputs, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


class Block(nn.Module):
    """Two of them around a shortcut: (B, C, T, H, W) -> (B, C', T/stride, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = SpaceThenTime(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm3d(outputs)
        self.conv2 = SpaceThenTime(outputs, outputs)
        self.norm2 = nn.BatchNorm3d(outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class VideoNet(nn.Module):
    """(B, 3, T, H, W) -> (B, classes)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 32, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(32),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.classifier = nn.Linear(128, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.blocks(self.stem(clip))
        return self.classifier(self.pool(x).flatten(1))


def build() -> nn.Module:
    """The network with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return VideoNet().eval()


def milliseconds(model: nn.Module, clip: Tensor) -> float:
    timer = Timer(
        "model(clip)",
        globals={"model": model, "clip": clip},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=1.0).median * 1e3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=112, help="height and width of the clip")
    size = parser.parse_args().size
    model, clip = build(), torch.randn(1, 3, 16, size, size)
    fast = fxtemporal.optimize(model, (clip,))
    print(fxtemporal.report(fast))

    before, after = milliseconds(model, clip), milliseconds(fast, clip)
    print(f"before {before:.1f} ms, after {after:.1f} ms: {before / after:.2f}x")

    fast.load_state_dict(model.state_dict())
    print(f"largest difference {(model(clip) - fast(clip)).abs().max():.1e}")


if __name__ == "__main__":
    main()
