"""Weights that are kept in the layout oneDNN computes in: the same numbers, wherever they go."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fxtemporal import Tune
from fxtemporal.functional import FORMS, ConvGeometry
from fxtemporal.ir.prepared import Prepared
from tests.referees import Referee, refereed

WIDE = 176
"""Channels from which a 3×3 kernel is packed."""

PACKED = [name for name, form in FORMS.items() if form.pack is not None]


def clip(batch: int = 1, frames: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, WIDE, frames, 6, 5)


def layer(**settings: Any) -> nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(WIDE, WIDE, 3, padding=1, **settings)


def geometry(conv: nn.Conv3d, x: Tensor) -> ConvGeometry:
    kernel, channels = (3, 3, 3), (conv.in_channels, conv.out_channels)
    return ConvGeometry(*channels, kernel, padding=(1, 1, 1), groups=conv.groups).at(x)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max())


def leaves(packed: Any) -> list[Tensor]:
    return [packed] if isinstance(packed, Tensor) else list(packed)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("batch", "frames"), [(1, 3), (2, 3), (0, 3)])
def test_the_numbers_are_those_of_the_plain_weight(name: str, batch: int, frames: int) -> None:
    form, conv, x = FORMS[name], layer(), clip(batch, frames)
    with torch.no_grad():
        plain = form.prepare(conv.weight, geometry(conv, x))
        packed = form.pack(plain, 1)
        assert all(weight.is_mkldnn for weight in leaves(packed))
        expected = form.run(x, plain, conv.bias, geometry(conv, x))
        actual = form.run(x, packed, conv.bias, geometry(conv, x))
        exact = copy.deepcopy(conv).double()(x.double())
    assert actual.stride() == expected.stride()
    if batch:
        assert error(actual, exact) <= max(3 * error(expected, exact), 6e-6)


@pytest.mark.parametrize(
    ("conv", "dtype"),
    [
        (nn.Conv3d(8, 8, 3), torch.float32),
        (layer(), torch.float64),
        (layer(), torch.bfloat16),
        (layer(groups=2), torch.float32),
    ],
    ids=["small", "float64", "bfloat16", "grouped"],
)
def test_what_is_not_packed(conv: nn.Conv3d, dtype: torch.dtype) -> None:
    weight = conv.weight.detach().to(dtype)
    plain = FORMS["conv3d_taps"].prepare(weight, geometry(conv, clip()))
    assert FORMS["conv3d_taps"].pack(plain, conv.groups) is plain


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    plain = FORMS["conv3d_taps"].prepare(layer().weight.detach(), geometry(layer(), clip()))
    assert FORMS["conv3d_taps"].pack(plain, 1) is plain


def fast(**settings: Any) -> Any:
    """``(model, result)``: a layer in taps, whichever form is the fastest here."""
    referee = Referee(lambda *_: 2.0, forms=lambda form, _: 1.0 if form == "conv3d_taps" else 2.0)
    model = nn.Sequential(layer(), nn.ReLU()).eval()
    return model, refereed(
        referee, model, (clip(),), Tune(cache=False), ["conv3d-forms"], **settings
    )


def kept(module: nn.Module) -> list[Tensor]:
    prepared = [m._kept for m in module.modules() if isinstance(m, Prepared)]
    return [leaf for entry in prepared if entry is not None for leaf in leaves(entry.value)]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_network_keeps_packed_weights(freeze: bool) -> None:
    model, result = fast(freeze=freeze)
    for x in (clip(), clip(2), clip(1, 7)):
        with torch.no_grad():
            torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)
    assert kept(result)
    assert all(weight.is_mkldnn for weight in kept(result))
    assert not any(weight.is_mkldnn for weight in result.state_dict().values())


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_is_copied_and_pickled(freeze: bool, again: Any) -> None:
    model, result = fast(freeze=freeze)
    with torch.no_grad():
        expected = model(clip())
        result(clip())
        torch.testing.assert_close(again(result)(clip()), expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_reaches_the_input_through_frozen_weights() -> None:
    model, result = fast()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        result(clip())
    assert all(weight.is_mkldnn for weight in kept(result))
    grads = []
    for net in (model, result):
        x = clip().requires_grad_()
        net(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch itself
def test_a_forward_derivative_goes_through_frozen_weights() -> None:
    model, result = fast()
    tangents = []
    with torch.no_grad():
        result(clip())
        for net in (model, result):
            with forward_ad.dual_level():
                y = net(forward_ad.make_dual(clip(), torch.ones_like(clip())))
                tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-4)


def test_new_weights_are_packed_anew() -> None:
    model, result = fast()
    with torch.no_grad():
        result(clip())
        model[0].weight.mul_(2)
        torch.testing.assert_close(result(clip()), model(clip()), rtol=1e-5, atol=1e-5)


def test_other_dtypes_are_computed_in_theirs() -> None:
    model, result = fast()
    with torch.no_grad():
        result(clip())
        with torch.autocast("cpu", torch.bfloat16):
            assert result(clip()).dtype == torch.bfloat16
        wide = clip().double()
        torch.testing.assert_close(result.double()(wide), model.double()(wide))


def test_compiled_and_exported_it_is_plain() -> None:
    model, result = fast()
    with torch.no_grad():
        result(clip())
        exported = torch.export.export(result, (clip(),)).module()
        torch.testing.assert_close(exported(clip()), model(clip()), rtol=1e-5, atol=1e-5)
