"""A rewrite stays where it measures faster, and measuring leaves nothing behind."""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_pipeline import Chain, Planted, clip
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Code, PassError, Tune
from fxtemporal.ir.program import Program
from fxtemporal.passes.conv3d_forms import Conv3dForms
from fxtemporal.tuning.ablation import worth_keeping
from fxtemporal.tuning.cache import Cache
from fxtemporal.tuning.engines import ENGINES, Engine
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.timing import Timing, race
from tests.zoo import InplaceBody, noise


class Sleeps(nn.Module):
    """Takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        time.sleep(self.seconds)
        return args


def waste(x: Tensor) -> Tensor:
    """``x``, after a hundredth of a second."""
    time.sleep(0.01)
    return x


def save(x: Tensor) -> Tensor:
    return x


def slow_down(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_function(waste, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def useless_product(program: Program, node: fx.Node) -> None:
    """Exact, and a hundred times the work: adds zero times a large product."""
    with program.graph.inserting_after(node):
        new = program.graph.call_function(add_nothing, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def add_nothing(x: Tensor) -> Tensor:
    large = x.new_ones(500, 500)
    for _ in range(5):
        large = large @ large * 1e-3
    return x + large.mean() * 0


def speed_up(program: Program, node: fx.Node) -> None:
    """Takes a layer's :func:`waste` away."""
    for user in list(node.users):
        if user.target is waste:
            user.replace_all_uses_with(node)
            program.graph.erase_node(user)


class Slow(Chain):
    """Each layer is followed by a hundredth of a second of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = waste(layer(x))
        return x


fx.wrap("waste")


class Formed(Planted):
    """Gives each site a form of its own, so that it is measured by itself."""

    def rewrite(self, program: Program, candidate: fx.Node) -> Mapping[str, Any]:
        super().rewrite(program, candidate)
        return {"form": str(candidate.target)}


def statuses(gm: nn.Module) -> dict[str, str]:
    return {remark.target: remark.status for remark in fxtemporal.report(gm).remarks}


QUICK = Tune(seconds=3.0)


# ------------------------------------------------------------------------------------- settings


def test_defaults() -> None:
    assert (Tune().target, Tune().seconds, Tune().margin) == ("eager", 60.0, 0.02)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"target": "abacus"}, "abacus"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
        ({"margin": -0.1}, "margin"),
        ({"margin": 1.0}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"seconds": float("nan")}, "seconds"),
        *(
            ({"memory_limit": limit}, "512MiB")
            for limit in (
                0,
                -1,
                True,
                1.5,
                float("inf"),
                "",
                "lots",
                "12 XB",
                "-1MB",
                "1e3",
                "0.5B",
            )
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(PassError, match=word):
        Tune(**settings)


@pytest.mark.parametrize(
    ("limit", "number"),
    [
        (1, 1),
        (10**12, 10**12),
        ("1024", 1024),
        ("7B", 7),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        (" 1.5 kib ", 1536),
        ("0.1mb", 100_000),
        ("3TiB", 3 * 2**40),
        (None, None),
    ],
)
def test_a_memory_limit_in_bytes(limit: Any, number: int | None) -> None:
    assert Tune(memory_limit=limit).limit == number
    assert Tune(memory_limit=limit).memory_limit == limit


def test_settings_that_need_inputs() -> None:
    for tune in ("measure", Tune()):
        with pytest.raises(PassError, match="example inputs"):
            fxtemporal.optimize(Chain(1), tune=tune)  # type: ignore[arg-type]
    for tune in ("fast", 3, True):
        with pytest.raises(PassError, match="tune must be"):
            fxtemporal.optimize(Chain(1), (clip(),), tune=tune)  # type: ignore[arg-type]


def test_static_measures_nothing() -> None:
    for result in (
        fxtemporal.optimize(Chain(1), (clip(),), tune="static"),
        fxtemporal.optimize(Chain(1)),
        fxtemporal.optimize(Chain(1), tune="static"),
    ):
        report = fxtemporal.report(result)
        assert report.timing is None
        assert report.settings == {"tune": "static"}
        assert statuses(result) == {"layers.0": "applied"}


# ---------------------------------------------------------------------------------------- races


def test_a_race_tells_the_faster_one() -> None:
    timing = race(Sleeps(0.004), Sleeps(0.001), ((), {}), seconds=0.1)
    assert timing.before > timing.after
    assert 2 < timing.speedup < 6
    assert timing.low <= timing.speedup <= timing.high
    assert timing.before == pytest.approx(4, rel=0.5)
    assert timing.rounds >= 3


def test_a_race_of_a_module_with_itself_is_a_draw() -> None:
    module = Sleeps(0.002)
    assert race(module, module, ((), {}), seconds=0.1).speedup == pytest.approx(1, abs=0.3)


def test_a_race_ends() -> None:
    start = time.perf_counter()
    timing = race(Sleeps(0.02), Sleeps(0.02), ((), {}), seconds=0.01)
    assert time.perf_counter() - start < 1
    assert timing.rounds == 3
    assert race(Sleeps(0), Sleeps(0), ((), {}), seconds=9).rounds == 25


def test_a_timing_as_a_dict() -> None:
    timing = Timing(2.00004, 1.0, 2.0, 1.9, 2.1, 5)
    assert timing.to_dict() == {
        "before": 2.0,
        "after": 1.0,
        "speedup": 2.0,
        "low": 1.9,
        "high": 2.1,
        "rounds": 5,
    }


# ------------------------------------------------------------------------------- what is worth it


def keeping(costs: dict[str, float], base: float = 0.004, **settings: Any) -> set[str]:
    """The groups that are left out; ``costs`` are seconds that each adds to ``base``."""

    def build(groups: frozenset[str]) -> nn.Module:
        return Sleeps(max(0.0, base + sum(costs[group] for group in groups)))

    races = Races(((), {}), Tune(**({"seconds": 3.0} | settings)), Cache(None, {}))
    verdict = worth_keeping(list(costs), build, races, lambda stage: None)
    assert verdict.network.rounds >= 3
    assert all(
        isinstance(race, Timing) for race in (*verdict.lost.values(), *verdict.gains.values())
    )
    assert not verdict.lost.keys() & verdict.gains.keys()
    return set(verdict.lost)


def test_groups_that_pay_are_kept() -> None:
    assert keeping({"a": -0.002, "b": -0.001}) == set()


def test_a_group_that_costs_is_left_out() -> None:
    assert keeping({"a": -0.002, "b": +0.003, "c": -0.001}) == {"b"}


def test_a_single_group_that_costs_is_left_out() -> None:
    assert keeping({"a": +0.002}) == {"a"}


def test_when_nothing_pays_nothing_stays() -> None:
    assert keeping({"a": +0.002, "b": +0.002}) == {"a", "b"}


def test_within_the_margin_a_group_stays() -> None:
    assert "b" not in keeping({"a": -0.003, "b": +0.0002}, base=0.02, margin=0.5)


# -------------------------------------------------------------------------------- in optimize()


@pytest.mark.parametrize("edit", [slow_down, useless_product])
def test_a_rewrite_that_slows_down_is_undone(edit: Any) -> None:
    model = Chain(2)
    result = fxtemporal.optimize(
        model, (clip(),), passes=[Planted({"layers.0": edit, "layers.1": edit})], tune=QUICK
    )
    for remark in fxtemporal.report(result).remarks:
        assert remark.status == "missed"
        assert [reason.code for reason in remark.reasons] == [Code.NOT_FASTER]
        assert "ms without it" in remark.reasons[0].text
        assert remark.detail["speedup"] < 1
    assert not any(n.target in (waste, add_nothing) for n in result.graph.nodes)
    torch.testing.assert_close(result(clip(3)), model(clip(3)))


def test_only_the_group_that_slows_down_is_undone() -> None:
    model = Slow(3)
    rule = Formed({"layers.0": speed_up, "layers.1": slow_down, "layers.2": speed_up})
    result = fxtemporal.optimize(model, (clip(),), passes=[rule], tune=QUICK)
    assert statuses(result) == {"layers.0": "applied", "layers.1": "missed", "layers.2": "applied"}
    timing = fxtemporal.report(result).timing
    assert timing is not None
    assert timing.speedup > 1.5
    torch.testing.assert_close(result(clip(3)), model(clip(3)))


def test_sites_of_one_form_stand_or_fall_together() -> None:
    class OneForm(Planted):
        def rewrite(self, program: Program, candidate: fx.Node) -> Mapping[str, Any]:
            super().rewrite(program, candidate)
            return {"form": "waste"}

    rule = OneForm(dict.fromkeys(("layers.0", "layers.1"), slow_down))
    result = fxtemporal.optimize(Chain(3), (clip(),), passes=[rule], tune=QUICK)
    assert set(statuses(result).values()) == {"missed"}


def test_wrong_rewrites_are_not_measured() -> None:
    def wrong(program: Program, node: fx.Node) -> None:
        with program.graph.inserting_after(node):
            new = program.graph.call_function(operator.mul, (node, 2))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    rule = Formed({"layers.0": wrong, "layers.1": speed_up})
    result = fxtemporal.optimize(Slow(2), (clip(),), passes=[rule], tune=QUICK)
    assert statuses(result) == {"layers.0": "failed", "layers.1": "applied"}


def test_the_settings_are_in_the_report() -> None:
    result = fxtemporal.optimize(Chain(1), (clip(),), tune=QUICK, passes=[Conv3dForms({})])
    report = fxtemporal.report(result)
    assert report.settings["tune"] == {
        "target": "eager",
        "seconds": 3.0,
        "margin": 0.02,
        "memory_limit": None,
        "cache": True,
    }
    assert report.timing is not None
    assert f"{report.timing.speedup:.2f}×" in str(report)


def test_nothing_to_rewrite_is_not_measured() -> None:
    model = Sleeps(0.0)
    result = fxtemporal.optimize(nn.ReLU(), (clip(),), tune="measure")
    assert fxtemporal.report(result).timing is None
    assert model.calls == 0


def test_the_time_limit_is_kept() -> None:
    start = time.perf_counter()
    fxtemporal.optimize(Slow(4), (clip(),), passes=[Formed()], tune=Tune(seconds=0.5))
    assert time.perf_counter() - start < 8


# ----------------------------------------------------------------------- nothing is left behind


class Training(nn.Module):
    """Counts its calls in a BatchNorm, draws random numbers, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 1)
        self.norm = nn.BatchNorm3d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.dropout(self.norm(self.conv(x)))


def test_measuring_leaves_model_inputs_and_random_state_alone() -> None:
    model = Training().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = clip()
    state = torch.get_rng_state()
    result = fxtemporal.optimize(model, (x,), tune=Tune(seconds=0.2))
    assert torch.equal(x, clip())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert result.training
    assert model.training


def test_measuring_builds_no_graph_of_gradients() -> None:
    model = InplaceBody.build()
    fxtemporal.optimize(model, model.example(), tune=Tune(seconds=0.2))
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_keyword_inputs_are_measured_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 3, (1, 3, 3))

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.conv(x) * scale

    tune, passes = Tune(seconds=0.2), [Conv3dForms({})]
    kwargs = {"scale": noise(1)}
    result = fxtemporal.optimize(Scaled(), (clip(),), kwargs, tune=tune, passes=passes)
    assert fxtemporal.report(result).timing is not None


# ---------------------------------------------------------------------------------------- engines


class FramesLoop(nn.Module):
    """(B, T, 3, H, W) -> (B, T, 3, H, W), frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 1)


def engine(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    monkeypatch.setitem(cast(dict[str, Engine], ENGINES), "fake", Engine("fake", build))


def test_choices_are_measured_on_the_engine_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def build(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        convolutions = sum(n.target == "conv" for n in cast(fx.GraphModule, model).graph.nodes)
        seen.append(convolutions)
        return Sleeps(0.001 if convolutions > 1 else 0.004)  # which likes the loop

    engine(monkeypatch, build)
    result = fxtemporal.optimize(FramesLoop(), (noise(2, 4, 3, 8, 8),), tune=Tune(target="fake"))
    assert set(seen) == {4, 1}
    report = fxtemporal.report(result)
    assert report.settings["tune"]["target"] == "fake"
    assert report.remarks[0].reasons[0].code == "not-faster"
    assert report.timing is not None
    assert report.timing.before < report.timing.after


def test_what_an_engine_refuses_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if sum(n.target == "conv" for n in cast(fx.GraphModule, model).graph.nodes) == 1:
            raise NotImplementedError("no such op")
        return Sleeps(0.001)

    engine(monkeypatch, build)
    result = fxtemporal.optimize(FramesLoop(), (noise(2, 4, 3, 8, 8),), tune=Tune(target="fake"))
    assert fxtemporal.report(result).remarks[0].status == "missed"


def test_what_an_engine_alone_can_run_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if sum(n.target == "conv" for n in cast(fx.GraphModule, model).graph.nodes) > 1:
            raise NotImplementedError("too many ops")
        return Sleeps(0.001)

    engine(monkeypatch, build)
    result = fxtemporal.optimize(FramesLoop(), (noise(2, 4, 3, 8, 8),), tune=Tune(target="fake"))
    assert fxtemporal.report(result).remarks[0].status == "applied"


def test_an_engine_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        raise ImportError("No module named 'fake'")

    engine(monkeypatch, build)
    with pytest.raises(fxtemporal.PassError, match="'fake' is not installed"):
        fxtemporal.optimize(FramesLoop(), (noise(2, 4, 3, 8, 8),), tune=Tune(target="fake"))


def test_engines_take_tensors_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, lambda model, inputs: model)
    with pytest.raises(fxtemporal.PassError, match="by position"):
        fxtemporal.optimize(FramesLoop(), (), {"x": noise(2, 4, 3, 8, 8)}, tune=Tune(target="fake"))


def test_races_of_graphs_are_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Timing:
        calls.append(1)
        return race(*args, **kwargs)

    monkeypatch.setattr("fxtemporal.tuning.races.race", counted)
    x = noise(2, 4, 3, 8, 8)
    tune = Tune(cache=tmp_path, seconds=1.0)
    first = fxtemporal.report(fxtemporal.optimize(FramesLoop(), (x,), tune=tune))
    count = len(calls)
    assert count
    again = fxtemporal.report(fxtemporal.optimize(FramesLoop(), (x,), tune=tune))
    assert len(calls) == count
    assert again.timing == first.timing
    fxtemporal.optimize(FramesLoop(), (noise(3, 4, 3, 8, 8),), tune=tune)
    assert len(calls) > count
