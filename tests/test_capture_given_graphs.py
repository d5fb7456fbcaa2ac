"""GraphModules and ExportedPrograms are taken as they are."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

import fxtemporal
from fxtemporal import CaptureError, FxTemporalError, SpecializationError
from fxtemporal.capture.capture import capture
from tests.capture_cases import Case, Forward, X, assert_same, snapshot
from tests.capture_forwards import EXPORTED
from tests.capture_inputs import keyword_only
from tests.strictly import strictly
from tests.zoo import NestedInputs, noise

# -------------------------------------------------------------------------------------- GraphModule


class Plain(nn.Module):
    """What torch.fx traces by itself; with a constant, a buffer and a layer it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        self.norm = nn.BatchNorm3d(4)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", noise(4, 1, 1, 1, seed=2))
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.norm(self.conv(x)) * self.scale + self.shift
        return {"out": out, "mean": out.mean((2, 3, 4))}


CLIP = noise(2, 3, 4, 6, 6)
CLIPS = (noise(3, 3, 4, 6, 6), noise(1, 3, 7, 6, 5))


@pytest.mark.parametrize("example", [(CLIP,), None])
def test_a_graph_module_is_taken_as_it_is(example: Any) -> None:
    given = fx.symbolic_trace(Plain().eval())
    code, nodes, before = given.code, list(given.graph.nodes), snapshot(given)
    result = strictly(given, example, passes=["conv3d-forms"], tune="static")
    assert (given.code, list(given.graph.nodes), snapshot(given)) == (code, nodes, before)
    report = fxtemporal.report(result)
    assert report.frontend == "given"
    assert [remark.status for remark in report.remarks] == ["applied"]
    for clip in (CLIP, *CLIPS):
        assert_same(result(clip), given(clip))
    assert list(result.state_dict()) == list(given.state_dict())
    assert all("val" in n.meta for n in result.graph.nodes if n.op != "output") == bool(example)


def test_meta_of_a_given_graph_is_not_touched() -> None:
    given = fx.symbolic_trace(Plain().eval())
    for node in given.graph.nodes:
        node.meta["val"] = node.meta["mine"] = "theirs"
    given.meta["kept"] = 1
    result = strictly(given, (CLIP,), tune="static")
    assert all(node.meta["val"] == "theirs" for node in given.graph.nodes)
    assert "fxtemporal" not in given.meta
    assert_same(result(CLIP), given(CLIP))


def test_wrong_inputs_of_a_graph_module_are_named_with_the_node() -> None:
    given = fx.symbolic_trace(Plain().eval())
    with pytest.raises(CaptureError, match="conv"):
        strictly(given, (noise(2, 4, 4, 6, 6),))
    with pytest.raises(CaptureError, match="do not fit"):
        strictly(given, (CLIP, CLIP, CLIP))


def test_a_graph_module_made_by_hand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.get_attr("w")
    y = graph.call_function(F.conv3d, (x, w), {"padding": (1, 0, 0)})
    y = graph.call_function(operator.add, (y, 1))
    graph.output((y, [x, {"k": y}]))
    root = nn.Module()
    root.w = nn.Parameter(noise(4, 3, 3, 1, 1))
    given = fx.GraphModule(root, graph)
    result = strictly(given, (CLIP,), tune="static")
    assert fxtemporal.report(result).by_status("applied")
    for clip in (CLIP, *CLIPS):
        assert_same(result(clip), given(clip))


def test_an_optimized_module_is_optimized_again_without_change() -> None:
    once = strictly(Plain().eval(), (CLIP,), tune="static")
    twice = strictly(once, (CLIP,), tune="static")
    assert not fxtemporal.report(twice).by_status("applied")
    assert fxtemporal.report(twice).specializations == fxtemporal.report(once).specializations
    for clip in (CLIP, *CLIPS):
        assert_same(twice(clip), once(clip))


# ----------------------------------------------------------------------------- ExportedProgram


def exported(model: nn.Module, args: tuple[Any, ...], **more: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model, args, strict=False, **more)


@pytest.mark.parametrize("example", [(CLIP,), None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program(dynamic: bool, example: Any) -> None:
    model = Plain().eval()
    shapes = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}} if dynamic else None
    program = exported(model, (CLIP,), dynamic_shapes=shapes)
    text = str(program.graph)
    state = {name: value.detach().clone() for name, value in program.state_dict.items()}
    result = strictly(program, example, passes=["conv3d-forms"], tune="static")
    assert str(program.graph) == text
    assert_same({name: value.detach().clone() for name, value in program.state_dict.items()}, state)
    assert [r.status for r in fxtemporal.report(result).remarks] == ["applied"]
    assert_same(result(CLIP), model(CLIP))
    for clip in CLIPS:
        if dynamic:
            assert_same(result(clip), model(clip))
        else:
            with pytest.raises(SpecializationError, match=r"x\.size\(0\) == 2"):
                result(clip)


def test_an_exported_program_says_what_it_was_exported_for() -> None:
    program = exported(Plain().eval(), (CLIP,))
    fixed = {str(s.expression): s.value for s in fxtemporal.audit(program).specializations}
    sizes = {f"x.size({dim})": size for dim, size in enumerate(CLIP.shape)}
    assert sizes.items() <= fixed.items()


def test_an_exported_program_with_nested_inputs_and_keywords() -> None:
    model = NestedInputs.build()
    program = exported(model, model.example(2, 4))
    result = strictly(program, tune="static")
    assert_same(result(*model.example(2, 4)), model(*model.example(2, 4)))
    keyword = Case(keyword_only).build()
    program = exported(keyword, (X,), kwargs={"mask": X > 0})
    result = strictly(program, (X,), {"mask": X > 0}, tune="static")
    assert_same(result(X, mask=X > 1), keyword(X, mask=X > 1))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own
def test_an_exported_program_after_decompositions() -> None:
    model = Plain().eval()
    program = exported(model, (CLIP,)).run_decompositions()
    result = strictly(program, tune="static")
    assert_same(result(CLIP), model(CLIP))


def test_an_exported_program_in_training_moves_its_buffers_as_the_model_does() -> None:
    model = Plain().train()
    program = exported(copy.deepcopy(model), (CLIP,))
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    result = strictly(program, tune="static")
    assert_same(dict(program.named_buffers()), before)
    assert_same(result(CLIP), model(CLIP))
    assert_same(result.norm.running_mean, model.norm.running_mean)
    assert_same(result.norm.num_batches_tracked, model.norm.num_batches_tracked)


def test_wrong_inputs_of_an_exported_program() -> None:
    program = exported(Plain().eval(), (CLIP,))
    with pytest.raises(FxTemporalError):
        strictly(program, (CLIPS[0],), tune="static")


@pytest.mark.parametrize("forward", EXPORTED.values())
def test_what_the_exporter_captured_keeps_names_and_parameters(forward: Forward) -> None:
    model = Case(forward).build()
    program = capture(model, (X,))
    assert program.frontend == "export"
    assert program.note
    parameters = dict(program.gm.named_parameters())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert program.gm.state_dict().keys() == model.state_dict().keys()
    assert all(m.training == model.training for m in program.gm.modules())
