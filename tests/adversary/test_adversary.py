"""The adversary's runs as tests: a few fixed seeds by default, many with ``-m long``."""

import os
from functools import partial

import pytest
import torch

from tests.adversary import regressions
from tests.adversary.campaign import campaign, judge_seed
from tests.adversary.case import Call, Case, Input
from tests.adversary.networks import network
from tests.adversary.oracle import FAULTS, Verdict, judge
from tests.adversary.programs import program
from tests.adversary.shrinker import shrink

_SEEDS = int(os.environ.get("FXTEMPORAL_ADVERSARY_SEED", "0"))
_PROGRAMS = int(os.environ.get("FXTEMPORAL_ADVERSARY_PROGRAMS", "20000"))
_NETWORKS = int(os.environ.get("FXTEMPORAL_ADVERSARY_NETWORKS", "10000"))
_JOBS = int(os.environ.get("FXTEMPORAL_ADVERSARY_JOBS", "2"))

_PLAIN = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        return torch.stack([self.layer(x[:, t]) for t in range(x.size(1))], 1)
"""
_ABRUPT = _PLAIN.replace("return", "self.calls = getattr(self, 'calls', 0) + 1\n        return")


def _plain(source: str) -> Case:
    calls = (Call(frames=(3,), gradients="inputs"), Call(batch=0, frames=(3,)), Call(frames=(5,)))
    inputs = (Input("x", ("B", "T0", 4), 1),)
    return Case("plain", source, "Net()", inputs, calls, Call(frames=(3,), seed=0))


@pytest.mark.parametrize("make", [program, network])
def test_the_same_seed_gives_the_same_case(make) -> None:
    assert make(3) == make(3)
    assert make(3).source != make(4).source


def test_the_oracle_agrees_with_a_plain_loop() -> None:
    assert judge(_plain(_PLAIN)).kind == "equal"


def test_the_oracle_sees_wrong_numbers() -> None:
    """A result that is off by a thousandth, at one size only."""

    class Off(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model
            self.state_dict = model.state_dict

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * (1.001 if x.size(1) == 5 else 1)

    verdict = judge(_plain(_PLAIN), lambda model, *_, **__: Off(model))
    assert (verdict.key, verdict.call) == (("wrong", "values"), 2)


def test_the_oracle_sees_a_model_that_was_changed() -> None:
    def optimize(model: torch.nn.Module, *_: object, **__: object) -> torch.nn.Module:
        with torch.no_grad():
            model.layer.bias += 1
        return model

    assert judge(_plain(_PLAIN), optimize).key == ("changed", "model: other values")


def test_a_failing_case_shrinks_to_what_fails() -> None:
    """A result that squares what the original passes on: all but the frame is left out."""

    def optimize(model: torch.nn.Module, *_: object, **__: object) -> torch.nn.Module:
        if any(isinstance(part, torch.nn.Linear) for part in model.modules()):
            raise ZeroDivisionError
        return model

    case, judged = _plain(_ABRUPT), partial(judge, optimize=optimize)
    small, verdict = shrink(case, judged(case), seconds=5, judged=judged)
    assert verdict.kind == "crash"
    assert "calls" not in small.source
    assert "nn.Linear" in small.source
    assert not small.calls


@pytest.mark.parametrize("name", sorted(regressions.CASES))
def test_what_once_failed_holds(name: str) -> None:
    verdict = judge(regressions.CASES[name])
    assert verdict.kind not in FAULTS, verdict


@pytest.mark.parametrize("kind", ["program", "network"])
def test_a_few_seeds_are_judged(kind: str) -> None:
    """The generators and the oracle work; faults are the longer runs' concern."""
    verdicts: list[Verdict] = [judge_seed((kind, seed))[0] for seed in range(8)]
    kinds = [verdict.kind for verdict in verdicts]
    assert {"broken", *FAULTS}.isdisjoint(kinds), verdicts
    assert kinds.count("equal") >= 4, verdicts


@pytest.mark.long
def test_no_seed_finds_a_fault() -> None:
    outcome = campaign(_PROGRAMS, _NETWORKS, seed=_SEEDS, jobs=_JOBS)
    assert not outcome.found, "\n".join([*(f.text() for f in outcome.found), outcome.table()])
