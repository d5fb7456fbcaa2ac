"""Which ops give memory of their own: held against torch's schemas, and against real calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal.analysis.aliasing import Aliasing, written_by
from fxtemporal.capture.capture import capture
from fxtemporal.ir.ops import describe
from fxtemporal.ir.ops.table import ATEN, OPS, ROWS
from fxtemporal.ir.program import Program
from tests.op_spellings import CASES
from tests.op_tracing import build, result, trace
from tests.zoo import noise

Call = Callable[[Tensor], Any]

OWNING = [row.name for row in ROWS if row.owns]


def test_what_is_not_said_to_own_its_memory_may_share() -> None:
    assert not type(ROWS[0])("unheard_of(input)").owns
    assert {"view", "reshape", "to", "dropout", "dropout2d", "positive", "einsum"}.isdisjoint(
        OWNING
    )
    assert {"conv3d", "relu", "cat", "size", "clone"} <= set(OWNING)


@pytest.mark.parametrize("name", sorted(ATEN))
def test_no_schema_of_an_owning_op_returns_a_view(name: str) -> None:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not OPS.get(ATEN[name].op or name, OPS["identity"]).owns:
        return
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
            continue
        assert all(entry.alias_info is None for entry in schema.returns), schema


def shares(given: Any, made: Any) -> bool:
    storages = [
        {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(v) if isinstance(t, Tensor)}
        for v in (given, made)
    ]
    return not storages[0].isdisjoint(storages[1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "make", "spellings"), CASES)
def test_a_call_of_an_owning_op_shares_nothing(
    name: str, make: Callable[[], Tensor], spellings: tuple[Any, ...], training: bool
) -> None:
    if not OPS[name].owns:
        return
    for spelling in spellings:
        gm = trace(build(spelling, make(), training=training), make())
        node, values = result(gm), {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                values[n] = super().run_node(n)  # noqa: B023
                return values[n]  # noqa: B023

        op = describe(node, gm)
        Recorder(gm).run(make())
        assert op is not None
        if not op.inplace:
            assert op.owns
            assert not shares([values[n] for n in op.nodes()], values[node])


NO_OPS: dict[str, Call] = {
    "conv": lambda x: F.conv2d(x, torch.ones(4, 1, 1, 1), groups=4),
    "linear": lambda x: F.linear(x, torch.eye(4)),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), eps=0.0),
    "layer norm": lambda x: F.layer_norm(x, (1,)[:0] or (4,), eps=0.0),
    "max pool": lambda x: F.max_pool2d(x, 1),
    "average pool": lambda x: F.avg_pool2d(x, 1),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (4, 4)),
    "adaptive average, whole": lambda x: F.adaptive_avg_pool2d(x, (None, None)),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, (4, 4)),
    "interpolate": lambda x: F.interpolate(x, (4, 4)),
    "interpolate by 1": lambda x: F.interpolate(x, scale_factor=1.0, mode="bilinear"),
    "interpolate exactly": lambda x: F.interpolate(x, scale_factor=1, mode="nearest-exact"),
    "pad by nothing": lambda x: F.pad(x, (0, 0)),
    "pad by nothing, reflected": lambda x: F.pad(x, (0, 0, 0, 0), mode="reflect"),
    "pad by nothing, repeated": lambda x: F.pad(x, (0, 0, 0, 0), mode="replicate"),
    "pad by nothing, circular": lambda x: F.pad(x, (0, 0, 0, 0), mode="circular"),
    "pad by less than nothing": lambda x: F.pad(x, (-1, 0)),
    "relu of what is positive": lambda x: F.relu(x.abs()),
    "hardtanh": lambda x: F.hardtanh(x, -99.0, 99.0),
    "leaky relu": lambda x: F.leaky_relu(x, 1.0),
    "threshold": lambda x: F.threshold(x, -99.0, 0.0),
    "elu": lambda x: F.elu(x.abs()),
    "prelu": lambda x: F.prelu(x, torch.ones(1)),
    "softshrink": lambda x: F.softshrink(x, 0.0),
    "clamp": lambda x: x.clamp(-99.0, 99.0),
    "clamp from below": lambda x: x.clamp_min(-99.0),
    "nan to num": lambda x: torch.nan_to_num(x),
    "nan to num of numbers": lambda x: torch.nan_to_num(x.long()),
    "round numbers": lambda x: torch.round(x.long()),
    "ceil of numbers": lambda x: torch.ceil(x.long()),
    "floor of numbers": lambda x: torch.floor(x.long()),
    "trunc of numbers": lambda x: torch.trunc(x.long()),
    "absolute numbers": lambda x: torch.abs(x.abs()),
    "add 0": lambda x: x + 0,
    "sub 0": lambda x: x - 0,
    "mul 1": lambda x: x * 1,
    "div 1": lambda x: x / 1,
    "pow 1": lambda x: x**1,
    "maximum of itself": lambda x: torch.maximum(x, x),
    "bitwise": lambda x: x.bool() & True,
    "logical": lambda x: torch.logical_or(x.bool(), torch.tensor(False)),
    "where": lambda x: torch.where(torch.tensor(True), x, x),
    "masked fill": lambda x: x.masked_fill(torch.zeros(4).bool(), 1.0),
    "lerp": lambda x: torch.lerp(x, x, 0.0),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0),
    "tril": lambda x: x.tril(99),
    "softmax": lambda x: x.softmax(0),
    "sum over nothing": lambda x: x[0, 0, 0, 0].sum(),
    "mean of one": lambda x: x[:1, :1, :1, :1].mean(0),
    "maximum of one": lambda x: x[:1].amax(0),
    "maximum of one, named": lambda x: x[:1].max(0)[0],
    "any of one": lambda x: x[:1].bool().any(0),
    "logsumexp of one": lambda x: x[:1].logsumexp(0),
    "product of one": lambda x: x[:1].prod(0),
    "norm of one": lambda x: x[:1].norm(dim=0),
    "cumsum of one": lambda x: x[:1].cumsum(0),
    "sort": lambda x: x.sort()[0],
    "topk": lambda x: x.topk(4)[0],
    "matmul": lambda x: x @ torch.eye(4),
    "addmm": lambda x: torch.addmm(x[0, 0], x[0, 0], x[0, 0], alpha=0),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, :, :1], x[:, :, :1], x[:, :, :1]),
    "index select": lambda x: x.index_select(0, torch.arange(2)),
    "gather": lambda x: x.gather(0, torch.zeros(2, 4, 4, 4).long()),
    "cat of one": lambda x: torch.cat([x]),
    "cat with nothing": lambda x: torch.cat([x, x[:0]]),
    "stack of one": lambda x: torch.stack([x]),
    "repeat once": lambda x: x.repeat(1, 1, 1, 1),
    "repeat each once": lambda x: x.repeat_interleave(1, 0),
    "tile once": lambda x: x.tile((1,)),
    "flip nothing": lambda x: x.flip(()),
    "roll by nothing": lambda x: x.roll(0, 0),
    "clone": lambda x: x.clone(),
    "normalize": lambda x: F.normalize(x),
    "response norm": lambda x: F.local_response_norm(x, 1),
    "instance norm": lambda x: F.instance_norm(x),
    "group norm": lambda x: F.group_norm(x, 1),
    "full like": lambda x: torch.full_like(x, 1.0),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    # those that share
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "dropout of p 0": nn.Dropout(0.0),
    "dropout1d": lambda x: F.dropout1d(x[0], 0.5, False),
    "dropout2d": nn.Dropout2d(),
    "dropout3d": lambda x: F.dropout3d(x, 0.5, False),
    "alpha dropout": nn.AlphaDropout(),
    "feature alpha dropout": nn.FeatureAlphaDropout(),
    "positive": lambda x: +x,
    "torch.positive": lambda x: torch.positive(x),
    "view as": lambda x: x.view_as(x),
    "reshape as": lambda x: x.reshape_as(x),
    "expand as": lambda x: x.expand_as(x),
    "broadcast to": lambda x: x.broadcast_to((2, 4, 4, 4)),
    "einsum": lambda x: torch.einsum("abcd->abdc", x),
    "einops.repeat": lambda x: einops.repeat(x, "b c h w -> b c h w"),
    "einops.rearrange": lambda x: einops.rearrange(x, "b c h w -> b c (h w)"),
    "einops.reduce": lambda x: einops.reduce(x, "b c h w -> b c h w", "mean"),
    "to": lambda x: x.to(torch.float32),
    "type_as": lambda x: x.type_as(x),
    "float": lambda x: x.float(),
    "contiguous": lambda x: x.contiguous(),
    "squeeze": lambda x: x.squeeze(),
    "flatten": nn.Flatten(),
    "unfold": lambda x: x.unfold(1, 1, 1),
    "chunk": lambda x: x.chunk(1)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "detach": lambda x: x.detach(),
    "index": lambda x: x[:],
    # those that no table knows
    "conj": lambda x: x.conj(),
    "resolve_conj": lambda x: x.resolve_conj(),
    "resolve_neg": lambda x: x.resolve_neg(),
    "real": lambda x: torch.real(x),
    "view_as_real": lambda x: x.diagonal(),
    "atleast_1d": lambda x: torch.atleast_1d(x),
    "ravel": lambda x: x.ravel(),
    "tensor_split": lambda x: x.tensor_split(1)[0],
    "hsplit": lambda x: x.hsplit(1)[0],
    "as_strided": lambda x: x.as_strided((2, 4), (64, 16)),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x)[1],
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing="ij")[0],
    "block_diag": lambda x: torch.block_diag(x[0, 0]),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 1),
    "channel shuffle": nn.ChannelShuffle(1),
}


class Model(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return [x, self.call(x)]


def traced(call: Call, shapes: bool) -> Program:
    return capture(Model(call).eval(), (noise(2, 4, 4, 4),) if shapes else None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shapes", [False, True])
@pytest.mark.parametrize("name", NO_OPS)
def test_what_shares_memory_in_a_real_call_is_taken_to_share(
    name: str, shapes: bool, training: bool
) -> None:
    """At arguments that leave an op nothing to do, node by node."""
    program = traced(NO_OPS[name], shapes)
    program.gm.train(training)
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(program.gm).run(noise(2, 4, 4, 4))
    aliasing = Aliasing(program)
    x = next(iter(program.graph.nodes))
    for node, value in values.items():
        if node.op.startswith("call") and shares(values[x], value):
            assert aliasing.share(x, node), node.format_node()


# -- a write behind such an op, seen by the convolution that would be computed earlier -------------


class Written(nn.Module):
    """Two convolutions of x; between them something that may be x is written."""

    def __init__(self, alias: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 5, 1, bias=False)
        self.alias = alias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.a(x)
        made = self.alias(x)
        made.mul_(2)
        return first, self.b(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shapes", [False, True])
@pytest.mark.parametrize("name", NO_OPS)
def test_a_write_behind_any_op_is_seen(name: str, shapes: bool) -> None:
    model = Written(NO_OPS[name]).eval()
    with torch.no_grad():
        try:
            expected = model(noise(2, 4, 4, 4))
        except RuntimeError:
            return  # what it gives cannot be written
        inputs = (noise(2, 4, 4, 4),) if shapes else None
        options = {"tune": "static", "verify": False, "progress": False} if shapes else {}
        fast = fxtemporal.optimize(model, inputs, passes=["merge-convolutions"], **options)
        for got, want in zip(fast(noise(2, 4, 4, 4)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# -- calls that nobody knows -----------------------------------------------------------------------


def returns_it(x: Tensor) -> Tensor:
    return x


def writes_it(x: Tensor) -> Tensor:
    x.mul_(2)
    return x.sum()


def writes_the_second(y: Tensor, x: Tensor) -> Tensor:
    x.mul_(2)
    return y.sum()


def only_reads(x: Tensor) -> Tensor:
    return x.sum() + 1


for _name in ("returns_it", "writes_it", "writes_the_second", "only_reads"):
    fx.wrap(_name)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(inplace=True))
        self.inner.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


UNKNOWN: dict[str, Callable[[], Call]] = {
    "returns its input": lambda: lambda x: returns_it(x).mul_(2),
    "writes its input": lambda: lambda x: writes_it(x),
    "writes its second input": lambda: lambda x: writes_the_second(x + 1, x),
    "writes a view": lambda: lambda x: writes_it(x[:, 0]),
    "a hooked module that writes": Hooked,
    "writes into a keyword": lambda: lambda x: torch.mul(x, 2, out=x),
}


@pytest.mark.parametrize("shapes", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_write_by_a_call_that_nobody_knows_is_seen(name: str, shapes: bool) -> None:
    class Net(Written):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            first = self.a(x)
            between = self.alias(x)
            return first, between, self.b(x)

    model = Net(UNKNOWN[name]()).eval()
    inputs = (noise(2, 4, 4, 4),) if shapes else None
    options = {"tune": "static", "verify": False, "progress": False} if shapes else {}
    with torch.no_grad():
        expected = model(noise(2, 4, 4, 4))
        fast = fxtemporal.optimize(model, inputs, passes=["merge-convolutions"], **options)
        for got, want in zip(fast(noise(2, 4, 4, 4)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_call_that_was_seen_to_write_nothing_stands_in_no_ones_way() -> None:
    program = traced(lambda x: [only_reads(x), only_reads(x)], shapes=True)
    found = [n for n in program.graph.nodes if n.target is only_reads]
    assert len(found) == 2
    assert not any(written_by(program, node) for node in found)
    unseen = traced(lambda x: only_reads(x), shapes=False)
    (node,) = (n for n in unseen.graph.nodes if n.target is only_reads)
    assert written_by(unseen, node) == node.all_input_nodes


# -- a description does not outlive an edit --------------------------------------------------------


@pytest.mark.parametrize("edit", ["all uses", "argument", "args", "kwargs", "input"])
def test_an_edited_node_is_described_anew(edit: str) -> None:
    program = traced(lambda x: torch.add(x, x.exp(), alpha=2), shapes=True)
    (node,) = (n for n in program.graph.nodes if n.target is torch.add)
    x, exp = node.all_input_nodes
    before = program.op(node)
    assert program.op(node) is before
    match edit:
        case "all uses":
            exp.replace_all_uses_with(x)
        case "argument":
            node.update_arg(1, x)
        case "args":
            node.args = (x, x)
        case "kwargs":
            node.kwargs = {"alpha": 3}
        case "input":
            node.replace_input_with(exp, x)
    after = program.op(node)
    assert after is not None
    assert after != before
    assert after.args["alpha"] == (3 if edit == "kwargs" else 2)
    assert edit == "kwargs" or exp not in after.nodes()


class Growing(nn.Module):
    def __init__(self, result: bool, dim: int = 1, empty: bool = False) -> None:
        super().__init__()
        self.conv, self.result, self.dim, self.empty = nn.Conv2d(3, 4, 1), result, dim, empty

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.size(0), 0, 4, *x.shape[3:]) if self.empty else None
        for t in range(x.size(1)):
            frame = self.conv(x[:, t]).unsqueeze(self.dim)
            written = frame.relu_()
            frame = written if self.result else frame
            out = frame if out is None else torch.cat([out, frame], self.dim)
        assert out is not None
        return out


@pytest.mark.parametrize(
    ("result", "dim", "empty"),
    [(False, 1, False), (True, 1, False), (False, 2, False), (False, 1, True)],
)
def test_a_growing_cat_of_frames_written_in_place_is_one_loop(
    result: bool, dim: int, empty: bool
) -> None:
    model, x = Growing(result, dim, empty).eval(), noise(2, 4, 3, 6, 6)
    fast = fxtemporal.optimize(model, (x,), tune="static", progress=False)
    assert [r.status for r in fxtemporal.report(fast).remarks] == ["applied"]
    torch.testing.assert_close(fast(x), model(x))
