"""Ranks, budgets and data: what becomes of a network whose layers share what may be left."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxtemporal
from fxtemporal import Code, Factorize, PassError
from fxtemporal.capture.capture import capture
from fxtemporal.factorization.latency import milliseconds
from fxtemporal.factorization.moments import Regression, SecondMoment
from fxtemporal.factorization.planning import plan
from fxtemporal.factorization.ranks import Curve, Point, allocate, frontier
from fxtemporal.functional import ConvGeometry
from fxtemporal.functional.factors import ORDERS, Order, decomposed, matrix
from fxtemporal.nn import Conv2Plus1d
from tests.zoo import noise

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": (2, 1, 2), "padding": (1, 0, 1)},
    "dilated": {"dilation": (2, 1, 2), "padding": 2},
    "same": {"padding": "same"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"outputs": 8, "groups": 4, "padding": 1},
    "no bias": {"bias": False},
    "uneven": {"kernel_size": (3, 2, 1), "padding": (1, 0, 0)},
}


def layer(inputs: int = 4, outputs: int = 6, **keywords: Any) -> nn.Conv3d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv3d(inputs, outputs, **({"kernel_size": 3} | keywords)).double()


def clip(batch: int = 2, frames: int = 6, channels: int = 4) -> Tensor:
    return noise(batch, channels, frames, 7, 7).double()


def geometry(conv: nn.Conv3d, x: Tensor) -> ConvGeometry:
    return ConvGeometry(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
    ).at(x)


def built(
    conv: nn.Conv3d, bias: Tensor | None, order: Order, right: Tensor, left: Tensor
) -> Conv2Plus1d:
    settings = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "padding_mode")}
    return Conv2Plus1d.of_factors(conv.weight, bias, right, left, order=order, **settings)


def off(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).detach().norm() / expected.detach().norm())


# ------------------------------------------------------------------------------- the algebra


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_is_the_layer_in_either_order(name: str, order: Order, weighted: bool) -> None:
    conv, x = layer(**SETTINGS[name]), clip()
    g = geometry(conv, x)
    moment = None
    if weighted:
        seen = SecondMoment(g, order)
        seen.add(x)
        moment = seen.sum
    found = decomposed(conv.weight.detach(), conv.groups, order, moment)
    bias = None if conv.bias is None else conv.bias.detach()
    factors = built(conv, bias, order, found.right, found.left)
    assert off(factors.product(), conv.weight) < 1e-9
    for batch, frames in ((2, 6), (3, 9)):
        assert off(factors(clip(batch, frames)), conv(clip(batch, frames))) < 1e-9


@pytest.mark.parametrize("data", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETTINGS)
def test_at_full_rank_a_model_is_itself_within_rounding(
    name: str, dtype: torch.dtype, data: int | None
) -> None:
    exact = nn.Sequential(layer(**SETTINGS[name]), nn.Tanh())
    model = copy.deepcopy(exact).to(dtype)
    settings = Factorize(1.0, calibration=data and [clip().to(dtype) for _ in range(data)])
    fast = fxtemporal.optimize(model, (clip().to(dtype),), factorize=settings, tune="static")
    (remark,) = fxtemporal.report(fast).factorized
    assert remark.detail["exact"]
    for batch in (2, 3):
        x = clip(batch).to(dtype)
        wanted = copy.deepcopy(model).double()(x.double())
        own = off(model(x).double(), wanted)
        least = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
        assert off(fast(x).double(), wanted) <= max(4 * own, least)


@pytest.mark.parametrize("order", ORDERS)
def test_the_energy_is_the_error_of_the_weight(order: Order) -> None:
    conv = layer(groups=2)
    found = decomposed(conv.weight.detach(), 2, order)
    for kept in range(1, len(found.energy) + 1):
        factors = built(conv, None, order, found.right[:, :kept], found.left[..., :kept])
        assert off(factors.product(), conv.weight) == pytest.approx(found.error(2 * kept), abs=1e-9)
    assert found.errors() == sorted(found.errors(), reverse=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["padded", "strided", "dilated", "grouped", "replicate"])
def test_the_moment_is_that_of_what_the_first_factor_sees(name: str, order: Order) -> None:
    """‖M·p‖² summed over all patches, by way of the moment and by way of a convolution."""
    conv, x = layer(**SETTINGS[name]), clip()
    g = geometry(conv, x)
    seen = SecondMoment(g, order)
    seen.add(x)
    assert seen.sum is not None
    found = decomposed(conv.weight.detach(), conv.groups, order)
    factors = built(conv, None, order, found.right, found.left)
    first = factors.spatial if order == ORDERS[0] else factors.temporal
    norm = torch.einsum("gmd,gde,gme->", found.right, seen.sum, found.right)
    torch.testing.assert_close(first(x).square().sum(), norm)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["padded", "strided", "dilated", "grouped"])
def test_regression_finds_the_second_factor(name: str, order: Order) -> None:
    conv, x = layer(**SETTINGS[name]), clip(8)
    g = geometry(conv, x)
    found = decomposed(conv.weight.detach(), conv.groups, order)
    right, left = found.right[:, :2], found.left[..., :2]
    factors = built(conv, conv.bias, order, right, left)
    first = factors.spatial if order == ORDERS[0] else factors.temporal
    regression = Regression(g, order)
    for part in x.split(3):
        regression.add(first(part).detach(), factors(part).detach())
    solved, bias, error = regression.solve()
    assert off(solved, left) < 1e-4
    torch.testing.assert_close(bias, conv.bias.detach(), rtol=1e-4, atol=1e-4)
    assert error < 1e-4


def test_a_matrix_has_a_row_for_each_output_and_tap() -> None:
    weight = layer(groups=2).weight.detach()
    assert matrix(weight, 2, "spatial-temporal").shape == (2, 3 * 3, 2 * 9)
    assert matrix(weight, 2, "temporal-spatial").shape == (2, 3 * 9, 2 * 3)


# ------------------------------------------------------------------------------- the decision


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=5),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 60),
)
def test_nothing_cheaper_loses_less(layers: list[list[tuple[int, int]]], budget: int) -> None:
    curves = [
        Curve.of(str(i), [Point(20.0, 0.0), *(Point(float(c), float(e), 1) for c, e in points)])
        for i, points in enumerate(layers)
    ]
    found = allocate(curves, budget)
    least = sum(curve.points[-1].cost for curve in curves)
    if found is None:
        assert least > budget
        return
    cost = sum(point.cost for point in found.values())
    loss = sum(point.loss for point in found.values())
    assert cost <= budget
    everything = [
        [Point(20.0, 0.0), *(Point(float(c), float(e)) for c, e in points)] for points in layers
    ]
    for other in itertools.product(*everything):
        if sum(point.cost for point in other) <= cost:
            assert sum(point.loss for point in other) >= loss - 1e-9


def test_the_frontier_goes_down() -> None:
    curve = Curve.of("a", [Point(10, 0), Point(6, 1, 3), Point(3, 4, 2), Point(1, 9, 1)])
    assert frontier([curve]) == [(10, 0), (6, 1), (3, 4), (1, 9)]


# ------------------------------------------------------------------------------- the network


class Net(nn.Module):
    """Three dense layers, BatchNorm between them, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv3d(4, 12, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv3d(12, 16, 3, padding=1, bias=False),
            nn.BatchNorm3d(16),
            nn.ReLU(inplace=True),
            nn.Conv3d(16, 16, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3, 4)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    model = Net().double()
    model.train()
    with torch.no_grad():
        for seed in range(10):
            torch.manual_seed(seed)
            model(smooth(8))
    return model.eval()


def smooth(batch: int) -> Tensor:
    """Clips in which neighbours are alike, as those of a camera are."""
    coarse = torch.randn(batch, 4, 2, 3, 3, dtype=torch.float64)
    return F.interpolate(coarse, size=(6, 8, 8), mode="trilinear")


def data(count: int = 6) -> list[Tensor]:
    torch.manual_seed(3)
    return [smooth(4) for _ in range(count)]


def factorized(model: nn.Module, **asked: Any) -> Any:
    torch.manual_seed(1)
    return fxtemporal.optimize(model, (smooth(2),), factorize=Factorize(**asked), tune="static")


def flops(model: nn.Module) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(smooth(2))
    return counter.get_total_flops()


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_budget_of_operations_is_kept(net: nn.Module, share: float, calibrated: bool) -> None:
    more = {"calibration": data()} if calibrated else {}
    result = factorized(net, flops=share, **more)
    assert 0.8 * share < flops(result) / flops(net) <= share + 1e-9
    report = fxtemporal.report(result)
    assert report.comparison.exact is False
    assert report.curve[0][1] == 0
    assert all(remark.detail["rank"] < remark.detail["full_rank"] for remark in report.factorized)


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_budget_of_parameters_is_kept(net: nn.Module, share: float) -> None:
    result = factorized(net, params=share)
    count = [sum(p.numel() for p in module.parameters()) for module in (result, net)]
    assert count[0] / count[1] <= share + 1e-9


def test_a_budget_of_time_is_kept_by_measurement(net: nn.Module) -> None:
    asked: list[str] = []

    def clock(calls: dict[str, Any], always: str) -> dict[str, float]:
        for name, call in calls.items():
            asked.append(name)
            assert call().shape[1] in (12, 16)
        ranks = {name: int(name.split()[-1]) for name in calls if " " in name}
        return {name: 0.02 * ranks[name] if name in ranks else 1.0 for name in calls}

    x = smooth(2)
    times = partial(milliseconds, clock=clock)
    program, tick = capture(net, (x,)), [].append
    planned = plan(program, Factorize(latency=0.5), ((x,), {}), tick, times)
    assert {name.split()[0] for name in asked} >= {"conv3d", "spatial-temporal", "temporal-spatial"}
    ranks = [layer.detail["rank"] for layer in planned.layers.values() if layer.factors]
    whole = 3 - len(ranks)
    assert whole + sum(0.02 * rank for rank in ranks) <= 0.5 * 3
    assert planned.curve[0] == (1.0, 0.0)


def test_data_lowers_the_error_of_the_output(net: nn.Module) -> None:
    torch.manual_seed(9)
    x = smooth(32)
    errors = {}
    with torch.no_grad():
        for name, more in (("weight", {}), ("data", {"calibration": data()})):
            errors[name] = off(factorized(net, flops=0.3, **more)(x), net(x))
    assert errors["data"] < 0.7 * errors["weight"]


def test_each_layer_says_how_far_its_output_is_off(net: nn.Module) -> None:
    report = fxtemporal.report(factorized(net, rank=0.3, calibration=data()))
    assert len(report.factorized) == 3
    assert all(0 < remark.detail["output_error"] < 1 for remark in report.factorized)
    assert all(
        remark.detail["flops_after"] < remark.detail["flops_before"] for remark in report.factorized
    )
    table = report.factorization()
    assert all(remark.target in table for remark in report.factorized)
    assert table in str(report)


@pytest.mark.parametrize("asked", [{"energy": 0.9}, {"error": 0.3}])
def test_a_bound_for_each_layer(net: nn.Module, asked: dict[str, float]) -> None:
    bound = asked.get("error", (1 - asked.get("energy", 0.0)) ** 0.5)
    report = fxtemporal.report(factorized(net, **asked))
    for remark in report.factorized:
        assert remark.detail["weight_error"] <= bound
    left = [r for r in report.remarks if r.rule == "factorize-2plus1d" and r.status == "missed"]
    assert len(left) + len(report.factorized) == 3
    assert all(reason.code is Code.NOTHING_SAVED for r in left for reason in r.reasons)


def test_the_model_stays_as_it_is(net: nn.Module) -> None:
    before, x = copy.deepcopy(net.state_dict()), smooth(2)
    expected = net(x)
    factorized(net, flops=0.5, calibration=data(2))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["labels", "dict", "loader"])
def test_what_calibration_data_may_look_like(net: nn.Module, kind: str) -> None:
    clips = data(3)
    shapes: dict[str, Any] = {
        "labels": [(x, torch.zeros(len(x))) for x in clips],
        "dict": [{"x": x} for x in clips],
        "loader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.cat(clips), torch.zeros(12)), batch_size=4
        ),
    }
    if kind == "dict":
        result = fxtemporal.optimize(
            net,
            (),
            {"x": clips[0]},
            factorize=Factorize(rank=0.3, calibration=shapes[kind]),
            tune="static",
        )
    else:
        result = factorized(net, rank=0.3, calibration=shapes[kind])
    plain = factorized(net, rank=0.3, calibration=clips)
    x = smooth(2)
    torch.testing.assert_close(result(x), plain(x))


class OwnWeight(nn.Module):
    """A weight that stands beside others, convolved with by a function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3, 3))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.kernel, padding=1) * self.scale


class Subclass(nn.Conv3d):
    """As torchvision's Conv3DSimple: another class, and nothing else."""


@pytest.mark.parametrize(
    "model", [OwnWeight(), nn.Sequential(Subclass(4, 6, 3, padding=1))], ids=["own", "subclass"]
)
def test_every_spelling_of_a_conv3d(model: nn.Module) -> None:
    model = model.double()
    result = fxtemporal.optimize(model, (clip(),), factorize=Factorize(1.0), tune="static")
    assert len(fxtemporal.report(result).factorized) == 1
    for x in (clip(), clip(3, 8)):
        assert off(result(x), model(x)) < 1e-9
    assert not any(p.dim() == 5 and min(p.shape[2:]) > 1 for p in result.parameters())


class BiasElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.bias.sum()


def test_a_bias_that_is_read_elsewhere_stays_there() -> None:
    model = BiasElsewhere()
    result = fxtemporal.optimize(model, (clip(),), factorize=Factorize(1.0), tune="static")
    assert result.conv.bias is model.conv.bias
    assert off(result(clip(3, 8)), model(clip(3, 8))) < 1e-9


class Computed(OwnWeight):
    def __init__(self, weight: bool) -> None:
        super().__init__()
        self.of_weight = weight
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (2 * self.kernel, None) if self.of_weight else (self.kernel, 2 * self.bias)
        return F.conv3d(x, weight, bias)


@pytest.mark.parametrize("weight", [True, False])
def test_what_is_computed_is_left_with_a_reason(weight: bool) -> None:
    model = Computed(weight).double()
    result = fxtemporal.optimize(model, (clip(),), factorize=Factorize(1.0), tune="static")
    (remark,) = [r for r in fxtemporal.report(result).remarks if r.rule == "factorize-2plus1d"]
    assert [reason.code for reason in remark.reasons] == [Code.SHAPES_UNKNOWN]
    torch.testing.assert_close(result(clip()), model(clip()))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = layer()

    def forward(self, x: Tensor, shift: Any = None, scale: Any = None) -> Tensor:
        y = self.conv(x) if scale is None else self.conv(x * scale)
        return y if shift is None else y + shift


def test_an_argument_left_out_keeps_its_default_on_data() -> None:
    model, scale = Scaled(), torch.full((1,), 3.0).double()
    made = [
        fxtemporal.optimize(
            model,
            args,
            kwargs,
            factorize=Factorize(rank=3, calibration=[args] * 2),
            tune="static",
        )
        for args, kwargs in (((clip(),), {"scale": scale}), ((clip(), None, scale), None))
    ]
    torch.testing.assert_close(made[0](clip(), scale=scale), made[1](clip(), None, scale))


def test_an_exported_program(net: nn.Module) -> None:
    exported = torch.export.export(net, (smooth(2),))
    result = fxtemporal.optimize(
        exported,
        (smooth(2),),
        factorize=Factorize(flops=0.5, calibration=[smooth(2)]),
        tune="static",
    )
    assert len(fxtemporal.report(result).factorized) >= 2


def test_a_kernel_of_low_rank_is_exact(net: nn.Module) -> None:
    model = copy.deepcopy(net)
    conv = model.features[5]
    with torch.no_grad():
        flat = matrix(conv.weight, 1, "spatial-temporal")[0]
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        low = (u[:, :5] * s[:5]) @ vh[:5]
        conv.weight.copy_(low.reshape(16, 3, 16, 3, 3).transpose(1, 2))
    report = fxtemporal.report(factorized(model, rank=5, calibration=data(2)))
    exact = {remark.target: bool(remark.detail.get("exact")) for remark in report.factorized}
    assert exact == {"features.0": False, "features.2": False, "features.5": True}


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "give one of"),
        ({"rank": 2, "flops": 0.5}, "rank and flops"),
        ({"flops": 0.0}, "flops must be"),
        ({"params": 1.0}, "params must be"),
        ({"latency": True}, "latency must be"),
        ({"energy": float("nan")}, "energy must be"),
        ({"error": -1}, "error must be"),
        ({"rank": 2, "calibration": iter([])}, "only once"),
        ({"rank": 2, "calibration": 3}, "an iterable"),
    ],
)
def test_settings_that_make_no_sense(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(PassError, match=text):
        Factorize(**asked)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "empty"),
        ([torch.zeros(4, 4, 6, 8, 7)], "has shape"),
        ([torch.zeros(4, 6, 8, 8)], "has shape"),
        ([torch.full((2, 4, 6, 8, 8), float("nan"))], "not finite"),
        ([torch.zeros(0, 4, 6, 8, 8)], "holds nothing"),
        (["clip.mp4"], "no input of the model"),
        ([()], "no input of the model"),
        ([(3,)], "where a tensor belongs"),
        ([{"y": torch.zeros(4, 4, 6, 8, 8)}], "nested in another way"),
    ],
)
def test_data_that_is_none(net: nn.Module, entries: list[Any], text: str) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PassError, match=text):
        factorized(net, rank=3, calibration=entries)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_a_budget_that_cannot_be_met(net: nn.Module) -> None:
    with pytest.raises(PassError, match="cannot be met"):
        factorized(net, flops=0.001)


def test_a_budget_needs_example_inputs(net: nn.Module) -> None:
    with pytest.raises(PassError, match="needs example inputs"):
        fxtemporal.optimize(net, factorize=Factorize(flops=0.5))


def test_data_needs_example_inputs(net: nn.Module) -> None:
    with pytest.raises(PassError, match="needs example inputs"):
        fxtemporal.optimize(net, factorize=Factorize(rank=2, calibration=data(1)))


# ------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_curve_is_drawn(net: nn.Module, tmp_path: Any, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curve.{suffix}"
    fxtemporal.report(factorized(net, flops=0.5)).plot(path)
    assert path.stat().st_size > 1000


def test_without_a_budget_there_is_no_curve(net: nn.Module, tmp_path: Any) -> None:
    with pytest.raises(fxtemporal.FxTemporalError, match="no curve"):
        fxtemporal.report(factorized(net, rank=2)).plot(tmp_path / "curve.png")
