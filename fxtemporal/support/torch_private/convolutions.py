"""Choices of torch's own convolutions. Without them, nothing is packed and layouts are guessed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

__all__ = ["memory_format", "packed", "packs", "run_packed", "suggest_memory_format"]


def memory_format(
    input: Tensor, weight: Tensor, window: Sequence[Any]
) -> torch.memory_format | None:
    """The memory format of the result of ``conv3d``; None if torch does not tell.

    ``window``: stride, padding, dilation, transposed, output padding and groups.
    """
    if not hasattr(torch._C, "_select_conv_backend"):
        return None
    backend = torch._C._select_conv_backend(input, weight, None, *window, [weight.shape[0]])
    found: torch.memory_format = torch._C._conv_determine_backend_memory_format(
        input, weight, backend
    )
    return found


def packs() -> bool:
    """Whether this torch can run oneDNN on a packed weight."""
    there = hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    return there and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def packed(weight: Tensor) -> Tensor:
    """A 2-D convolution's weight in the layout that is fastest for oneDNN."""
    reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
    result: Tensor = reorder(weight.to_mkldnn(), [0, 0], [1, 1], [1, 1], 1)
    return result


def run_packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv2d`` with a :func:`packed` weight."""
    sizes = (list(padding), list(stride), list(dilation))
    run = torch.ops.mkldnn._convolution_pointwise
    result: Tensor = run(input, weight, bias, *sizes, groups, "none", [], "")
    return result
