"""What differs is described differently; an op says whether it is random, writes, or is a size."""

from __future__ import annotations

import operator

import einops
import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxtemporal.ir.ops import Describer, describe
from tests.op_tracing import Fn, aten, build, clip, key, op_of, result, trace

rearrange = einops.rearrange
fx.wrap("rearrange")

DIFFERENT: tuple[tuple[Fn, ...], ...] = (
    (
        lambda m, x: F.conv3d(x, m.conv3.weight),
        lambda m, x: F.conv3d(x, m.conv3.weight, padding=1),
        lambda m, x: F.conv3d(x, m.conv3.weight, padding=(1, 0, 0)),
        lambda m, x: F.conv3d(x, m.conv3.weight, padding="same"),
        lambda m, x: F.conv3d(x, m.conv3.weight, stride=2),
        lambda m, x: F.conv3d(x, m.valid.weight),
        lambda m, x: F.conv3d(x, m.conv3.weight, m.conv1.bias),
    ),
    (
        lambda m, x: x + 1,
        lambda m, x: x + 1.0,
        lambda m, x: x + True,
        lambda m, x: x + 2,
        lambda m, x: x.add(1, alpha=2),
        lambda m, x: x.add_(1),
        lambda m, x: x - 1,
        lambda m, x: 1 - x,
    ),
    (lambda m, x: x * 0.0, lambda m, x: x * -0.0, lambda m, x: x * float("nan")),
    (
        lambda m, x: x[:, 0],
        lambda m, x: x[:, 1],
        lambda m, x: x[:, 0:1],
        lambda m, x: x[0],
        lambda m, x: x[:, [0]],
        lambda m, x: x[:, None],
        lambda m, x: x[:, 0, 0],
        lambda m, x: x[:, 0::2],
    ),
    (
        lambda m, x: x.mean(1),
        lambda m, x: x.mean(2),
        lambda m, x: x.mean(1, keepdim=True),
        lambda m, x: x.mean(),
        lambda m, x: x.mean(1, dtype=torch.float64),
    ),
    (lambda m, x: x.view(2, -1), lambda m, x: x.view(-1, 2), lambda m, x: x.reshape(2, -1)),
    (lambda m, x: x.permute(0, 2, 1, 3, 4), lambda m, x: x.permute(0, 1, 2, 4, 3)),
    (lambda m, x: F.relu(x), lambda m, x: F.relu(x, inplace=True), lambda m, x: F.relu6(x)),
    (lambda m, x: F.gelu(x), lambda m, x: F.gelu(x, approximate="tanh")),
    (lambda m, x: x.max(), lambda m, x: x.max(1), lambda m, x: torch.max(x, x)),
    (lambda m, x: x.var(1), lambda m, x: x.var(1, correction=0), lambda m, x: x.var()),
    (lambda m, x: torch.cat([x, x]), lambda m, x: torch.cat([x]), lambda m, x: torch.stack([x, x])),
    (
        lambda m, x: F.max_pool3d(x, 2),
        lambda m, x: F.max_pool3d(x, 2, 1),
        lambda m, x: F.max_pool3d(x, 2, ceil_mode=True),
        lambda m, x: F.avg_pool3d(x, 2),
    ),
    (
        lambda m, x: F.dropout(x),
        lambda m, x: F.dropout(x, 0.4),
        lambda m, x: F.dropout(x, 0.5, False),
    ),
    (lambda m, x: x.to(torch.float64), lambda m, x: x.half(), lambda m, x: x.to("cpu")),
    (
        lambda m, x: rearrange(x, "b (c d) ... -> b d c ...", c=2),
        lambda m, x: rearrange(x, "b (c d) ... -> b d c ...", c=1),
        lambda m, x: rearrange(x, "b (c d) ... -> b c d ...", c=2),
    ),
    (lambda m, x: F.interpolate(x, scale_factor=2), lambda m, x: F.interpolate(x, size=(2, 2, 2))),
    (
        lambda m, x: F.pad(x, (1, 0)),
        lambda m, x: F.pad(x, (0, 1)),
        lambda m, x: F.pad(x, (1, 0), value=1),
    ),
)  # fmt: skip


@pytest.mark.parametrize("spellings", DIFFERENT)
def test_what_differs_in_one_argument_is_described_differently(spellings: tuple[Fn, ...]) -> None:
    keys = [key(op_of(spelling, clip())) for spelling in spellings]
    assert len(set(keys)) == len(keys)


def test_equal_ops_read_the_same_nodes() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    forward = graph.call_function(torch.sub, (x, y))
    same = graph.call_function(operator.sub, (x, y))
    backward = graph.call_function(torch.sub, (y, x))
    describer = Describer(nn.Module())
    assert describer(forward) == describer(same) != describer(backward)
    assert hash(describer(forward)) == hash(describer(same))
    first, other = describer(forward), describer(backward)
    assert first is not None
    assert other is not None
    assert first.static() == other.static()
    assert first.nodes() == (x, y)


def test_a_tensor_that_is_made_has_one_description() -> None:
    graph = fx.Graph()
    made = [
        graph.call_function(torch.zeros, (2, 3)),
        graph.call_function(torch.zeros, ((2, 3),), {"requires_grad": False}),
        graph.call_function(torch.zeros, (), {"size": [2, 3]}),
        graph.call_function(aten.zeros.default, ([2, 3],), {"pin_memory": False}),
    ]
    first, *others = [describe(node, nn.Module()) for node in made]
    assert first is not None
    assert others == [first] * 3


def test_numbers_of_numpy_and_of_torch_are_numbers() -> None:
    describer = Describer(nn.Module())
    raw = [np.int64(1), np.float32(0.5), torch.tensor(2), torch.tensor(True), [1, (2,)]]
    values = describer.value(raw)
    assert values == (1, 0.5, 2, True, (1, (2,)))
    assert [type(value) for value in values] == [int, float, int, bool, tuple]


def test_nodes_are_found_in_nested_arguments_with_repeats() -> None:
    graph = fx.Graph()
    x, t = graph.placeholder("x"), graph.placeholder("t")
    op = describe(graph.call_function(torch.cat, ([x, x, t], 1)), nn.Module())
    assert op is not None
    assert op.nodes() == (x, x, t)
    sliced = graph.call_function(operator.getitem, (x, (slice(None), slice(t, None, None))))
    op = describe(sliced, nn.Module())
    assert op is not None
    assert op.nodes() == (x, t)


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "training", "random"),
    [
        (lambda m, x: F.dropout(x), False, True),
        (lambda m, x: F.dropout(x, training=False), True, False),
        (lambda m, x: F.dropout(x, 0.0), True, False),
        (lambda m, x: F.dropout3d(x, 0.2), False, True),
        (lambda m, x: F.alpha_dropout(x), True, False),
        (lambda m, x: aten.dropout.default(x, 0.5, True), False, True),
        (lambda m, x: m.drop(x), True, True),
        (lambda m, x: m.drop(x), False, False),
        (lambda m, x: torch.rand_like(x), False, True),
        (lambda m, x: torch.zeros_like(x), False, False),
        (lambda m, x: torch.bernoulli(x.abs().clamp(0, 1)), False, True),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), False, True),
    ],
)
def test_random_ops_say_so(fn: Fn, training: bool, random: bool) -> None:
    assert op_of(fn, clip(), training=training, drop=nn.Dropout()).random is random


def test_dropout_of_features_is_named_by_its_rank() -> None:
    module = op_of(lambda m, x: m.drop(x), clip(), training=True, drop=nn.Dropout3d())
    assert key(module) == key(
        op_of(lambda m, x: aten.feature_dropout.default(x, 0.5, True), clip())
    )


@pytest.mark.parametrize(
    ("fn", "inplace"),
    [
        (lambda m, x: m.relu(x), True),
        (lambda m, x: F.dropout(x, 0.1, False, True), True),
        (lambda m, x: x.mul_(2), True),
        (lambda m, x: x.copy_(x), True),
        (lambda m, x: aten.add_.Tensor(x, x), True),
        (lambda m, x: x.clamp_(0, 1), True),
        (lambda m, x: x.clamp(0, 1), False),
    ],
)
def test_ops_that_write_say_so(fn: Fn, inplace: bool) -> None:
    assert op_of(fn, clip(), relu=nn.ReLU(inplace=True)).inplace is inplace


@pytest.mark.parametrize("shapes", [True, False])
def test_augmented_assignment_writes_tensors_but_not_sizes(shapes: bool) -> None:
    """A trace has no ``+=``, but a graph may."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    rows = graph.call_method("size", (x, 0))
    ops = [
        describe(graph.call_function(operator.iadd, (first, 2)), nn.Module()) for first in (x, rows)
    ]
    if shapes:
        x.meta["val"], rows.meta["val"] = clip(), 2
    assert [op is not None and op.inplace for op in ops] == [True, False]


def test_normalization_says_whether_it_uses_its_statistics() -> None:
    in_training = op_of(lambda m, x: m.bn3(x), clip(), training=True)
    assert in_training.args["training"] is True
    assert op_of(lambda m, x: m.bn3(x), clip()).args["training"] is False
    assert op_of(lambda m, x: m.in3_tracked(x), clip()).args["use_input_stats"] is False


# ---- sizes and items -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: x.size(2),
        lambda m, x: x.size(-3),
        lambda m, x: x.size(dim=2),
        lambda m, x: x.shape[2],
        lambda m, x: x.shape[-3],
        lambda m, x: x.size()[2],
        lambda m, x: aten.sym_size.int(x, 2),
    ],
)
def test_a_size_has_one_description(fn: Fn) -> None:
    op = op_of(fn, clip())
    assert (op.name, op.args["dim"]) == ("size", 2)
    assert len(op.nodes()) == 1
    assert op.nodes()[0].op == "placeholder"


def test_a_whole_shape_and_facts_have_one_description() -> None:
    assert key(op_of(lambda m, x: x.shape, clip())) == key(op_of(lambda m, x: x.size(), clip()))
    assert op_of(lambda m, x: x.shape[2:], clip()).args["index"] == ("slice", 2, None, 1)
    assert op_of(lambda m, x: x.dtype, clip()).name == "dtype"
    assert op_of(lambda m, x: x.ndim, clip()).name == op_of(lambda m, x: x.dim(), clip()).name


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize(
    ("fn", "source"),
    [
        (lambda m, x: x.split(2, 1)[1], "split"),
        (lambda m, x: x.chunk(2, 1)[1], "chunk"),
        (lambda m, x: torch.unbind(x, 1)[1], "unbind"),
        (lambda m, x: x.max(1)[1], "max"),
        (lambda m, x: x.max(1).indices, "max"),
        (lambda m, x: x.flatten(2).topk(2)[1], "topk"),
        (lambda m, x: m.lstm(x.flatten(2))[1], "lstm"),
        (lambda m, x: m.lstm(x.flatten(2))[1][1], "item"),
    ],
)
def test_items_of_tuples_are_items(fn: Fn, source: str, shapes: bool) -> None:
    root = build(fn, clip(), lstm=nn.LSTM(60, 3))
    gm = trace(root, clip(), shapes=shapes)
    describer = Describer(gm)
    op = describer(result(gm))
    assert op is not None
    assert (op.name, op.args["index"]) == ("item", 1)
    producer = describer(op.nodes()[0])
    assert producer is not None
    assert producer.name == source


def test_an_item_of_a_tensor_is_a_select_where_shapes_are_unknown() -> None:
    gm = trace(build(lambda m, x: x.relu()[0] + x[:, 1] + x[..., -1], clip()), shapes=False)
    described = [op for op in map(Describer(gm), gm.graph.nodes) if op and op.name == "select"]
    assert [(op.args["dim"], op.args["index"]) for op in described] == [(0, 0), (1, 1), (-1, -1)]


def test_arithmetic_on_sizes_is_described_as_such() -> None:
    op = op_of(lambda m, x: x.size(0) * x.size(1), clip())
    assert (op.name, op.inplace) == ("mul", False)
    assert [node.name for node in op.nodes()] == ["size", "size_1"]
    op = op_of(lambda m, x: x.size(2) // 2, clip())
    assert (op.name, op.args["other"]) == ("floor_divide", 2)


def test_a_view_by_sizes_keeps_the_nodes() -> None:
    op = op_of(lambda m, x: x.view(x.size(0), -1), clip())
    assert op.args["shape"][1] == -1
    assert isinstance(op.args["shape"][0], fx.Node)
    whole = op_of(lambda m, x: x.view(x.shape), clip())
    assert isinstance(whole.args["shape"], fx.Node)


def test_an_index_that_is_a_size_selects_and_one_that_is_a_tensor_gathers() -> None:
    assert op_of(lambda m, x: x[:, x.size(0)], clip()).name == "select"
    masked = trace(build(lambda m, x: x[(x > 0,)], clip()), shapes=False)
    op = describe(result(masked), masked)
    assert op is not None
    assert op.name == "getitem"
    by_brackets = op_of(lambda m, x, y: x[:, y], clip(), torch.tensor([0, 1]))
    by_aten = op_of(lambda m, x, y: aten.index.Tensor(x, [None, y]), clip(), torch.tensor([0, 1]))
    assert key(by_brackets) == key(by_aten)


def test_a_long_chain_without_shapes_is_described_in_linear_time() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(2000):
        node = graph.call_function(operator.add, (node, node))
    describer = Describer(nn.Module())
    assert all(describer(n) for n in graph.nodes if n.op == "call_function")


def test_negative_dims_stay_where_the_rank_is_unknown() -> None:
    gm = trace(build(lambda m, x: x.relu().mean(-1), clip()), shapes=False)
    op = describe(result(gm), gm)
    assert op is not None
    assert op.args["dim"] == (-1,)
