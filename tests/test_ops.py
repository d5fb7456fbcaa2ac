"""Every spelling of an op has one description, and the description computes the same numbers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from einops.layers.torch import Rearrange, Reduce
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxtemporal.ir.ops import Attr, Op, describe
from fxtemporal.ir.ops.modules import MODULES
from fxtemporal.ir.ops.signature import REQUIRED
from fxtemporal.ir.ops.table import ATEN, FUNCTIONS, ROWS
from tests.op_spellings import CASES, ids
from tests.op_tracing import Fn, aten, build, clip, export, image, key, line, op_of, result, trace


@pytest.mark.parametrize(("name", "make", "spellings"), CASES, ids=ids())
def test_all_spellings_have_one_description(
    name: str, make: Callable[[], torch.Tensor], spellings: tuple[Fn, ...]
) -> None:
    ops = [op_of(spelling, make()) for spelling in spellings]
    assert [op.name for op in ops] == [name] * len(ops)
    for op in ops[1:]:
        assert key(op) == key(ops[0])
        assert list(op.args) == list(ops[0].args)


SUBTLE = {"rearrange", "einops_reduce", "einops_repeat"}
DECOMPOSED = {"norm", "split", "chunk", "unbind", "getitem", "slice", "adaptive_max_pool2d",
              "local_response_norm", "matmul", "sort", "unsqueeze", "select", "to",
              "hardtanh", "movedim", "contiguous", "where", "transpose"}  # fmt: skip
"""Ops that torch.export spells as others, or drops."""


def _exportable() -> list[Any]:
    seen = set()
    cases = []
    for name, make, spellings in CASES:
        if name not in SUBTLE | DECOMPOSED and name not in seen:
            seen.add(name)
            cases.append(pytest.param(name, make, spellings[0], id=name))
    return cases


@pytest.mark.parametrize(("name", "make", "spelling"), _exportable())
def test_an_exported_op_has_the_same_description(
    name: str, make: Callable[[], torch.Tensor], spelling: Fn
) -> None:
    gm = export(build(spelling, make()), make())
    op = describe(result(gm), gm)
    assert op is not None, result(gm).format_node()
    assert key(op) == key(op_of(spelling, make()))


# ---- the description computes the numbers --------------------------------------------------------


def evaluate(op: Op, root: nn.Module, values: dict[fx.Node, Any]) -> Any:
    """What a description says, computed with torch."""

    def concrete(value: Any) -> Any:
        if isinstance(value, Attr):
            return operator.attrgetter(value.name)(root)
        if isinstance(value, tuple):
            return tuple(concrete(item) for item in value)
        return values.get(value, value) if isinstance(value, fx.Node) else value

    args = {name: concrete(value) for name, value in op.args.items()}
    mode = args.pop("padding_mode", "zeros")
    assert mode == "zeros"
    if op.name in SUBTLE:
        axes = dict(args.pop("axes"))
        function = getattr(einops, op.name.removeprefix("einops_"))
        return function(args.pop("input"), **args, **axes)
    if op.name == "getitem":
        marks = {"slice": lambda *ends: slice(*ends), "newaxis": lambda: None}
        parts = tuple(
            marks[p[0]](*p[1:]) if isinstance(p, tuple) and isinstance(p[0], str) else p
            for p in args["index"]
        )
        return args["input"][tuple(list(p) if isinstance(p, tuple) else p for p in parts)]
    if op.name == "slice":
        index = (slice(None),) * args["dim"] + (slice(args["start"], args["end"], args["step"]),)
        return args["input"][index]
    if op.name == "to":
        x, other = args["input"], args["other"]
        return x.to(other) if other is not None else x.to(args["device"] or "cpu", args["dtype"])
    if op.name == "where":
        return torch.where(args["condition"], args["input"], args["other"])
    if op.name == "einsum":
        return torch.einsum(args["equation"], *args["operands"])
    if op.name == "split":
        return torch.split(args["input"], args["sizes"], args["dim"])
    if op.name in ("sum", "max", "norm") and args["dim"] is None:
        return getattr(torch, op.name)(args["input"])
    if op.name == "argmax":
        return torch.argmax(args["input"], *args["dim"])
    if op.name in ("var", "std"):
        return getattr(torch, op.name)(**args)
    if op.name in ("view", "reshape", "expand", "repeat", "permute"):
        (shape,) = (value for name, value in args.items() if name != "input")
        return getattr(args["input"], op.name)(*shape)
    if op.name in ("tile", "contiguous", "squeeze") or "_sigmoid" in op.name:
        spec = () if op.name != "tile" else (args["dims"],)
        spec = (args["dim"],) if args.get("dim") is not None else spec
        return getattr(F if "_" in op.name else torch.Tensor, op.name.replace("_s", "s"))(
            args["input"], *spec
        )
    for place in (F, torch):
        if hasattr(place, op.name):
            return getattr(place, op.name)(**args)
    raise AssertionError(op.name)


@pytest.mark.parametrize(("name", "make", "spellings"), CASES, ids=ids())
def test_a_description_computes_the_same_numbers(
    name: str, make: Callable[[], torch.Tensor], spellings: tuple[Fn, ...]
) -> None:
    root = build(spellings[0], make())
    gm = trace(root, make())
    node = result(gm)
    op = describe(node, gm)
    assert op is not None
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(gm).run(make())
    expected = values[node]
    if op.inplace:
        values = {n: make() for n in values}
    torch.testing.assert_close(evaluate(op, root, values), expected, rtol=0, atol=0)


MODULE_CASES: tuple[tuple[nn.Module, Callable[[], torch.Tensor]], ...] = (
    *((kind(), clip) for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.CELU)),
    *((kind(), clip) for kind in (nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh)),
    *((kind(), clip) for kind in (nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign)),
    *((kind(), clip) for kind in (nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.LogSigmoid)),
    (nn.Threshold(0.1, 2.0), clip),
    (nn.GLU(1), clip),
    (nn.LeakyReLU(0.3), clip),
    (nn.ELU(0.3), clip),
    (nn.Softplus(2, 3), clip),
    (nn.Hardtanh(-2, 0.5), clip),
    (nn.Softmax(-1), clip),
    (nn.Softmax2d(), image),
    (nn.LogSoftmax(1), clip),
    (nn.MaxPool1d(2), line),
    (nn.MaxPool2d(2, 1, padding=1, dilation=2), image),
    (nn.MaxPool3d((1, 2, 2), ceil_mode=True), clip),
    (nn.AvgPool1d(2), line),
    (nn.AvgPool2d(2, 1, 1, count_include_pad=False), image),
    (nn.AvgPool3d((3, 1, 1), divisor_override=2), clip),
    (nn.AdaptiveAvgPool1d(2), line),
    (nn.AdaptiveAvgPool2d((None, 2)), image),
    (nn.AdaptiveAvgPool3d((1, None, None)), clip),
    (nn.AdaptiveMaxPool1d(2), line),
    (nn.AdaptiveMaxPool2d(2), image),
    (nn.AdaptiveMaxPool3d(1), clip),
    (nn.BatchNorm1d(4), line),
    (nn.BatchNorm2d(4, momentum=None), image),
    (nn.Conv3d(4, 2, 3, padding="same"), clip),
    (nn.Conv3d(4, 2, 3, stride=(1, 2, 1), padding=1), clip),
    (nn.ConvTranspose1d(4, 2, 3), line),
    (NonDynamicallyQuantizableLinear(5, 2), line),
    (nn.Dropout(), clip),
    (nn.Dropout3d(), clip),
    (nn.AlphaDropout(), clip),
    (nn.FeatureAlphaDropout(), clip),
    (nn.Flatten(), clip),
    (nn.Unflatten(1, (2, 2)), clip),
    (nn.ZeroPad2d((1, 0, 2, 0)), image),
    (nn.ConstantPad3d(1, 0.5), clip),
    (nn.ReflectionPad1d(1), line),
    (nn.ReplicationPad3d((0, 0, 0, 0, 2, 0)), clip),
    (nn.CircularPad2d(1), image),
    (nn.Upsample(scale_factor=2), image),
    (nn.Upsample(size=(2, 8, 10), mode="trilinear", align_corners=True), clip),
    (nn.UpsamplingNearest2d(scale_factor=2), image),
    (nn.UpsamplingBilinear2d(size=8), image),
    (nn.PixelShuffle(2), image),
    (nn.PixelUnshuffle(2), lambda: image()[..., :4]),
    (nn.ChannelShuffle(2), image),
    (Rearrange("b (c d) t -> b c (d t)", c=2), line),
    (Reduce("b c t -> b c", "max"), line),
)


@pytest.mark.parametrize(
    ("module", "make"), MODULE_CASES, ids=[f"{type(m).__name__}" for m, _ in MODULE_CASES]
)
def test_a_module_is_described_by_what_it_computes(
    module: nn.Module, make: Callable[[], torch.Tensor]
) -> None:
    module.eval()
    gm = trace(build(lambda m, x: m.layer(x), make(), layer=module), make())
    op = describe(result(gm), gm)
    assert op is not None
    assert not op.random
    values = {node: make() for node in op.nodes()}
    torch.testing.assert_close(evaluate(op, gm, values), module(make()), rtol=0, atol=0)


def test_the_identity_is_described() -> None:
    op = op_of(lambda m, x: m.layer(x), clip(), layer=nn.Identity())
    assert (op.name, list(op.args)) == ("identity", ["input"])


def test_the_module_table_names_ops_that_exist() -> None:
    names = {row.name for row in ROWS}
    assert len(names) == len(ROWS)
    strings = {row.op for row in MODULES.values() if isinstance(row.op, str)}
    assert strings <= names


# ---- the table agrees with torch -----------------------------------------------------------------

NAMED_OTHERWISE = {"p", "training", "dim", "input", "lambd", "threshold"}


@pytest.mark.parametrize(
    "function",
    [f for f in FUNCTIONS if getattr(f, "__module__", "") == "torch.nn.functional"],
    ids=lambda f: f.__name__,
)
def test_signatures_are_those_of_torch_nn_functional(function: Fn) -> None:
    try:
        theirs = inspect.signature(function).parameters
    except ValueError:
        pytest.skip("builtin")
    if "kwargs" in theirs:
        return
    ours = FUNCTIONS[function].signature
    trailing = {"return_indices", "out"}
    names = [name for name in theirs if name not in trailing]
    renamed = {"input1": "input", "train": "training"}
    shared = list(ours.positional)[: len(names)]
    assert [renamed.get(name, name) for name in names][: len(shared)] == shared
    for name in shared:
        default = theirs[name].default if name in theirs else inspect.Parameter.empty
        if default is not inspect.Parameter.empty and ours.defaults[name] is not REQUIRED:
            assert ours.defaults[name] == default, name


def test_every_aten_overload_binds_by_names_of_its_schema() -> None:
    """An argument that every overload has, but the table lacks, would make an op undescribable."""
    known = 0
    for name, spelling in ATEN.items():
        packet = getattr(aten, name, None)
        if packet is None:
            continue
        names = set(spelling.signature.names) | {"cudnn_enabled", "cudnn_enable"}
        renamed = {"self": "input", "train": "training", **spelling.renamed}
        required = [
            {
                renamed.get(a.name, a.name)
                for a in getattr(packet, overload)._schema.arguments
                if not a.has_default_value()
            }
            for overload in packet.overloads()
        ]
        assert any(needs <= names for needs in required), name
        known += 1
    assert known > 200
