"""A BatchNorm in eval mode becomes part of the layer before it, or says why not."""

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
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxtemporal
from fxtemporal import Code, Remark, SpecializationError
from tests.strictly import strictly
from tests.zoo import SharedConv3d, noise

RULE = "fold-batchnorm"
CHANNELS, OUT = 4, 6
SIDES = {1: (7,), 2: (6, 5), 3: (4, 6, 5)}


def data(dims: int, batch: int = 2, frames: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    first, *rest = SIDES[dims]
    return noise(batch, CHANNELS, first + frames, *rest).to(dtype)


def varied(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics that are not those of a fresh BatchNorm."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, least in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -0.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(least, least + 1, generator=generator)
    return model.eval()


def optimized(model: nn.Module, *example: Any, **more: Any) -> fx.GraphModule:
    settings = {"tune": "static", "passes": [RULE], **more}
    return strictly(model, example or None, **settings)


def remarks(module: nn.Module) -> list[Remark]:
    return [r for r in fxtemporal.report(module).remarks if r.rule == RULE]


def codes(module: nn.Module) -> list[str]:
    return [reason.code for remark in remarks(module) for reason in remark.reasons]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def norms(gm: fx.GraphModule) -> list[fx.Node]:
    found = {F.batch_norm, torch.batch_norm, torch.ops.aten.batch_norm.default}
    return [
        node
        for node in gm.graph.nodes
        if node.target in found
        or (
            node.op == "call_module"
            and isinstance(gm.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm)
        )
    ]


class Pair(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


def pair(dims: int = 3, norm: dict[str, Any] | None = None, **conv: Any) -> Pair:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = "ConvTranspose" if conv.pop("transposed", False) else "Conv"
        layer = getattr(nn, f"{kind}{dims}d")(CHANNELS, OUT, **{"kernel_size": 3, **conv})
        bn = getattr(nn, f"BatchNorm{dims}d")(OUT, **(norm or {}))
    return varied(Pair(layer, bn)).double()


LAYERS: dict[str, Callable[[], Pair]] = {
    **{f"conv{n}d": (lambda n=n: pair(n)) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (lambda n=n: pair(n, transposed=True)) for n in (1, 2, 3)},
    "no bias": lambda: pair(bias=False),
    "grouped": lambda: pair(groups=2),
    "grouped, transposed": lambda: pair(groups=2, transposed=True, stride=2, output_padding=1),
    "strided, padded, dilated": lambda: pair(stride=(1, 2, 1), padding=2, dilation=(1, 2, 1)),
    "same": lambda: pair(kernel_size=(2, 3, 4), padding="same"),
    "reflect": lambda: pair(padding=1, padding_mode="reflect"),
    "circular, same": lambda: pair(kernel_size=(2, 3, 3), padding="same", padding_mode="circular"),
    "replicate, 2d": lambda: pair(2, padding=(1, 2), padding_mode="replicate", bias=False),
    "no affine": lambda: pair(norm={"affine": False}),
    "other eps": lambda: pair(norm={"eps": 0.3}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_at_every_size(name: str) -> None:
    model = LAYERS[name]()
    dims = model.conv.weight.dim() - 2
    result = optimized(model, data(dims))
    (remark,) = remarks(result)
    assert (remark.status, remark.target, remark.detail["into"]) == ("applied", "norm", "conv")
    assert not norms(result)
    for batch, frames in ((2, 0), (3, 0), (1, 2), (3, 3)):
        x = data(dims, batch, frames)
        with torch.no_grad():
            close(result(x), model(x))
        close(result(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_the_same_parameters(name: str) -> None:
    model = LAYERS[name]()
    dims = model.conv.weight.dim() - 2
    result = optimized(model, data(dims))
    grads = []
    for module in (model, result):
        x = data(dims, 3).requires_grad_()
        module(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for actual, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_twice_changes_nothing(name: str) -> None:
    model = LAYERS[name]()
    x = data(model.conv.weight.dim() - 2)
    once = optimized(model, x)
    twice = optimized(once, x)
    assert not remarks(twice)
    assert [n.target for n in twice.graph.nodes] == [n.target for n in once.graph.nodes]
    close(twice(x), model(x))
    with pytest.raises(SpecializationError):
        twice.train()


@settings(max_examples=30, deadline=None)
@given(
    dims=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    kernel_size=st.integers(1, 3),
)
def test_any_layer(dims: int, affine: bool, **conv: Any) -> None:
    model = pair(dims, {"affine": affine}, **conv)
    result = optimized(model, data(dims), verify=False)
    assert not norms(result)
    with torch.no_grad():
        for batch in (1, 3):
            close(result(data(dims, batch, 1)), model(data(dims, batch, 1)))


def test_a_linear_on_rows() -> None:
    model = varied(Pair(nn.Linear(CHANNELS, OUT), nn.BatchNorm1d(OUT))).double()
    x = noise(5, CHANNELS).double()
    result = optimized(model, x)
    assert not norms(result)
    close(result(x[:3]), model(x[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float_norm", [False, True])
def test_lower_precision_is_as_near_to_float64_as_the_model(
    dtype: torch.dtype, float_norm: bool
) -> None:
    exact = pair()
    model = copy.deepcopy(exact).to(dtype)
    if float_norm:
        model.norm.float()
    result = optimized(model, data(3, dtype=dtype))
    assert not norms(result)
    exact.load_state_dict(model.state_dict())
    for batch in (2, 3):
        x = data(3, batch, dtype=dtype)
        with torch.no_grad():
            want, own, mine = exact(x.double()), model(x), result(x)
        assert mine.dtype == dtype
        bound = 2 * (own.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (mine.double() - want).abs().max() <= bound


def test_under_autocast() -> None:
    model = pair().float()
    result = optimized(model, data(3, dtype=torch.float32))
    x = data(3, 3, dtype=torch.float32)
    want = model(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mine, own = result(x), model(x)
    assert mine.dtype == own.dtype
    assert (mine - want).abs().max() <= 2 * (own - want).abs().max() + 2**-8 * want.abs().max()
    with torch.no_grad():
        close(result(x), want, 1e-5)


def test_one_convolution_with_two_batchnorms() -> None:
    model = varied(SharedConv3d.build())
    result = optimized(model, *model.example())
    assert [r.status for r in remarks(result)] == ["applied", "applied"]
    model.double(), result.double()
    for batch, frames in ((2, 4), (3, 6)):
        x = model.example(batch, frames)[0].double()
        close(result(x), model(x))


class Twice(nn.Module):
    """One convolution and one BatchNorm, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm3d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))


def test_a_pair_called_twice_is_prepared_once() -> None:
    model = varied(Twice()).double()
    result = optimized(model, data(3))
    assert [remark.target for remark in remarks(result)] == ["norm", "norm"]
    assert sum(name.startswith("_prepared") for name, _ in result.named_children()) == 1
    close(result(data(3, 3)), model(data(3, 3)))


# -- checkpoints and changes of the weights --------------------------------------------------------


def test_the_state_dict_is_the_models() -> None:
    model = pair()
    result = optimized(model, data(3))
    assert list(result.state_dict()) == list(model.state_dict())
    mine, theirs = dict(result.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in theirs)
    assert dict(result.named_buffers()).keys() == dict(model.named_buffers()).keys()


def test_other_weights_load_both_ways() -> None:
    model, other = pair(), pair(bias=True)
    for tensor in other.state_dict().values():
        tensor.mul_(2) if tensor.is_floating_point() else None
    result = optimized(model, data(3))
    x = data(3, 3)
    with torch.no_grad():
        before = result(x)
        result.load_state_dict(other.state_dict())
        assert not torch.allclose(result(x), before)
        close(result(x), other(x))
        fresh = pair()
        fresh.load_state_dict(result.state_dict())
        close(fresh(x), result(x))


def test_an_optimizer_step_is_noticed() -> None:
    model = pair()
    result = optimized(model, data(3))
    x = data(3, 3)
    optimizer = torch.optim.Adam(result.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            before = result(x)
        result(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            close(result(x), model(x))
            assert not torch.allclose(result(x), before)


def test_a_buffer_written_in_place_is_noticed() -> None:
    model = pair()
    result = optimized(model, data(3))
    with torch.no_grad():
        result(data(3))
        model.norm.running_var[2] *= 4
        close(result(data(3)), model(data(3)))


@pytest.mark.parametrize("move", ["double", "half", "bfloat16"])
def test_moved_to_another_dtype(move: str) -> None:
    model = pair().float()
    result = optimized(model, data(3, dtype=torch.float32))
    with torch.no_grad():
        result(data(3, dtype=torch.float32))
    reference = getattr(copy.deepcopy(model), move)()
    moved = getattr(copy.deepcopy(result), move)()
    dtype = reference.conv.weight.dtype
    with torch.no_grad():
        close(
            moved(data(3, 3, dtype=dtype)),
            reference(data(3, 3, dtype=dtype)),
            max(8 * torch.finfo(dtype).eps, 1e-12),
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_copies_pickles_and_compilers() -> None:
    model = pair()
    result = optimized(model, data(3))
    x = data(3, 3, 2)
    shapes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(result, (data(3),), dynamic_shapes=shapes)
    with torch.no_grad():
        want = model(x)
        close(copy.deepcopy(result)(x), want)
        close(pickle.loads(pickle.dumps(result))(x), want)
        close(exported.module()(x), want)
        close(torch.compile(result, backend="eager", fullgraph=True)(x), want)
        close(fx.symbolic_trace(result)(x), want)
        close(torch.jit.trace(result, (data(3),))(x), want)
    copied = copy.deepcopy(result)
    with torch.no_grad():
        copied.conv.weight.mul_(2)
        close(result(x), want)
        assert not torch.allclose(copied(x), want)
    with pytest.raises(SpecializationError):
        copied.train()


def test_a_wrapper_around_the_result_is_optimized_again() -> None:
    model = pair()
    result = optimized(nn.Sequential(optimized(model, data(3))), data(3))
    close(result(data(3, 3)), model(data(3, 3)))
    with pytest.raises(SpecializationError):
        result.train()


# -- modes -----------------------------------------------------------------------------------------


def test_training_mode_is_refused_later() -> None:
    model = pair()
    result = optimized(model, data(3))
    with pytest.raises(SpecializationError, match=r"norm\.training"):
        result.train()
    result.eval()
    result.norm.train()
    with pytest.raises(SpecializationError):
        result(data(3))
    result.norm.eval()
    close(result(data(3)), model(data(3)))
    assert model.train().training


# -- refusals --------------------------------------------------------------------------------------


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def hooked_norm(model: Pair) -> Pair:
    model.norm.register_forward_hook(doubled)
    return model


def hooked_conv(model: Pair) -> Pair:
    model.conv.register_forward_hook(doubled)
    return model


def parametrized(model: Pair) -> Pair:
    parametrizations.weight_norm(model.conv)
    return model


class TwiceNorm(nn.BatchNorm3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


TwiceNorm.__module__ = "torch.nn.mine"  # so that it is called, and not traced through


def subclassed(model: Pair) -> Pair:
    norm = TwiceNorm(OUT).double()
    norm.load_state_dict(model.norm.state_dict())
    model.norm = norm.eval()
    return model


def synchronized(model: Pair) -> Pair:
    model.norm = nn.SyncBatchNorm.convert_sync_batchnorm(model.norm)
    return model


def without_statistics(model: Pair) -> Pair:
    model.norm = nn.BatchNorm3d(OUT, track_running_stats=False).double().eval()
    return model


class Reading(Pair):
    """What the convolution gave is also read, returned or written by something else."""

    def __init__(self, read: Callable[[Tensor, Tensor], Any]) -> None:
        model = pair()
        super().__init__(model.conv, model.norm)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.read(self, y)


def written_before(self: Reading, y: Tensor) -> Tensor:
    y.mul_(2)
    return self.norm(y)


def written_after(self: Reading, y: Tensor) -> tuple[Tensor, Tensor]:
    z = self.norm(y)
    return y.mul_(2), z


class ComputedWeight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight - self.conv.weight.mean()
        return self.norm(F.conv3d(x, weight))


class WritesStatistics(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.norm.running_mean.add_(1)
        return self.norm(y)


class AlongFrames(nn.Module):
    """(C, L) without a batch: dimension 1 is no channel, but there are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, OUT, 1)
        self.norm = nn.BatchNorm1d(OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


REFUSED: dict[str, tuple[Code, Callable[[], nn.Module], tuple[Any, ...]]] = {
    "hook on the norm": (Code.HOOKED_MODULE, lambda: hooked_norm(pair()), (data(3),)),
    "hook on the conv": (Code.HOOKED_MODULE, lambda: hooked_conv(pair()), (data(3),)),
    "parametrized": (Code.PARAMETRIZED_MODULE, lambda: parametrized(pair()), (data(3),)),
    "subclass": (Code.SUBCLASS, lambda: subclassed(pair()), (data(3),)),
    "synchronized": (Code.SUBCLASS, lambda: synchronized(pair()), (data(3),)),
    "training": (Code.TRAINING_BATCHNORM, lambda: pair().train(), (data(3),)),
    "no statistics": (Code.BATCH_STATISTICS, lambda: without_statistics(pair()), (data(3),)),
    "read too": (Code.OUTPUT_SHARED, lambda: Reading(lambda s, y: s.norm(y) + y), (data(3),)),
    "output too": (Code.OUTPUT_SHARED, lambda: Reading(lambda s, y: (s.norm(y), y)), (data(3),)),
    "view too": (Code.OUTPUT_SHARED, lambda: Reading(lambda s, y: s.norm(y) + y[:1]), (data(3),)),
    "written after": (Code.VISIBLE_WRITE, lambda: Reading(written_after), (data(3),)),
    "computed weight": (
        Code.COMPUTED_WEIGHT,
        lambda: ComputedWeight(*pair().children()).eval(),
        (data(3),),
    ),
    "other axis": (
        Code.OTHER_AXIS,
        lambda: varied(AlongFrames()).double(),
        (noise(CHANNELS, OUT).double(),),
    ),
    "linear along other axis": (
        Code.OTHER_AXIS,
        lambda: varied(Pair(nn.Linear(CHANNELS, OUT), nn.BatchNorm1d(5))).double(),
        (noise(2, 5, CHANNELS).double(),),
    ),
    "unknown rank": (
        Code.SHAPES_UNKNOWN,
        lambda: varied(Pair(nn.Linear(CHANNELS, OUT), nn.BatchNorm1d(OUT))),
        (),
    ),
    "dtypes": (
        Code.MIXED_DTYPES,
        lambda: varied(Pair(nn.Conv3d(CHANNELS, OUT, 1), nn.BatchNorm3d(OUT).double())),
        (),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    code, build, example = REFUSED[name]
    model = build()
    result = optimized(copy.deepcopy(model), *example)
    assert [remark.status for remark in remarks(result)] == ["missed"]
    assert code in codes(result)
    if example:
        mine, theirs = result(*example), copy.deepcopy(model)(*example)
        for actual, expected in zip(
            mine if isinstance(mine, tuple) else (mine,),
            theirs if isinstance(theirs, tuple) else (theirs,),
            strict=True,
        ):
            close(actual, expected)


class Formats(nn.Module):
    """Takes a channels-last tensor as it is, and copies another, before it writes."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), nn.ReLU())
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x).to(memory_format=torch.channels_last_3d)
        return nn.functional.relu(y, inplace=True) if self.write else y.relu()


@pytest.mark.parametrize("write", [True, False])
def test_a_copy_that_the_layout_decides(write: bool) -> None:
    """A map of one pixel has other strides behind BatchNorm than behind a convolution."""
    model = Formats(write).to(memory_format=torch.channels_last_3d).eval()
    result = fxtemporal.optimize(model, None, tune="static", passes=["fold-batchnorm"])
    (remark,) = fxtemporal.report(result).remarks
    assert remark.status == ("missed" if write else "applied")
    x = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    mine, theirs = (torch.autograd.grad(net(x).sum(), x) for net in (result, model))
    torch.testing.assert_close(mine, theirs)


def test_what_is_written_between_the_two_stays() -> None:
    model = Reading(written_before).eval()
    result = optimized(model, data(3))
    assert norms(result)
    close(result(data(3, 3)), model(data(3, 3)))


def test_a_size_may_be_read_of_what_the_convolution_gave() -> None:
    model = Reading(lambda self, y: self.norm(y) * y.size(2) + y.shape[0]).eval()
    result = optimized(model, data(3))
    assert not norms(result)
    for batch, frames in ((2, 0), (3, 0)):
        close(result(data(3, batch, frames)), model(data(3, batch, frames)))


def test_a_write_to_the_statistics_between_the_two_is_seen() -> None:
    model = WritesStatistics(*pair().children()).eval()
    result = optimized(copy.deepcopy(model), data(3))
    assert Code.VISIBLE_WRITE in codes(result)


def test_without_shapes() -> None:
    model = pair()
    result = optimized(model)
    assert not norms(result)
    close(result(data(3, 3)), model(data(3, 3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_an_exported_program(dynamic: bool) -> None:
    model = pair(stride=2, padding=1)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(model, (data(3),), dynamic_shapes=shapes)
    result = optimized(program, data(3))
    assert not norms(result)
    assert [remark.target for remark in remarks(result)] == ["norm"]
    for batch in (2, 3) if dynamic else (2,):
        close(result(data(3, batch)), model(data(3, batch)))


def test_as_functions() -> None:
    class Functions(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.conv3d(x, self.conv.weight, self.conv.bias, padding=1)
            norm = self.norm
            mean, var = norm.running_mean, norm.running_var
            return F.batch_norm(y, mean, var, norm.weight, norm.bias, eps=norm.eps)

    model = Functions(*pair().children()).eval()
    result = optimized(model, data(3))
    assert not norms(result)
    close(result(data(3, 3)), model(data(3, 3)))


def test_the_original_is_left_as_it_was() -> None:
    model = pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = repr(model)
    result = optimized(model, data(3))
    with torch.no_grad():
        result(data(3))
    assert repr(model) == text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_audit_says_what_optimize_does() -> None:
    model = pair()
    audited = fxtemporal.audit(model, (data(3),), passes=[RULE]).remarks
    assert audited == tuple(remarks(optimized(model, data(3))))
