"""The optimized module is a module like the model: state, copies, flags and training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import fxtemporal
from fxtemporal import FxTemporalError, Report, SpecializationError
from fxtemporal.capture.capture import capture
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.shallow_copy import twin
from tests.strictly import strictly
from tests.zoo import CNNLSTM, InplaceBody, ResidualConv3d, TiedConv3d, ViewByBatch, noise


class Everything(nn.Module):
    """Used and unused parameters and buffers, persistent or not, tied, None, a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        self.norm = nn.BatchNorm3d(4)
        self.tied = nn.Conv3d(3, 4, (1, 3, 3))
        self.tied.weight = self.conv.weight
        self.unused = nn.Linear(2, 2)
        self.alone = nn.Parameter(noise(3))
        self.frozen = nn.Parameter(noise(3), requires_grad=False)
        self.nothing = nn.Sequential()
        self.register_buffer("shift", noise(4, 1, 1, 1))
        self.register_buffer("passing", noise(4, 1, 1, 1, seed=2), persistent=False)
        self.register_buffer("unused_buffer", noise(2))
        self.register_buffer("none", None)
        self.register_parameter("no_parameter", None)
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) + self.tied(x)) * self.scale + self.shift * self.passing


def clip(batch: int = 2, frames: int = 4) -> Tensor:
    return noise(batch, 3, frames, 6, 6)


def build() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


def optimized(model: nn.Module, *example: Any, **more: Any) -> fx.GraphModule:
    return strictly(model, example or (clip(),), tune="static", **more)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- state


def test_names_order_and_identity_of_all_parameters_and_buffers() -> None:
    model = build()
    result = optimized(model)
    for kind in ("named_parameters", "named_buffers"):
        mine = list(getattr(result, kind)(remove_duplicate=False))
        theirs = list(getattr(model, kind)(remove_duplicate=False))
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        assert all(a is b for (_, a), (_, b) in zip(mine, theirs, strict=True))
    assert list(result.state_dict()) == list(model.state_dict())
    assert "passing" not in result.state_dict()
    assert "scale" not in result.state_dict()


@pytest.mark.parametrize("cls", [CNNLSTM, InplaceBody, ResidualConv3d, TiedConv3d, ViewByBatch])
def test_state_dicts_of_the_zoo(cls: Any) -> None:
    model = cls.build()
    result = optimized(model, *model.example())
    mine, theirs = result.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    assert [id(p) for p in result.parameters()] == [id(p) for p in model.parameters()]


def test_state_dicts_load_both_ways() -> None:
    model, other = build(), build()
    result = optimized(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not result.load_state_dict(other.state_dict()).missing_keys
    close(result(clip()), other(clip()))
    close(model(clip()), other(clip()))  # they are the same parameters
    third = build()
    third.load_state_dict(result.state_dict())
    close(third(clip()), other(clip()))


def test_state_dicts_go_through_torch_save() -> None:
    model = build()
    result = optimized(model)
    file = io.BytesIO()
    torch.save(result.state_dict(), file)
    file.seek(0)
    other = build()
    with torch.no_grad():
        other.conv.weight.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    close(other(clip()), model(clip()))


def test_state_of_what_torch_export_captured() -> None:
    class Made(Everything):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.vmap(torch.neg)(x))

    model = Made().eval()
    result = optimized(model)
    assert fxtemporal.report(result).frontend == "export"
    assert sorted(result.state_dict()) == sorted(model.state_dict())
    mine = dict(result.named_parameters(remove_duplicate=False))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in theirs)


# -------------------------------------------------------------------------------------- copies


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "twice": lambda module: through_pickle(copy.deepcopy(through_pickle(module))),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_the_same_and_keeps_the_report(name: str) -> None:
    result = optimized(build())
    other = COPIES[name](result)
    assert isinstance(other, OptimizedModule)
    assert torch.equal(other(clip(3)), result(clip(3)))
    report = fxtemporal.report(other)
    assert isinstance(report, Report)
    assert report.to_dict() == fxtemporal.report(result).to_dict()
    assert str(report) == str(fxtemporal.report(result))
    with pytest.raises(SpecializationError):
        other(clip()[0])


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_holds_all_of_the_state_and_shares_none(name: str) -> None:
    result = optimized(build())
    other = COPIES[name](result)
    assert list(other.state_dict()) == list(result.state_dict())
    assert [n for n, _ in other.named_buffers()] == [n for n, _ in result.named_buffers()]
    assert other.get_parameter("tied.weight") is other.get_parameter("conv.weight")
    assert not other.frozen.requires_grad
    before = result(clip())
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers(), other.scale):
            tensor.fill_(7)
    assert torch.equal(result(clip()), before)
    assert not torch.equal(other(clip()), before)


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("cls", [CNNLSTM, InplaceBody, ResidualConv3d, ViewByBatch])
def test_copies_of_the_zoo(name: str, cls: Any) -> None:
    model = cls.build()
    result = optimized(model, *model.example())
    other = COPIES[name](result)
    for sizes in cls.sizes[:2]:
        torch.testing.assert_close(other(*model.example(*sizes)), model(*model.example(*sizes)))
    assert other.training == result.training
    assert {n: m.training for n, m in other.named_modules()} == {
        n: m.training for n, m in result.named_modules()
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of its treespecs
def test_copies_of_what_torch_export_captured_and_of_a_given_program() -> None:
    def without_gradients(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self[0](x)

    model = type("Sequence", (nn.Sequential,), {"forward": without_gradients})(
        nn.Conv3d(3, 4, (1, 3, 3))
    ).eval()
    program: ExportedProgram = torch.export.export(model, (clip(),), strict=False)
    for given in (model, program):
        result = strictly(given, (clip(),), tune="static")
        other = copy.deepcopy(result)
        close(other(clip()), model(clip()))
        assert str(fxtemporal.report(other)) == str(fxtemporal.report(result))
        if given is model:
            close(pickle.loads(pickle.dumps(result))(clip()), model(clip()))
            continue
        with pytest.raises(pickle.PicklingError, match=r"torch\.export\.save"):
            pickle.dumps(result)


def test_a_copy_of_the_model_is_not_needed_to_keep_it() -> None:
    """The result goes on working when the model is gone."""
    model = build()
    expected = model(clip())
    result = optimized(model)
    del model
    close(result(clip()), expected)


def test_hooks_go_with_a_deepcopy() -> None:
    result = optimized(build())
    result.register_forward_hook(_double)
    other = copy.deepcopy(result)
    assert torch.equal(other(clip()), result(clip()))


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


# ------------------------------------------------------------------------- flags, dtype, device


def test_train_and_eval_of_the_result_are_its_own() -> None:
    model = build()
    result = optimized(model)
    result.train()
    assert all(m.training for m in result.modules())
    assert not any(m.training for m in model.modules())
    result.eval()
    model.train()
    assert not any(m.training for m in result.modules())


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_at_capture_is_the_mode_of_the_result(training: bool) -> None:
    model = WithDropout().train(training)
    result = optimized(model)
    assert result.training is training
    assert {n: m.training for n, m in result.named_modules() if n} == {
        n: m.training for n, m in model.named_modules() if n
    }
    zeros = float((result(clip()) == 0).double().mean())
    assert (0.3 < zeros < 0.7) if training else zeros == 0


def test_layers_that_stay_modules_follow_train_and_eval() -> None:
    model = WithDropout().eval()
    result = optimized(model).train()
    assert (result(clip()) == 0).any()
    close(result.eval()(clip()), model(clip()))


def test_modes_of_single_layers_are_kept() -> None:
    model = nn.Sequential(nn.BatchNorm3d(3), nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)).train()
    model[0].eval()
    result = optimized(model)
    flags = {name: m.training for name, m in result.named_modules()}
    assert (flags["0"], flags["2"], flags[""]) == (False, True, True)


def test_dtype_of_the_result() -> None:
    """.double() converts the shared parameters, as it does for any two modules that share them."""
    model = build()
    result = optimized(model)
    expected = copy.deepcopy(model).double()(clip().double())
    torch.testing.assert_close(
        copy.deepcopy(result).double()(clip().double()), expected, rtol=1e-9, atol=1e-9
    )
    assert model.conv.weight.dtype == torch.float32
    assert copy.deepcopy(result).to(torch.bfloat16)(clip().bfloat16()).dtype == torch.bfloat16


def test_requires_grad_is_shared_and_zero_grad_works() -> None:
    model = build()
    result = optimized(model)
    result.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    result(clip()).sum().backward()
    result.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------- training


def test_gradients_reach_the_models_parameters_and_equal_the_models() -> None:
    model = build()
    result = optimized(model)
    model(clip()).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    result(clip()).square().sum().backward()
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    assert "unused.weight" not in actual
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-4)


def test_a_step_on_the_models_parameters_is_seen_by_the_result_and_the_other_way() -> None:
    for trained, watched in ((0, 1), (1, 0)):
        model = build()
        modules = (model, optimized(model))
        optimizer = torch.optim.SGD(modules[trained].parameters(), lr=0.01)
        modules[trained](clip()).square().mean().backward()
        before = modules[watched](clip())
        optimizer.step()
        after = modules[watched](clip())
        assert not torch.equal(before, after)
        close(after, modules[trained](clip()))


def test_running_statistics_are_shared_and_counted_once() -> None:
    model = build().train()
    result = optimized(model)
    assert int(model.norm.num_batches_tracked) == 0
    reference = copy.deepcopy(model)
    for batch in (2, 3):
        close(result(clip(batch)), reference(clip(batch)))
    assert int(model.norm.num_batches_tracked) == 2
    close(model.norm.running_mean, reference.norm.running_mean)
    close(model.norm.running_var, reference.norm.running_var)


def test_replacing_a_parameter_of_the_model_afterwards_is_seen() -> None:
    model = build()
    result = optimized(model)
    copied, expected = copy.deepcopy(result), result(clip())
    model.norm.weight = nn.Parameter(torch.zeros_like(model.norm.weight))
    close(result(clip()), model(clip()))
    assert torch.equal(copied(clip()), expected)  # a copy follows no model
    model.conv.weight = nn.Parameter(torch.zeros_like(model.conv.weight))
    with pytest.raises(SpecializationError, match="one tensor of several modules"):
        result(clip())


# ---------------------------------------------------------------------------------- as a module


def test_it_is_a_graph_module_that_fx_can_work_on() -> None:
    result = optimized(build())
    assert isinstance(result, fx.GraphModule)
    result.graph.lint()
    result.recompile()
    again = fx.GraphModule(result, copy.deepcopy(result.graph))
    close(again(clip()), result(clip()))
    retraced = fx.Transformer(result).transform()
    close(retraced(clip()), result(clip()))
    interpreted = fx.Interpreter(result).run(clip())
    close(interpreted, result(clip()))


def test_it_goes_through_torch_export() -> None:
    model = build()
    result = optimized(model)
    shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
    program = torch.export.export(result, (clip(),), dynamic_shapes=shapes, strict=False)
    close(program.module()(clip(3, 5)), model(clip(3, 5)))


def test_keyword_calls_and_defaults_are_those_of_the_model() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
            return x * scale + shift

    model = Scaled()
    result = optimized(model, clip())
    close(result(x=clip()), model(clip()))
    result = optimized(model, clip(), 3.0)
    close(result(clip(), scale=4.0), model(clip(), 4.0))
    with pytest.raises(TypeError):
        result(clip(), 3.0, other=1)


def test_only_an_optimized_module_has_a_report() -> None:
    model = build()
    optimized(model)
    for other in (model, fx.symbolic_trace(nn.ReLU()), None, nn.ReLU()):
        with pytest.raises(FxTemporalError, match="carries no report"):
            fxtemporal.report(other)  # type: ignore[arg-type]


def test_the_class_keeps_the_models_name() -> None:
    assert type(optimized(build())).__name__ in ("Everything", "GraphModuleImpl")
    assert optimized(build())._get_name() == "Everything"


class LastFrame(nn.Module):
    """Computes every frame, and returns the last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.layer(x[:, t]) for t in range(x.size(1))]
        return frames[-1]


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5, inplace=True)),
        nn.TransformerEncoderLayer(4, 1, 8, batch_first=True),
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_call_that_was_dropped_is_not_missed_in_training(layer: nn.Module) -> None:
    model = LastFrame(layer).eval()
    x = torch.randn(3, 5, 4)
    fast = strictly(model, (x,), tune="static", progress=False)
    torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(SpecializationError, match="nothing reads was dropped"):
        fast.train()


def test_a_dropped_call_that_is_the_same_in_training_holds_no_mode() -> None:
    model = LastFrame(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.LayerNorm(4))).eval()
    x = torch.randn(3, 5, 4)
    fast = strictly(model, (x,), tune="static", progress=False).train()
    torch.testing.assert_close(fast(x), model.train()(x))


def test_code_is_made_when_it_is_asked_for() -> None:
    program = capture(build(), (clip(),))
    twins = twin(program.gm), twin(program.gm)  # they share a class, whose forward is one
    program.gm.recompile()
    assert program.gm.code
    for other in (*twins, program.copy().gm):
        assert other.code == program.gm.code
        assert other.code in str(other)
    before = program.gm.code
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node._rename("another")
    program.refresh()
    assert program.gm.code != before
