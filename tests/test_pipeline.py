"""Rules are run, checked and undone one by one: a wrong rewrite costs itself, and nothing else."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Code, Reason, Remark, VerificationError
from fxtemporal.capture.capture import capture
from fxtemporal.ir.program import Program
from fxtemporal.passes import DEFAULT_PASSES
from fxtemporal.passes.pipeline import Skip, run_rules
from fxtemporal.passes.rule import Rule, Site
from tests.zoo import BLOCKED, CNNLSTM, CONV3D, SPELLINGS, noise

Edit = Callable[[Program, fx.Node], None]


class Chain(nn.Module):
    """``count`` convolutions one after the other."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1)) for _ in range(count)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def clip(batch: int = 2, frames: int = 4) -> Tensor:
    return noise(batch, 3, frames, 6, 6)


def scale(program: Program, node: fx.Node, factor: float = 1.001) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_function(operator.mul, (node, factor))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def exactly(program: Program, node: fx.Node) -> None:
    scale(program, node, 1)


def drop_the_bias(program: Program, node: fx.Node) -> None:
    conv = program.gm.get_submodule(str(node.target))
    with program.graph.inserting_before(node):
        weight = program.graph.get_attr(f"{node.target}.weight")
        new = program.graph.call_function(
            torch.conv3d, (node.args[0], weight, None, conv.stride, conv.padding)
        )
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)


def fail(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):  # leaves the graph half rewritten
        program.graph.call_function(operator.mul, (node, 7))
    node.replace_all_uses_with(next(iter(node.users)), delete_user_cb=lambda user: True)
    raise RuntimeError("half done\nand more")


def break_the_graph(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_before(node):
        new = program.graph.call_function(torch.relu, (node,))  # stands before what it reads
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def break_the_shapes(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_method("view", (node, 7, 7, 7))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def fail_when_run(program: Program, node: fx.Node) -> None:
    """Right on fake tensors, an error on real ones."""
    with program.graph.inserting_after(node):
        new = program.graph.call_function(refuse_real_tensors, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def refuse_real_tensors(x: Tensor) -> Tensor:
    if not isinstance(x, torch._subclasses.FakeTensor):
        raise ValueError("real")
    return x * 1


def wrong_at_another_batch(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_function(double_unless_two, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def double_unless_two(x: Tensor) -> Tensor:
    return x if x.shape[0] == 2 else x * 2


class Planted(Rule[fx.Node]):
    """Rewrites each Conv3d by ``edits[path]``, or by nothing but a multiplication by one."""

    name = "planted"

    def __init__(self, edits: Mapping[str, Edit] | None = None, name: str = "planted") -> None:
        self.edits = dict(edits or {})
        self.name = name
        self.rewrites = 0
        self.runs = 0

    def candidates(self, program: Program) -> Iterable[fx.Node]:
        self.runs += 1
        for node in list(program.graph.nodes):
            if node.op == "call_module" and isinstance(
                program.gm.get_submodule(str(node.target)), nn.Conv3d
            ):
                yield node

    def site(self, program: Program, candidate: fx.Node) -> Site:
        target = str(candidate.target)
        return Site(self.name, target, target, program.location(candidate))

    def preconditions(self, program: Program, candidate: fx.Node) -> Iterator[Reason]:
        yield from ()

    def rewrite(self, program: Program, candidate: fx.Node) -> Mapping[str, Any]:
        self.rewrites += 1
        self.edits.get(str(candidate.target), exactly)(program, candidate)
        return {"became": "planted"}


def optimized(model: nn.Module, *rules: Any, **more: Any) -> fx.GraphModule:
    return fxtemporal.optimize(model, (clip(),), passes=list(rules), tune="static", **more)


def by_target(gm: nn.Module, rule: str = "planted") -> dict[str, Remark]:
    return {r.target: r for r in fxtemporal.report(gm).remarks if r.rule == rule}


WRONG: dict[str, Edit] = {
    "scaled": scale,
    "without its bias": drop_the_bias,
    "raising on real tensors": fail_when_run,
    "wrong at another batch": wrong_at_another_batch,
}
RAISING: dict[str, Edit] = {
    "raising": fail,
    "an unsorted graph": break_the_graph,
    "impossible shapes": break_the_shapes,
}


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("guilty", [(0,), (7,), (3, 4), (0, 2, 5)])
def test_a_wrong_rewrite_is_undone_and_the_others_are_kept(edit: Edit, guilty: Any) -> None:
    model = Chain()
    rule = Planted({f"layers.{i}": edit for i in guilty})
    result = optimized(model, rule)
    remarks = by_target(result)
    for i in range(8):
        remark = remarks[f"layers.{i}"]
        assert remark.status == ("failed" if i in guilty else "applied")
        assert [r.code for r in remark.reasons] == ([Code.WRONG_RESULT] if i in guilty else [])
    for x in (clip(), clip(3, 6)):
        torch.testing.assert_close(result(x), model(x))
    comparison = fxtemporal.report(result).comparison
    assert comparison is not None
    assert comparison.equal
    products = [n for n in result.graph.nodes if n.target is operator.mul]
    assert len(products) == 8 - len(guilty)


def test_the_guilty_are_found_by_bisecting() -> None:
    count = 32
    model = Chain(count)
    for guilty in ((17,), (3, 29)):
        rule = Planted({f"layers.{i}": scale for i in guilty})
        optimized(model, rule)
        assert rule.runs <= 4 + len(guilty) * (math.log2(count) + 2)


def test_the_reason_says_how_wrong_it_was() -> None:
    result = optimized(Chain(2), Planted({"layers.1": scale}))
    (reason,) = by_target(result)["layers.1"].reasons
    assert "relative error" in reason.text
    assert "rounding" in reason.text
    result = optimized(Chain(2), Planted({"layers.1": fail_when_run}))
    (reason,) = by_target(result)["layers.1"].reasons
    assert reason.text == "raised ValueError: real"


def test_without_verification_it_stays() -> None:
    result = optimized(Chain(2), Planted({"layers.1": scale}), verify=False)
    assert by_target(result)["layers.1"].status == "applied"
    assert fxtemporal.report(result).comparison is None


@pytest.mark.parametrize("edit", RAISING.values(), ids=RAISING.keys())
@pytest.mark.parametrize("verify", [True, False])
def test_a_rewrite_that_raises_is_undone_and_the_others_are_kept(edit: Edit, verify: bool) -> None:
    model = Chain()
    rule = Planted({"layers.2": edit, "layers.6": edit})
    result = optimized(model, rule, verify=verify)
    for i in range(8):
        remark = by_target(result)[f"layers.{i}"]
        failed = i in (2, 6)
        assert remark.status == ("failed" if failed else "applied")
        assert [r.code for r in remark.reasons] == ([Code.REWRITE_RAISED] if failed else [])
    torch.testing.assert_close(result(clip(3)), model(clip(3)))
    assert rule.runs <= 4  # a broken graph is looked at once more
    if edit is fail:
        assert rule.runs == 3
        assert by_target(result)["layers.2"].reasons[0].text == "RuntimeError: half done"


def test_wrong_and_raising_together() -> None:
    model = Chain()
    edits: dict[str, Edit] = {"layers.1": fail, "layers.4": scale, "layers.5": break_the_shapes}
    result = optimized(model, Planted(edits))
    failed = {t: r.reasons[0].code for t, r in by_target(result).items() if r.status == "failed"}
    assert failed == {
        "layers.1": Code.REWRITE_RAISED,
        "layers.4": Code.WRONG_RESULT,
        "layers.5": Code.REWRITE_RAISED,
    }
    torch.testing.assert_close(result(clip(3)), model(clip(3)))


def test_the_innocent_rule_behind_a_wrong_one_is_kept() -> None:
    model = Chain(4)
    first, second = Planted({"layers.2": scale}, "first"), Planted({"layers.0": scale}, "second")
    result = optimized(model, first, second, "conv3d-forms")
    statuses = {(r.rule, r.target): r.status for r in fxtemporal.report(result).remarks}
    assert {key for key, status in statuses.items() if status == "failed"} == {
        ("first", "layers.2"),
        ("second", "layers.0"),
    }
    assert len(by_target(result, "conv3d-forms")) == 4
    assert all(r.status == "applied" for r in by_target(result, "conv3d-forms").values())
    torch.testing.assert_close(result(clip(3)), model(clip(3)))


def test_two_rewrites_that_are_wrong_only_together() -> None:
    """One of them goes; the numbers are right."""

    def plus(value: int) -> Edit:
        def edit(program: Program, node: fx.Node) -> None:
            program.gm.meta.setdefault("both", set()).add(value)
            if program.gm.meta["both"] == {1, 2}:
                scale(program, node)

        return edit

    model = Chain(4)
    result = optimized(model, Planted({"layers.0": plus(1), "layers.3": plus(2)}))
    failed = [t for t, r in by_target(result).items() if r.status == "failed"]
    assert len(failed) == 1
    torch.testing.assert_close(result(clip(3)), model(clip(3)))


def test_the_model_stays_as_it_is_whatever_the_rules_do() -> None:
    model = Chain()
    before = copy.deepcopy(model.state_dict())
    rule = Planted({"layers.1": fail, "layers.4": scale})
    optimized(model, rule)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(not module._forward_hooks for module in model.modules())


def test_a_captured_graph_that_is_not_the_model_is_an_error() -> None:
    calls = [0]

    def outside(x: Tensor) -> Tensor:
        calls[0] += 1
        return x * calls[0]

    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return outside(x)

    with pytest.raises(VerificationError, match="a counter"):
        optimized(Outside(), "conv3d-forms")


# ------------------------------------------------------------------------------ the loop itself


def test_run_rules_rewrites_a_copy() -> None:
    program = capture(Chain(2), (clip(),))
    nodes = [str(node) for node in program.graph.nodes]
    outcome = run_rules(program, [Planted()])
    assert [str(node) for node in program.graph.nodes] == nodes
    assert len(outcome.program.graph.nodes) == len(nodes) + 2
    assert outcome.applied == (("planted", "layers.0"), ("planted", "layers.1"))
    assert outcome.remark(("planted", "layers.1")).detail == {"became": "planted"}


def test_only_and_skips() -> None:
    program = capture(Chain(3), (clip(),))
    skip = Skip("missed", Reason(Code.NOT_FASTER, "no"), (("speedup", 0.5),))
    outcome = run_rules(program, [Planted()], {("planted", "layers.0"): skip})
    first = outcome.remark(("planted", "layers.0"))
    assert (first.status, first.reasons, first.detail) == (
        "missed",
        (skip.reason,),
        {"speedup": 0.5},
    )
    assert len(outcome.applied) == 2
    outcome = run_rules(program, [Planted()], only=frozenset({("planted", "layers.2")}))
    assert outcome.applied == (("planted", "layers.2"),)
    assert len(outcome.remarks) == 1


def test_an_order_of_passes_is_followed() -> None:
    order: list[str] = []

    class Logged(Planted):
        def candidates(self, program: Program) -> Iterable[fx.Node]:
            order.append(self.name)
            return ()

    model = Chain(1)
    optimized(model, Logged(name="b"), "time-distribute", Logged(name="a"), verify=False)
    assert order == ["b", "a"]


@pytest.mark.parametrize(
    "cls", [*CONV3D, *BLOCKED, CNNLSTM, *SPELLINGS[:6]], ids=lambda c: c.__name__
)
def test_audit_and_optimize_agree_and_audit_changes_nothing(cls: Any) -> None:
    model = cls.build()
    inputs = model.example()
    kept = [x.clone() for x in inputs]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    report = fxtemporal.audit(model, inputs)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert report.mode == "audit"
    assert report.comparison is None
    result = fxtemporal.optimize(model, inputs, tune="static")
    mine = [(r.rule, r.status, r.target, r.location, r.reasons, r.detail) for r in report.remarks]
    theirs = fxtemporal.report(result).remarks
    assert mine == [(r.rule, r.status, r.target, r.location, r.reasons, r.detail) for r in theirs]
    assert report.specializations == fxtemporal.report(result).specializations or any(
        r.detail.get("form") == "conv3d_full_extent" or r.rule == "time-distribute" for r in theirs
    )


@pytest.mark.parametrize("cls", [*CONV3D, CNNLSTM, *SPELLINGS], ids=lambda c: c.__name__)
def test_every_node_of_the_result_has_the_value_that_it_computes(cls: Any) -> None:
    model = cls.build()
    inputs = model.example()
    result = fxtemporal.optimize(model, inputs, tune="static")
    result.graph.lint()

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "output":
                return value
            assert "val" in n.meta, n
            known = n.meta["val"]
            if isinstance(value, Tensor):
                assert tuple(known.shape) == tuple(value.shape), n
                assert known.dtype == value.dtype, n
            elif isinstance(value, int | float):
                assert known == value, n
            return value

    Check(result).run(*inputs)


def test_a_rule_of_ones_own_beside_the_default_ones() -> None:
    model = Chain(2)
    result = optimized(model, *DEFAULT_PASSES, Planted())
    assert not by_target(result)  # nothing is left for it
    result = optimized(model, Planted(), *DEFAULT_PASSES)
    assert len(by_target(result)) == 2
    torch.testing.assert_close(result(clip(3)), model(clip(3)))


def test_without_rules_the_result_is_the_model() -> None:
    model = Chain(2)
    result = optimized(model)
    assert fxtemporal.report(result).remarks == ()
    torch.testing.assert_close(result(clip(3)), model(clip(3)))
