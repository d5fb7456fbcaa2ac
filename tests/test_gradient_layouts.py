"""Gradients at one sample, in layouts in which torch's own kernels give wrong ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal.passes.building.form_layouts import contiguous_gradient

LAST = torch.channels_last_3d


class Normed(nn.Module):
    """As in nnU-Net: convolutions with InstanceNorm, and a sum around one of them."""

    def __init__(self, kernel: Any, norm: Any, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(4, affine=True)
        self.conv = nn.Conv3d(4, 4, kernel, padding="same", groups=groups)
        self.last = nn.Conv3d(4, 2, 1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(torch.relu(self.conv(y)) + y)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    leaves = [x, *model.parameters()]
    return list(torch.autograd.grad(out, leaves, cotangent))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("norm", [nn.InstanceNorm3d, nn.BatchNorm3d])
def test_a_norm_gets_the_gradient_of_the_model(norm: Any, kernel: Any, threads: int) -> None:
    model = Normed(kernel, norm)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = fxtemporal.optimize(model, (torch.randn(2, 4, 3, 5, 5),), tune="static")
        assert any(node.name.startswith("conv3d_") for node in result.graph.nodes)
        for shape in ((1, 4, 3, 5, 5), (2, 4, 3, 5, 5), (1, 4, 2, 1, 3), (1, 4, 4, 1, 1)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            exact = gradients(copy.deepcopy(model).double(), x.double())
            for mine, theirs in zip(gradients(result, x), exact, strict=True):
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(before)


def test_it_stands_where_a_form_chooses_a_layout() -> None:
    x = torch.randn(2, 4, 3, 5, 5)
    chosen = fxtemporal.optimize(Normed((1, 3, 3), nn.InstanceNorm3d), (x,), tune="static")
    (node,) = (n for n in chosen.graph.nodes if n.target is contiguous_gradient)
    assert len(node.users) == 2
    again = fxtemporal.optimize(chosen, (x,), tune="static")
    assert sum(n.target is contiguous_gradient for n in again.graph.nodes) == 1
    none = fxtemporal.optimize(nn.InstanceNorm3d(4), (x,), tune="static")
    assert all(n.target is not contiguous_gradient for n in none.graph.nodes)


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("kernel", [(2, 1, 1), (3, 1, 1), (1, 1, 1), (1, 2, 2)])
def test_grouped_weights_in_channels_last(kernel: Any, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 6, (2, 1, 1), padding=(2, 1, 1)), nn.Conv3d(6, 6, kernel, groups=groups)
    )
    model = model.double().to(memory_format=LAST)  # type: ignore[call-overload]
    result = fxtemporal.optimize(model, (torch.randn(2, 2, 3, 2, 2).double(),), tune="static")
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape in ((1, 2, 3, 2, 2), (1, 2, 1, 1, 1), (2, 2, 3, 2, 2), (1, 2, 3, 1, 4)):
            x = torch.randn(shape).double()
            for mine, theirs in zip(gradients(result, x), gradients(plain, x), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_num_threads(before)
