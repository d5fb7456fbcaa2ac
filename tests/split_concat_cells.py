"""Cells over a frame joined with a state, and what the tests of split-concat ask of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxtemporal
from benchmarks.measure import CountConvolutions
from tests.zoo import noise

IN, HIDDEN, FRAMES, SIDE = 3, 4, 6, 5


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


def optimized(model: nn.Module, *inputs: Any, **more: Any) -> fx.GraphModule:
    return fxtemporal.optimize(model, inputs, tune="static", **{"verify": False, **more})


def remarks(fast: nn.Module) -> list[fxtemporal.Remark]:
    return [r for r in fxtemporal.report(fast).remarks if r.rule == "split-concat"]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def convolutions(model: nn.Module, x: Tensor) -> int:
    with CountConvolutions() as counter:
        model(x)
    return counter.count
