"""Loops whose bodies read operands that are the same for all frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import noise

from .case import Cases, conv, frames, images, parameter, tokens, vectors

CASES = Cases()
case = CASES.declare


def _with_context(*shape: int, batched: bool) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        context = noise(batch, *shape, seed=4) if batched else noise(*shape, seed=4)
        return (*images(batch, length), context)

    return inputs


@case(_with_context(4, 1, 1, batched=True), conv=conv, left=1)
def context_a_sample(self, x: Tensor, context: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) * context for t in range(x.size(1))], 1)


@case(_with_context(4, 1, 1, batched=False), at=(4, 4), conv=conv, left=1)
def context_a_channel(self, x: Tensor, context: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) * context for t in range(x.size(1))], 1)


@case(_with_context(4, 4, 1, 1, batched=False), at=(1, 4), conv=conv, left=1)
def context_as_long_as_the_clip(self, x: Tensor, context: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) * context for t in range(x.size(1))], 1)


@case(conv=conv, left=1)
def context_from_the_clip(self, x: Tensor) -> Tensor:
    mean = x.mean(1)
    return torch.stack([self.conv(x[:, t] - mean) for t in range(x.size(1))], 1)


@case(conv=conv, weights=parameter(16), left=1)
def a_weight_a_frame(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) * self.weights[t] for t in range(x.size(1))], 1)


@case(conv=conv, position=parameter(1, 16, 4, 1, 1), left=1)
def a_position_a_frame(self, x: Tensor) -> Tensor:
    return torch.stack([self.conv(x[:, t]) + self.position[:, t] for t in range(x.size(1))], 1)


@case(vectors, position=parameter(16, 6), bias=parameter(6))
def a_position_with_a_bias(self, x: Tensor) -> Tensor:
    outs = [torch.tanh(x[:, t]) + (self.position[t] + self.bias) for t in range(x.size(1))]
    return torch.stack(outs, 1)


@case(vectors, at=(1, 4), shift=parameter(4, 6))
def a_parameter_as_long_as_the_clip(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t] + self.shift) for t in range(x.size(1))], 1)


@case(frames(1, 6, 6, dim=0), at=(1, 4), channels=parameter(4, 1, 1, 1))
def a_parameter_that_adds_samples(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[t] + self.channels).mean((2, 3)) for t in range(x.size(0))])


@case(tokens, at=(1, 4), mix=parameter(4, 6, 2))
def a_batch_of_matrices(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(x[:, t] @ self.mix) for t in range(x.size(1))], 1)


@case(tokens, at=(1, 4), mix=parameter(4, 3, 5))
def a_batch_of_matrices_from_the_left(self, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(self.mix @ x[:, t]) for t in range(x.size(1))], 1)


@case(vectors, generator=lambda: nn.Linear(6, 6))
def a_weight_made_from_the_frame(self, x: Tensor) -> Tensor:
    outs = []
    for t in range(x.size(1)):
        weight = self.generator(x[:, t]).mean(0).expand(6, 6)
        outs.append(F.linear(x[:, t], weight).tanh())
    return torch.stack(outs, 1)
