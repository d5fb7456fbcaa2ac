"""Functions of torch that give something else for NaN or Inf in a vector than in its remainder.

Which of two equal values stands in the remainder follows from how a tensor lies in memory, so that
no one can say what is right there. They are found by asking each of torch's activations.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GRADIENTS", "VALUES"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(F, name)
    for name in """
        relu gelu silu mish elu celu selu hardswish hardsigmoid hardtanh relu6 leaky_relu softplus
        softshrink hardshrink tanhshrink softsign logsigmoid sigmoid tanh
    """.split()
}
_LENGTHS = (1, 3, 8, 16, 17, 23, 64, 67)


def _answers(function: Callable[[Tensor], Tensor], value: float) -> Iterator[tuple[str, str]]:
    """What it gives for ``value``, and its gradient, at both ends of tensors of several lengths."""
    for length in _LENGTHS:
        x = torch.full((length,), value, dtype=torch.float32, requires_grad=True)
        out = function(x)
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        for end in (0, -1):
            yield str(out[end].item()), str(x.grad[end].item())


def _uneven(part: int) -> frozenset[str]:
    values = (float("nan"), float("inf"), -float("inf"))
    return frozenset(
        name
        for name, function in _ACTIVATIONS.items()
        if any(len({answer[part] for answer in _answers(function, v)}) > 1 for v in values)
    )


VALUES, GRADIENTS = _uneven(0), _uneven(1)
