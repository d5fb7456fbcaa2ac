"""Parameters go by one name, and what only looks known is not described."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from fxtemporal.ir.ops import Attr, Describer, blocked, describe
from tests.op_tracing import Fn, aten, build, clip, export, key, line, op_of, result, trace


def test_parameters_are_named_by_the_first_of_their_names() -> None:
    tied = nn.Linear(5, 3)
    root = build(lambda m, x: m.head(x), clip(), head=tied, again=tied)
    gm = trace(root, clip())
    op = describe(result(gm), root)
    assert op is not None
    assert op.args["weight"] == Attr("head.weight")
    alias = trace(build(lambda m, x: m.again(x), clip(), head=tied, again=tied), clip())
    other = describe(result(alias), root)
    assert other is not None
    assert other.args["weight"] == Attr("head.weight")


def test_a_describer_follows_parameters_that_are_replaced() -> None:
    root = build(lambda m, x: m.linear(x), clip())
    node = result(trace(root, clip()))
    describer = Describer(root)
    before = describer(node)
    root.linear.weight = nn.Parameter(torch.zeros(3, 5))
    assert describer(node) == before


def test_a_parametrized_weight_is_a_node_and_not_a_parameter() -> None:
    root = nn.Module()
    root.linear = parametrizations.spectral_norm(nn.Linear(5, 3))
    graph = fx.Graph()
    weight = graph.get_attr("linear.weight")
    node = graph.call_function(F.linear, (graph.placeholder("x"), weight))
    op = describe(node, root)
    assert op is not None
    assert op.args["weight"] is weight


def test_a_describer_follows_parameters_that_move() -> None:
    root = nn.Module()
    root.old = nn.Linear(2, 2)
    graph = fx.Graph()
    x = graph.placeholder("x")
    before, after = graph.call_module("old", (x,)), graph.call_module("new", (x,))
    describer = Describer(root)
    assert getattr(describer(before), "args", {})["weight"] == Attr("old.weight")
    root.new = root.old
    del root.old
    assert getattr(describer(after), "args", {})["weight"] == Attr("new.weight")


def test_a_plain_tensor_attribute_goes_by_its_path() -> None:
    root = nn.Module()
    root.constant = torch.ones(3)
    graph = fx.Graph()
    node = graph.call_function(torch.add, (graph.placeholder("x"), graph.get_attr("constant")))
    op = describe(node, root)
    assert op is not None
    assert op.args["other"] == Attr("constant")


# ---- modules that are left alone -----------------------------------------------------------------


class Shifted(nn.Conv3d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Trivial(nn.Conv3d):
    pass


def conv() -> nn.Conv3d:
    return nn.Conv3d(4, 4, 3)


def hooked(register: str) -> nn.Module:
    module = conv()
    getattr(module, register)(lambda *args: None)
    return module


def patched() -> nn.Module:
    module = conv()
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def patched_inside() -> nn.Module:
    module = conv()
    module._conv_forward = lambda *args: args[0]  # type: ignore[method-assign, assignment]
    return module


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(conv())


BLOCKED = {
    "hook": (lambda: hooked("register_forward_hook"), "hooked"),
    "pre-hook": (lambda: hooked("register_forward_pre_hook"), "hooked"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "hooked"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "hooked"),
    "old weight norm": (old_weight_norm, "hooked"),
    "weight norm": (lambda: parametrizations.weight_norm(conv()), "parametrized"),
    "subclass": (lambda: Shifted(4, 4, 3), "subclass"),
    "subclass that changes nothing": (lambda: Trivial(4, 4, 3), "subclass"),
    "forward replaced": (patched, "subclass"),
    "another method replaced": (patched_inside, "subclass"),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_a_module_that_only_looks_known_is_blocked(case: str) -> None:
    make, why = BLOCKED[case]
    root = nn.Module()
    root.conv = make()
    graph = fx.Graph()
    node = graph.call_module("conv", (graph.placeholder("x"),))
    assert describe(node, root) is None
    assert blocked(node, root) == why


def test_an_attention_with_a_parametrized_projection_is_blocked() -> None:
    root = nn.Module()
    root.attention = nn.MultiheadAttention(4, 2, dropout=0.5)
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_module("attention", (x, x, x))
    assert blocked(node, root) is None
    op = describe(node, root)
    assert op is not None
    assert op.args["out_proj_weight"] == Attr("attention.out_proj.weight")
    assert op.random
    parametrizations.weight_norm(root.attention.out_proj)
    assert describe(node, root) is None
    assert blocked(node, root) == "parametrized"


def test_a_known_module_is_not_blocked_and_an_unknown_one_has_no_reason() -> None:
    root = nn.Module()
    root.conv, root.other = conv(), nn.Sequential()
    graph = fx.Graph()
    x = graph.placeholder("x")
    known, unknown = graph.call_module("conv", (x,)), graph.call_module("other", (x,))
    assert blocked(known, root) is None
    assert blocked(unknown, root) is None
    assert blocked(x, root) is None
    assert describe(unknown, root) is None


# ---- what is not described -----------------------------------------------------------------------


def double(x: Any) -> Any:
    return x * 2


UNKNOWN: dict[str, Fn] = {
    "a function of the user": lambda g, x: g.call_function(double, (x,)),
    "an unknown method": lambda g, x: g.call_method("fft", (x,)),
    "out=": lambda g, x: g.call_function(torch.add, (x, x), {"out": x}),
    "aten out": lambda g, x: g.call_function(aten.add.out, (x, x), {"out": x}),
    "too many arguments": lambda g, x: g.call_function(F.relu, (x, False, 3)),
    "an unknown keyword": lambda g, x: g.call_function(torch.relu, (x,), {"scale": 2}),
    "pooling with indices": lambda g, x: g.call_function(
        F.max_pool2d, (x, 2), {"return_indices": True}
    ),
    "tuple of ATen": lambda g, x: g.call_function(aten.adaptive_max_pool2d.default, (x, [1, 1])),
    "tuple of torch": lambda g, x: g.call_function(torch.adaptive_max_pool1d, (x, 1)),
    "softmax over a dim of its own": lambda g, x: g.call_function(F.softmax, (x,)),
    "named dims": lambda g, x: g.call_method("sum", (x, "channels")),
    "an item of something unknown": lambda g, x: g.call_function(operator.getitem, (x, 0)),
    "a view as another dtype": lambda g, x: g.call_method("view", (x, torch.int32)),
    "renormalizing embedding": lambda g, x: g.call_function(F.embedding, (x, x), {"max_norm": 1.0}),
    "a generator": lambda g, x: g.call_function(torch.bernoulli, (x,), {"generator": 3}),
    "an unknown attribute": lambda g, x: g.call_function(getattr, (x, "grad")),
    "joined shapes": lambda g, x: g.call_function(
        operator.add, (g.call_function(getattr, (x, "shape")), (1,))
    ),
    "compared shapes": lambda g, x: g.call_function(
        operator.eq, (g.call_method("size", (x,)), g.call_method("size", (x,)))
    ),
    "placeholder": lambda g, x: x,
    "parameter": lambda g, x: g.get_attr("weight"),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_not_described(case: str) -> None:
    graph = fx.Graph()
    assert describe(UNKNOWN[case](graph, graph.placeholder("x")), nn.Linear(2, 2)) is None


# ---- recurrent nets ------------------------------------------------------------------------------


def test_recurrent_nets_list_their_parameters() -> None:
    lstm = nn.LSTM(5, 3, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
    op = op_of(lambda m, x: m.lstm(x)[0], line(), lstm=lstm, training=True)
    op = op_of(lambda m, x: m.lstm(x), line(), lstm=lstm, training=True)
    assert op.name == "lstm"
    assert op.args["params"][0] == Attr("lstm.weight_ih_l0")
    assert len(op.args["params"]) == 16
    assert op.args["hx"] is None
    assert op.random
    assert (op.args["batch_first"], op.args["nested"]) == (True, True)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_an_exported_recurrent_net_has_the_description_of_its_module(kind: type[nn.Module]) -> None:
    net = kind(5, 3, batch_first=True)
    gm = export(
        build(lambda m, x, y: m.net(x, y), line(), line(), net=net), line(), torch.zeros(1, 2, 3)
    )
    (node,) = (n for n in gm.graph.nodes if n.target in (aten.gru.input, aten.rnn_tanh.input))
    exported = describe(node, gm)
    assert exported is not None
    module = op_of(lambda m, x, y: m.net(x, y)[0], line(), torch.zeros(1, 2, 3), net=net.eval())
    assert module.name == "item"
    root = build(lambda m, x, y: m.net(x, y), line(), line(), net=net)
    traced = trace(root, line(), torch.zeros(1, 2, 3))
    described = describe(result(traced), traced)
    assert described is not None
    assert key(described) == key(exported)
