"""Re-rolled loops compute what the loops computed, at every size; the others say why they stay.

Everything runs in float64, where a right rewrite is right to 1e-12 and a wrong one is not. The
rewrite is checked with ``verify=False``: verification is a net, and a net is not what makes a
rewrite right.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxtemporal
from benchmarks.measure import relative_error
from fxtemporal.ir.reasons import Code
from tests import zoo
from tests.rerolling import (
    LINE,
    all_differences,
    convolutions,
    differs,
    listing,
    optimized,
    reasons,
    remarks,
    rerolled,
)
from tests.zoo import Awkward, noise

pytestmark = pytest.mark.usefixtures("in_float64")

LOOPS = (*zoo.SPELLINGS, *zoo.BODIES, *zoo.ACROSS_THE_BATCH, *zoo.BLOCKED)


# -- the zoo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.__name__)
def test_the_zoo_computes_the_same_at_every_size(kind: type[Awkward]) -> None:
    model, fast = rerolled(kind)
    assert {r.status for r in remarks(fast)} <= {"applied", "missed"}
    assert all_differences(model, fast, model.example, (2, 4)) == {}
    for size in kind.sizes:
        assert differs(model, fast, model.example(*size), free=True) is None


@pytest.mark.long
@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.__name__)
def test_verification_finds_nothing_wrong_and_leaves_the_model_as_it_was(
    kind: type[Awkward],
) -> None:
    def snapshot() -> Any:
        modules = [
            (name, id(m), m.training, sorted(vars(m)), list(m._forward_hooks), list(m._modules))
            for name, m in model.named_modules()
        ]
        state = model.state_dict(keep_vars=True)
        return modules, {name: id(tensor) for name, tensor in state.items()}

    model = kind.build()
    before, state = snapshot(), copy.deepcopy(model.state_dict())
    example = model.example()
    fast = optimized(model, example, verify=True)
    assert snapshot() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert relative_error(example, model.example()) == 0

    comparison = fxtemporal.report(fast).comparison
    assert comparison is not None
    assert comparison.equal
    assert [(r.target, r.status) for r in remarks(fast)] == [
        (r.target, r.status) for r in remarks(rerolled(kind)[1])
    ]  # nothing was undone


@pytest.mark.parametrize("kind", [*zoo.SPELLINGS, *zoo.BODIES], ids=lambda kind: kind.__name__)
def test_one_convolution_serves_all_frames(kind: type[Awkward]) -> None:
    model, fast = rerolled(kind)
    applied = [remark for remark in remarks(fast) if remark.status == "applied"]
    assert applied
    frames = max(remark.detail["frames"] for remark in applied)
    before, after = (convolutions(m, model.example()) for m in (model, fast))
    assert after * frames == before


def test_frames_that_nothing_reads_are_not_computed() -> None:
    model = zoo.LastFrameOnly.build()
    fast = optimized(model, model.example())
    before, after = (convolutions(m, model.example()) for m in (model, fast))
    assert before == model.example()[0].size(1) * after


@pytest.mark.long
@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.__name__)
def test_every_loop_gets_a_remark_with_a_line_of_its_source(kind: type[Awkward]) -> None:
    _, fast = rerolled(kind)
    assert remarks(fast)
    for remark in remarks(fast):
        assert LINE.search(remark.location or ""), remark
        assert remark.reasons or remark.status == "applied"
    assert all(text for text in reasons(fast).values())


@pytest.mark.parametrize("kind", zoo.BLOCKED, ids=lambda kind: kind.__name__)
def test_a_blocked_loop_names_its_blocker(kind: type[Awkward]) -> None:
    found = reasons(rerolled(kind)[1])
    assert kind.blocker in found
    if kind.blocker is not Code.NOTHING_TO_BATCH:
        assert LINE.search(found[kind.blocker]), found


@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.__name__)
def test_optimizing_twice_changes_nothing(kind: type[Awkward]) -> None:
    model, once = rerolled(kind)
    twice = optimized(once, model.example())
    assert [remark for remark in remarks(twice) if remark.status != "missed"] == []
    assert sorted(listing(twice)) == sorted(listing(once))


@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.__name__)
def test_gradients_reach_the_same_parameters(kind: type[Awkward]) -> None:
    def gradients(call: nn.Module) -> dict[str, Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        for name, moved in model.named_buffers():
            moved.copy_(buffers[name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs = call(*pytree.tree_map_only(Tensor, torch.clone, model.example()))
        leaves = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]
        sum((leaf * noise(*leaf.shape)).sum() for leaf in leaves).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = kind.build()
    buffers = {name: kept.clone() for name, kept in model.named_buffers()}
    fast = optimized(model, model.example())
    mine, theirs = dict(fast.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    try:
        expected = gradients(model)
    except RuntimeError:  # nothing to train, or a write that autograd forbids
        return
    actual = gradients(fast)
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) <= 1e-12 * largest, name


# -- graphs that were captured before --------------------------------------------------------------

EXPORTED = (
    zoo.IndexedFrames,
    zoo.UnboundFrames,
    zoo.InplaceBody,
    zoo.ResidualBody,
    zoo.ViewByBatch,
    zoo.ViewByFeatures,
    zoo.BatchedContext,
    zoo.PositionPerFrame,
    zoo.FrameDifference,
    zoo.CNNLSTM,
    zoo.ConvThenRecurrence,
    zoo.TimeMajor,
)


@pytest.mark.filterwarnings("ignore::Warning")  # torch.export warns of its own code
@pytest.mark.parametrize("kind", EXPORTED, ids=lambda kind: kind.__name__)
def test_an_exported_program_is_rerolled_with_a_free_batch(kind: type[Awkward]) -> None:
    model = kind.build()
    example = model.example()
    dim = 1 if kind is zoo.TimeMajor else 0
    shapes = tuple({dim: torch.export.Dim.DYNAMIC} for _ in example)
    exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    fast = optimized(exported, example)
    assert [remark.status for remark in remarks(fast)][:1] == ["applied"], remarks(fast)
    for batch in (2, 3, 5):
        assert differs(model, fast, model.example(batch)) is None
    assert differs(model, fast, model.example(2, 6), free=True) is None
    assert convolutions(model, example) == 4 * convolutions(fast, example)


class FourFrames(nn.Module):
    """Base of models whose number of frames stands in the code, so that plain fx can trace them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4).requires_grad_(False)
            self.head = nn.Linear(4 * 36, 5)
            self.cell = nn.GRUCell(5, 5)
            self.position = nn.Parameter(noise(8, 5))
        self.eval()


class PlainFour(FourFrames):
    def forward(self, x: Tensor) -> Tensor:
        outs = [self.norm(self.conv(x[:, t])).relu_() for t in range(4)]
        return torch.stack(outs, dim=1)


class SizedFour(FourFrames):
    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(4):
            y = self.conv(x[:, t])
            outs.append(self.head(y.view(y.size(0), -1)))
        return torch.stack(outs, dim=1)


class PositionedFour(FourFrames):
    def forward(self, x: Tensor) -> Tensor:
        outs = [self.head(self.conv(x[:, t]).flatten(1)) + self.position[t] for t in range(4)]
        return torch.stack(outs, dim=1)


class DifferenceFour(FourFrames):
    def forward(self, x: Tensor) -> Tensor:
        y = [self.conv(x[:, t]) for t in range(4)]
        return torch.cat([(y[t] - y[t - 1]).flatten(1) for t in range(1, 4)], dim=1)


class RecurrentFour(FourFrames):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(self.head(self.conv(x[:, 0]).flatten(1)))
        for t in range(4):
            h = self.cell(self.head(self.conv(x[:, t]).flatten(1)), h)
        return h


class ListedFour(FourFrames):
    def forward(self, x: Tensor) -> dict[str, Any]:
        maps = [self.conv(x[:, t]) for t in range(4)]
        return {"maps": maps, "sum": sum(m.mean((2, 3)) for m in maps)}


class UnsizedFour(FourFrames):
    def forward(self, x: Tensor) -> Tensor:
        outs = [self.conv(x.select(1, t)).relu() for t in (3, 2, 1, 0)]
        return torch.stack(outs, dim=0)


@pytest.mark.parametrize("kind", FourFrames.__subclasses__(), ids=lambda kind: kind.__name__)
def test_a_graph_module_is_rerolled(kind: type[FourFrames]) -> None:
    def example(batch: int, frames: int) -> tuple[Tensor]:
        return (noise(batch, frames, 3, 8, 8),)

    model = kind()
    graph = fx.symbolic_trace(model)
    before = graph.code
    fast = optimized(graph, example(2, 4))
    assert "applied" in {remark.status for remark in remarks(fast)}
    assert all_differences(graph, fast, example, (2, 4)) == {}
    assert convolutions(model, example(2, 4)) in (4, 5)
    assert convolutions(fast, example(2, 4)) == 1
    assert graph.code == before


def test_an_empty_batch_stays_empty() -> None:
    model = zoo.IndexedFrames.build()
    fast = optimized(model, model.example())
    assert fast(*model.example(0)).shape == (0, 4, zoo.FEATURES)


@pytest.mark.parametrize("kind", [zoo.InplaceBody, zoo.EvalDropout])
def test_training_mode_switched_on_afterwards_is_right_or_refused(kind: type[Awkward]) -> None:
    model, fast = (copy.deepcopy(m) for m in rerolled(kind))
    with contextlib.suppress(fxtemporal.FxTemporalError):
        assert differs(model.train(), fast.train(), model.example(), free=True) is None


def test_the_loop_of_a_parent_with_hooks_says_so() -> None:
    model = zoo.IndexedFrames.build()
    model.body.register_forward_hook(zoo.double)
    fast = optimized(model, model.example())
    assert differs(model, fast, model.example()) is None
    assert Code.HOOKED_MODULE in reasons(fast)
