"""Loops over some of the frames: in another order, several at a time, of views and volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .case import Cases, conv, frames, vectors

CASES = Cases()
case = CASES.declare


@case(conv=conv, left=1)
def shuffled_frames(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) for t in (2, 0, 3, 1)], 1)


@case(conv=conv, left=1)
def inner_frames(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) for t in range(1, x.size(1) - 1)], 1)


@case(conv=conv, left=1)
def every_second_frame_backwards(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) for t in range(x.size(1) - 1, 0, -2)], 1)


@case(conv=conv, left=1)
def a_frame_twice(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t // 2]) for t in range(x.size(1))], 1)


@case(conv=conv, left=1)
def the_last_four_frames(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) for t in (-4, -3, -2, -1)], 1)


@case(conv=conv, left=1)
def the_last_minus_the_one_before(self, x: Tensor) -> Tensor:
    return self.conv(x[:, -1]) - self.conv(x[:, -2])


@case(conv=conv, left=1)
def the_last_of_unbind(self, x: Tensor) -> Tensor:
    pieces = x.unbind(1)
    return self.conv(pieces[-1]) - self.conv(pieces[-2])


@case(conv=conv, left=1)
def counted_from_the_last(self, x: Tensor) -> Tensor:
    last = x.size(1) - 1
    return torch.stack([self.conv(x[:, last - t]) for t in range(x.size(1))], 1)


@case(conv=conv)
def the_first_and_the_last(self, x: Tensor) -> Tensor:
    y = [self.conv(x[:, t]) for t in range(x.size(1) - 1)]
    return torch.stack([*y, self.conv(x[:, x.size(1) - 1]), self.conv(x[:, -1])], 1)


@case(conv=conv, left=1)
def kept_dimensions(self, x: Tensor) -> Tensor:
    parts = [self.conv(x[:, t : t + 1].flatten(0, 1)).unsqueeze(1) for t in range(x.size(1))]
    return torch.cat(parts, 1)


@case(frames(3, 8, 8), conv3=lambda: nn.Conv3d(1, 2, (1, 3, 3)), left=1)
def kept_dimensions_as_channels(self, x: Tensor) -> Tensor:
    return torch.cat([self.conv3(x[:, t : t + 1]) for t in range(x.size(1))], 1)


@case(frames(3, 8, 8, dim=2), at=(2, 6), conv3=lambda: nn.Conv3d(3, 4, (3, 1, 1)), left=1)
def overlapping_clips(self, x: Tensor) -> Tensor:
    parts = [self.conv3(x[:, :, t : t + 4]) for t in range(x.size(2) - 3)]
    return torch.stack(parts, 1)


@case(frames(3, 8, 8, dim=2), at=(2, 6), conv3=lambda: nn.Conv3d(3, 4, (2, 1, 1)), left=1)
def clips_side_by_side(self, x: Tensor) -> Tensor:
    return torch.cat([self.conv3(x[:, :, t : t + 2]) for t in range(0, 6, 2)], 2)


@case(frames(3, 8, 8, dim=2), at=(2, 7), conv3=lambda: nn.Conv3d(3, 4, (2, 1, 1)), left=1)
def clips_with_gaps(self, x: Tensor) -> Tensor:
    return torch.cat([self.conv3(x[:, :, t : t + 2]) for t in (0, 1, 4)], 2)


@case(vectors, at=(2, 5))
def clips_cut_short_by_the_end(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t : t + 4].mean(1)) for t in range(x.size(1))], 1)


@case(vectors, at=(5, 5))
def sizes_of_clips_cut_short(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        clip = x[:, t : t + 2]
        outs.append(torch.tanh(clip.sum(1) / clip.size(1)))
    return torch.stack(outs, 1)


@case(vectors, at=(2, 5))
def clips_that_a_shorter_input_cuts(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t : t + 2].mean(1)) for t in range(4)], 1)


@case(frames(2, 3, 8, 8), conv=conv, left=1)
def views_and_frames(self, x: Tensor) -> Tensor:
    outs = []
    for v in range(2):
        clip = x[:, :, v]
        outs.append(torch.stack([self.conv(clip[:, t]) for t in range(clip.size(1))], 1))
    return torch.stack(outs, 1)


@case(frames(2, 3, 8, 8), conv=conv)
def views_and_frames_at_once(self, x: Tensor) -> Tensor:
    outs = [[self.conv(x[:, t, v]) for t in range(x.size(1))] for v in range(2)]
    return torch.stack([torch.stack(row, 1) for row in outs], 1)


@case(conv=conv)
def frames_by_a_list(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, [t]].squeeze(1)) for t in range(x.size(1))], 1)


@case(frames(3, 8, 8, dim=0), conv=conv, lstm=lambda: nn.LSTM(144, 3), left=1)
def time_major_into_an_lstm(self, x: Tensor) -> Tensor:
    features = torch.stack([self.conv(x[t]).flatten(1) for t in range(x.size(0))])
    return self.lstm(features)[0][-1]


@case(frames(6, dim=0))
def time_major_and_kept(self, x: Tensor) -> Tensor:
    b = x.size(1)
    return torch.cat([torch.tanh(x[t : t + 1]).view(b, -1) for t in range(x.size(0))], 1)


@case(frames(6, dim=0), at=(1, 4))
def time_major_kept_and_dropped(self, x: Tensor) -> Tensor:
    parts = [torch.tanh(x[t].unsqueeze(1) * x[t : t + 1]) for t in range(x.size(0))]
    return torch.stack(parts, 1)


@case(frames(3, 8, 8, dim=2), conv=conv, left=1)
def slices_of_a_volume(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, :, z]).relu_() for z in range(x.size(2))], 2)


@case(frames(3, 8, 8, dim=2), at=(1, 4), head=lambda: nn.Linear(192, 5))
def a_view_after_an_elementwise_op_on_a_volume(self, x: Tensor) -> Tensor:
    b = x.size(0)
    return torch.stack([self.head((x[:, :, z] + 1).view(b, -1)) for z in range(x.size(2))], 1)
