"""The lossy (2+1)D factorization: opt-in, exact at full rank, and honest about its error."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Code, Factorize, PassError, Remark, SpecializationError
from fxtemporal.nn import paper_rank
from tests.zoo import HookedConv3d, ParametrizedConv3d, noise

FULL = min(4 * 3 * 3, 6 * 3)


def clip(batch: int = 2, frames: int = 5) -> Tensor:
    return noise(batch, 4, frames, 7, 7).double()


def dense(**keywords: Any) -> nn.Conv3d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv3d(4, 6, 3, **keywords).double()


def factorized(model: nn.Module, rank: Any, *example: Any, **more: Any) -> fx.GraphModule:
    return fxtemporal.optimize(
        model, example or (clip(),), factorize=Factorize(rank), tune="static", **more
    )


def remark(module: nn.Module, number: int = 0) -> Remark:
    found = [r for r in fxtemporal.report(module).remarks if r.rule == "factorize-2plus1d"]
    return found[number]


def codes(module: nn.Module, number: int = 0) -> list[Code]:
    return [reason.code for reason in remark(module, number).reasons]


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).detach().norm() / expected.detach().norm())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": (2, 1, 2), "padding": (1, 0, 1)},
    "dilated": {"dilation": (2, 1, 2), "padding": 2},
    "same": {"padding": "same"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": (1, 2, 0), "padding_mode": "circular"},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rank", [1.0, FULL])
def test_full_rank_is_exact(name: str, rank: Any) -> None:
    model = nn.Sequential(dense(**SETTINGS[name]))
    result = factorized(model, rank)
    assert remark(result).status == "applied"
    assert remark(result).detail["rank"] == remark(result).detail["full_rank"] == FULL
    assert remark(result).detail["weight_error"] < 1e-12
    for x in (clip(), clip(3, 8)):
        torch.testing.assert_close(result(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_error_falls_with_the_rank(name: str) -> None:
    model = nn.Sequential(dense(**SETTINGS[name]))
    weight_errors, errors = [], []
    for rank in (1, 4, 9, 14, FULL):
        result = factorized(model, rank)
        assert remark(result).detail["rank"] == rank
        weight_errors.append(remark(result).detail["weight_error"])
        errors.append(error(result(clip(4)), model(clip(4))))
    assert weight_errors == sorted(weight_errors, reverse=True)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-12


@pytest.mark.parametrize(
    ("rank", "expected"),
    [("paper", paper_rank(4, 6, 3)), (3, 3), (0.5, FULL // 2), (0.01, 1), (1, 1), (1.0, FULL)],
)
def test_each_way_to_give_a_rank(rank: Any, expected: int) -> None:
    result = factorized(nn.Sequential(dense()), rank)
    assert remark(result).detail["rank"] == expected
    assert result.get_submodule("0").mid_channels == expected
    count = sum(p.numel() for p in result.parameters())
    assert remark(result).detail["parameters"].endswith(str(count))


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, -0.5, True, None, "full", float("nan"), [3]])
def test_a_bad_rank_is_a_pass_error(rank: Any) -> None:
    with pytest.raises(PassError, match="rank must be"):
        Factorize(rank)


def test_it_is_off_by_default() -> None:
    model = nn.Sequential(dense())
    for result in (
        fxtemporal.optimize(model),
        fxtemporal.optimize(model, (clip(),), tune="static"),
    ):
        assert {r.rule for r in fxtemporal.report(result).remarks} == {"conv3d-forms"}
        assert "factorize" not in fxtemporal.report(result).settings
        torch.testing.assert_close(result(clip()), model(clip()), rtol=1e-12, atol=1e-12)


def test_its_two_factors_get_their_exact_forms_afterwards() -> None:
    result = factorized(nn.Sequential(dense(padding=1)), 4)
    rest = [(r.target, r.detail["form"]) for r in fxtemporal.report(result).remarks[1:]]
    assert rest == [("0.spatial", "conv3d_spatial"), ("0.temporal", "conv3d_temporal")]


def test_the_report_says_that_it_is_lossy_and_how_much() -> None:
    model = nn.Sequential(dense())
    result = factorized(model, 3)
    comparison = fxtemporal.report(result).comparison
    assert comparison is not None
    assert comparison.exact is False
    expected, actual = model(clip()).detach(), result(clip()).detach()
    off = float((actual - expected).abs().max())
    example = comparison.samples[0]
    assert example.max_abs_error == pytest.approx(off, rel=1e-6)
    assert example.relative_error == pytest.approx(off / float(expected.abs().max()), rel=1e-6)
    assert comparison.max_abs_error >= off
    assert comparison.to_dict()["equal"] is None
    assert "Relative error" in str(fxtemporal.report(result))
    assert fxtemporal.report(result).settings["factorize"] == {"rank": 3}


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(dense(), nn.BatchNorm3d(6).double())
    before, text, x = copy.deepcopy(model.state_dict()), repr(model), clip()
    expected = model.eval()(x)
    result = factorized(model, 2)
    assert repr(model) == text
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        for parameter in result.get_submodule("0").parameters():
            parameter.zero_()
    torch.testing.assert_close(model(x), expected)
    assert result.get_parameter("1.weight") is model[1].weight


def test_factors_are_trained_and_saved() -> None:
    result = factorized(nn.Sequential(dense()), 4)
    assert list(result.state_dict()) == ["0.spatial.weight", "0.temporal.weight", "0.temporal.bias"]
    before = result(clip()).detach()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss = result(clip()).square().mean()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in result.parameters())
    assert float(result(clip()).detach().square().mean()) < float(before.square().mean())


def test_fine_tuning_lowers_the_error_to_the_original() -> None:
    model = nn.Sequential(dense())
    result = factorized(model, 8)
    target = model(clip()).detach()
    start = float((result(clip()) - target).detach().square().mean())
    optimizer = torch.optim.Adam(result.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss = (result(clip()) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * start


class Shared(nn.Module):
    """One Conv3d called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def test_a_module_called_twice_is_replaced_at_both_calls() -> None:
    model = Shared()
    result = factorized(model, 1.0)
    assert remark(result).status == "applied"
    torch.testing.assert_close(result(clip()), model(clip()), rtol=1e-11, atol=1e-11)
    lossy = factorized(model, 2)
    factors = lossy.get_submodule("conv")
    torch.testing.assert_close(lossy(clip()), factors(factors(clip())), rtol=1e-11, atol=1e-11)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3)).double()
    model[1].weight = model[0].weight
    return model


def aliased() -> nn.Module:
    conv = nn.Conv3d(4, 4, 3, padding=1).double()
    return nn.Sequential(conv, nn.ReLU(), conv)


class UsedElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = dense()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.conv.weight.square().sum()


class UsedByAFunction(UsedElsewhere):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), F.conv3d(x, self.conv.weight)


@pytest.mark.parametrize("build", [tied, aliased, UsedElsewhere, UsedByAFunction])
def test_a_weight_that_is_used_elsewhere_is_refused(build: Any) -> None:
    model = build()
    result = factorized(model, 2)
    assert codes(result) == [Code.SHARED_PARAMETER]
    for actual, expected in zip(_leaves(result(clip())), _leaves(model(clip())), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def _leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), 1])
def test_a_factor_already(kernel: Any) -> None:
    model = nn.Sequential(nn.Conv3d(4, 6, kernel).double())
    result = factorized(model, 0.5)
    assert codes(result) == [Code.NOTHING_SAVED]
    assert "factor already" in remark(result).reasons[0].text
    torch.testing.assert_close(result(clip()), model(clip()), rtol=1e-12, atol=1e-12)


def test_groups_share_the_rank() -> None:
    model = nn.Sequential(dense(groups=2))
    result = factorized(model, 0.5)
    assert remark(result).status == "applied"
    assert (remark(result).detail["rank"], remark(result).detail["full_rank"]) == (8, 18)
    full = factorized(model, 1.0)
    torch.testing.assert_close(full(clip(3, 8)), model(clip(3, 8)), rtol=1e-11, atol=1e-11)
    with pytest.raises(PassError, match="2 groups cannot share"):
        factorized(model, 7)


def test_a_rank_above_that_of_every_layer_is_an_error() -> None:
    with pytest.raises(PassError, match=f"0: rank {FULL + 1} .* has {FULL} at most"):
        factorized(nn.Sequential(dense()), FULL + 1)


def test_a_rank_above_that_of_one_layer_leaves_it() -> None:
    model = nn.Sequential(dense(), nn.Conv3d(6, 60, 3, padding=1).double())
    result = factorized(model, FULL + 1)
    assert codes(result) == [Code.RANK_OUT_OF_RANGE]
    assert str(FULL) in remark(result).reasons[0].text
    assert remark(result, 1).status == "applied"


def two(bias: bool = True) -> nn.Sequential:
    last = nn.Conv3d(6, 4, 3, padding=1, bias=bias).double()
    return nn.Sequential(dense(padding=1, bias=bias), nn.ReLU(), last)


def test_ranks_by_name() -> None:
    asked = {"2": {"rank": 5, "order": "temporal-spatial", "bias": True}}
    result = factorized(two(), asked)
    assert codes(result) == [Code.NOT_REQUESTED]
    assert fxtemporal.report(result).ranks == asked
    assert fxtemporal.report(result).settings["factorize"] == {"rank": asked}
    assert factorized(two(), {"2.weight": 0.5, "0": "paper"}).get_submodule("2.spatial")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("data", [[clip(), clip(3)], None])
def test_the_ranks_of_a_report_make_the_module_that_its_checkpoint_loads_into(
    bias: bool, data: Any
) -> None:
    settings = Factorize(flops=0.6, calibration=data)
    trained = fxtemporal.optimize(two(bias), (clip(),), factorize=settings, tune="static")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    ranks = json.loads(json.dumps(fxtemporal.report(trained).ranks))
    again = factorized(two(bias), ranks)
    again.load_state_dict(trained.state_dict())
    x = clip(3, 8) if not fxtemporal.report(again).specializations else clip(3)
    torch.testing.assert_close(again(x), trained(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ({"3": 2}, "'3', which is no Conv3d that can be factorized; there are 0, 2"),
        ({"1": 2}, "'1', which is no Conv3d"),
        ({"0": FULL + 1}, f"0: rank {FULL + 1}"),
        ({"0": 0}, "rank of '0' must be"),
        ({"0": 2.0}, "rank of '0' must be"),
        ({"0": {"rank": 2, "order": "sideways"}}, "'spatial-temporal', 'temporal-spatial'"),
        ({"0": {"rank": 2, "bias": 1}}, "and its bias True or False"),
        ({"0": {"order": "spatial-temporal"}}, "must be a rank, or a dict with rank"),
        ({"0": {"rank": 2, "flops": 1}}, "must be a rank, or a dict with rank"),
    ],
)
def test_ranks_by_name_that_cannot_be(ranks: Any, says: str) -> None:
    with pytest.raises(PassError, match=re.escape(says)):
        factorized(two(), ranks)


def test_every_reason_is_given() -> None:
    result = factorized(tied(), 1000)
    assert codes(result) == [Code.SHARED_PARAMETER, Code.RANK_OUT_OF_RANGE]


@pytest.mark.parametrize(
    ("cls", "code"),
    [(HookedConv3d, Code.HOOKED_MODULE), (ParametrizedConv3d, Code.PARAMETRIZED_MODULE)],
)
def test_a_module_that_is_no_plain_conv3d(cls: Any, code: Code) -> None:
    model = cls.build()
    result = factorized(model, 1, *model.example())
    assert codes(result) == [code]
    torch.testing.assert_close(result(*model.example(3)), model(*model.example(3)))


def test_a_weight_that_is_not_finite_is_a_failed_rewrite() -> None:
    model = nn.Sequential(dense(), nn.ReLU(), nn.Conv3d(6, 4, 3).double())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0, 0] = float("nan")
    result = factorized(model, 2, verify=False)
    assert [remark(result, 0).status, remark(result, 1).status] == ["failed", "applied"]
    assert codes(result) == [Code.REWRITE_RAISED]
    assert "not finite" in remark(result).reasons[0].text


def test_without_example_inputs() -> None:
    model = nn.Sequential(dense())
    result = fxtemporal.optimize(model, factorize=Factorize(1.0))
    assert remark(result).status == "applied"
    assert fxtemporal.report(result).comparison is None
    torch.testing.assert_close(result(clip()), model(clip()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("example", [(clip(),), None])
def test_a_graph_module(example: Any) -> None:
    model = fx.symbolic_trace(nn.Sequential(dense()))
    result = fxtemporal.optimize(model, example, factorize=Factorize(1.0), tune="static")
    assert remark(result).status == "applied"
    torch.testing.assert_close(result(clip()), model(clip()), rtol=1e-12, atol=1e-12)


def test_dtype_mode_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(dense().float(), nn.Dropout(0.5)).eval().requires_grad_(False)
    result = factorized(model, 2, clip().float())
    factors = result.get_submodule("0")
    assert not any(p.requires_grad for p in factors.parameters())
    assert {p.dtype for p in factors.parameters()} == {torch.float32}
    assert not any(module.training for module in result.modules())


def test_frames_stay_free() -> None:
    result = factorized(nn.Sequential(dense(padding=1)), 3)
    for frames in (3, 5, 9):
        try:
            assert result(clip(1, frames)).shape == (1, 6, frames, 7, 7)
        except SpecializationError:
            pytest.fail("the number of frames was fixed")


def test_loops_are_still_rerolled_around_it() -> None:
    """Lossy first, then the exact passes, which are held to the factorized network."""

    model = nn.Sequential(dense(padding=1), nn.Conv3d(6, 6, (1, 3, 3)).double())
    result = factorized(model, 2)
    statuses = {(r.rule, r.target): r.status for r in fxtemporal.report(result).remarks}
    assert statuses == {
        ("factorize-2plus1d", "0"): "applied",
        ("factorize-2plus1d", "1"): "missed",
        ("conv3d-forms", "0.spatial"): "applied",
        ("conv3d-forms", "0.temporal"): "applied",
        ("conv3d-forms", "1"): "applied",
    }


class LoopBehind(nn.Module):
    """A factorizable layer, and a loop that computes something else from the eighth frame on."""

    def __init__(self, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv3d(4, 4, kernel, padding=[k // 2 for k in kernel])
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.conv(frame).mean((2, 3)) for frame in self.stem(x).unbind(2)]
        return torch.stack(frames, 1) * (1 if len(frames) < 8 else 2)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)], ids=["factorized", "left"])
def test_another_number_of_frames_is_right_or_refused(kernel: tuple[int, int, int]) -> None:
    model = LoopBehind(kernel).double().eval()
    result = factorized(model, 12 if kernel[0] > 1 else 1, clip())
    for frames in (5, 7, 8, 11):
        try:
            got = result(clip(frames=frames))
        except SpecializationError:
            assert frames != 5
            continue
        assert error(got, model(clip(frames=frames))) < 1e-5
