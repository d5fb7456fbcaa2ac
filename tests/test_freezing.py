"""A frozen result computes the same numbers without the weights it was made from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fxtemporal
from fxtemporal import SpecializationError
from tests.zoo import ResidualConv3d, SharedConv3d, TiedConv3d

MODELS = [ResidualConv3d, SharedConv3d, TiedConv3d]


def bytes_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in {*module.parameters(), *module.buffers()})


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("with_example", [True, False])
def test_the_numbers_stay(build: type, with_example: bool) -> None:
    model = build.build().double()
    example = tuple(x.double() for x in model.example()) if with_example else None
    result = fxtemporal.optimize(model, example, tune="static", freeze=True)
    assert "_prepared" not in "".join(name for name, _ in result.named_modules())
    for batch, frames in ((2, 4), (3, 6)):
        x = model.example(batch, frames)[0].double()
        torch.testing.assert_close(result(x), model(x), rtol=1e-12, atol=1e-12)
        for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            torch.testing.assert_close(other(x), result(x), rtol=0, atol=0)


def test_what_nothing_reads_is_dropped_and_the_rest_stays() -> None:
    model = ResidualConv3d.build()
    before = dict(model.named_parameters())
    result = fxtemporal.optimize(model, model.example(), tune="static", freeze=True)
    assert set(result.state_dict()) == {
        "shortcut.weight",
        "shortcut.bias",
        "head.weight",
        "head.bias",
        *(f"frozen_{number}" for number in range(4)),
    }
    assert dict(result.named_parameters())["head.weight"] is before["head.weight"]
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert "BatchNorm3d" in repr(result)
    with pytest.raises(SpecializationError):
        result.train()


def test_nothing_is_computed_again() -> None:
    model = ResidualConv3d.build()
    result = fxtemporal.optimize(model, model.example(), tune="static", freeze=True)
    x = model.example(3)[0]
    with torch.no_grad():
        before = result(x)
        model.stem.weight.mul_(2)
        torch.testing.assert_close(result(x), before, rtol=0, atol=0)


def test_the_state_dict_of_a_frozen_model_loads_into_another() -> None:
    one, other = ResidualConv3d.build(0), ResidualConv3d.build(1)
    x = one.example(3)[0]
    first = fxtemporal.optimize(one, one.example(), tune="static", freeze=True)
    second = fxtemporal.optimize(other, one.example(), tune="static", freeze=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)


def test_it_is_exported_for_any_batch() -> None:
    model = ResidualConv3d.build()
    result = fxtemporal.optimize(model, model.example(), tune="static", freeze=True)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(result, model.example(), dynamic_shapes=shapes)
    assert not any("norm" in name for name in program.state_dict)
    x = model.example(5)[0]
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_the_report_says_what_each_choice_costs() -> None:
    model = ResidualConv3d.build()
    kept = fxtemporal.report(fxtemporal.optimize(model, model.example(), tune="static"))
    gm = fxtemporal.optimize(model, model.example(), tune="static", freeze=True)
    frozen = fxtemporal.report(gm)
    assert kept.memory is not None
    assert frozen.memory is not None
    assert kept.memory.original == kept.memory.result == bytes_of(model)
    weights = (model.stem, model.temporal)
    folded = sum(4 * (conv.weight.numel() + conv.out_channels) for conv in weights)
    assert kept.memory.prepared == folded
    assert kept.memory.frozen == frozen.memory.result == bytes_of(gm)
    assert frozen.memory.prepared == 0
    assert frozen.memory.frozen == frozen.memory.result
    assert kept.to_dict()["memory"] == kept.memory.to_dict()
    assert "Memory:" in str(kept)
    assert "Memory:" in str(frozen)


def test_without_anything_prepared_nothing_is_said() -> None:
    model = TiedConv3d.build()
    report = fxtemporal.report(fxtemporal.optimize(model, model.example(), tune="static"))
    assert report.memory is not None
    assert report.memory.prepared == 0
    assert report.memory.original == report.memory.frozen == bytes_of(model)
    assert "Memory:" not in str(report)
