"""Loops that write in place: before another reader, behind a join, through a view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxtemporal.ir.reasons import Code

from .case import Cases, conv, frames, vectors

CASES = Cases()
case = CASES.declare


@case(conv=conv, left=1)
def relu_before_another_reader(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t])
        total = y.sum(0)  # stays in the loop, and must see the map before the write
        outs.append(y.relu_() + total)
    return torch.stack(outs, 1)


@case(conv=conv)
def written_before_its_neighbour_reads(self, x: Tensor) -> Tensor:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    outs = []
    for t in range(x.size(1) - 1):
        y[t] = F.relu_(y[t])
        outs.append(y[t] - y[t + 1])
    return torch.stack(outs, 1)


@case(conv=conv)
def a_neighbour_written(self, x: Tensor) -> Tensor:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    return torch.stack([y[t] + y[t - 1].relu_() for t in range(1, x.size(1))], 1)


@case(conv=conv)
def one_of_two_equal_maps_written(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        a, b = self.conv(x[:, t]), self.conv(x[:, t])
        a = a.relu_()
        outs.append(a - b)
    return torch.stack(outs, 1)


@case(conv=conv)
def one_of_two_equal_maps_written_in_the_loop(self, x: Tensor) -> list[Tensor]:
    outs = []
    for t in range(x.size(1)):
        a, b = self.conv(x[:, t]), self.conv(x[:, t])
        b.mul_(b.cumsum(0))
        outs += [a, b]
    return outs


@case(conv=conv, left=1)
def the_stack_written(self, x: Tensor) -> tuple[Tensor, Tensor]:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    z = torch.stack(y, 1)
    z.relu_()
    return z, y[-1]


@case(conv=conv, left=1)
def the_cat_written(self, x: Tensor) -> tuple[Tensor, Tensor]:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    z = torch.cat(y, 1)
    z += 1
    return z, y[0] * 2


@case(conv=conv, left=1)
def a_view_of_the_stack_written(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    z = torch.stack(y, 1)
    z[:, :2].mul_(3)
    return z, y


@case(conv=conv, left=1)
def one_lane_written_afterwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
    y = [self.conv(x[:, t]) for t in range(x.size(1))]
    z = torch.stack(y, 1)
    y[0].add_(1)
    return z, y[0]


@case(conv=conv)
def the_source_written_after_its_frames_were_taken(self, x: Tensor) -> Tensor:
    base = x * 2
    taken = [base[:, t] for t in range(1, x.size(1))]
    base.relu_()
    return torch.stack([self.conv(frame) for frame in taken], 1)


@case(frames(3, 8, 8, dim=2), conv=conv, stem=lambda: nn.Conv3d(3, 3, 1))
def the_volume_written_after_its_slices_were_taken(self, x: Tensor) -> Tensor:
    base = self.stem(x)
    taken = [base[:, :, t] for t in range(x.size(2))]
    base += 1
    return torch.stack([self.conv(frame) for frame in taken], 1)


@case(vectors)
def a_buffer_a_frame(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = torch.tanh(x[:, t])
        total = torch.zeros(y.size(0), 6)
        total += y
        total += y.cumsum(0)
        outs.append(total)
    return torch.stack(outs, 1)


@case(conv=conv, code=Code.VISIBLE_WRITE)
def written_through_a_view(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t])
        y[:, :2].mul_(2)
        outs.append(y)
    return torch.stack(outs, 1)
