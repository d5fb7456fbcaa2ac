"""torch.func over the exact forms: vmap, per-sample gradients, Hessians, as of conv3d itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal.functional import FORMS, ConvGeometry
from fxtemporal.support.torch_private.transforms import in_forward_mode, in_transform
from tests.zoo import noise

pytestmark = [  # what torch.func says of torch's own
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

GEOMETRIES = (
    ConvGeometry(4, 6, (1, 3, 3), padding=(0, 1, 1), stride=(2, 1, 1)),
    ConvGeometry(4, 6, (3, 1, 1), padding=(1, 0, 0)),
    ConvGeometry(4, 6, (1, 1, 1)),
    ConvGeometry(4, 6, (2, 2, 2), stride=(2, 2, 2)),
    ConvGeometry(4, 6, (4, 3, 3)),
    ConvGeometry(4, 6, (3, 3, 3), padding=(1, 1, 1), groups=2),
    ConvGeometry(4, 6, (3, 3, 3), padding=(1, 1, 1)),
)


def weight_of(geometry: ConvGeometry, form: str) -> Tensor:
    weight = noise(6, 4 // geometry.groups, *geometry.kernel).double()
    flat = form == "conv3d_low_rank"
    return weight[:, :, :1].expand_as(weight).contiguous() if flat else weight


def cases() -> list[Any]:
    clip = noise(2, 4, 4, 6, 6).double()
    return [
        pytest.param(name, geometry, id=f"{name}-{geometry.kernel}-{geometry.groups}")
        for name, form in FORMS.items()
        for geometry in GEOMETRIES
        if not any(form.blockers(geometry.at(clip)))
    ]


@pytest.mark.parametrize(("name", "geometry"), cases())
def test_a_form_is_transformed_as_conv3d_is(name: str, geometry: ConvGeometry) -> None:
    clip, weight = noise(2, 4, 4, 6, 6).double(), weight_of(geometry, name)
    args = (None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    def loss(function: Any, x: Tensor, w: Tensor) -> Tensor:
        return function(x, w, *args).square().sum()

    form, conv3d = FORMS[name].function, FORMS["conv3d"].function
    for function in (form, conv3d):
        assert function(clip, weight, *args).dim() == 5
    samples = [
        torch.vmap(lambda z, f=f: f(z[None], weight, *args)[0])(clip) for f in (form, conv3d)
    ]
    torch.testing.assert_close(*samples)
    for side in (0,) if name == "conv3d_low_rank" else (0, 1):  # its rank is that of these numbers
        each = [
            torch.vmap(
                torch.func.grad(lambda x, w, f=f: loss(f, x[None], w), argnums=side),
                in_dims=(0, None),
            )(clip, weight)
            for f in (form, conv3d)
        ]
        torch.testing.assert_close(*each)
    small = clip[:1, :, :, :4, :4]
    hessians = [
        torch.func.hessian(lambda z, f=f: loss(f, torch.cat([z, small[:, 1:]], 1), weight))(
            small[:, :1]
        )
        for f in (form, conv3d)
    ]
    torch.testing.assert_close(*hessians)


def test_a_result_is_transformed_as_the_model_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3)), nn.Tanh(), nn.Conv3d(4, 4, (3, 1, 1)), nn.AvgPool3d((1, 2, 2))
    ).eval()
    x = noise(2, 3, 4, 6, 6)
    fast = fxtemporal.optimize(model, (x,), tune="static", progress=False)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(net: nn.Module, p: dict[str, Tensor], z: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (z[None],)).square().sum()

    for transform in (
        lambda net: torch.vmap(lambda z: net(z[None])[0])(x),
        lambda net: torch.func.hessian(lambda z: net(z).square().sum())(x[:1]),
        lambda net: torch.vmap(torch.func.grad(lambda p, z: loss(net, p, z)), in_dims=(None, 0))(
            weights, x
        )["0.weight"],
    ):
        torch.testing.assert_close(transform(fast), transform(model), rtol=1e-4, atol=1e-5)


class Tangents(nn.Module):
    """torch.export puts the levels of jvp and vmap into the graph, as nodes."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self.linear, x) @ x.new_ones(4, 2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.vmap(torch.vmap(f))(x),
        lambda f, x: torch.func.jvp(torch.vmap(f), (x,), (x,))[0],
    ],
)
def test_an_error_leaves_no_transform_entered(transform: Any) -> None:
    model = Tangents(transform)
    x = torch.rand(3, 5, 4)
    result = fxtemporal.optimize(model, (x,), tune="static", otherwise="error")
    torch.testing.assert_close(result(x), model(x))
    for wrong in (torch.rand(3, 5, 4, dtype=torch.float64), torch.rand(3, 5, 7), torch.rand(4)):
        with pytest.raises((RuntimeError, ValueError, IndexError, fxtemporal.FxTemporalError)):
            result(wrong)
        assert not in_transform()
        assert not in_forward_mode()
    torch.testing.assert_close(result(x), model(x))
