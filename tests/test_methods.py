"""Methods other than forward: ``optimize(vae.decode, (z,))``, and a result in a method's place."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import CaptureError, PassError
from tests.zoo import noise

Z = noise(1, 3, 4, 6, 6)


def without_names(function: Any) -> Any:
    """A decorator that keeps neither name nor signature, as some libraries have them."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        self.norm = nn.BatchNorm3d(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(x) + 1

    def decode(self, z: Tensor, scaled: bool = True) -> Tensor:
        y = self.norm(self.conv(z)).relu() + self.shift
        return y * self.scale if scaled else y

    @without_names
    def encode(self, z: Tensor, *, sign: int = 1) -> tuple[Tensor, Tensor]:
        return self.conv(z) * sign, self.shift

    def each(self, clips: Tensor) -> Tensor:
        return torch.stack([self(clip[None])[0] for clip in clips])

    def by_forward(self, z: Tensor) -> Tensor:
        return self.forward(z) * 2

    def depends_on_the_mode(self, z: Tensor) -> Tensor:
        return self.conv(z) if self.training else self.conv(z) * 2


@pytest.fixture
def model() -> Autoencoder:
    return Autoencoder().eval()


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("decode", (Z,), {}),
        ("decode", (Z, False), {}),
        ("decode", (), {"z": Z, "scaled": False}),
        ("encode", (Z,), {"sign": -1}),
        ("each", (Z.repeat(2, 1, 1, 1, 1),), {}),
        ("by_forward", (Z,), {}),
        ("depends_on_the_mode", (Z,), {}),
    ],
)
def test_the_result_is_called_as_the_method_is(
    model: Autoencoder, name: str, args: Any, kwargs: Any
) -> None:
    model.register_forward_hook(lambda module, args, out: None)
    expected = getattr(model, name)(*args, **kwargs)
    one = fxtemporal.optimize(getattr(model, name), args, kwargs, tune="static")
    two = fxtemporal.optimize(model, args, kwargs, method=name, tune="static")
    for result in (one, two):
        torch.testing.assert_close(result(*args, **kwargs), expected)
        assert list(result.state_dict()) == list(model.state_dict())
        assert result.conv.weight is model.conv.weight
        report = fxtemporal.report(result)
        assert [r.rule for r in report.by_status("applied")][-1] == "conv3d-forms"
    audited = fxtemporal.audit(model, args, kwargs, method=name)
    assert {r.rule for r in audited.remarks} == {r.rule for r in report.remarks}
    assert "decode" not in vars(model)


def test_the_mode_that_a_method_reads_is_held(model: Autoencoder) -> None:
    result = fxtemporal.optimize(model.depends_on_the_mode, (Z,), tune="static")
    with pytest.warns(UserWarning, match=r"training == False"):
        torch.testing.assert_close(result.train()(Z), model.train().depends_on_the_mode(Z))


def test_tensors_that_the_model_replaces_are_taken_over(model: Autoencoder) -> None:
    result = fxtemporal.optimize(model.decode, (Z,), tune="static")
    gc.collect()
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(result(Z), model.decode(Z))
    other = pickle.loads(pickle.dumps(result))
    torch.testing.assert_close(other(Z), model.decode(Z))


def test_errors(model: Autoencoder) -> None:
    with pytest.raises(PassError, match="not both"):
        fxtemporal.optimize(model.decode, (Z,), method="decode")
    with pytest.raises(CaptureError, match="has no method 'decoder'"):
        fxtemporal.optimize(model, (Z,), method="decoder")
    with pytest.raises(CaptureError, match=r"needs an nn\.Module"):
        fxtemporal.optimize(torch.relu, (Z,), method="decode")  # type: ignore[arg-type]
    vars(model)["decode"] = lambda z: z
    with pytest.raises(CaptureError, match="was replaced on this Autoencoder"):
        fxtemporal.optimize(model, (Z,), method="decode")


class TestInPlace:
    def test_a_method(self, model: Autoencoder) -> None:
        names, expected, whole = list(model.state_dict()), model.decode(Z), model(Z)
        result = fxtemporal.optimize_in_place(model.decode, (Z,), tune="static")
        assert fxtemporal.report(result).by_status("applied")
        calls: list[int] = []
        result.register_forward_hook(lambda module, args, out: calls.append(1))
        torch.testing.assert_close(model.decode(Z), expected)
        torch.testing.assert_close(model(Z), whole)  # the forward calls it
        assert len(calls) == 2
        assert list(model.state_dict()) == names
        del model.decode
        torch.testing.assert_close(model.decode(Z), expected)
        assert len(calls) == 2

    def test_the_forward(self, model: Autoencoder) -> None:
        hooks: list[int] = []
        model.register_forward_hook(lambda module, args, out: hooks.append(1))
        expected = model(Z)
        fxtemporal.optimize_in_place(model, (Z,), tune="static")
        torch.testing.assert_close(model(Z), expected)
        assert len(hooks) == 2
        torch.testing.assert_close(nn.Sequential(model)(Z), expected)

    def test_it_follows_the_model(self, model: Autoencoder) -> None:
        fxtemporal.optimize_in_place(model.decode, (Z,), tune="static")
        method = Autoencoder.decode
        with torch.no_grad():
            model.scale.mul_(3)
        torch.testing.assert_close(model.decode(Z), method(model, Z))
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(model.decode(Z), method(model, Z))
        expected = method(copy.deepcopy(model).train(), Z)
        model.train()
        with pytest.warns(UserWarning, match="right only where"):
            actual = model.decode(Z)
        torch.testing.assert_close(actual, expected)
        model.eval().double()
        torch.testing.assert_close(model.decode(Z.double()), method(model, Z.double()))

    def test_copies_run_their_own_method(self, model: Autoencoder) -> None:
        expected = model.decode(Z)
        fxtemporal.optimize_in_place(model.decode, (Z,), tune="static")
        other = copy.deepcopy(model)
        with torch.no_grad():
            model.conv.weight.zero_()
        torch.testing.assert_close(other.decode(Z), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(other)).decode(Z), expected)

    def test_a_model_with_such_a_method_can_be_optimized(self, model: Autoencoder) -> None:
        whole = model(Z)
        fxtemporal.optimize_in_place(model.decode, (Z,), tune="static")
        for again in (model, nn.Sequential(model)):
            result = fxtemporal.optimize(again, (Z,), tune="static")
            torch.testing.assert_close(result(Z), whole)
        fxtemporal.optimize_in_place(model.decode, (Z,), tune="static")
        torch.testing.assert_close(model(Z), whole)

    def test_nothing_is_changed_by_an_error(self, model: Autoencoder) -> None:
        before = dict(vars(model))
        with pytest.raises(CaptureError):
            fxtemporal.optimize_in_place(model.decode, (noise(1, 7, 4, 6, 6),))
        with pytest.raises(PassError):
            fxtemporal.optimize_in_place(model.decode, (Z,), method="decode")
        assert vars(model) == before

    def test_a_model_that_is_dropped_is_freed(self) -> None:
        model = Autoencoder().eval()
        fxtemporal.optimize_in_place(model.decode, (Z,), tune="static")
        model.decode(Z)
        known = weakref.ref(model)
        del model
        gc.collect()
        assert known() is None
