"""What a result does at a call that its guards refuse: the original, an error, another result."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import PassError, SpecializationError
from tests.straight_through import Straight
from tests.zoo import noise

SHORT, LONG = noise(2, 3, 3, 6, 6), noise(2, 9, 3, 6, 6)


class Branching(nn.Module):
    """From the sixth frame on, the forward does something else: 3 frames are another graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        each = [self.norm(self.conv(x[:, t])) * (2 if t > 4 else 1) for t in range(x.shape[1])]
        return torch.stack(each, 1)


def optimized(model: nn.Module, *inputs: Tensor, **settings: Any) -> Any:
    return fxtemporal.optimize(model, inputs or (SHORT,), tune="static", **settings)


@pytest.fixture
def model() -> nn.Module:
    return Branching().eval()


@pytest.mark.parametrize("otherwise", [None, "original", "recapture"])
def test_the_model_s_numbers_and_one_warning(model: nn.Module, otherwise: Any) -> None:
    fast = optimized(model, otherwise=otherwise)
    expected = model(LONG)
    with pytest.warns(UserWarning, match=r"right only where x.shape\[1\] == 3") as caught:
        actual = [fast(LONG) for _ in range(3)]
    torch.testing.assert_close(actual, [expected] * 3)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert list(fxtemporal.report(fast).refused.values()) == [3]
    assert "Calls refused by x.shape[1] == 3" in str(fxtemporal.report(fast))
    torch.testing.assert_close(fast(SHORT), model(SHORT))


def test_an_error_on_request_and_in_a_frozen_result(model: nn.Module) -> None:
    for settings in ({"otherwise": "error"}, {"freeze": True}):
        fast = optimized(model, **settings)
        with pytest.raises(SpecializationError):
            fast(LONG)
        assert fxtemporal.report(fast).refused == {}
    with pytest.raises(PassError, match="otherwise must be"):
        optimized(model, otherwise="ignore")


@pytest.mark.filterwarnings("ignore:the optimized model is right only")
@pytest.mark.parametrize("otherwise", ["original", "recapture"])
class TestAfterTheModelChanged:
    def test_trained_weights(self, model: nn.Module, otherwise: Any) -> None:
        fast = optimized(model, otherwise=otherwise)
        fast(LONG)
        with torch.no_grad():
            model.conv.weight.mul_(3)
        torch.testing.assert_close(fast(LONG), model(LONG))
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(fast(LONG), model(LONG))

    def test_another_dtype(self, model: nn.Module, otherwise: Any) -> None:
        fast = optimized(model, otherwise=otherwise)
        wide = copy.deepcopy(model).double()
        torch.testing.assert_close(fast.double()(LONG.double()), wide(LONG.double()))

    def test_the_other_mode(self, model: nn.Module, otherwise: Any) -> None:
        reference = copy.deepcopy(model).train()
        fast = optimized(model, otherwise=otherwise).train()
        for _ in range(2):
            torch.testing.assert_close(fast(SHORT), reference(SHORT))
        torch.testing.assert_close(model.norm.running_mean, reference.norm.running_mean)
        assert not model.training
        torch.testing.assert_close(fast.eval()(SHORT), model(SHORT))

    def test_gradients(self, model: nn.Module, otherwise: Any) -> None:
        fast = optimized(model, otherwise=otherwise)
        fast(LONG).square().sum().backward()
        mine = model.conv.weight.grad.clone()
        model.zero_grad()
        model(LONG).square().sum().backward()
        torch.testing.assert_close(mine, model.conv.weight.grad)

    def test_hooks(self, model: nn.Module, otherwise: Any) -> None:
        calls: list[str] = []
        model.register_forward_pre_hook(lambda module, args: calls.append("before"))
        fast = optimized(model, otherwise=otherwise)
        calls.clear()
        fast.register_forward_hook(lambda module, args, out: calls.append("after"))
        fast(LONG)
        assert calls == ["before", "after"]

    def test_copies_and_pickles(self, model: nn.Module, otherwise: Any) -> None:
        fast = optimized(model, otherwise=otherwise)
        other = copy.deepcopy(fast)
        with torch.no_grad():
            fast.conv.weight.zero_()
        reference = Branching().eval()
        torch.testing.assert_close(other(LONG), reference(LONG))
        with pytest.raises(SpecializationError):
            pickle.loads(pickle.dumps(fast))(LONG)


@pytest.mark.filterwarnings("ignore:the optimized model is right only")
def test_recapture_keeps_a_result_for_each_size(model: nn.Module) -> None:
    fast = optimized(model, otherwise="recapture")
    for frames in (4, 9, 4, 9):
        x = noise(2, frames, 3, 6, 6)
        calls: list[bool] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out, calls=calls: calls.append(isinstance(module, nn.Conv2d))
        )
        try:
            actual = fast(x)
        finally:
            handle.remove()
        torch.testing.assert_close(actual, model(x))
    assert len(calls) < 4  # the second time nothing is traced, and one convolution runs


@pytest.mark.filterwarnings("ignore:the optimized model is right only")
def test_recapture_is_bounded_and_falls_back_to_the_original() -> None:
    class Strange(Branching):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] == 4:
                return super().forward(x) * float(x.sum())  # a number of the data
            return super().forward(x)

    model = Strange().eval()
    fast = optimized(model, otherwise="recapture")
    for frames in (*range(1, 16), 4):
        x = noise(2, frames, 3, 6, 6)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:the optimized model is right only")
def test_two_threads(model: nn.Module) -> None:
    fast = optimized(model)
    wrong: list[Any] = []

    def serve(x: Tensor) -> None:
        expected = model(x)
        for _ in range(20):
            if not torch.allclose(fast(x), expected, atol=1e-5):
                wrong.append(x.shape)

    threads = [threading.Thread(target=serve, args=(x,)) for x in (SHORT, LONG)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Writing(nn.Module):
    """Writes its input, or draws numbers, before the size is read that the graph is held to."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        y = self.conv(x).relu_()
        if torch.cat([y, y], 2).shape[2] > 8:
            return y * 2
        return y


@pytest.mark.parametrize(
    ("change", "once"),
    [
        (lambda x: x.add_(1), False),
        (lambda x: x[:, :, 0].relu_(), False),
        (lambda x: x + torch.rand(1), False),
        (lambda x: x + 1, True),
    ],
)
def test_nothing_is_done_twice(change: Callable[[Tensor], Any], once: bool) -> None:
    model = Writing(change).eval()
    fast = optimized(model, noise(1, 3, 4, 6, 6), verify=False)
    x = noise(1, 3, 6, 6, 6)
    mine, theirs = x.clone(), x.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            actual = fast(mine)
        except SpecializationError:
            assert not once
            return
    expected = model(theirs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(mine, theirs)
    assert len(caught) == 1


class Updating(nn.Module):
    """Writes a buffer before the size is read that the graph is held to."""

    def __init__(self, change: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        self.register_buffer("seen", torch.zeros(2))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.seen, x)
        y = self.conv(x).relu_()
        return y * 2 if torch.cat([y, y], 2).shape[2] > 8 else y


@pytest.mark.parametrize(
    "change",
    [
        lambda seen, x: seen.add_(1),
        lambda seen, x: seen[:1].mul_(2).add_(1),
        lambda seen, x: seen.copy_(seen + x.mean()),
        lambda seen, x: seen.__setitem__(0, seen[0] + 1),
        lambda seen, x: nn.functional.relu(seen.sub_(1), inplace=True),
        lambda seen, x: torch.add(seen, 1, out=seen),
    ],
)
def test_a_buffer_is_written_once(change: Callable[[Tensor, Tensor], Any]) -> None:
    model, reference = Updating(change).eval(), Updating(change).eval()
    fast = optimized(model, noise(1, 3, 4, 6, 6), verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(SpecializationError):
            fast(noise(1, 3, 6, 6, 6))
            reference(noise(1, 3, 6, 6, 6))
            torch.testing.assert_close(model.seen, reference.seen)


def test_compilers_and_traces_get_the_error(model: nn.Module) -> None:
    fast = optimized(model)
    with pytest.raises(Exception, match=r"x\.shape"):
        torch.export.export(fast, (LONG,), strict=False)
    compiled = torch.compile(fast, backend="eager")
    torch.testing.assert_close(compiled(SHORT), model(SHORT))


def test_a_result_within_another_model(model: nn.Module) -> None:
    outer = nn.Sequential(optimized(model), nn.Flatten(2)).eval()
    fast = optimized(outer)
    with pytest.warns(UserWarning, match="right only where"):
        torch.testing.assert_close(fast(LONG), model(LONG).flatten(2))


class Counting(nn.Module):
    """Puts another tensor in place of its buffer: captured by torch.export, with a write."""

    def __init__(self, hidden: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("seen", torch.zeros(1))
        self.layer = nn.Linear(4, 4)
        self.hidden = hidden()

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            f = self.hidden(self.layer(x[:, t]))
            self.seen = self.seen * 0.9 + f.detach().mean()
            outs.append(f * self.seen)
        return torch.stack(outs, 1)


def test_a_buffer_that_the_original_replaces_stays_that_of_the_model() -> None:
    model, reference = Counting().eval(), Counting().eval()
    fast = optimized(model, noise(2, 2, 4))
    for frames in (2, 5, 3, 2, 5):
        x = noise(2, frames, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(fast(x), reference(x))
        torch.testing.assert_close(fast.seen, reference.seen)
        assert model.seen is fast.seen


@pytest.mark.parametrize("hidden", [nn.Dropout, nn.AlphaDropout, nn.RReLU, nn.Dropout1d])
def test_layers_without_tensors_follow_the_mode_too(hidden: type[nn.Module]) -> None:
    model = Counting(hidden).eval()
    fast = optimized(model, noise(2, 2, 4))
    x = noise(2, 2, 4)
    model.train()
    fast.train()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="right only where"):
        actual = fast(x)
    model.seen.zero_()
    torch.manual_seed(1)
    torch.testing.assert_close(actual, model(x))


@pytest.mark.parametrize("kind", [Branching, Counting])
def test_hooks_of_the_model_and_of_its_layers_run_once(kind: type[nn.Module]) -> None:
    def twice(module: nn.Module, inputs: Any) -> Any:
        return (inputs[0] * 2,)

    def more(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + 100

    model = kind().eval()
    hooked = [model, *list(model.children())[:1]]
    for module in hooked:
        module.register_forward_pre_hook(twice)
        module.register_forward_hook(more)
    short, long = (SHORT, LONG) if kind is Branching else (noise(2, 2, 4), noise(2, 7, 4))
    reference = copy.deepcopy(model)
    for otherwise in ("original", "recapture"):
        fast = optimized(model, short, otherwise=otherwise)
        for x in (short, long, long):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.testing.assert_close(fast(x), reference(x))
            for one, other in zip(model.buffers(), reference.buffers(), strict=True):
                other.copy_(one)


class Spectral(nn.Module):
    """Its layer writes its own state in training, before the size is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * 2 if len(torch.cat([y, y])) > 5 else y


def test_a_layer_that_keeps_a_state_is_not_run_twice() -> None:
    model = Spectral().train()
    fast = optimized(model, noise(2, 4))
    kept = model.layer.parametrizations.weight[0]._u.clone()
    with pytest.raises(SpecializationError):
        fast(noise(3, 4))
    model.layer.parametrizations.weight[0]._u.copy_(kept)
    quiet = optimized(model.eval(), noise(2, 4))
    with pytest.warns(UserWarning, match="right only where"):
        torch.testing.assert_close(quiet(noise(3, 4)), model(noise(3, 4)))


class Estimator(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(super().forward(x))


def test_a_refused_call_without_gradients_leaves_the_next_one_alone() -> None:
    """The result refuses a backward of its own; the original gives one."""
    fast = optimized(Estimator().eval())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        fast(LONG)
    with pytest.raises(fxtemporal.GradientError):
        fast(SHORT.clone().requires_grad_()).sum().backward()
    x = LONG.clone().requires_grad_()
    fast(x).sum().backward()
    assert x.grad is not None


UNKNOWN = {
    "meshgrid": (lambda x: torch.meshgrid(x[0, :, 0, 0], x[0, :, 0, 0], indexing="ij"), True),
    "a method": (lambda x: x.vsplit(1), True),
    "a sampling": (
        lambda x: nn.functional.grid_sample(x, x.new_zeros(len(x), 2, 2, 2), align_corners=False),
        True,
    ),
    "a conversion": (lambda x: x.type(torch.float64), True),
    "gumbel": (lambda x: nn.functional.gumbel_softmax(x), False),
    "fractional pooling": (lambda x: nn.functional.fractional_max_pool2d(x, 2, (2, 2)), False),
    "poisson": (lambda x: torch.poisson(x.abs()), False),
    "statistics": (
        lambda x: torch.instance_norm(
            x, None, None, torch.zeros(4), torch.ones(4), True, 0.1, 1e-5, False
        ),
        False,
    ),
    "bernoulli": (lambda x: x.sigmoid().bernoulli(), False),
}


@pytest.mark.parametrize("named", UNKNOWN)
def test_ops_that_no_description_covers(named: str) -> None:
    """Torch says which of its own ops draw numbers or write: a guard behind these is an error."""
    op, harmless = UNKNOWN[named]

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            op(y)
            return y * 2 if len(torch.cat([y, y])) > 5 else y

    model = Calls().eval()
    fast = optimized(model, noise(2, 3, 6, 6), verify=False)
    x = noise(3, 3, 6, 6)
    if harmless:
        with pytest.warns(UserWarning, match="right only where"):
            torch.testing.assert_close(fast(x), model(x))
    else:
        with pytest.raises(SpecializationError):
            fast(x)
