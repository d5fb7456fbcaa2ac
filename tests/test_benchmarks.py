"""The benchmarks measure what they say: counterparts agree with their loops, engines with eager."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import loop_models, loop_runs, loops
from benchmarks.measure import Timing, relative_error
from benchmarks.memory import peak_of_call
from benchmarks.models import Case, FoldedByHand, SensorGridLSTM, seeded
from fxtemporal.tuning.engines import ENGINES, Engine, compile_with, versions

SMALL = {
    "small_cnn_lstm": {"frames": 3, "batch": 2},
    "resnet18_lstm": {"frames": 2, "size": 32},
    "two_stream": {"frames": 2, "size": 32},
    "conv_lstm": {"frames": 3, "size": 8},
    "encoded_conv_lstm": {"frames": 3, "size": 16},
    "lstm_cell": {"frames": 5, "features": 8},
    "sliding_windows": {"frames": 8, "window": 4, "step": 2, "size": 32},
    "nested_crops": {"crops": 2, "frames": 2, "size": 32},
}
INSTALLED_BY = {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx", "onnxscript"]}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str = "tiny") -> Case:
    """A loop over three frames that any engine compiles in a second."""

    def clip() -> tuple[torch.Tensor]:
        return (torch.randn(2, 3, 1, 5, 5, generator=torch.Generator().manual_seed(1)),)

    return Case(name, partial(seeded, SensorGridLSTM), clip, True, FoldedByHand)


def test_every_builder_is_measured_and_has_a_small_size():
    assert {build.__name__ for build in loop_models.BUILDERS} == set(SMALL)
    assert all(name == case.name for name, case in loop_models.LOOPS.items())
    assert all(case.loops and case.hand_batched for case in loop_models.LOOPS.values())


@pytest.mark.parametrize("build", loop_models.BUILDERS, ids=lambda build: build.__name__)
@torch.no_grad()
def test_batched_by_hand_computes_what_the_loop_does_with_its_parameters(build):
    case = build("small", **SMALL[build.__name__])
    model, inputs = case.build(), case.inputs()
    by_hand = case.hand_batched(model).eval()
    assert {p.data_ptr() for p in by_hand.parameters()} == {
        p.data_ptr() for p in model.parameters()
    }
    expected = model.double()(*(x.double() for x in inputs))
    assert expected.std() > 1e-3  # not a constant that any model would give
    result = case.hand_batched(model).eval()(*(x.double() for x in inputs))
    assert relative_error(result, expected) < 1e-12


@pytest.mark.parametrize("name", ["resnet18_lstm_64", "sliding_windows"])
def test_models_and_inputs_are_the_same_at_every_build(name):
    case = loop_models.LOOPS[name]
    first, second = case.build().state_dict(), case.build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(map(torch.equal, case.inputs(), case.inputs()))


@pytest.mark.parametrize("engine", ["eager", "openvino", "onnxruntime"])
@torch.no_grad()
def test_an_engine_computes_what_eager_does(engine):
    for package in INSTALLED_BY.get(engine, []):
        pytest.importorskip(package)
    case = tiny()
    model, inputs = case.build(), case.inputs()
    compiled = compile_with(ENGINES[engine], model, inputs)
    reference = model(*inputs)
    result = compiled.run(*inputs)
    assert isinstance(result, torch.Tensor)
    assert relative_error(result, reference) < 1e-5
    assert compiled.seconds > 0
    other = torch.randn_like(inputs[0])
    assert relative_error(compiled.run(other), model(other)) < 1e-5
    assert relative_error(result, reference) < 1e-5  # a later call leaves earlier results alone


def test_an_engine_that_is_missing_or_fails_is_noted_and_the_rest_is_measured():
    def missing(model, inputs):
        raise ModuleNotFoundError("No module named 'missing'")

    def failing(model, inputs):
        raise RuntimeError("cannot convert aten::roll:\n  axis 2")

    absent = Engine("missing", missing, ("missing-package",))
    engines = (ENGINES["eager"], absent, Engine("failing", failing))
    result = loop_runs.run_case(tiny(), engines, rounds=3, budget=0, memory=False)
    assert set(result.cells) == {("eager", variant) for variant in loop_runs.VARIANTS}
    assert result.notes == [
        "missing: not installed (No module named 'missing')",
        "tiny, failing, loop: RuntimeError: cannot convert aten::roll: axis 2",
        "tiny, failing, optimized: RuntimeError: cannot convert aten::roll: axis 2",
        "tiny, failing, by hand: RuntimeError: cannot convert aten::roll: axis 2",
    ]
    assert versions([absent]) == {"missing-package": "not installed"}
    assert loops.NOT_MEASURED in loops._times([result], "simple")
    assert json.loads(json.dumps(result.to_dict()))["engines"]["eager"]["loop"]


def test_a_result_of_another_shape_is_an_infinite_error():
    def cuts(model, inputs):
        return lambda *args: model(*args)[:1]

    result = loop_runs.run_case(tiny(), (Engine("cuts", cuts),), rounds=3, budget=0, memory=False)
    assert "cuts, loop: relative error inf, above 1e-05" in result.broken()


def cell(milliseconds: float, error: float = 1e-7) -> loop_runs.Cell:
    return loop_runs.Cell(Timing((milliseconds,) * 3), error, 0.0)


def measured(**cells: loop_runs.Cell) -> loop_runs.Result:
    result = loop_runs.Result("model", ((1, 2),), ("eager",), optimize_seconds=1.0)
    result.cells.update({("eager", name.replace("_", " ")): c for name, c in cells.items()})
    return result


@pytest.mark.parametrize(
    ("result", "broken"),
    [
        (measured(loop=cell(2.0), optimized=cell(1.0)), []),
        (measured(loop=cell(0.98), optimized=cell(1.0)), []),
        (
            measured(loop=cell(0.9), optimized=cell(1.0)),
            ["runs at 0.90x in eager mode, less than 0.97x"],
        ),
        (
            measured(loop=cell(2.0), optimized=cell(1.0, 1e-3)),
            ["eager, optimized: relative error 1.0e-03, above 1e-05"],
        ),
        (
            measured(loop=cell(2.0), optimized=cell(1.0, float("nan"))),
            ["eager, optimized: relative error nan, above 1e-05"],
        ),
        (loop_runs.Result("model", ((1, 2),), ("eager",)), ["cannot be optimized"]),
    ],
)
def test_a_slow_or_wrong_result_is_broken(result, broken):
    assert result.broken() == broken


def test_main_prints_writes_and_judges(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loops, "LOOPS", {"tiny": tiny()})
    monkeypatch.setattr(loops, "SCALING", (2,))
    monkeypatch.setattr(loops, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(loop_runs, "SLOWEST", 0.0)
    arguments = ["--engines", "eager", "openvino", "--skip", "tiny/openvino", "--rounds", "3"]
    arguments += ["--budget", "0", "--no-memory", "--scaling", "--save"]
    assert loops.main([*arguments, "--json", str(tmp_path / "loops.json")]) == 0
    printed = capsys.readouterr().out
    assert "not measured: tiny, openvino: left out with --skip" in printed
    content = json.loads((tmp_path / "loops.json").read_text())
    assert content["cases"][0]["name"] == "tiny"
    assert content["scaling"][0]["frames"] == 2
    (saved,) = (tmp_path / "results").glob("loops-*.md")
    text = saved.read_text(encoding="utf-8")
    assert "| tiny" in text
    assert "2×3×1×5×5" in text
    assert "left out with --skip" in text
    monkeypatch.setattr(loop_runs, "LARGEST_ERROR", -1.0)
    assert loops.main(["--engines", "eager", "--rounds", "3", "--budget", "0", "--no-memory"]) == 1
    assert "broken: tiny: eager, optimized" in capsys.readouterr().err


class Widens(nn.Module):
    """(B, 1) -> a tensor of 64 MiB on the way to a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(1 << 24, -1).contiguous().sum()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps the record")
def test_peak_memory_is_that_of_the_call():
    peak = peak_of_call(Widens(), (torch.ones(1, 1),))
    assert 60 * 2**20 < peak < 100 * 2**20
