"""Each Conv3d gets the exact form that its kernel has, or keeps its own and says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxtemporal
from fxtemporal import Code, Remark, SpecializationError
from fxtemporal.functional import FORMS, conv3d_spanning
from fxtemporal.passes.conv3d_forms import Conv3dForms
from tests.strictly import strictly
from tests.zoo import CONV3D, ScaledConv3d, noise

# nn.Conv3d itself warns that "same" with an even kernel copies its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

IN, OUT, FRAMES = 4, 6, 5


def clip(batch: int = 2, frames: int = FRAMES, size: int = 6, channels: int = IN) -> Tensor:
    return noise(batch, channels, frames, size, size).double()


def optimized(model: nn.Module, *example: Any, **more: Any) -> fx.GraphModule:
    return strictly(model, example, tune="static", **more)


def remarks(module: nn.Module) -> tuple[Remark, ...]:
    return tuple(r for r in fxtemporal.report(module).remarks if r.rule == "conv3d-forms")


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def conv3d_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """What is left of conv3d in the graph."""
    functions = {FORMS["conv3d"].function, F.conv3d, torch.conv3d, torch.ops.aten.conv3d.default}
    return [
        node
        for node in gm.graph.nodes
        if node.target in functions
        or (node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Conv3d))
    ]


@dataclass(frozen=True)
class Layer:
    """A Conv3d on 4 channels, and the form that it must get (None: it stays)."""

    form: str | None
    kernel: Any
    keywords: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Conv3d:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Conv3d(IN, OUT, self.kernel, **dict(self.keywords)).double()


def layer(form: str | None, kernel: Any, **keywords: Any) -> Layer:
    return Layer(form, kernel, tuple(keywords.items()))


LAYERS: dict[str, Layer] = {
    "spatial": layer("conv3d_spatial", (1, 3, 3)),
    "spatial, padded": layer("conv3d_spatial", (1, 3, 3), padding=(0, 1, 1)),
    "spatial, strided": layer("conv3d_spatial", (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "spatial, every other frame": layer("conv3d_spatial", (1, 3, 3), stride=(2, 1, 1)),
    "spatial, time padded": layer("conv3d_spatial", (1, 3, 3), padding=1),
    "spatial, dilated": layer("conv3d_spatial", (1, 3, 2), dilation=(3, 2, 1)),
    "spatial, grouped": layer("conv3d_spatial", (1, 3, 3), groups=2),
    "spatial, no bias": layer("conv3d_spatial", (1, 3, 1), bias=False),
    "spatial, same": layer("conv3d_spatial", (1, 2, 4), padding="same"),
    "spatial, valid": layer("conv3d_spatial", (1, 3, 3), padding="valid"),
    "spatial, reflect": layer("conv3d_spatial", (1, 3, 3), padding=1, padding_mode="reflect"),
    "spatial, circular": layer("conv3d_spatial", (1, 3, 3), padding=2, padding_mode="circular"),
    "temporal": layer("conv3d_temporal", (3, 1, 1)),
    "temporal, padded": layer("conv3d_temporal", (3, 1, 1), padding=(1, 0, 0)),
    "temporal, strided": layer("conv3d_temporal", (3, 1, 1), stride=(2, 2, 1), padding=1),
    "temporal, dilated": layer("conv3d_temporal", (2, 1, 1), dilation=(3, 2, 2)),
    "temporal, grouped": layer("conv3d_temporal", (3, 1, 1), groups=2, bias=False),
    "temporal, same": layer("conv3d_temporal", (4, 1, 1), padding="same"),
    "temporal, replicate": layer(
        "conv3d_temporal", (3, 1, 1), padding=(2, 0, 0), padding_mode="replicate"
    ),
    "temporal, circular": layer(
        "conv3d_temporal", (3, 1, 1), padding=(1, 2, 0), padding_mode="circular"
    ),
    "pointwise": layer("conv3d_pointwise", 1),
    "pointwise, strided": layer("conv3d_pointwise", 1, stride=2),
    "pointwise, padded": layer("conv3d_pointwise", 1, padding=1),
    "pointwise, padded by mode": layer(
        "conv3d_pointwise", 1, padding=(1, 0, 2), padding_mode="replicate"
    ),
    "pointwise, grouped": layer("conv3d_pointwise", 1, groups=2, bias=False),
    "pointwise, same": layer("conv3d_pointwise", 1, padding="same", dilation=2),
    "full extent": layer("conv3d_full_extent", (FRAMES, 3, 3), padding=(0, 1, 1)),
    "full extent, dilated": layer("conv3d_full_extent", (3, 2, 2), dilation=(2, 1, 2)),
    "full extent, grouped": layer("conv3d_full_extent", (FRAMES, 3, 3), groups=2, stride=2),
    "full extent, flat": layer("conv3d_full_extent", (FRAMES, 1, 1)),
    "patches": layer("conv3d_patchify", (2, 3, 3), stride=(2, 3, 3)),
    "patches, grouped": layer("conv3d_patchify", (2, 2, 2), stride=2, groups=2, bias=False),
    "patches, rest cropped": layer("conv3d_patchify", (2, 4, 5), stride=(2, 4, 5), padding="valid"),
    "dense": layer(None, 3, padding=1),
    "dense, strided": layer(None, 3, stride=(1, 2, 2), padding=1),
    "dense, dilated": layer(None, 2, dilation=2),
    "depthwise": layer(None, (3, 3, 3), groups=2, padding="same"),
    "dense in time and width": layer(None, (3, 1, 3)),
    "overlapping patches": layer(None, (2, 3, 3), stride=(2, 2, 2)),
}


@cache
def of_layer(name: str) -> tuple[nn.Sequential, fx.GraphModule]:
    """The layer alone in a model, and that model optimized: for tests that change neither."""
    model = nn.Sequential(LAYERS[name].build())
    return model, optimized(model, clip())


@pytest.mark.parametrize("name", LAYERS)
def test_each_kernel_gets_its_form(name: str) -> None:
    case = LAYERS[name]
    model, result = of_layer(name)
    (remark,) = remarks(result)
    assert remark.target == "0"
    assert remark.detail["form"] == case.form
    assert remark.detail["kernel"] == "×".join(map(str, model[0].kernel_size))
    if case.form is None:
        assert remark.status == "missed"
        assert [reason.code for reason in remark.reasons] == [Code.DENSE_KERNEL]
        assert len(conv3d_nodes(result)) == 1
    else:
        assert (remark.status, remark.reasons) == ("applied", ())
        assert not conv3d_nodes(result)
        function = conv3d_spanning if "full" in case.form else FORMS[case.form].function
        assert function in [n.target for n in result.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_at_every_size(name: str) -> None:
    model, result = of_layer(name)
    for batch, frames, size in ((2, FRAMES, 6), (3, FRAMES, 6), (1, FRAMES, 9), (2, FRAMES + 2, 7)):
        x = clip(batch, frames, size)
        close(result(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_the_same_parameters(name: str) -> None:
    model, result = of_layer(name)
    grads = []
    for module in (model, result):
        x = clip(3).requires_grad_()
        module(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for actual, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_state_dict_and_the_model_stay_as_they_are(name: str) -> None:
    before = nn.Sequential(LAYERS[name].build())
    model, result = of_layer(name)
    assert list(result.state_dict()) == list(model.state_dict())
    mine, theirs = dict(result.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in theirs)
    close(model(clip()), before(clip()))
    assert repr(model) == repr(before)


@pytest.mark.parametrize("name", LAYERS)
def test_twice_changes_nothing(name: str) -> None:
    _, once = of_layer(name)
    twice = optimized(once, clip())
    assert not fxtemporal.report(twice).by_status("applied")
    assert [n.target for n in twice.graph.nodes] == [n.target for n in once.graph.nodes]
    close(twice(clip(3)), once(clip(3)))


@pytest.mark.parametrize("name", LAYERS)
def test_audit_says_what_optimize_does(name: str) -> None:
    model, result = of_layer(name)
    assert fxtemporal.audit(model, (clip(),)).remarks == remarks(result)


@pytest.mark.parametrize("name", LAYERS)
def test_without_example_inputs(name: str) -> None:
    case = LAYERS[name]
    model = nn.Sequential(case.build())
    result = strictly(model)
    (remark,) = remarks(result)
    codes = [reason.code for reason in remark.reasons]
    if case.form is None or (case.form == "conv3d_full_extent" and name != "full extent, flat"):
        assert remark.status == "missed"
        assert codes == [Code.SHAPES_UNKNOWN, Code.DENSE_KERNEL]
        assert "example inputs" in remark.reasons[0].text
    elif name == "full extent, flat":  # which is temporal too
        assert (remark.status, remark.detail["form"]) == ("applied", "conv3d_temporal")
    else:
        assert (remark.status, remark.detail["form"]) == ("applied", case.form)
    for batch, frames in ((2, FRAMES), (3, FRAMES + 3)):
        close(result(clip(batch, frames)), model(clip(batch, frames)))
    unbatched = clip(1)[0]
    close(result(unbatched), model(unbatched))


@pytest.mark.parametrize("name", LAYERS)
def test_one_clip_without_a_batch(name: str) -> None:
    model = nn.Sequential(LAYERS[name].build())
    result = optimized(model, clip(1)[0])
    assert remarks(result)[0].detail["form"] == LAYERS[name].form
    close(result(clip(1, FRAMES, 8)[0]), model(clip(1, FRAMES, 8)[0]))
    with pytest.raises(SpecializationError, match=r"dim\(\)"):
        result(clip(2))


# ------------------------------------------------------------------------------ how it is spelled


class Functional(nn.Module):
    """A convolution spelled by ``forward``, on a weight and a bias of its own."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(OUT, IN, 1, 3, 3, seed=2).double() / 5)
        self.bias = nn.Parameter(noise(OUT, seed=3).double())
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def by_keyword(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv3d(input=x, weight=w, bias=b, stride=(1, 2, 2), padding=(0, 1, 1))


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "F.conv3d": lambda x, w, b: F.conv3d(x, w, b),
    "F.conv3d by keyword": by_keyword,
    "F.conv3d without bias": lambda x, w, b: F.conv3d(x, weight=w, padding="same"),
    "torch.conv3d": lambda x, w, b: torch.conv3d(x, w, b, 1, (0, 1, 1), 1, 1),
    "aten.conv3d": lambda x, w, b: torch.ops.aten.conv3d.default(x, w, b, [1, 1, 1], [0, 1, 1]),
    "aten.conv3d.padding": lambda x, w, b: torch.ops.aten.conv3d.padding(
        x, w, b, [1, 1, 1], "same"
    ),
    "numbers as tensors": lambda x, w, b: F.conv3d(x, w, b, padding=[0, int(w.shape[3]) // 2, 1]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_function(name: str) -> None:
    model = Functional(SPELLINGS[name])
    result = optimized(model, clip())
    (remark,) = remarks(result)
    assert (remark.status, remark.detail["form"]) == ("applied", "conv3d_spatial")
    assert remark.location is not None
    assert "test_conv3d_forms.py:" in remark.location
    for batch, frames in ((2, FRAMES), (3, FRAMES + 2)):
        close(result(clip(batch, frames)), model(clip(batch, frames)))


@pytest.mark.parametrize("name", ["spatial, padded", "temporal, same", "patches", "pointwise"])
def test_aten_from_torch_export(name: str) -> None:
    model = nn.Sequential(LAYERS[name].build())
    shapes = (dict.fromkeys((0, 2), torch.export.Dim.AUTO),)
    program = torch.export.export(model, (clip(),), dynamic_shapes=shapes, strict=False)
    result = strictly(program, tune="static")
    (remark,) = remarks(result)
    assert (remark.status, remark.detail["form"]) == ("applied", LAYERS[name].form)
    close(result(clip()), model(clip()))
    close(result(clip(3, FRAMES + 2)), model(clip(3, FRAMES + 2)))


def test_a_computed_weight_is_rewritten_where_its_shape_is_known() -> None:
    model = Functional(lambda x, w, b: F.conv3d(x, w * 2, b))
    result = optimized(model, clip())
    assert remarks(result)[0].status == "applied"
    close(result(clip(3)), model(clip(3)))


class WeightAsInput(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(x, weight)


def test_a_weight_that_is_an_input_has_no_shape_without_example_inputs() -> None:
    result = strictly(WeightAsInput())
    (remark,) = remarks(result)
    assert [reason.code for reason in remark.reasons] == [Code.SHAPES_UNKNOWN]


def test_a_weight_that_is_an_input_is_held_to_its_kernel() -> None:
    """Traced with a (1, 3, 3) kernel, a call with a (3, 1, 1) kernel must not give its numbers."""
    model = WeightAsInput()
    flat, tall = noise(OUT, IN, 1, 3, 3).double(), noise(OUT, IN, 3, 1, 1).double()
    result = optimized(model, clip(), flat)
    close(result(clip(3), flat * 2), model(clip(3), flat * 2))
    try:
        actual = result(clip(), tall)
    except (SpecializationError, ValueError):
        return
    close(actual, model(clip(), tall))


# ----------------------------------------------------------------------------- which module it is


def one(module: nn.Module) -> nn.Module:
    return nn.Sequential(module.double())


def hooked() -> nn.Module:
    model = one(nn.Conv3d(IN, OUT, (1, 3, 3)))
    model[0].register_forward_hook(lambda m, a, o: o * 2)
    return model


def parametrized() -> nn.Module:
    return one(parametrizations.weight_norm(nn.Conv3d(IN, OUT, (1, 3, 3))))


def replaced() -> nn.Module:
    model = one(nn.Conv3d(IN, OUT, (1, 3, 3)))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 2
    return model


class Padded(nn.Conv3d):
    """Overrides a helper of forward, not forward itself."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1)), weight, bias)


BLOCKED: dict[str, tuple[Callable[[], nn.Module], Code]] = {
    "hook": (hooked, Code.HOOKED_MODULE),
    "parametrization": (parametrized, Code.PARAMETRIZED_MODULE),
    "forward replaced": (replaced, Code.SUBCLASS),
}


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_a_module_that_is_no_plain_conv3d_is_left_alone(name: str, with_inputs: bool) -> None:
    build, code = BLOCKED[name]
    model = build()
    result = strictly(model, (clip(),) if with_inputs else None, tune="static")
    (remark,) = remarks(result)
    assert remark.status == "missed"
    assert [reason.code for reason in remark.reasons] == [code]
    assert "0 (" in remark.reasons[0].text
    close(result(clip(3)), model(clip(3)))


@pytest.mark.parametrize("cls", [ScaledConv3d, Padded])
def test_a_subclass_with_a_forward_of_its_own_is_seen_through(cls: type[nn.Conv3d]) -> None:
    """Its own arithmetic stays in the graph, around the conv3d that it calls."""
    model = one(cls(IN, OUT, (1, 3, 3)))
    result = optimized(model, clip())
    assert remarks(result)[0].status == "applied"
    close(result(clip(3)), model(clip(3)))


class Twice(nn.Module):
    """One Conv3d at two places, on maps of different sizes and numbers of frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(IN, IN, (3, 1, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[..., ::2])


def test_a_shared_module_is_two_sites() -> None:
    model = Twice()
    result = optimized(model, clip())
    forms = [(r.target, r.status, r.detail["form"], r.detail["frames"]) for r in remarks(result)]
    assert forms == [
        ("conv", "applied", "conv3d_temporal", FRAMES),
        ("conv", "applied", "conv3d_full_extent", FRAMES - 2),
    ]
    assert list(result.state_dict()) == ["conv.weight", "conv.bias"]
    close(result(clip(3)), model(clip(3)))
    close(result(clip(2, FRAMES + 1)), model(clip(2, FRAMES + 1)))


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Conv3d(IN, IN, (1, 3, 3)), nn.Conv3d(IN, IN, (1, 3, 3))).double()
    model[1].weight = model[0].weight
    result = optimized(model, clip())
    tied = dict(result.named_parameters(remove_duplicate=False))
    assert tied["0.weight"] is tied["1.weight"] is model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(2)
    close(result(clip(3)), model(clip(3)))


def test_weights_that_change_after_optimize_are_used() -> None:
    """No form keeps a copy: the next call reads the parameters as they are then."""
    model = nn.Sequential(*(LAYERS[n].build() for n in ("spatial, padded",)))
    result = optimized(model, clip())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result(clip()).square().mean().backward()
    optimizer.step()
    close(result(clip()), model(clip()))
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    close(result(clip()), model(clip()))


def test_training_works_as_with_the_original() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(IN, OUT, (1, 3, 3)), nn.BatchNorm3d(OUT), nn.ReLU(), nn.Conv3d(OUT, 2, (3, 1, 1))
    ).double()
    other = copy.deepcopy(model)
    result = optimized(model.train(), clip())
    for module, parameters in ((result, model), (other.train(), other)):
        optimizer = torch.optim.SGD(parameters.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            module(clip(2 + step)).square().mean().backward()
            optimizer.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_other_convolutions_are_no_sites() -> None:
    model = nn.Sequential(
        nn.ConvTranspose3d(IN, IN, (1, 3, 3)), nn.Flatten(2, 3), nn.Conv2d(IN, IN, 1)
    ).double()
    assert not optimized(model, clip()).meta["fxtemporal"].remarks


def test_a_lazy_conv3d_is_a_conv3d_once_it_has_run() -> None:
    model = nn.Sequential(nn.LazyConv3d(OUT, (1, 3, 3))).double()
    model(clip())
    assert remarks(optimized(model, clip()))[0].status == "applied"


def test_the_order_of_preference_when_several_forms_fit() -> None:
    for kernel, stride, form in (
        (1, 1, "conv3d_pointwise"),  # spatial, temporal and patchify fit too
        ((FRAMES, 1, 1), 1, "conv3d_full_extent"),
        ((1, 2, 2), (1, 2, 2), "conv3d_spatial"),
    ):
        model = nn.Sequential(nn.Conv3d(IN, OUT, kernel, stride).double())
        assert remarks(optimized(model, clip()))[0].detail["form"] == form


def test_channels_last_input_keeps_the_numbers() -> None:
    for name in ("spatial, padded", "temporal", "pointwise", "full extent", "patches"):
        model, result = of_layer(name)
        close(result(clip().to(memory_format=torch.channels_last_3d)), model(clip()))
        strided = clip(2, FRAMES, 12)[..., ::2, ::2]
        close(result(strided), model(strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_kept_and_verified(dtype: torch.dtype) -> None:
    model = nn.Sequential(*(LAYERS[n].build() for n in ("spatial, padded",))).to(dtype)
    result = optimized(model, clip().to(dtype))
    comparison = fxtemporal.report(result).comparison
    assert comparison is not None
    assert comparison.equal
    assert comparison.original_error is not None
    assert result(clip().to(dtype)).dtype == dtype


def test_an_empty_batch() -> None:
    for name in ("spatial, padded", "temporal", "pointwise", "full extent", "patches", "dense"):
        model, result = of_layer(name)
        close(result(clip(0)), model(clip(0)))


# ---------------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("cls", CONV3D, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_the_zoo_keeps_its_numbers(cls: Any, with_inputs: bool) -> None:
    model = cls.build().double()
    example = tuple(x.double() for x in model.example(*cls.sizes[0]))
    result = strictly(model, example if with_inputs else None, tune="static")
    assert remarks(result)
    assert fxtemporal.report(result).by_status("failed") == ()
    assert list(result.state_dict()) == list(model.state_dict())
    for sizes in (*cls.sizes, (2, 7)):
        inputs = tuple(x.double() for x in model.example(*sizes))
        try:
            expected = model(*inputs)
        except RuntimeError:
            continue
        try:
            close(result(*inputs), expected)
        except SpecializationError:
            assert sizes[1] != cls.sizes[0][1]


@pytest.mark.long
def test_every_site_of_the_zoo_has_a_place() -> None:
    for cls in CONV3D:
        model = cls.build()
        for remark in fxtemporal.audit(model, model.example()).remarks:
            assert remark.location is not None
            assert "no_loop.py:" in remark.location
            assert remark.target


# ------------------------------------------------------------------------------------ any geometry


def triples(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    kernel=triples(1, 3),
    stride=triples(1, 3),
    padding=st.one_of(triples(0, 1), st.sampled_from(["same", "valid"])),
    dilation=triples(1, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
)
def test_any_geometry(
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, mode: str, bias: bool
) -> None:
    if padding == "same":
        stride = 1
    conv = nn.Conv3d(IN, OUT, kernel, stride, padding, dilation, groups, bias, mode).double()
    result = optimized(nn.Sequential(conv), clip())
    for x in (clip(), clip(3, FRAMES + 2, 7)):
        try:
            actual = result(x)
        except SpecializationError:
            assert x.shape[2] != FRAMES
        else:
            close(actual, conv(x))
    (remark,) = remarks(result)
    assert (remark.status == "missed") == bool(remark.reasons)


def test_the_rule_is_named_and_knows_its_table_alone() -> None:
    assert Conv3dForms().name == "conv3d-forms"
    assert Conv3dForms.exact
    assert vars(Conv3dForms()) == {"choices": None, "confined": False, "bitwise": False}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norm", [nn.InstanceNorm3d, nn.BatchNorm3d])
def test_gradients_of_one_frame_come_back_in_plain_strides(
    norm: type[nn.Module], batch: int
) -> None:
    """torch's BatchNorm takes a gradient with other strides, of sizes of 1, for another format."""
    model = nn.Sequential(
        nn.Conv3d(3, 6, 1),
        nn.Conv3d(6, 2, (1, 2, 2), padding=1),
        nn.Conv3d(2, 4, 2),
        nn.Conv3d(4, 2, (1, 2, 2)),
        norm(2),
        nn.Conv3d(2, 2, (1, 1, 2)),
    ).eval()
    fast = strictly(model, (torch.randn(2, 3, 1, 2, 3),), tune="static")
    x = torch.randn(batch, 3, 1, 2, 3)
    found = []
    for net in (model, fast):
        model.zero_grad()
        net(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_a_grouped_weight_in_channels_last() -> None:
    """torch's conv2d, on one thread, gives another one for strides that a size of 1 leaves open."""
    layers = nn.Sequential(nn.Conv3d(6, 6, 1), nn.Conv3d(6, 3, 1, groups=3)).eval()
    model = layers.to(memory_format=torch.channels_last_3d)
    fast = strictly(model, (torch.randn(2, 6, 1, 1, 2),), tune="static")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch in (1, 2):
            x = torch.randn(batch, 6, 1, 1, 2)
            found = []
            for net in (model, fast):
                model.zero_grad()
                net(x).square().sum().backward()
                found.append([parameter.grad.clone() for parameter in model.parameters()])
            for mine, theirs in zip(*found, strict=True):
                torch.testing.assert_close(mine, theirs)
    finally:
        torch.set_num_threads(threads)


def test_a_clip_without_frames_that_is_padded_first() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 2, (1, 1, 2), padding=(2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)))

    model = Causal().eval()
    fast = strictly(model, (torch.randn(2, 3, 4, 5, 5),), tune="static")
    for frames in (4, 2, 1):
        x = torch.randn(1, 3, frames, 5, 5)
        torch.testing.assert_close(fast(x), model(x))


def test_settings_that_the_forward_computes_are_not_guessed() -> None:
    class Wavelets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("taps", torch.rand(2))

        def forward(self, x: Tensor) -> Tensor:
            groups = x.shape[1]
            kernel = self.taps.reshape(1, 1, -1, 1, 1).repeat(groups, 1, 1, 1, 1)
            return nn.functional.conv3d(x, kernel, groups=groups, stride=(2, 1, 1))

    model = Wavelets()
    fast = fxtemporal.optimize(model, (torch.randn(1, 3, 6, 4, 4),), tune="static")
    (remark,) = fxtemporal.report(fast).remarks
    assert remark.status == "missed"
    x = torch.randn(2, 3, 8, 4, 4)
    torch.testing.assert_close(fast(x), model(x))
