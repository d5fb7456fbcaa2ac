"""Loops that meet: two bodies on a clip, a loop over a loop, frames and their neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .case import Cases, conv

CASES = Cases()
case = CASES.declare


@case(conv=conv, other=lambda: nn.Conv2d(3, 4, 3), left=1)  # each one call, and then merged
def two_bodies_on_one_clip(self, x: Tensor) -> Tensor:
    a = torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 1)
    b = torch.stack([self.other(x[:, t]).tanh() for t in range(x.size(1))], 1)
    return a * b


@case(conv=conv, left=2)
def one_body_on_two_clips(self, x: Tensor) -> Tensor:
    y = x.flip(1)
    return torch.stack([self.conv(x[:, t]) + self.conv(y[:, t]) for t in range(x.size(1))], 1)


@case(conv=conv, head=lambda: nn.Linear(6, 5), left=1)
def a_loop_over_what_a_loop_stacked(self, x: Tensor) -> Tensor:
    f = torch.stack([self.conv(x[:, t]).relu_() for t in range(x.size(1))], 1)
    f = f + f.mean(1, keepdim=True)
    return torch.stack([self.head(f[:, t]).relu_() for t in range(x.size(1))], 1)


@case(conv=conv, left=1)
def one_frame_before(self, x: Tensor) -> Tensor:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    return torch.stack([torch.cat([y[t], y[t - 1]], 1).tanh() for t in range(1, x.size(1))], 1)


@case(conv=conv, left=1)
def neighbours_with_the_edges_repeated(self, x: Tensor) -> Tensor:
    last = x.size(1) - 1
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    outs = [y[max(t - 1, 0)] + y[t] - y[min(t + 1, last)] for t in range(x.size(1))]
    return torch.stack(outs, 1)


@case(conv=conv, left=1)
def raw_frame_differences(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t + 1] - x[:, t]) for t in range(x.size(1) - 1)], 1)


@case(conv=conv, left=1)
def everything_returned(self, x: Tensor) -> dict[str, Any]:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    z = tuple(torch.sigmoid(f) for f in y)
    return {"maps": y, "gates": z, "first": y[0] * 2, "frame": x[:, 1]}


@case(conv=conv, left=1)
def joined_out_of_order(self, x: Tensor) -> Tensor:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    return torch.cat([torch.stack(y[::2], 1), torch.stack(y[::-1], 1)], 1)


@case(conv=conv, left=1)
def every_second_output(self, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return torch.stack([self.conv(y[t]) for t in range(x.size(1))][::2])


@case(conv=conv, left=1)
def the_best_frame(self, x: Tensor) -> Tensor:
    best = self.conv(x[:, 0])
    for t in range(1, x.size(1)):
        best = torch.maximum(best, self.conv(x[:, t]))
    return best


@case(conv=conv, cell=lambda: nn.GRUCell(4, 4), left=1)
def unequal_steps_behind_a_recurrence(self, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(0), 4)
    for t in range(x.size(1)):
        h = self.cell(self.conv(x[:, t]).mean((2, 3)), h) * 0.5
    return h
