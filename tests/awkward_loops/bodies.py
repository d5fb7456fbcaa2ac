"""Loops by what their bodies compute: views, norms, attention, indices, sequences."""

from __future__ import annotations

from typing import Any

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxtemporal.ir.reasons import Code
from tests.zoo import noise

from .case import Cases, buffer, conv, frames, parameter, tokens, vectors

CASES = Cases()
case = CASES.declare


@case(left=1, deep=lambda: nn.Sequential(conv(), *[nn.Tanh() for _ in range(150)]))
def a_long_body(self, x: Tensor) -> Tensor:
    return torch.stack([self.deep(x[:, t]) for t in range(x.size(1))], 1)


@case(conv=conv, left=1)
def gated_halves(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        a, b = self.conv(x[:, t]).chunk(2, dim=1)
        outs.append(a * torch.sigmoid(b))
    return torch.stack(outs, 1)


@case(conv=conv, left=1)
def halves_of_unequal_use(self, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = [], []
    for t in range(x.size(1)):
        halves = self.conv(x[:, t]).chunk(2, 1)
        first.append(halves[0].tanh())
        if t:
            second.append(halves[1].sigmoid())
    return torch.stack(first, 1), torch.stack(second, 1)


@case(conv=conv, left=1)
def tuples_returned(self, x: Tensor) -> list[Any]:
    return [self.conv(x[:, t]).split(2, 1) for t in range(x.size(1))]


@case(conv=conv, left=1)
def a_maximum_with_its_place(self, x: Tensor) -> tuple[Tensor, Tensor]:
    values, place = [], x
    for t in range(x.size(1)):
        best = self.conv(x[:, t]).max(1)
        values.append(best.values)
        if t == x.size(1) - 1:
            place = best.indices
    return torch.stack(values, 1), place


@case(conv=conv, left=1)
def rearranged(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = einops.rearrange(self.conv(x[:, t]), "b c h w -> b (h w) c")
        outs.append(einops.reduce(y, "b n c -> b c", "mean"))
    return torch.stack(outs, 1)


@case(conv=conv, left=1)
def shape_read_in_every_lap(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t])
        outs.append(y.view(x.size(0), -1))
    return torch.stack(outs, 1)


@case(conv=conv, left=1)
def sizes_as_numbers(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t])
        b, c, _h, _w = y.shape
        y = y.reshape(b, c, -1).sum(-1) / y.size(0) + y.shape[1]
        outs.append(y + torch.ones(y.shape[0], c))
    return torch.stack(outs, 1)


@case(conv=conv, left=1)
def expanded(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t]).mean((2, 3), keepdim=True)
        outs.append(y.expand(y.shape[0], -1, 5, 5).reshape(y.size(0), y.size(1), 25))
    return torch.stack(outs, 1)


@case(vectors, at=(1, 3), scale=lambda: nn.Parameter(torch.rand(2, 1, 1)))
def spread_then_viewed(self, x: Tensor) -> Tensor:
    y = [torch.tanh(x[:, t]) * self.scale for t in range(x.size(1))]  # (2, B, 6)
    return torch.stack([both.exp().reshape(-1, 6) for both in y])


@case(vectors, at=(1, 3))
def samples_compared_then_viewed(self, x: Tensor) -> Tensor:
    y = [x[:, t] @ x[:, t].transpose(0, 1) for t in range(x.size(1))]  # (B, B)
    return torch.stack([similar.tanh().reshape(-1, 1) for similar in y])


@case(vectors, at=(1, 3))
def transposed_then_viewed(self, x: Tensor) -> Tensor:
    y = [torch.tanh(x[:, t]).transpose(0, 1) for t in range(x.size(1))]  # (6, B)
    return torch.stack([samples.exp().reshape(-1, 1) for samples in y])


@case(vectors)
def a_number_squeezed(self, x: Tensor) -> Tensor:
    return torch.stack([x[:, t].exp().amax().squeeze(0) for t in range(x.size(1))])


@case(frames(10), at=(2, 4))
def a_view_that_mixes_samples(self, x: Tensor) -> Tensor:
    n = x.size(0) * 5
    return torch.stack([torch.tanh(x[:, t]).view(-1, n) for t in range(x.size(1))])


@case(frames(4, 4), at=(4, 4))
def sizes_that_all_coincide(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = torch.tanh(x[:, t])
        outs.append(y.view(-1, 4).view(x.size(0), 4, -1) @ y.transpose(1, 2))
    return torch.stack(outs, 1)


@case(frames(4, 4), at=(4, 4))
def transposed_where_sizes_coincide(self, x: Tensor) -> Tensor:
    return torch.stack([torch.exp(x[:, t]).transpose(0, 1) for t in range(x.size(1))], 1)


@case(frames(4), at=(4, 4))
def softmax_over_the_batch(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t]).softmax(0) for t in range(x.size(1))], 1)


@case(vectors, at=(1, 1))
def one_frame_of_one_sample(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t]) for t in range(x.size(1))], 1)


@case(vectors, at=(1, 2))
def squeezed(self, x: Tensor) -> Tensor:
    outs = [torch.tanh(x[:, t]).unsqueeze(1).squeeze() for t in range(x.size(1))]
    return torch.stack(outs, -1)


@case(vectors, at=(2, 2), fixed=True, head=lambda: nn.Linear(6, 3))
def squeezed_and_repaired(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.head(x[:, t]).unsqueeze(1).squeeze()
        outs.append(y.unsqueeze(0) if y.dim() == 1 else y)
    return torch.stack(outs, 1)


@case(tokens, gru=lambda: nn.GRU(6, 4, batch_first=True))
def a_sequence_in_each_frame(self, x: Tensor) -> Tensor:
    return torch.stack([self.gru(x[:, t])[0][:, -1] for t in range(x.size(1))], 1)


@case(tokens, at=(2, 2), gru=lambda: nn.GRU(6, 4, num_layers=2, batch_first=True))
def the_state_of_a_sequence_in_each_frame(self, x: Tensor) -> Tensor:
    return torch.stack([self.gru(x[:, t])[1].tanh() for t in range(x.size(1))], 1)


@case(tokens, lstm=lambda: nn.LSTM(6, 4, batch_first=True), head=lambda: nn.Linear(4, 2))
def the_state_of_an_lstm_in_each_frame(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        _, (h, _c) = self.lstm(x[:, t])
        outs.append(self.head(h[-1]))
    return torch.stack(outs, 1)


@case(tokens, mix=parameter(6, 6))
def attention_and_products(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = x[:, t]
        scores = torch.bmm(y @ self.mix, y.transpose(1, 2)).softmax(-1)
        y = F.scaled_dot_product_attention(y, y, scores @ y)
        outs.append(torch.einsum("bnc,cd->bdn", y, self.mix))
    return torch.stack(outs, 1)


@case(tokens, attend=lambda: nn.MultiheadAttention(6, 2, batch_first=True))
def multihead_attention(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = x[:, t]
        outs.append(self.attend(y, y, y, need_weights=False)[0])
    return torch.stack(outs, 1)


def _with_mask(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return (*tokens(batch, length), noise(batch, 5, 5, seed=3))


@case(_with_mask)
def attention_under_one_mask_a_sample(self, x: Tensor, mask: Tensor) -> Tensor:
    def attend(y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)

    return torch.stack([attend(x[:, t]) for t in range(x.size(1))], 1)


@case(_with_mask, at=(1, 4))
def attention_under_one_mask(self, x: Tensor, mask: Tensor) -> Tensor:
    def attend(y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)

    return torch.stack([attend(x[:, t]) for t in range(x.size(1))], 1)


@case(conv=conv, group=lambda: nn.GroupNorm(2, 4), layer=lambda: nn.LayerNorm((4, 6, 6)), left=1)
def normalized(self, x: Tensor) -> Tensor:
    return torch.stack([self.layer(self.group(self.conv(x[:, t]))) for t in range(x.size(1))], 1)


@case(conv=conv, instance=lambda: nn.InstanceNorm2d(4, affine=True), left=1, trains=True)
def instance_norm_in_training(self, x: Tensor) -> Tensor:
    return torch.stack([self.instance(self.conv(x[:, t])) for t in range(x.size(1))], 1)


@case(
    conv=conv,
    instance=lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    trains=True,
    code=Code.TRAINING_BATCHNORM,
)
def instance_norm_that_keeps_statistics(self, x: Tensor) -> Tensor:
    return torch.stack([self.instance(self.conv(x[:, t])) for t in range(x.size(1))], 1)


@case(conv=conv, layer=lambda: nn.LayerNorm(6), drop=lambda: nn.Dropout(0.0), left=1, trains=True)
def layer_norm_and_no_dropout_in_training(self, x: Tensor) -> Tensor:
    outs = [self.drop(self.layer(self.conv(x[:, t]))) for t in range(x.size(1))]
    return torch.stack(outs, 1)


@case(frames(3, 4, 5), at=(2, 2))
def lists_of_indices_apart(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t])[:, [0, 1], :, [0, 1]] for t in range(x.size(1))], 1)


@case(frames(3, 4, 5), at=(2, 2))
def an_index_and_a_list_apart(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t])[:, 0, :, [0, 1]] for t in range(x.size(1))], 1)


@case(conv=conv, left=1)
def indexed_channels(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t])
        outs.append(y[:, 1:3, ::2, 0].cumsum(1) + y[:, -1, :3, 1:2].amax(-1).unsqueeze(1))
    return torch.stack(outs, 1)


@case(
    lambda b, t: (noise(t, 3, 8, 8),), conv=conv, mean=buffer(3, 1, 1), std=buffer(3, 1, 1), left=1
)
def unbatched_and_normalized(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv((x[t] - self.mean) / self.std) for t in range(x.size(0))])


@case(lambda b, t: (noise(t, 3, 8, 8),), conv=conv, norm=lambda: nn.InstanceNorm2d(4, affine=True))
def unbatched_instance_norm(self, x: Tensor) -> Tensor:
    return torch.stack([self.norm(self.conv(x[t])) for t in range(x.size(0))])


@case(
    lambda b, t: (noise(t, 3, 8, 8),),
    conv=conv,
    pool=lambda: nn.AdaptiveAvgPool2d(2),
    head=lambda: nn.Linear(16, 3),
    left=1,
)
def unbatched_to_the_end(self, x: Tensor) -> Tensor:
    outs = [self.head(self.pool(self.conv(x[t])).flatten()) for t in range(x.size(0))]
    return torch.stack(outs)


@case(vectors)
def every_frame_so_far(self, x: Tensor) -> Tensor:
    seen, outs = [], []
    for t in range(x.size(1)):
        seen.append(torch.tanh(x[:, t]))
        outs.append(torch.stack(seen, 1).mean(1))
    return torch.stack(outs, 1)


@case(vectors)
def every_pair_of_frames(self, x: Tensor) -> Tensor:
    y = [torch.tanh(x[:, t]) for t in range(x.size(1))]
    return torch.stack([torch.stack([(a * b).sum(-1) for b in y], 1) for a in y], 1)


@case(vectors)
def each_frame_with_its_mirror(self, x: Tensor) -> Tensor:
    y = [torch.tanh(x[:, t]) for t in range(x.size(1))]
    return torch.stack([a - b.exp() for a, b in zip(y, reversed(y), strict=True)], 1)


@case(vectors)
def the_last_before_the_first(self, x: Tensor) -> Tensor:
    y = [torch.tanh(x[:, t]) for t in range(x.size(1))]
    return torch.stack([y[t] - y[t - 1] for t in range(x.size(1))], 1)


@case(vectors)
def odd_and_even_frames_apart(self, x: Tensor) -> Tensor:
    outs = [torch.tanh(x[:, t]) if t % 2 else torch.exp(x[:, t]) for t in range(x.size(1))]
    return torch.stack(outs, 1)


@case(tokens)
def sorted_and_normalized(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = x[:, t]
        best, _ = y.topk(2, -1)
        parts = [best, torch.sort(y, 1)[0], y.norm(dim=-1, keepdim=True), F.normalize(y, dim=-1)]
        outs.append(torch.cat([*parts, y.std(-1, keepdim=True)], -1))
    return torch.stack(outs, 1)


@case(
    left=2,
    up=lambda: nn.Upsample(scale_factor=2),
    deconv=lambda: nn.ConvTranspose2d(3, 4, 2, stride=2),
    conv=lambda: nn.Conv2d(1, 2, 3),
)
def upsampled(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = F.pixel_shuffle(self.deconv(self.up(x[:, t])), 2)
        y = F.interpolate(y, size=(7, 7), mode="bilinear", align_corners=False)
        outs.append(self.conv(F.pad(y, (1, 1, 1, 1), mode="replicate")))
    return torch.stack(outs, 1)


@case(
    lambda b, t: (torch.arange(b * t * 5).reshape(b, t, 5) % 7,),
    embed=lambda: nn.Embedding(7, 4),
)
def words_of_each_frame(self, x: Tensor) -> Tensor:
    return torch.stack([self.embed(x[:, t]).mean(1) for t in range(x.size(1))], 1)


@case(frames(4, 6), order=lambda: torch.tensor([2, 0]), at=(2, 2))
def indexed_by_a_buffer(self, x: Tensor) -> Tensor:
    outs = [torch.tanh(x[:, t])[:, self.order] + x[:, t, :2] for t in range(x.size(1))]
    return torch.stack(outs, 1)


@case(frames(4, 6), order=lambda: torch.tensor([1, 0]), at=(2, 2))
def samples_indexed_by_a_buffer(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t])[self.order] for t in range(x.size(1))], 1)


@case(vectors)
def joined_by_other_names(self, x: Tensor) -> list[Tensor]:
    y = [torch.tanh(x[:, t]) for t in range(x.size(1))]
    return [torch.concat(tensors=y, dim=-1), torch.hstack(y), torch.vstack(y), torch.dstack(y)]


@case(conv=conv)
def filled_frame_by_frame(self, x: Tensor) -> Tensor:
    out = torch.empty(x.size(0), x.size(1), 4, 6, 6)
    for t in range(x.size(1)):
        out.select(1, t).copy_(self.conv(x[:, t]))
    return out


@case(conv=conv, left=1)
def negative_values_filled(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        y = self.conv(x[:, t])
        outs.append(y.masked_fill_(y < 0, 0.5))
    return torch.stack(outs, 1)
