"""Moving handwritten digits: what the factorized network is measured on.

A clip shows one 8×8 digit of scikit-learn's ``load_digits`` that moves in one of six directions,
in noise. Its class is digit and direction, 60 in all. Digits of the test clips are none that were
trained on.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["CHECKPOINT", "CLASSES", "DigitNet", "accuracy", "clips", "trained"]

CHECKPOINT = Path(__file__).parent / "digits.pt"

FRAMES, SIDE, DIGIT = 8, 24, 12
DIRECTIONS = 6
CLASSES = 10 * DIRECTIONS
NOISE, SPEED = 0.25, (0.8, 1.4)


def _images(held_out: bool) -> tuple[Tensor, Tensor]:
    """(N, 12, 12) in [0, 1] and digits (N,); every fourth one is held out."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
    chosen = (torch.arange(len(images)) % 4 == 0) == held_out
    return images[chosen, 0], torch.from_numpy(data.target)[chosen]


def clips(count: int, seed: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Clips (count, 1, T, H, W) and their classes (count,)."""
    generator = torch.Generator().manual_seed(seed)
    images, digits = _images(held_out)
    which = torch.randint(len(images), (count,), generator=generator)
    direction = torch.randint(DIRECTIONS, (count,), generator=generator)
    low, high = SPEED
    speed = low + (high - low) * torch.rand(count, generator=generator)
    angle = direction * (2 * math.pi / DIRECTIONS)
    step = torch.stack([torch.sin(angle), torch.cos(angle)], 1) * speed[:, None]
    middle = (SIDE - DIGIT) / 2 + 2 * torch.rand(count, 2, generator=generator) - 1
    time = torch.arange(FRAMES) - (FRAMES - 1) / 2
    place = (middle[:, None] + time[:, None] * step[:, None]).round().long()  # (N, T, 2)
    place = place.clamp(0, SIDE - DIGIT)
    # Row and column of each pixel in the digit's own coordinates; outside of it, nothing.
    rows = torch.arange(SIDE)[None, None] - place[..., :1]
    columns = torch.arange(SIDE)[None, None] - place[..., 1:]
    inside = _within(rows)[..., :, None] & _within(columns)[..., None, :]
    sample = which[:, None, None, None]
    at = rows.clamp(0, DIGIT - 1)[..., :, None], columns.clamp(0, DIGIT - 1)[..., None, :]
    shown = images[sample, at[0], at[1]] * inside
    shown = shown + NOISE * torch.randn(shown.shape, generator=generator)
    return shown[:, None], digits[which] * DIRECTIONS + direction


def _within(offsets: Tensor) -> Tensor:
    return (offsets >= 0) & (offsets < DIGIT)


class DigitNet(nn.Module):
    """(B, 1, T, H, W) -> (B, 60): five 3×3×3 convolutions, as C3D has eight (arXiv 1412.0767)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 64, 96, 96)) -> None:
        super().__init__()
        pools = [(1, 2, 2), (2, 2, 2), None, (2, 2, 2), None]
        layers: list[nn.Module] = []
        channels = 1
        for width, pool in zip(widths, pools, strict=True):
            layers += [
                nn.Conv3d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            ]
            if pool is not None:
                layers.append(nn.MaxPool3d(pool))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3, 4)))


def trained() -> DigitNet:
    """The network with the weights of the checkpoint, in eval mode."""
    net = DigitNet()
    net.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    return net.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor, batch: int = 100) -> float:
    """Share of clips whose class is the largest logit."""
    right = sum(
        int((model(part).argmax(1) == target).sum())
        for part, target in zip(x.split(batch), labels.split(batch), strict=True)
    )
    return right / len(labels)
