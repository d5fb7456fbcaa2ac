"""R(2+1)D from a 3-D network, to be trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxtemporal
from benchmarks._torchvision import video_model
from fxtemporal import PassError
from fxtemporal.nn import Conv2Plus1d
from tests.zoo import noise

TORCHVISION = {
    "stem.0": 45,
    "layer1.*": 144,
    "layer2.0.*": 230,
    "layer2.1.*": 288,
    "layer3.0.*": 460,
    "layer3.1.*": 576,
    "layer4.0.*": 921,
    "layer4.1.*": 1152,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(8, 8, (1, 3, 3)),
        nn.Conv3d(8, 6, 3, stride=2, groups=2, padding_mode="replicate", padding=1, bias=False),
    )


def test_each_layer_of_r3d_18_keeps_its_parameters() -> None:
    model = video_model("r3d_18")
    net = fxtemporal.convert_to_2plus1d(model)
    pairs = {path: m for path, m in net.named_modules() if isinstance(m, Conv2Plus1d)}
    assert len(pairs) == 17
    for path, pair in pairs.items():
        before = model.get_submodule(path).weight.numel()
        after = pair.spatial.weight.numel() + pair.temporal.weight.numel()
        assert abs(after - before) <= 0.01 * before
    with torch.no_grad():
        assert net.eval()(noise(1, 3, 4, 32, 32)).shape == (1, 400)


def test_with_its_channels_it_is_torchvisions_r2plus1d_18() -> None:
    net = fxtemporal.convert_to_2plus1d(video_model("r3d_18"), TORCHVISION).eval()
    reference = video_model("r2plus1d_18").eval()
    assert count(net) == count(reference)
    loaded = net.load_state_dict(fxtemporal.from_torchvision_r2plus1d(reference.state_dict()))
    assert loaded.missing_keys == loaded.unexpected_keys == []
    x = noise(1, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), reference(x), rtol=1e-5, atol=1e-5)


def test_flat_convolutions_stay_and_the_model_too() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    net = fxtemporal.convert_to_2plus1d(model)
    assert [type(m) for m in net] == [Conv2Plus1d, nn.ReLU, nn.Conv3d, Conv2Plus1d]
    torch.testing.assert_close(net[2].weight, model[2].weight)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    x = noise(2, 4, 6, 9, 9)
    assert net(x).shape == model(x).shape
    assert isinstance(net[0].norm, nn.BatchNorm3d)
    assert isinstance(net[0].activation, nn.ReLU)


@pytest.mark.parametrize(
    ("mid", "expected"),
    [
        (4, [4, 4]),
        ({"0": 6}, [6, None]),
        ({"*": 8, "0": 6}, [8, 8]),
        (lambda path, conv: 2 * conv.groups if path == "3" else None, [None, 4]),
    ],
)
def test_each_way_to_give_the_channels(mid: Any, expected: list[int | None]) -> None:
    net, paper = (fxtemporal.convert_to_2plus1d(small(), m) for m in (mid, "paper"))
    for place, channels in zip((0, 3), expected, strict=True):
        assert net[place].mid_channels == (channels or paper[place].mid_channels)


def test_without_norm_and_activation() -> None:
    net = fxtemporal.convert_to_2plus1d(small(), norm=False, activation=None)
    assert net[0].norm is None
    assert net[0].activation is None


def test_a_layer_that_is_the_model() -> None:
    assert isinstance(fxtemporal.convert_to_2plus1d(nn.Conv3d(4, 4, 3)), Conv2Plus1d)


def test_a_module_at_two_places_stays_one() -> None:
    conv = nn.Conv3d(4, 4, 3, padding=1)
    net = fxtemporal.convert_to_2plus1d(nn.ModuleList([conv, nn.Sequential(conv)]))
    assert net[0] is net[1][0]


def test_dtype_and_mode_are_kept() -> None:
    net = fxtemporal.convert_to_2plus1d(small().double().eval())
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert not any(module.training for module in net.modules())


class Own(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked() -> nn.Module:
    conv = nn.Conv3d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return nn.Sequential(conv)


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv3d(4, 4, 3)))


def tied() -> nn.Module:
    first, second = nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3)
    second.weight = first.weight
    return nn.Sequential(first, second)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (hooked, "hooks"),
        (parametrized, "parametrized"),
        (lambda: nn.Sequential(Own(4, 4, 3)), "a forward of its own"),
        (tied, "shares its weight"),
    ],
)
def test_what_is_not_converted_blindly(model: Any, text: str) -> None:
    with pytest.raises(PassError, match=text):
        fxtemporal.convert_to_2plus1d(model())


@pytest.mark.parametrize("mid", ["most", None, 2.5, True])
def test_channels_that_make_no_sense(mid: Any) -> None:
    with pytest.raises(PassError, match="mid_channels must be"):
        fxtemporal.convert_to_2plus1d(small(), mid)


def test_channels_that_the_groups_cannot_share() -> None:
    with pytest.raises(ValueError, match="multiple of groups"):
        fxtemporal.convert_to_2plus1d(small(), {"3": 3})
