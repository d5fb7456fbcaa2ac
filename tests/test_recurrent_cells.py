"""Cells called step after step become one call.

Everything runs in float64 and with ``verify=False``: verification is a net, and a net is not what
makes a rewrite right.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxtemporal
from fxtemporal.passes import recurrent_cells
from fxtemporal.passes.recurrent_cells import RecurrentCells
from tests.recurrent_models import (
    HIDDEN,
    MODELS,
    StackedCells,
    StateLeftOut,
    clip,
    close,
    every_kind,
    executed,
    ops,
    optimized,
    outcome,
    remarks,
    sequenced,
)
from tests.strictly import strictly
from tests.zoo import body, noise

pytestmark = [
    pytest.mark.usefixtures("in_float64"),
    # Exporting an LSTM with a free batch: oneDNN's kernel is not used while it is traced.
    pytest.mark.filterwarnings("ignore:LSTM with symbolic sizes"),
]

every_model = pytest.mark.parametrize("name", MODELS)
one_or_two_states = pytest.mark.parametrize("kind", ["lstm", "gru"])


# --------------------------------------------------------------------------------- what is done


@every_kind
@every_model
def test_the_steps_become_one_call(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    assert ops(result) == {kind: plain.calls}
    found = remarks(result)
    assert [r.status for r in found] == ["applied"] * plain.calls
    for remark in found:
        assert remark.detail["kind"] == kind
        assert remark.detail["steps"] >= 2
        assert remark.target in ("cell", "second", "same")
        assert remark.location is not None
        assert "recurrent_models.py:" in remark.location


@every_kind
@every_model
def test_the_numbers_at_every_batch(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    for batch in plain.batches:
        inputs = plain.example(batch)
        close(outcome(result, inputs), outcome(plain, inputs))


@one_or_two_states
@every_model
def test_gradients_reach_the_same_parameters(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    grads = []
    for module in (plain, result):
        inputs = pytree.tree_map(lambda t: t.requires_grad_(), plain.example(plain.batches[-1]))
        leaves = pytree.tree_leaves(outcome(module, inputs))
        sum(leaf.square().sum() for leaf in leaves).backward()
        grads.append([t.grad for t in (*pytree.tree_leaves(inputs), *plain.parameters())])
        plain.zero_grad(set_to_none=True)
    close(grads[1], grads[0], 1e-10)


@one_or_two_states
@every_model
def test_outputs_are_memory_of_their_own(name: str, kind: str) -> None:
    """Writing one output must not change another, as it does not with the cells."""
    plain, result = sequenced(name, kind)
    for index in range(len(pytree.tree_leaves(outcome(plain, plain.example())))):
        with torch.no_grad():
            both = [pytree.tree_leaves(outcome(m, plain.example())) for m in (plain, result)]
            for leaves in both:
                leaves[index].add_(1.0)
        close(both[1], both[0])
        strides = [[leaf.stride() for leaf in leaves] for leaves in both]
        assert strides[0] == strides[1]


@one_or_two_states
@every_model
def test_twice_changes_nothing(name: str, kind: str) -> None:
    plain, once = sequenced(name, kind)
    twice = optimized(once, *plain.example(), passes=["recurrent-cells"])
    assert remarks(twice) == []
    assert [n.target for n in twice.graph.nodes] == [n.target for n in once.graph.nodes]
    close(outcome(twice, plain.example()), outcome(once, plain.example()))


@every_model
def test_the_model_and_its_state_dict_stay_as_they_are(name: str) -> None:
    before = MODELS[name]("lstm")
    plain, result = sequenced(name, "lstm")
    assert list(result.state_dict()) == list(plain.state_dict())
    mine, theirs = dict(result.named_parameters()), dict(plain.named_parameters())
    assert all(mine[key] is theirs[key] for key in theirs)
    close(outcome(plain, plain.example()), outcome(before, plain.example()))
    assert repr(plain) == repr(before)


@every_model
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    plain, result = sequenced(name, "lstm")
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert ops(again) == ops(result)
        close(outcome(again, plain.example(1)), outcome(plain, plain.example(1)))
        assert fxtemporal.report(again).remarks == fxtemporal.report(result).remarks


@one_or_two_states
@pytest.mark.parametrize("name", ["StateLeftOut", "StateAsInput", "StackedCells", "Backwards"])
def test_the_result_can_be_exported_with_a_free_batch(name: str, kind: str) -> None:
    plain, result = sequenced(name, kind)
    inputs = plain.example()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(result, inputs, dynamic_shapes=shapes, strict=False)
    close(program.module()(*plain.example(5)), outcome(plain, plain.example(5)))


@one_or_two_states
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("OneClip")])
def test_programs_of_torch_export(name: str, kind: str) -> None:
    plain = MODELS[name](kind)
    program = torch.export.export(plain, plain.example(), strict=False)
    result = optimized(program, *plain.example())
    assert ops(result) == {kind: plain.calls}
    close(outcome(result, plain.example()), outcome(plain, plain.example()))


@every_kind
def test_without_bias(kind: str) -> None:
    plain = StateLeftOut(kind, bias=False)
    result = optimized(plain, *plain.example())
    assert ops(result) == {kind: 1}
    close(result(clip(3)), plain(clip(3)))


@every_kind
def test_in_training_mode(kind: str) -> None:
    plain = StackedCells(kind).train()
    result = optimized(plain, *plain.example())
    assert ops(result) == {kind: 2}
    close(result(clip(3)), plain(clip(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    plain = StackedCells(kind).to(dtype)
    x = clip().to(dtype)
    result = strictly(plain, (x,), tune="static")  # verified, also in float64
    assert ops(result) == {kind: 2}
    wide = copy.deepcopy(plain).double()(x.double())
    tolerance = 8 * torch.finfo(dtype).eps
    close(pytree.tree_map(Tensor.double, result(x)), wide, tolerance)
    result(x)[0].sum().backward()
    assert plain.cell.weight_ih.grad is not None


@every_kind
def test_a_batch_of_none(kind: str) -> None:
    plain, result = sequenced("StateLeftOut", kind)
    close(result(clip()[:0]), plain(clip()[:0]))


def test_other_numbers_of_frames() -> None:
    plain, result = sequenced("AFewFrames", "lstm")
    close(result(clip(2, 7)), plain(clip(2, 7)))
    with pytest.raises((RuntimeError, IndexError)):
        result(clip(2, 2))
    _, held = sequenced("StateLeftOut", "lstm")
    with pytest.raises(fxtemporal.SpecializationError):
        held(clip(2, 7))


def test_lanes_of_one_tensor_are_not_stacked_again() -> None:
    for name in ("StateLeftOut", "StateOfZeros", "TimeFirst", "AFewFrames", "Backwards"):
        _, result = sequenced(name, "lstm")
        targets = [n.target for n in result.graph.nodes]
        assert torch.stack not in targets
        assert ("narrow" in targets) == (name == "AFewFrames")


# ------------------------------------------------------------------------------ with other passes


class Video(nn.Module):
    """Features of each frame, a cell, a classifier on each state."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = body()
            self.cell = nn.LSTMCell(5, HIDDEN)
            self.head = nn.Linear(HIDDEN, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        outs = []
        for t in range(x.size(1)):
            h, c = self.cell(self.body(x[:, t]), (h, c))
            outs.append(h)
        return self.head(torch.stack(outs, 1))


def test_behind_time_distribute() -> None:
    plain, x = Video(), noise(2, 6, 3, 8, 8).double()
    result = strictly(plain, (x,), tune="static")
    assert ops(result) == {"lstm": 1}
    assert executed(plain, x)["convolution"] == 6
    assert executed(result, x)["convolution"] == 1
    assert torch.stack not in [n.target for n in result.graph.nodes]
    other = noise(3, 6, 3, 8, 8, seed=4).double()
    close(result(other), plain(other))
    again = optimized(result, x)
    assert not fxtemporal.report(again).by_status("applied")


class ClassifiesEachFrame(Video):
    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), HIDDEN)
        outs = []
        for t in range(x.size(1)):
            h, c = self.cell(self.body(x[:, t]), (h, c))
            outs.append(self.head(h))
        return torch.stack(outs, 1)


def test_what_reads_every_state_is_batched_behind_it() -> None:
    plain, x = ClassifiesEachFrame(), noise(2, 6, 3, 8, 8).double()
    result = strictly(plain, (x,), tune="static")
    applied = [r.rule for r in fxtemporal.report(result).by_status("applied")]
    assert applied == ["time-distribute", "recurrent-cells", "time-distribute"]
    assert sum(n.target == "head" for n in result.graph.nodes) == 1
    other = noise(3, 6, 3, 8, 8, seed=4).double()
    close(result(other), plain(other))
    assert not fxtemporal.report(optimized(result, x)).by_status("applied")


def test_a_body_that_is_not_batched_moves_up() -> None:
    """Features that stay in the loop are computed before the first step."""
    plain, x = Video(), noise(2, 4, 3, 8, 8).double()
    result = optimized(plain, x, passes=["recurrent-cells"])
    assert ops(result) == {"lstm": 1}
    close(result(x[:1]), plain(x[:1]))


@pytest.mark.parametrize(
    ("recurrent", "products", "rounds"),
    [("tf32", "none", True), ("tf32", "tf32", False), ("none", "none", False)],
)
def test_tf32_counts_as_another_precision(
    monkeypatch: pytest.MonkeyPatch, recurrent: str, products: str, rounds: bool
) -> None:
    class Setting:
        fp32_precision = recurrent

    class Matmul:
        fp32_precision = products

    monkeypatch.setattr(torch.backends.cudnn, "rnn", Setting(), raising=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        value = torch.empty(2, 3, device="meta", dtype=torch.float32)
    assert not recurrent_cells._rounds_to_tf32(value)

    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float32

    assert recurrent_cells._rounds_to_tf32(OnCuda()) is rounds  # type: ignore[arg-type]


def test_audit_says_what_optimize_does() -> None:
    for name in ("StackedCells", "TwoLoops"):
        plain, result = sequenced(name, "lstm")
        assert fxtemporal.audit(plain, plain.example()).remarks == fxtemporal.report(result).remarks


def test_the_rule_is_stateless_and_named() -> None:
    assert RecurrentCells().name == "recurrent-cells"
    assert RecurrentCells.exact
    assert not vars(RecurrentCells())
