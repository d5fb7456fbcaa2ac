"""Every reason in fxtemporal.Code can be got, and from which model is written here."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_fold_batchnorm import REFUSED as FOLDS
from test_merge_convolutions import REFUSED as MERGES
from test_pipeline import Chain, Planted, clip
from test_pool3d_forms import REFUSED as POOLS
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Code, Factorize, Reason, Report, Tune
from fxtemporal.ir.program import Program
from fxtemporal.passes.rule import Rule
from tests.zoo import (
    AlwaysDropout,
    ConvolutionalRecurrence,
    DenseConv3d,
    HardCodedView,
    HookedBody,
    HookedConv3d,
    IndexedFrames,
    ModulePerFrame,
    OnlyMovesData,
    ParametrizedBody,
    ParametrizedConv3d,
    PureRecurrence,
    ResidualConv3d,
    StepAsNumber,
    TiedConv3d,
    TrainingBatchNorm,
    TrainingDropout,
    WithBody,
    WritesItsInput,
    noise,
)


class UnderAutocast(Chain):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class Unsure(Planted):
    """A pass with a defect: it raises where it looks at a site."""

    def preconditions(self, program: Program, candidate: fx.Node) -> Iterator[Reason]:
        yield from {}["lost"]


class SortedBody(WithBody):
    """An op that has no batching rule."""

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            y = self.body(x[:, t])
            outs.append(torch.linalg.matrix_exp(y[:, :4].view(-1, 2, 2)))
        return torch.stack(outs, dim=1)


class NarrowThenWide(nn.Sequential):
    """A kernel of rank 12 at most, and one of 36."""

    def __init__(self) -> None:
        super().__init__(nn.Conv3d(3, 4, 3), nn.Conv3d(4, 36, 3))

    @classmethod
    def example(cls) -> tuple[Tensor, ...]:
        return (noise(1, 3, 6, 8, 8),)


class ReplacedForward(nn.Module):
    """A Conv3d whose forward was replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))
        plain = self.conv.forward
        self.conv.forward = lambda x: plain(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class NormalizedConv3d(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4))
        self[1].running_var.fill_(0.3)
        self.eval()


BITWISE: dict[str, Any] = {"exact": "bitwise"}


def scale(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_function(operator.mul, (node, 1.01))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def add_rounding(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_function(operator.mul, (node, 1 + 2**-21))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def spread(program: Program, node: fx.Node) -> None:
    """Nothing is added, unless an entry is NaN or infinite."""
    with program.graph.inserting_before(node.next):
        total = program.graph.call_method("sum", (node,))
        zero = program.graph.call_function(operator.mul, (total, 0.0))
        new = program.graph.call_function(operator.add, (node, zero))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (total, new))


def fail(program: Program, node: fx.Node) -> None:
    raise RuntimeError("no")


def wait(x: Tensor) -> Tensor:
    time.sleep(0.005)
    return x


def slow_down(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        new = program.graph.call_function(wait, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


@dataclass(frozen=True)
class Way:
    """A model on which optimize must give a code, from the rule named, as the status named."""

    rule: str
    build: Callable[[], nn.Module]
    example: Callable[[Any], tuple[Any, ...] | None] = lambda model: model.example()
    status: str = "missed"
    passes: tuple[Rule[Any], ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def report(self) -> Report:
        model = self.build()
        settings = {"tune": "static", **self.settings}
        result = fxtemporal.optimize(model, self.example(model), passes=self.passes, **settings)
        return fxtemporal.report(result)


def loop(cls: Any) -> Way:
    return Way("time-distribute", cls.build)


def limited(cls: Any, limit: Any, rule: str = "time-distribute", seconds: float = 1.0) -> Way:
    return Way(rule, cls.build, settings={"tune": Tune(seconds=seconds, memory_limit=limit)})


def conv3d(build: Callable[[], nn.Module], **more: Any) -> Way:
    return Way("conv3d-forms", build, **more)


def factorized(build: Callable[[], nn.Module], rank: Any, **more: Any) -> Way:
    return Way("factorize-2plus1d", build, settings={"factorize": Factorize(rank)}, **more)


def planted(edit: Any, status: str, **settings: Any) -> Way:
    return Way(
        "planted",
        lambda: Chain(1),
        lambda model: (clip(),),
        status,
        (Planted({"layers.0": edit}),),
        settings,
    )


def nothing(model: Any) -> None:
    return None


def beside(rule: str, name: str, **more: Any) -> Way:
    """What the tests of ``rule`` show to be refused."""
    _, build, *rest = {
        "fold-batchnorm": FOLDS,
        "merge-convolutions": MERGES,
        "pool3d-forms": POOLS,
    }[rule][name]
    example = rest[0] if rest else (noise(2, 4 if rule[0] == "m" else 3, 4, 6, 6).double(),)
    return Way(rule, build, lambda model: example or None, **more)


WAYS: dict[Code, tuple[Way, ...]] = {
    Code.SHAPES_UNKNOWN: (conv3d(DenseConv3d.build, example=nothing),),
    Code.UNSUPPORTED_OP: (loop(SortedBody),),
    Code.NESTED_GRAPH: (conv3d(UnderAutocast, example=lambda model: (clip(),)),),
    Code.HOOKED_MODULE: (
        loop(HookedBody),
        conv3d(HookedConv3d.build),
        factorized(HookedConv3d.build, 1),
    ),
    Code.PARAMETRIZED_MODULE: (loop(ParametrizedBody), conv3d(ParametrizedConv3d.build)),
    Code.DIFFERENT_PARAMETERS: (loop(ModulePerFrame),),
    Code.UNEQUAL_FRAMES: (loop(StepAsNumber),),
    Code.RECURRENCE: (loop(PureRecurrence), loop(ConvolutionalRecurrence)),
    Code.TRAINING_BATCHNORM: (loop(TrainingBatchNorm), beside("fold-batchnorm", "training")),
    Code.RANDOMNESS: (loop(TrainingDropout), loop(AlwaysDropout)),
    Code.VISIBLE_WRITE: (
        loop(WritesItsInput),
        beside("fold-batchnorm", "written after"),
        beside("merge-convolutions", "input written"),
    ),
    Code.FIXED_BATCH: (loop(HardCodedView),),
    Code.NOTHING_TO_BATCH: (loop(OnlyMovesData),),
    Code.DENSE_KERNEL: (conv3d(DenseConv3d.build),),
    Code.SUBCLASS: (conv3d(ReplacedForward, example=lambda model: (clip(),)),),
    Code.BATCH_STATISTICS: (beside("fold-batchnorm", "no statistics"),),
    Code.OUTPUT_SHARED: (
        beside("fold-batchnorm", "read too"),
        beside("fold-batchnorm", "output too"),
    ),
    Code.COMPUTED_WEIGHT: (
        beside("fold-batchnorm", "computed weight"),
        beside("merge-convolutions", "weight computed"),
    ),
    Code.OTHER_AXIS: (beside("fold-batchnorm", "other axis"),),
    Code.MIXED_DTYPES: (beside("fold-batchnorm", "dtypes"),),
    Code.RETURNS_INDICES: (beside("pool3d-forms", "indices"),),
    Code.NO_FLAT_WINDOW: (
        Way("pool3d-forms", lambda: nn.Sequential(nn.MaxPool3d(2)), lambda model: (clip(),)),
    ),
    Code.NOTHING_SAVED: (factorized(ResidualConv3d.build, 0.5),),
    Code.RANK_OUT_OF_RANGE: (factorized(NarrowThenWide, 20),),
    Code.NOT_REQUESTED: (factorized(DenseConv3d.build, {}),),
    Code.SHARED_PARAMETER: (factorized(TiedConv3d.build, 1),),
    Code.NOT_FASTER: (planted(slow_down, "missed", tune=Tune(seconds=0.5)),),
    Code.NOT_MEASURED: (limited(IndexedFrames, "1GiB", rule="fold-in-chunks", seconds=1e-6),),
    Code.MEMORY_LIMIT: (
        limited(IndexedFrames, 1),
        limited(IndexedFrames, 1, rule="fold-in-chunks"),
        limited(PureRecurrence, 1, rule="fold-in-chunks"),
    ),
    Code.NOT_BITWISE: (
        planted(add_rounding, "missed", exact="bitwise"),
        Way("fold-batchnorm", NormalizedConv3d, lambda model: (clip(),), settings=BITWISE),
    ),
    Code.SPREADS_NAN: (planted(spread, "missed", nan="confined"),),
    Code.WRONG_RESULT: (planted(scale, "failed"),),
    Code.PASS_RAISED: (
        Way("planted", lambda: Chain(1), lambda model: (clip(),), "failed", (Unsure(),)),
    ),
    Code.REWRITE_RAISED: (planted(fail, "failed"),),
}


def reasons(report: Report, rule: str, status: str) -> Iterator[tuple[str, str]]:
    """(code, text) of each reason: for a site left alone, or for what was left of a loop."""
    for remark in report.remarks:
        if remark.rule == rule:
            if remark.status == status:
                yield from ((str(reason.code), reason.text) for reason in remark.reasons)
            for entry in remark.detail.get("left_because", ()):
                yield entry["code"], entry["text"]


@pytest.mark.parametrize("code", list(Code), ids=str)
def test_every_code_has_a_way_to_get_it(code: Code) -> None:
    assert code in WAYS, f"add a model to WAYS in tests/test_codes.py that yields {code}"


@pytest.mark.parametrize(
    ("code", "way"),
    [(code, way) for code, ways in WAYS.items() for way in ways],
    ids=lambda value: str(value) if isinstance(value, Code) else value.rule,
)
def test_each_code_is_given(code: Code, way: Way) -> None:
    found = dict(reasons(way.report(), way.rule, way.status))
    assert code in found
    text = found[code]
    assert text
    assert text[-1] not in ".!\n"
    assert "\n" not in text


@pytest.mark.parametrize("code", list(Code), ids=str)
def test_every_code_is_explained_where_it_is_defined(code: Code) -> None:
    source = __import__("inspect").getsource(Code)
    _, _, after = source.partition(f'{code.name} = "{code.value}"')
    assert after.lstrip().startswith('"""')
