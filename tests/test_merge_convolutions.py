"""Convolutions of one input become one, and nobody can tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fold_batchnorm import varied
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxtemporal
from fxtemporal import Code, Remark, SpecializationError
from tests.strictly import strictly
from tests.zoo import noise

RULE = "merge-convolutions"
CHANNELS = 4

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def clip(batch: int = 2, frames: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise(batch, CHANNELS, frames, 5, 6).to(dtype)


def optimized(model: nn.Module, *example: Any, **more: Any) -> fx.GraphModule:
    settings = {"tune": "static", "passes": [RULE], **more}
    return strictly(model, example or None, **settings)


def remarks(module: nn.Module) -> list[Remark]:
    return [r for r in fxtemporal.report(module).remarks if r.rule == RULE]


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def convolutions(gm: fx.GraphModule) -> int:
    found = {F.conv1d, F.conv2d, F.conv3d, torch.ops.aten.conv3d.default}
    return sum(
        node.target in found
        or (
            node.op == "call_module"
            and isinstance(gm.get_submodule(str(node.target)), nn.modules.conv._ConvNd)
        )
        for node in gm.graph.nodes
    )


class Branching(nn.Module):
    """Two or three branches of one input, joined by ``join(self, x)``."""

    def __init__(
        self, join: Callable[[Branching, Tensor], Any], dims: int = 3, **conv: Any
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind = getattr(nn, f"Conv{dims}d")
            settings = {"kernel_size": 1, **conv}
            self.a = kind(CHANNELS, 3, **settings)
            self.b = kind(CHANNELS, 5, **settings)
            self.c = kind(CHANNELS, 2, **settings)
        self.relu = nn.ReLU(inplace=True)
        self.join = join
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.join(self, x)


def plain(self: Any, x: Tensor) -> Tensor:
    return torch.cat([F.relu(self.a(x)), self.b(x) * 2, torch.sigmoid(self.c(x))], -4)


def in_place_relu(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.relu(self.a(x)), F.relu_(self.b(x)), self.c(x).relu_()], -4)


def returned(self: Any, x: Tensor) -> Any:
    a, b = self.a(x), self.b(x)
    return a, {"b": b, "view": b[:, :2], "c": self.c(x).relu_()}


def viewed(self: Any, x: Tensor) -> Tensor:
    return self.a(x).view(-1, 2).sum(0) + self.b(x).view(-1, 2).sum(0) + self.c(x).mean()


def written(self: Any, x: Tensor) -> Tensor:
    a, b, c = self.a(x), self.b(x), self.c(x)
    a += 1
    b[:, 1:].mul_(3)
    c.relu_()
    return torch.cat([a, b, c, c.sigmoid()], -4)


def relu_seen(self: Any, x: Tensor) -> Tensor:
    a, b = self.a(x), self.b(x)
    early = a.sum()
    torch.relu_(a)
    return torch.cat([a, b, self.c(x)], -4) + early


def relu_then_add(self: Any, x: Tensor) -> Tensor:
    a, b = self.relu(self.a(x)), self.relu(self.b(x))
    a += b[:, :3]
    return torch.cat([a, b, self.c(x)], -4)


def same_twice(self: Any, x: Tensor) -> Tensor:
    return torch.cat([F.relu(self.a(x)), self.b(x) + 1, self.a(x) * 3, F.relu_(self.a(x))], -4)


def sizes(self: Any, x: Tensor) -> Tensor:
    a, b = self.a(x), self.b(x)
    return torch.cat([a * a.size(2), b * b.shape[0], self.c(x) * 1], -4)


JOINS = [
    plain,
    in_place_relu,
    returned,
    viewed,
    written,
    relu_seen,
    same_twice,
    sizes,
]


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("shapes", [True, False])
def test_numbers_and_gradients_whatever_reads_the_branches(
    join: Callable[..., Any], shapes: bool
) -> None:
    model = Branching(join)
    result = optimized(model, *([clip()] if shapes else []))
    assert [remark.status for remark in remarks(result)] == ["applied"]
    assert convolutions(result) == 1
    for batch, frames in ((2, 4), (3, 6)):
        found = []
        for module in (model, result):
            x = clip(batch, frames).requires_grad_()
            leaves = torch.utils._pytree.tree_leaves(module(x))
            sum(leaf.square().sum() for leaf in leaves).backward()
            grads = [x.grad, *(p.grad for p in model.parameters())]
            found.append([*leaves, *(g for g in grads if g is not None)])
            model.zero_grad(set_to_none=True)
        close(found[1], found[0])
        with torch.no_grad():
            close(result(clip(batch, frames)), model(clip(batch, frames)))


def test_what_a_relu_wrote_may_be_written_again() -> None:
    model = Branching(relu_then_add)
    result = optimized(model, clip())
    assert convolutions(result) == 1
    with torch.no_grad():
        close(result(clip(3)), model(clip(3)))


def test_outputs_share_no_memory() -> None:
    model = Branching(lambda self, x: (self.a(x), self.b(x), self.a(x)))
    result = optimized(model, clip())
    with torch.no_grad():
        outputs, expected = result(clip()), model(clip())
        outputs[0].fill_(7)
    assert all(out.is_contiguous() for out in outputs)
    close(outputs[1:], expected[1:])


@settings(max_examples=25, deadline=None)
@given(
    dims=st.integers(1, 3),
    kernel_size=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "valid"]),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
)
def test_any_window(dims: int, **conv: Any) -> None:
    def join(self: Any, x: Tensor) -> Tensor:
        return torch.cat([F.relu_(self.a(x)), self.b(x) * 2, self.c(x) + 1], -1 - dims)

    model = Branching(join, dims, **conv)
    sizes = (7, 6, 5)[:dims]
    result = optimized(model, noise(2, CHANNELS, *sizes).double(), verify=False)
    assert convolutions(result) == 1
    for batch in (1, 3):
        x = noise(batch, CHANNELS, *sizes).double()
        close(result(x), model(x))


def test_unbatched() -> None:
    model = Branching(plain)
    result = optimized(model, clip()[0])
    assert convolutions(result) == 1
    close(result(clip(1, 6)[0]), model(clip(1, 6)[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_lower_precision_in_each_layout(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = Branching(in_place_relu).to(dtype)
    result = optimized(model, clip(dtype=dtype))
    for batch in (2, 3):
        x = clip(batch, dtype=dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            mine, own = result(x), model(x)
            want = copy.deepcopy(model).double()(x.double())
        assert mine.dtype == dtype
        assert mine.stride() == own.stride()
        eps = torch.finfo(dtype).eps * want.abs().max()
        assert (mine - want).abs().max() <= 2 * (own - want).abs().max() + eps


class Inception(nn.Module):
    """Each branch: a pointwise convolution, a BatchNorm and an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(CHANNELS, width, 1, bias=False),
                nn.BatchNorm3d(width, eps=1e-3),
                nn.ReLU(inplace=True),
            )
            for width in (3, 5, 2)
        )
        self.pool = nn.Sequential(nn.MaxPool3d(3, 1, 1), nn.Conv3d(CHANNELS, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return torch.cat([*(branch(x) for branch in self.branches), self.pool(x)], 1)


def inception(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return varied(Inception()).double()


def test_behind_folded_batchnorms() -> None:
    model = inception()
    result = optimized(model, clip(), passes=["fold-batchnorm", RULE])
    (remark,) = remarks(result)
    assert remark.status == "applied"
    assert remark.target == "branches.0.0"
    assert remark.detail["channels"] == "3 + 5 + 2"
    assert convolutions(result) == 2
    assert list(result.state_dict()) == list(model.state_dict())
    for batch, frames in ((2, 4), (3, 6)):
        close(result(clip(batch, frames)), model(clip(batch, frames)))
    other = inception(1)
    with torch.no_grad():
        result(clip())
        result.load_state_dict(other.state_dict())
        close(result(clip(3)), other(clip(3)))
        model.branches[1][0].weight.mul_(2)
        close(result(clip(3)), model(clip(3)))
    with pytest.raises(SpecializationError):
        result.train()


def test_by_default_with_everything_else() -> None:
    model = inception()
    result = strictly(model, (clip(),), tune="static")
    assert remarks(result)[0].status == "applied"
    for batch, frames in ((2, 4), (3, 6)):
        close(result(clip(batch, frames)), model(clip(batch, frames)))
    frozen = strictly(model, (clip(),), tune="static", freeze=True)
    close(frozen(clip(3)), model(clip(3)))
    memory = fxtemporal.report(frozen).memory
    assert memory is not None
    # the merged kernels alone, not the folded ones that they were merged from
    assert memory.result == 8 * (CHANNELS * 10 + 10 + CHANNELS * 2 + 2)


def test_weights_change_and_load_both_ways() -> None:
    model, other = Branching(plain), Branching(plain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    result = optimized(model, clip())
    mine, theirs = dict(result.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in theirs)
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    with torch.no_grad():
        before = result(clip(3))
    result(clip()).sum().backward()
    optimizer.step()
    with torch.no_grad():
        close(result(clip(3)), model(clip(3)))
        assert not torch.allclose(result(clip(3)), before)
        result.load_state_dict(other.state_dict())
        close(result(clip(3)), other(clip(3)))
        model.load_state_dict(result.state_dict())


def test_twice_changes_nothing_and_audit_agrees() -> None:
    model = Branching(in_place_relu)
    once = optimized(model, clip())
    twice = optimized(once, clip())
    assert not remarks(twice)
    assert [n.target for n in twice.graph.nodes] == [n.target for n in once.graph.nodes]
    close(twice(clip(3)), model(clip(3)))
    assert fxtemporal.audit(model, (clip(),), passes=[RULE]).remarks == tuple(remarks(once))


def test_copies_and_compilers() -> None:
    model = Branching(in_place_relu)
    result = optimized(model, clip())
    x = clip(3, 6)
    free = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(result, (clip(),), dynamic_shapes=free).module()
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    for module in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), exported, compiled):
        close(module(x), model(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_an_exported_program(dynamic: bool) -> None:
    model = Branching(in_place_relu)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(model, (clip(),), dynamic_shapes=shapes)
    result = optimized(program, clip())
    assert [remark.status for remark in remarks(result)] == ["applied"]
    for batch in (2, 3) if dynamic else (2,):
        close(result(clip(batch)), model(clip(batch)))


def test_chained_blocks() -> None:
    def join(self: Any, x: Tensor) -> Tensor:
        y = self.relu(torch.cat([self.a(x), self.b(x)[:, :1]], 1))
        return torch.cat([self.a(y), self.c(y)], 1)

    model = Branching(join)
    result = optimized(model, clip())
    assert [remark.status for remark in remarks(result)] == ["applied", "applied"]
    assert convolutions(result) == 2
    close(result(clip(3)), model(clip(3)))


class Other(nn.Module):
    """Convolutions of one input that are no sites: each has a window of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            (
                nn.Conv3d(CHANNELS, 4, 1),
                nn.Conv3d(CHANNELS, 4, 3, padding=1),
                nn.Conv3d(CHANNELS, 4, 1, bias=False),
                nn.Conv3d(CHANNELS, 4, 1, groups=2),
                nn.Conv3d(CHANNELS, 4, 3, padding=1, padding_mode="replicate"),
                nn.Conv3d(CHANNELS, 4, 3, padding=2, dilation=2),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


def test_other_windows_are_left_alone() -> None:
    model = Other().double()
    result = optimized(model, clip())
    assert not remarks(result)
    close(result(clip(3)), model(clip(3)))


# -- refusals --------------------------------------------------------------------------------------


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def hooked() -> nn.Module:
    model = Branching(plain)
    model.b.register_forward_hook(doubled)
    return model


def parametrized() -> nn.Module:
    model = Branching(plain)
    parametrizations.weight_norm(model.b)
    return model


class Scaled(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


Scaled.__module__ = "torch.nn.mine"  # so that it is called, and not traced through


def subclassed() -> nn.Module:
    model = Branching(plain)
    model.b = Scaled(CHANNELS, 5, 1).double()
    return model


def input_written(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    a = self.a(y)
    y[:1].add_(1)
    return torch.cat([a, self.b(y)], 1)


def computed() -> nn.Module:
    def join(self: Any, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), F.conv3d(x, self.b.weight * 2, self.b.bias)], 1)

    return Branching(join)


def weight_written() -> nn.Module:
    def join(self: Any, x: Tensor) -> Tensor:
        a = self.a(x)
        self.b.weight.detach().mul_(1)
        return torch.cat([a, self.b(x)], 1)

    return Branching(join)


def switching() -> nn.Module:
    model = Branching(plain)
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_module("a", (x,))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    graph.output((a, graph.call_module("b", (x,))))
    return fx.GraphModule(model, graph)


REFUSED: dict[str, tuple[Code, Callable[[], nn.Module]]] = {
    "hook": (Code.HOOKED_MODULE, hooked),
    "parametrized": (Code.PARAMETRIZED_MODULE, parametrized),
    "subclass": (Code.SUBCLASS, subclassed),
    "input written": (Code.VISIBLE_WRITE, lambda: Branching(input_written)),
    "weight computed": (Code.COMPUTED_WEIGHT, computed),
    "weight written": (Code.VISIBLE_WRITE, weight_written),
    "mode switched": (Code.UNSUPPORTED_OP, switching),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    code, build = REFUSED[name]
    model = build()
    result = optimized(model, clip())
    assert [remark.status for remark in remarks(result)] == ["missed"]
    assert code in [reason.code for remark in remarks(result) for reason in remark.reasons]
    close(result(clip()), model(clip()))


@pytest.mark.parametrize("rule", ["fold-batchnorm", RULE])
def test_looking_at_a_spectral_norm_does_not_advance_it(rule: str) -> None:
    model = Branching(plain)
    parametrizations.spectral_norm(model.b)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxtemporal.audit(model, (clip(),), passes=[rule])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
