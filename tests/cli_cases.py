"""A user's file of models, and what a command printed, for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable

CLIP = ("--input", "2x4x3x6x6")

MODEL = '''
"""Models of the kinds that a user may name."""

import sys

import torch
from torch import nn

from beside import CHANNELS


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, clip):
        return torch.stack([self.norm(self.conv(clip[:, t])) for t in range(clip.size(1))], 1)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, clip):
        return torch.stack([self.norm(clip[:, t]) for t in range(clip.size(1))], 1)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 3)

    def forward(self, tokens, mask, scale):
        assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
        return self.embedding(tokens) * mask.unsqueeze(-1) * scale


class Data(nn.Module):
    def forward(self, x):
        return x[: int(x.sum().item())] if x.sum() > 0 else x


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        Counts.calls += 1
        return x * Counts.calls


class Asks(nn.Module):
    def forward(self, x):
        return x * 2 if x.requires_grad else x * 3


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()


def build():
    print("built")
    return Frames()


def build_of(width, *rest, depth=1):
    return Wide(width)


def broken():
    layers = []
    return layers[3]


def leaves():
    sys.exit("no GPU")


def text():
    return "a model"


instance = nn.Linear(4, 2)
number = 3
'''


class Ran:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def error(self) -> str:
        """The one line on stderr, without its head; nothing may be on stdout."""
        head = "fxtemporal: error: "
        assert self.out == ""
        assert self.err.startswith(head), self.err
        assert self.err.count("\n") == 1
        return self.err.removeprefix(head).strip()


Run = Callable[..., Ran]
