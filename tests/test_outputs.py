"""Outputs of any class: dataclasses, named tuples, subclasses of dict, plain objects."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import pickle
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxtemporal
from fxtemporal import GradientError
from fxtemporal.ir.outputs import leaves_of, put_together, take_apart
from tests.straight_through import Straight
from tests.strictly import strictly
from tests.zoo import noise

CLIP = noise(2, 4, 3, 6, 6)


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclasses.dataclass
class Record:
    logits: Tensor
    loss: Tensor | None = None
    count: int = 3


class Gaussian:
    """A plain object, as autoencoders return it."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.mean, self.logvar = parameters.chunk(2, 2)
        self.deterministic = deterministic
        self.std = torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        return self.mean


class Registered(collections.OrderedDict[str, Any]):
    """A dict with attributes, known to pytree, like the outputs of transformers and diffusers."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


pytree.register_pytree_node(
    Registered,
    lambda d: (list(d.values()), list(d)),
    lambda v, names: Registered(**dict(zip(names, v, strict=True))),
)


class Chain(dict[str, Any]):
    """A dict that pytree does not know."""


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.kept = Record(torch.zeros(1))

    def features(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 1)

    def forward(self, x: Tensor) -> Any:
        return self.made(self.features(x))


class Returns(Base):
    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made


KINDS = {
    "named tuple": lambda y: Pair(y, [y.mean(), None]),
    "dataclass": lambda y: Record(y),
    "plain": lambda y: Gaussian(y),
    "registered": lambda y: Registered(sample=y, other=y.mean()),
    "plain in registered": lambda y: Registered(dist=Gaussian(y, True)),
    "plain in tuple": lambda y: (y, {"dist": Gaussian(y)}, 5),
    "ordered dict": lambda y: collections.OrderedDict(b=y, a=y.mean()),
    "distribution": lambda y: torch.distributions.Normal(y, y.exp(), validate_args=False),
    "alias": lambda y: Registered(one=y, same=y),
}


def contents(value: Any) -> Any:
    return leaves_of(value)


@pytest.mark.parametrize("kind", KINDS)
def test_come_back_as_what_they_were(kind: str) -> None:
    model = Returns(KINDS[kind]).eval()
    fast = strictly(model, (CLIP,), tune="static")
    report = fxtemporal.report(fast)
    assert report.frontend == "fx"
    assert report.by_status("applied")
    for batch in (2, 3):
        for net in (fast, copy.deepcopy(fast)):
            x = noise(batch, 4, 3, 6, 6)
            expected, actual = model(x), net(x)
            assert type(actual) is type(expected)
            assert set(getattr(actual, "__dict__", ())) == set(getattr(expected, "__dict__", ()))
            torch.testing.assert_close(contents(actual), contents(expected))
    x, y = (CLIP.clone().requires_grad_() for _ in range(2))
    for net, given in ((model, x), (fast, y)):
        sum(v.sum() for v in contents(net(given)) if isinstance(v, Tensor)).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_one_tensor_at_two_places_is_one_tensor() -> None:
    fast = strictly(Returns(KINDS["alias"]).eval(), (CLIP,), tune="static")
    out = fast(CLIP)
    assert out["one"] is out["same"]
    assert out.one is out["one"]


def test_methods_and_later_attributes_of_a_plain_object() -> None:
    fast = strictly(Returns(KINDS["plain"]).eval(), (CLIP,), tune="static")
    one, other = fast(CLIP), fast(CLIP)
    assert one is not other
    torch.testing.assert_close(one.mode(), one.mean)
    one.extra = 1
    assert not hasattr(other, "extra")


def test_a_pickle_returns_them_too() -> None:
    model = Recording(Base()).eval()
    fast = strictly(model, (CLIP,), tune="static")
    again = pickle.loads(pickle.dumps(fast))
    out = again(CLIP)
    assert type(out) is Record
    torch.testing.assert_close(out.logits, model(CLIP).logits)


class Recording(nn.Module):
    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Record:
        return Record(self.base.features(x), count=x.size(1))


def test_another_number_of_frames_gives_another_number_in_it() -> None:
    model = Recording(Base()).eval()
    fast = strictly(model, (CLIP,), tune="static")
    for frames in (4, 7, 1, 2):
        x = noise(2, frames, 3, 6, 6)
        out = fast(x)
        assert out.count == frames
        torch.testing.assert_close(out.logits, model(x).logits)


class Kept(Base):
    """Returns an object that it keeps: a caller may compare identities."""

    def forward(self, x: Tensor) -> Record:
        self.kept.logits = self.features(x)
        return self.kept


class Twice(Base):
    def forward(self, x: Tensor) -> Any:
        one = Record(self.features(x))
        return one, one


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("kind", [Kept, Twice])
def test_an_object_with_an_identity_is_not_made_anew(kind: type[Base]) -> None:
    model = kind().eval()
    try:
        fast = strictly(model, (CLIP,), tune="static")
    except fxtemporal.CaptureError:
        return
    out = fast(CLIP)
    if kind is Twice:
        assert out[0] is out[1]
    else:
        assert out is fast(CLIP)


@pytest.mark.parametrize("made", [Slots, lambda y: Chain(a=y), lambda y: iter([y])])
def test_other_classes_are_refused_or_right(made: Any) -> None:
    model = Returns(made).eval()
    try:
        fast = strictly(model, (CLIP,), tune="static")
    except fxtemporal.CaptureError:
        return
    assert type(fast(CLIP)) is type(model(CLIP))


def test_refused_gradients_of_tensors_within_objects() -> None:
    model = Returns(lambda y: Registered(dist=Gaussian(Straight.apply(y)))).eval()
    fast = strictly(model, (CLIP,), tune="static")
    out = fast(CLIP.clone().requires_grad_())
    assert type(out.dist) is Gaussian
    with pytest.raises(GradientError):
        out.dist.mean.sum().backward()


def test_the_verifier_compares_within_objects() -> None:
    model = Returns(KINDS["plain"]).eval()
    fast = strictly(model, (CLIP,), tune="static")
    comparison = fxtemporal.report(fast).comparison
    assert comparison is not None
    assert comparison.equal


def test_the_original_returns_them_where_a_guard_refuses() -> None:
    class Branch(Base):
        def forward(self, x: Tensor) -> Any:
            return Gaussian(self.features(x) * (2 if x.size(1) > 5 else 1))

    model = Branch().eval()
    fast = fxtemporal.optimize(model, (CLIP,), tune="static")
    x = noise(2, 8, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(contents(fast(x)), contents(model(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_apart_and_together(kind: str) -> None:
    value = KINDS[kind](CLIP)
    apart, layout = take_apart(value, {})
    again = put_together(apart, layout)
    assert type(again) is type(value)
    torch.testing.assert_close(contents(again), contents(value))
    assert [id(v) for v in contents(again)] == [id(v) for v in contents(value)]
    assert take_apart(value, {})[1] == layout
    assert copy.deepcopy(layout) == layout


def test_an_object_at_two_places_is_taken_apart_where_identity_does_not_matter() -> None:
    record = Record(CLIP)
    again = put_together(*take_apart((record, record)))
    assert [type(v) for v in again] == [Record, Record]
    with pytest.raises(ValueError, match="at two places"):
        take_apart((record, record), {})


def test_a_circle_is_refused() -> None:
    record = Record(CLIP)
    record.loss = record  # type: ignore[assignment]
    with pytest.raises((ValueError, RecursionError)):
        take_apart(record, {})


def merging_defaults(forward: Any) -> Any:
    """As decorators of transformers do: what was not given comes from the model's config."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("scale", self.config_scale)
        return_dict = kwargs.pop("return_dict", True)
        y = forward(self, *args, **kwargs)
        return {"y": y} if return_dict else (y,)

    return wrapper


class Decorated(Base):
    config_scale = 3.0

    @merging_defaults
    def forward(self, x: Tensor, scale: float = 1.0, return_dict: bool = True) -> Any:
        return self.features(x) * scale


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((CLIP,), {}),
        ((), {"x": CLIP}),
        ((CLIP,), {"scale": 2.0}),
        ((CLIP,), {"return_dict": False}),
    ],
)
def test_a_decorator_sees_what_the_example_gave_by_keyword(args: Any, kwargs: Any) -> None:
    model = Decorated().eval()
    fast = strictly(model, args, kwargs, tune="static")
    assert fxtemporal.report(fast).frontend == "fx"
    expected, actual = model(*args, **kwargs), fast(*args, **kwargs)
    assert type(actual) is type(expected)
    torch.testing.assert_close(contents(actual), contents(expected))
