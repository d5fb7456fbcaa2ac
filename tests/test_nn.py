"""TimeDistributed equals a loop over the frames; Conv2Plus1d at full rank equals conv3d."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxtemporal.nn import Conv2Plus1d, TimeDistributed, paper_rank

MODES = ("zeros", "reflect", "replicate", "circular")
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def loop(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The meaning of TimeDistributed: the module on each frame, the results stacked."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    frames = next(leaf.shape[1] for leaf in leaves if isinstance(leaf, Tensor))
    outputs = []
    for t in range(frames):
        at_t = [leaf[:, t] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args_t, kwargs_t = pytree.tree_unflatten(at_t, spec)
        outputs.append(module(*args_t, **kwargs_t))
    return pytree.tree_map(lambda *each: torch.stack(each, dim=1), *outputs)


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.LazyLinear(5),
    )


class Nested(nn.Module):
    """Takes and returns structures, with things in them that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(
        self, pair: tuple[Tensor, Tensor], scale: float, *, more: dict[str, Any]
    ) -> dict[str, Any]:
        a, b = pair
        x = self.linear(a + b) * scale
        return {"sum": x, "rest": (more["x"].mean(dim=(1, 2)), [x.amax(1)]), "none": None}


# ---------------------------------------------------------------------------- TimeDistributed


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 9)),
        (nn.Linear(5, 4), (5,)),
        (nn.Linear(5, 4), (6, 5)),
        (cnn(), (3, 17, 15)),
        (nn.Conv3d(2, 3, 2), (2, 4, 5, 6)),
        (nn.LayerNorm(6), (6,)),
    ],
    ids=["Conv2d", "Linear", "Linear-rows", "cnn", "Conv3d-volumes", "LayerNorm"],
)
def test_equals_a_loop_over_frames(module: nn.Module, shape: tuple[int, ...], frames: int) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(module).eval()
    x = torch.randn(2, frames, *shape, requires_grad=True)
    with torch.no_grad():
        module(x[:, 0])  # lazy parameters get their shape
    result, reference = TimeDistributed(module)(x), loop(module, x)
    torch.testing.assert_close(result, reference)
    leaves = [x, *module.parameters()]
    upstream = torch.randn_like(reference)
    for ours, theirs in zip(
        torch.autograd.grad(result, leaves, upstream),
        torch.autograd.grad(reference, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_non_contiguous_input() -> None:
    conv = nn.Conv2d(3, 4, 3)
    frames = torch.randn(2, 3, 5, 8, 8).transpose(1, 2)  # from (B, C, T, H, W)
    torch.testing.assert_close(TimeDistributed(conv)(frames), loop(conv, frames))


@pytest.mark.parametrize(("batch", "frames"), [(0, 3), (2, 0), (0, 0)])
def test_no_samples_or_no_frames(batch: int, frames: int) -> None:
    result = TimeDistributed(nn.Conv2d(3, 4, 3))(torch.zeros(batch, frames, 3, 8, 8))
    assert result.shape == (batch, frames, 4, 6, 6)


def test_nested_inputs_and_outputs() -> None:
    module = Nested()
    pair = (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    more = {"x": torch.randn(2, 3, 5, 6), "flag": True, "note": "as it is"}
    result = TimeDistributed(module)(pair, 0.5, more=more)
    reference = [
        module((pair[0][:, t], pair[1][:, t]), 0.5, more={"x": more["x"][:, t]}) for t in range(3)
    ]
    assert list(result) == ["sum", "rest", "none"]
    assert result["none"] is None
    assert isinstance(result["rest"], tuple)
    for t in range(3):
        torch.testing.assert_close(result["sum"][:, t], reference[t]["sum"])
        torch.testing.assert_close(result["rest"][0][:, t], reference[t]["rest"][0])
        torch.testing.assert_close(result["rest"][1][0][:, t], reference[t]["rest"][1][0])


def test_parameters_are_those_of_the_module() -> None:
    module = cnn()
    layer = TimeDistributed(module)
    assert layer.module is module
    assert [name for name, _ in layer.named_children()] == ["module"]


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        assert mask.shape == x.shape[:1]
        return x * mask[:, None]


class Swallows(nn.Module):
    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return x * kwargs["mask"][:, None]


@pytest.mark.parametrize("module", [Masked(), Swallows()])
def test_a_mask_goes_to_a_module_that_takes_one(module: nn.Module) -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])
    result = TimeDistributed(module)(x, mask=mask)
    torch.testing.assert_close(result, x * mask[..., None])


def test_a_mask_is_ignored_by_a_module_that_takes_none() -> None:
    linear, x = nn.Linear(4, 2), torch.randn(2, 3, 4)
    result = TimeDistributed(linear)(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(result, linear(x))


def test_nested_time_distributed_gets_the_inner_part_of_the_mask() -> None:
    x, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5) > 0.5
    result = TimeDistributed(TimeDistributed(Masked()))(x, mask=mask)
    torch.testing.assert_close(result, x * mask[..., None])


def test_batchnorm_in_training_takes_all_frames_at_once() -> None:
    norm = nn.BatchNorm2d(3)
    x = torch.randn(2, 5, 3, 4, 4) * 3 + 1
    result = TimeDistributed(norm)(x)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(dim=(0, 1, 3, 4)))
    torch.testing.assert_close(result.mean(dim=(0, 1, 3, 4)), torch.zeros(3), atol=1e-5, rtol=0)


def test_dropout_in_training_draws_a_mask_for_each_frame() -> None:
    torch.manual_seed(0)
    result = TimeDistributed(nn.Dropout(0.5))(torch.ones(1, 4, 64))
    assert all(not torch.equal(result[:, 0], result[:, t]) for t in range(1, 4))


def test_the_wrapped_module_is_called_once() -> None:
    calls: list[tuple[int, ...]] = []
    linear = nn.Linear(4, 2)
    linear.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    TimeDistributed(linear)(torch.randn(2, 5, 4))
    assert calls == [(10, 4)]


class Add(nn.Module):
    def forward(self, x: Any, y: Any = None, **rest: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.zeros(2, 3),), {}, r"args\[0\] has shape \(2, 3\).*unsqueeze"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)), {}, r"args\[1\] has shape \(2, 4, 4\)"),
        ((torch.zeros(2, 3, 4),), {"y": [torch.zeros(3, 3, 4)]}, r"y\[0\] has shape \(3, 3, 4\)"),
        (({"a": torch.zeros(4)},), {}, r"args\[0\]\['a'\] has shape \(4,\)"),
        ((3,), {"y": None}, "no tensor is given"),
        ((torch.zeros(2, 3, 4),), {"mask": torch.zeros(2, 4)}, r"mask has shape \(2, 4\)"),
        ((torch.zeros(2, 3, 4),), {"mask": torch.zeros(2)}, r"mask has shape \(2,\)"),
    ],
)
def test_inputs_without_common_frames_are_named(
    args: tuple[Any, ...], kwargs: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        TimeDistributed(Add())(*args, **kwargs)


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: x.sum(0), r"shape \(4,\).*B·T = 2·3"),
        (lambda x: (x, x.T), r"shape \(4, 6\)"),
        (lambda x: {x}, "returns a set"),
    ],
)
def test_outputs_without_frames_are_refused(what: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TimeDistributed(Returns(what))(torch.zeros(2, 3, 4))


def test_exports_with_batch_and_frames_free() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")}
    program = torch.export.export(
        TimeDistributed(module), (torch.randn(2, 3, 3, 8, 8),), dynamic_shapes=((free,),)
    ).module()
    for batch, frames in ((2, 3), (5, 2), (3, 9)):
        x = torch.randn(batch, frames, 3, 8, 8)
        torch.testing.assert_close(program(x), loop(module, x))


def test_compiles_without_a_graph_break() -> None:
    layer = TimeDistributed(Masked())
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    x, mask = torch.randn(2, 3, 4), torch.rand(2, 3) > 0.5
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))


# -------------------------------------------------------------------------------- Conv2Plus1d


@pytest.mark.parametrize(
    ("ends", "middle"),
    [((64, 64), 144), ((64, 128), 230), ((128, 128), 288), ((256, 512), 921), ((1, 1), 2)],
)
def test_paper_rank_is_the_table_of_r2plus1d_18(ends: tuple[int, int], middle: int) -> None:
    assert paper_rank(*ends, 3) == middle
    assert Conv2Plus1d(*ends, 3, device="meta").mid_channels == middle


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(*[st.integers(1, 5)] * 3))
def test_paper_rank_keeps_the_parameter_count_below_full_rank(
    inputs: int, outputs: int, kernel: tuple[int, int, int]
) -> None:
    kt, kh, kw = kernel
    rank = paper_rank(inputs, outputs, kernel)
    assert 1 <= rank <= min(inputs * kh * kw, kt * outputs)
    if rank > 1:
        weights = rank * (inputs * kh * kw + kt * outputs)
        assert weights <= kt * kh * kw * inputs * outputs < weights + weights // rank


def test_stride_padding_and_dilation_are_split() -> None:
    layer = Conv2Plus1d(4, 6, (3, 5, 7), (1, 2, 3), (4, 5, 6), (2, 1, 3), groups=2)
    spatial, temporal = layer.spatial, layer.temporal
    assert (spatial.kernel_size, temporal.kernel_size) == ((1, 5, 7), (3, 1, 1))
    assert (spatial.stride, temporal.stride) == ((1, 2, 3), (1, 1, 1))
    assert (spatial.padding, temporal.padding) == ((0, 5, 6), (4, 0, 0))
    assert (spatial.dilation, temporal.dilation) == ((1, 1, 3), (2, 1, 1))
    assert spatial.groups == temporal.groups == 2
    assert spatial.out_channels == temporal.in_channels == layer.mid_channels
    assert layer.mid_channels == 2 * paper_rank(2, 3, (3, 5, 7))


@pytest.mark.parametrize("order", ["spatial-temporal", "temporal-spatial"])
def test_has_the_shape_and_state_dict_of_its_parts(order: Any) -> None:
    x = torch.randn(2, 4, 5, 9, 8)
    plain = Conv2Plus1d(4, 6, 3, 2, 1, order=order)
    assert plain(x).shape == nn.Conv3d(4, 6, 3, 2, 1)(x).shape
    last = "temporal" if order == "spatial-temporal" else "spatial"
    assert set(plain.state_dict()) == {"spatial.weight", "temporal.weight", f"{last}.bias"}
    full = Conv2Plus1d(4, 6, 3, 2, 1, norm=True, activation=nn.ReLU, order=order)
    assert isinstance(full.norm, nn.BatchNorm3d)
    assert isinstance(full.activation, nn.ReLU)
    assert full(x).shape == plain(x).shape
    first, second = full.spatial, full.temporal
    if order == "temporal-spatial":
        first, second = second, first
    torch.testing.assert_close(full(x), second(torch.relu(full.norm(first(x)))))


def test_what_stands_between_is_the_users_choice() -> None:
    act = nn.SiLU()
    layer = Conv2Plus1d(
        4, 6, 3, bias=True, norm=nn.InstanceNorm3d, activation=act, dtype=torch.float64
    )
    assert isinstance(layer.norm, nn.InstanceNorm3d)
    assert layer.activation is act
    assert layer.spatial.bias is None
    assert Conv2Plus1d(4, 6, 3, activation=act).spatial.bias is not None
    assert Conv2Plus1d(4, 6, 3, activation=act, bias=False).spatial.bias is None
    assert Conv2Plus1d(4, 6, 3, mid_channels=7).spatial.out_channels == 7
    layer = Conv2Plus1d(4, 6, 3, norm=nn.BatchNorm3d, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"mid_channels": 0}, "mid_channels is 0"),
        ({"mid_channels": 5, "groups": 2}, "mid_channels is 5"),
        ({"order": "time-space"}, "order is"),
        ({"stride": (1, 2)}, "stride is"),
    ],
)
def test_settings_out_of_range(keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Conv2Plus1d(4, 6, 3, **keywords)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv3d, list[Tensor]]:
    groups = draw(st.integers(1, 3))
    three = st.tuples(*[st.integers(1, 3)] * 3)
    kernel, stride, dilation = draw(three), draw(three), draw(three)
    mode = draw(st.sampled_from(MODES))
    padding: Any = draw(
        st.one_of(st.tuples(*[st.integers(0, 2)] * 3), st.sampled_from(["same", "valid"]))
    )
    if padding == "same":
        stride = (1, 1, 1)
    torch.manual_seed(0)
    conv = nn.Conv3d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
    )
    inputs = []
    for batch in (2, draw(st.integers(0, 1))):
        # At least the reach of the kernel, and more than "same" mirrors.
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        size = [draw(st.integers(max(3, least), 8)) for least in reach]
        inputs.append(torch.randn(batch, conv.in_channels, *size, dtype=torch.float64))
    return conv, inputs


@quick
@given(convolutions())
def test_at_full_rank_is_the_convolution_itself(case: tuple[nn.Conv3d, list[Tensor]]) -> None:
    conv, inputs = case
    layer = Conv2Plus1d.from_conv3d(conv, 1.0)
    for x in inputs:
        result, reference = layer(x), conv(x)
        assert result.shape == reference.shape
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-11)


@quick
@given(convolutions(), st.floats(0.05, 1.0))
def test_below_full_rank_is_the_best_approximation_of_the_weight(
    case: tuple[nn.Conv3d, list[Tensor]], fraction: float
) -> None:
    conv, _ = case
    layer = Conv2Plus1d.from_conv3d(conv, fraction)
    g, kept = conv.groups, layer.mid_channels // conv.groups
    outputs, inputs, kt, kh, kw = conv.weight.shape
    a = layer.temporal.weight.reshape(g, outputs // g, kept, kt)
    b = layer.spatial.weight.reshape(g, kept, inputs, kh, kw)
    weight = conv.weight.reshape(g, outputs // g, inputs, kt, kh, kw)
    error = (weight - torch.einsum("gomt,gmchw->gocthw", a, b)).square().sum()
    matrices = weight.permute(0, 1, 3, 2, 4, 5).reshape(g, outputs // g * kt, -1)
    dropped = torch.linalg.svdvals(matrices)[:, kept:].square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-9, atol=1e-20)
    torch.testing.assert_close(a.square().sum(), b.square().sum())


def test_ranks_by_name_number_and_fraction() -> None:
    conv = nn.Conv3d(8, 8, 3)
    full = 24  # min(8·9, 3·8)
    assert Conv2Plus1d.from_conv3d(conv).mid_channels == paper_rank(8, 8, 3) == 18
    assert Conv2Plus1d.from_conv3d(conv, 5).mid_channels == 5
    assert Conv2Plus1d.from_conv3d(conv, 1).mid_channels == 1
    assert Conv2Plus1d.from_conv3d(conv, full).mid_channels == full
    assert Conv2Plus1d.from_conv3d(conv, 0.5).mid_channels == 12
    assert Conv2Plus1d.from_conv3d(conv, 1e-9).mid_channels == 1
    grouped = nn.Conv3d(8, 8, 3, groups=4)
    assert Conv2Plus1d.from_conv3d(grouped, 0.5).mid_channels == 12
    assert Conv2Plus1d.from_conv3d(grouped).mid_channels == 4 * paper_rank(2, 2, 3)


@pytest.mark.parametrize("rank", [0, -1, 25, 0.0, 1.5, -0.5, float("nan"), True, "full", None])
def test_rank_out_of_range(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank is"):
        Conv2Plus1d.from_conv3d(nn.Conv3d(8, 8, 3), rank)


def test_rank_must_be_shared_by_the_groups() -> None:
    with pytest.raises(ValueError, match="multiple of groups = 4"):
        Conv2Plus1d.from_conv3d(nn.Conv3d(8, 8, 3, groups=4), 6)


def test_convolutions_that_cannot_be_factorized() -> None:
    class Mine(nn.Conv3d):
        pass

    with pytest.raises(ValueError, match="Mine is not nn"):
        Conv2Plus1d.from_conv3d(Mine(2, 2, 3))
    with pytest.raises(ValueError, match="meta device"):
        Conv2Plus1d.from_conv3d(nn.Conv3d(2, 2, 3, device="meta"))
    broken = nn.Conv3d(2, 2, 3)
    nn.init.constant_(broken.weight, float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        Conv2Plus1d.from_conv3d(broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_mode_and_requires_grad_and_leaves_the_original(dtype: torch.dtype) -> None:
    conv = nn.Conv3d(3, 4, 3, padding=1, dtype=dtype).eval()
    assert conv.bias is not None
    conv.weight.requires_grad_(False)
    before, state = copy.deepcopy(conv.state_dict()), torch.get_rng_state()
    layer = Conv2Plus1d.from_conv3d(conv, 1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.spatial.weight.requires_grad
    assert not layer.temporal.weight.requires_grad
    bias = layer.temporal.bias
    assert bias is not None
    assert bias.requires_grad
    assert torch.equal(bias, conv.bias)
    assert bias.data_ptr() != conv.bias.data_ptr()
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())
    assert all(not p.is_meta for p in layer.parameters())
    x = torch.randn(1, 3, 4, 6, 6, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x), conv(x), rtol=tolerance, atol=tolerance)


def test_a_factorized_layer_can_be_trained() -> None:
    layer = Conv2Plus1d.from_conv3d(nn.Conv3d(2, 3, 3), 0.5)
    layer(torch.randn(1, 2, 4, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
