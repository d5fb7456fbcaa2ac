"""Every spelling of an op has one description, and the description computes the same numbers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
from einops.layers.torch import Rearrange, Reduce
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, weight_norm

from fxtemporal.ir.ops import Attr, Describer, Op, blocked, describe
from fxtemporal.ir.ops.modules import MODULES
from fxtemporal.ir.ops.signature import REQUIRED
from fxtemporal.ir.ops.table import ATEN, FUNCTIONS, ROWS

rearrange, reduce, repeat = einops.rearrange, einops.reduce, einops.repeat
for name in ("rearrange", "reduce", "repeat"):
    fx.wrap(name)

aten = torch.ops.aten
Fn = Callable[..., Any]


class Tracer(fx.Tracer):
    """Everything from torch and einops is a leaf, containers too."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, Rearrange | Reduce) or super().is_leaf_module(m, name)


class Layers(nn.Module):
    """The layers that the cases below share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(4, 6, 3, padding="same", padding_mode="zeros", groups=2)
        self.conv3 = nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0), dilation=1, bias=False)
        self.valid = nn.Conv3d(4, 6, 1, padding="valid", bias=False)
        self.up2 = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)
        self.up3 = nn.ConvTranspose3d(4, 6, 3, groups=2, dilation=2)
        self.linear = nn.Linear(5, 3)
        self.embedding = nn.Embedding(9, 4, padding_idx=0)
        self.bn3 = nn.BatchNorm3d(4)
        self.bn_free = nn.BatchNorm3d(4, track_running_stats=False, affine=False)
        self.in3 = nn.InstanceNorm3d(4, affine=True)
        self.in3_tracked = nn.InstanceNorm3d(4, track_running_stats=True)
        self.ln = nn.LayerNorm((4, 5))
        self.gn = nn.GroupNorm(2, 4, eps=1e-3)
        self.rms = nn.RMSNorm(5)
        self.lrn = nn.LocalResponseNorm(3)
        self.prelu = nn.PReLU(4)
        self.register_buffer("scale", torch.ones(()))


def clip() -> torch.Tensor:
    return torch.arange(2 * 4 * 3 * 4 * 5, dtype=torch.float32).sin().view(2, 4, 3, 4, 5)


def image() -> torch.Tensor:
    return clip()[:, :, 0].contiguous()


def line() -> torch.Tensor:
    return clip()[:, :, 0, 0].contiguous()


def build(fn: Fn, *inputs: torch.Tensor, training: bool = False, **modules: nn.Module) -> nn.Module:
    """A module whose forward is ``fn(self, *inputs)``, with the layers above and ``modules``."""
    torch.manual_seed(0)
    names = ("x", "y", "z")[: len(inputs)]
    scope: dict[str, Any] = {"fn": fn}
    exec(f"def forward(self, {', '.join(names)}): return fn(self, {', '.join(names)})", scope)
    root = type("Root", (Layers,), {"forward": scope["forward"]})()
    for name, module in modules.items():
        root.add_module(name, module)
    return root.train(training)


def trace(root: nn.Module, *inputs: torch.Tensor, shapes: bool = True) -> fx.GraphModule:
    gm = fx.GraphModule(root, Tracer().trace(root))
    if shapes:
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return gm


def export(root: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    module = torch.export.export(root, inputs, strict=False).module()
    assert isinstance(module, fx.GraphModule)
    return module


def result(gm: fx.GraphModule) -> fx.Node:
    """The node that computes the output."""
    (out,) = (node.args[0] for node in gm.graph.nodes if node.op == "output")
    while isinstance(out, list | tuple):
        out = out[0]
    assert isinstance(out, fx.Node)
    return out


def op_of(fn: Fn, *inputs: torch.Tensor, training: bool = False, **modules: nn.Module) -> Op:
    root = build(fn, *inputs, training=training, **modules)
    gm = trace(root, *inputs)
    op = describe(result(gm), gm)
    assert op is not None, result(gm).format_node()
    return op


def key(op: Op) -> tuple[Any, ...]:
    return op.inplace, op.random, op.static()


# ---- every spelling is one op --------------------------------------------------------------------

Case = tuple[str, Fn, tuple[Fn, ...]]

CASES: tuple[Case, ...] = (
    # (what it is, inputs, spellings)
    (
        "conv1d",
        line,
        (
            lambda m, x: m.conv1(x),
            lambda m, x: F.conv1d(x, m.conv1.weight, m.conv1.bias, 2, 1),
            lambda m, x: torch.conv1d(x, m.conv1.weight, m.conv1.bias, (2,), padding=[1]),
            lambda m, x: aten.conv1d.default(x, m.conv1.weight, m.conv1.bias, [2], [1]),
            lambda m, x: aten.convolution.default(
                x, m.conv1.weight, m.conv1.bias, [2], [1], [1], False, [0], 1
            ),
        ),
    ),
    (
        "conv2d",
        image,
        (
            lambda m, x: m.conv2(x),
            lambda m, x: F.conv2d(x, m.conv2.weight, m.conv2.bias, padding="same", groups=2),
            lambda m, x: aten.conv2d.padding(
                x, m.conv2.weight, m.conv2.bias, [1], "same", [1, 1], 2
            ),
        ),
    ),
    (
        "conv3d",
        clip,
        (
            lambda m, x: m.conv3(x),
            lambda m, x: m.conv3(input=x),
            lambda m, x: F.conv3d(x, m.conv3.weight, padding=(1, 0, 0)),
            lambda m, x: F.conv3d(x, m.conv3.weight, None, 1, [1, 0, 0], 1, 1),
            lambda m, x: F.conv3d(input=x, weight=m.conv3.weight, padding=(1, 0, 0)),
            lambda m, x: torch.conv3d(x, m.conv3.weight, stride=(1, 1, 1), padding=(1, 0, 0)),
            lambda m, x: aten.conv3d.default(x, m.conv3.weight, None, [1, 1, 1], [1, 0, 0]),
            lambda m, x: aten.convolution.default(
                x, m.conv3.weight, None, [1, 1, 1], [1, 0, 0], [1, 1, 1], False, [0, 0, 0], 1
            ),
        ),
    ),
    (
        "conv3d",
        clip,
        (
            lambda m, x: m.valid(x),
            lambda m, x: F.conv3d(x, m.valid.weight),
            lambda m, x: F.conv3d(x, m.valid.weight, padding="valid"),
        ),
    ),
    (
        "conv_transpose2d",
        image,
        (
            lambda m, x: m.up2(x),
            lambda m, x: F.conv_transpose2d(x, m.up2.weight, m.up2.bias, 2, output_padding=1),
            lambda m, x: aten.convolution.default(
                x, m.up2.weight, m.up2.bias, [2, 2], [0, 0], [1, 1], True, [1, 1], 1
            ),
        ),
    ),
    (
        "conv_transpose3d",
        clip,
        (
            lambda m, x: m.up3(x),
            lambda m, x: F.conv_transpose3d(x, m.up3.weight, m.up3.bias, 1, 0, 0, 2, 2),
        ),
    ),
    (
        "linear",
        clip,
        (
            lambda m, x: m.linear(x),
            lambda m, x: F.linear(x, m.linear.weight, m.linear.bias),
            lambda m, x: F.linear(bias=m.linear.bias, input=x, weight=m.linear.weight),
        ),
    ),
    (
        "embedding",
        lambda: torch.tensor([[1, 2], [0, 8]]),
        (
            lambda m, x: m.embedding(x),
            lambda m, x: F.embedding(x, m.embedding.weight, 0),
            lambda m, x: torch.embedding(m.embedding.weight, x, 0),
            lambda m, x: aten.embedding.default(m.embedding.weight, x, 0),
        ),
    ),
    (
        "batch_norm",
        clip,
        (
            lambda m, x: m.bn3(x),
            lambda m, x: F.batch_norm(
                x, m.bn3.running_mean, m.bn3.running_var, m.bn3.weight, m.bn3.bias
            ),
            lambda m, x: torch.batch_norm(
                x,
                m.bn3.weight,
                m.bn3.bias,
                m.bn3.running_mean,
                m.bn3.running_var,
                False,
                0.1,
                1e-5,
                True,
            ),
        ),
    ),
    (
        "batch_norm",
        clip,
        (lambda m, x: m.bn_free(x), lambda m, x: F.batch_norm(x, None, None, training=True)),
    ),
    (
        "instance_norm",
        clip,
        (
            lambda m, x: m.in3(x),
            lambda m, x: F.instance_norm(x, weight=m.in3.weight, bias=m.in3.bias),
        ),
    ),
    ("instance_norm", clip, (lambda m, x: m.in3_tracked(x),)),
    (
        "layer_norm",
        clip,
        (
            lambda m, x: m.ln(x),
            lambda m, x: F.layer_norm(x, [4, 5], m.ln.weight, m.ln.bias),
            lambda m, x: torch.layer_norm(x, (4, 5), m.ln.weight, m.ln.bias, 1e-5),
        ),
    ),
    (
        "group_norm",
        clip,
        (
            lambda m, x: m.gn(x),
            lambda m, x: F.group_norm(x, 2, m.gn.weight, m.gn.bias, 1e-3),
            lambda m, x: torch.group_norm(x, 2, m.gn.weight, m.gn.bias, eps=1e-3),
        ),
    ),
    ("rms_norm", clip, (lambda m, x: m.rms(x), lambda m, x: F.rms_norm(x, (5,), m.rms.weight))),
    (
        "local_response_norm",
        clip,
        (lambda m, x: m.lrn(x), lambda m, x: F.local_response_norm(x, 3)),
    ),
    (
        "max_pool2d",
        image,
        (
            lambda m, x: F.max_pool2d(x, 2),
            lambda m, x: F.max_pool2d(x, (2, 2), stride=2),
            lambda m, x: torch.max_pool2d(x, 2, [2, 2], 0, 1, False),
            lambda m, x: aten.max_pool2d.default(x, [2, 2], [2, 2]),
        ),
    ),
    (
        "avg_pool3d",
        clip,
        (lambda m, x: F.avg_pool3d(x, 2, 1), lambda m, x: aten.avg_pool3d.default(x, [2], [1])),
    ),
    ("avg_pool1d", line, (lambda m, x: F.avg_pool1d(x, 2), lambda m, x: torch.avg_pool1d(x, 2, 2))),
    (
        "adaptive_avg_pool3d",
        clip,
        (
            lambda m, x: F.adaptive_avg_pool3d(x, 1),
            lambda m, x: F.adaptive_avg_pool3d(x, (1, 1, 1)),
            lambda m, x: aten.adaptive_avg_pool3d.default(x, [1, 1, 1]),
        ),
    ),
    (
        "adaptive_max_pool2d",
        image,
        (
            lambda m, x: F.adaptive_max_pool2d(x, 2),
            lambda m, x: F.adaptive_max_pool2d(x, (2, 2), return_indices=False),
        ),
    ),
    (
        "relu",
        clip,
        (
            lambda m, x: F.relu(x),
            lambda m, x: x.relu(),
            lambda m, x: torch.relu(x),
            lambda m, x: aten.relu.default(x),
            lambda m, x: F.relu(x, inplace=False),
        ),
    ),
    (
        "relu",
        clip,
        (
            lambda m, x: F.relu(x, inplace=True),
            lambda m, x: F.relu(x, True),
            lambda m, x: x.relu_(),
            lambda m, x: torch.relu_(x),
            lambda m, x: F.relu_(x),
            lambda m, x: aten.relu_.default(x),
        ),
    ),
    (
        "hardtanh",
        clip,
        (
            lambda m, x: F.relu6(x),
            lambda m, x: F.hardtanh(x, 0, 6),
            lambda m, x: aten.relu6.default(x),
        ),
    ),
    (
        "leaky_relu",
        clip,
        (lambda m, x: F.leaky_relu(x), lambda m, x: aten.leaky_relu.default(x, 0.01)),
    ),
    ("elu", clip, (lambda m, x: F.elu(x), lambda m, x: aten.elu.default(x, 1, 1, 1))),
    ("gelu", clip, (lambda m, x: F.gelu(x, approximate="tanh"),)),
    ("softplus", clip, (lambda m, x: F.softplus(x), lambda m, x: aten.softplus.default(x, 1, 20))),
    ("prelu", clip, (lambda m, x: m.prelu(x), lambda m, x: F.prelu(x, m.prelu.weight))),
    ("sigmoid", clip, (lambda m, x: F.sigmoid(x), lambda m, x: torch.sigmoid(x))),
    ("log_sigmoid", clip, (lambda m, x: F.logsigmoid(x), lambda m, x: aten.log_sigmoid.default(x))),
    ("neg", clip, (lambda m, x: -x, lambda m, x: x.neg(), lambda m, x: torch.negative(x))),
    ("abs", clip, (lambda m, x: abs(x), lambda m, x: x.abs(), lambda m, x: torch.absolute(x))),
    (
        "clamp",
        clip,
        (
            lambda m, x: x.clamp(min=0),
            lambda m, x: torch.clamp(x, 0),
            lambda m, x: x.clip(0, None),
            lambda m, x: x.clamp_min(0),
            lambda m, x: aten.clamp.default(x, 0),
        ),
    ),
    ("pow", clip, (lambda m, x: x**2, lambda m, x: x.pow(2), lambda m, x: torch.pow(x, 2))),
    (
        "add",
        clip,
        (
            lambda m, x: x + 1,
            lambda m, x: 1 + x,
            lambda m, x: torch.add(x, 1),
            lambda m, x: x.add(1, alpha=1),
            lambda m, x: aten.add.Tensor(x, 1),
            lambda m, x: aten.add.Scalar(x, 1, 1),
        ),
    ),
    ("add", clip, (lambda m, x: torch.add(x, x, alpha=2), lambda m, x: x.add(x, alpha=2))),
    ("add", clip, (lambda m, x: x.add_(1), lambda m, x: aten.add_.Tensor(x, 1))),
    ("add", clip, (lambda m, x: x + m.scale, lambda m, x: torch.add(x, m.scale))),
    (
        "sub",
        clip,
        (lambda m, x: 1 - x, lambda m, x: torch.rsub(x, 1), lambda m, x: aten.rsub.Scalar(x, 1)),
    ),
    ("sub", clip, (lambda m, x: x - 1, lambda m, x: torch.subtract(x, 1), lambda m, x: x.sub(1))),
    ("mul", clip, (lambda m, x: x * 2, lambda m, x: 2 * x, lambda m, x: torch.multiply(x, 2))),
    (
        "div",
        clip,
        (lambda m, x: x / 3, lambda m, x: torch.true_divide(x, 3), lambda m, x: x.div(3)),
    ),
    ("floor_divide", clip, (lambda m, x: x // 3, lambda m, x: torch.floor_divide(x, 3))),
    ("remainder", clip, (lambda m, x: x % 3, lambda m, x: torch.remainder(x, 3))),
    ("gt", clip, (lambda m, x: x > 0, lambda m, x: x > 0, lambda m, x: torch.greater(x, 0))),
    ("maximum", clip, (lambda m, x: torch.maximum(x, x), lambda m, x: torch.max(x, x))),
    (
        "where",
        clip,
        (
            lambda m, x: torch.where(x > 0, x, 0.0),
            lambda m, x: x.where(x > 0, 0.0),
            lambda m, x: aten.where.ScalarOther(x > 0, x, 0.0),
        ),
    ),
    (
        "softmax",
        clip,
        (
            lambda m, x: F.softmax(x, 1),
            lambda m, x: x.softmax(-4),
            lambda m, x: torch.softmax(x, dim=1),
            lambda m, x: aten.softmax.int(x, 1),
        ),
    ),
    ("log_softmax", clip, (lambda m, x: F.log_softmax(x, -1), lambda m, x: x.log_softmax(4))),
    (
        "mean",
        clip,
        (
            lambda m, x: x.mean((-1, -2)),
            lambda m, x: x.mean([3, 4]),
            lambda m, x: torch.mean(x, dim=(4, 3)),
            lambda m, x: torch.mean(x, axis=(3, 4), keepdims=False),
            lambda m, x: aten.mean.dim(x, [-2, -1]),
        ),
    ),
    ("sum", clip, (lambda m, x: x.sum(), lambda m, x: torch.sum(x), lambda m, x: x.sum(dim=()))),
    ("amax", clip, (lambda m, x: x.amax(1), lambda m, x: torch.amax(x, (1,), False))),
    (
        "max",
        clip,
        (lambda m, x: x.max(), lambda m, x: torch.max(x), lambda m, x: aten.max.default(x)),
    ),
    (
        "var",
        clip,
        (
            lambda m, x: x.var(1, False),
            lambda m, x: torch.var(x, 1, unbiased=False),
            lambda m, x: x.var(dim=1, correction=0),
            lambda m, x: aten.var.correction(x, [1], correction=0),
        ),
    ),
    ("std", clip, (lambda m, x: x.std(), lambda m, x: x.std(True), lambda m, x: torch.std(x))),
    ("norm", clip, (lambda m, x: x.norm(dim=-1), lambda m, x: torch.norm(x, dim=4))),
    ("cumsum", clip, (lambda m, x: x.cumsum(-1), lambda m, x: torch.cumsum(x, 4))),
    ("argmax", clip, (lambda m, x: x.argmax(1), lambda m, x: torch.argmax(x, dim=-4))),
    (
        "matmul",
        clip,
        (
            lambda m, x: x @ m.linear.weight.t(),
            lambda m, x: torch.matmul(x, m.linear.weight.t()),
            lambda m, x: x.matmul(m.linear.weight.transpose(0, 1)),
        ),
    ),
    (
        "einsum",
        line,
        (
            lambda m, x: torch.einsum("b c t, b d t -> b c d", x, x),
            lambda m, x: torch.einsum("bct,bdt->bcd", [x, x]),
            lambda m, x: aten.einsum.default("bct,bdt->bcd", [x, x]),
        ),
    ),
    (
        "scaled_dot_product_attention",
        line,
        (
            lambda m, x: F.scaled_dot_product_attention(x, x, x),
            lambda m, x: F.scaled_dot_product_attention(x, key=x, value=x, dropout_p=0),
        ),
    ),
    (
        "select",
        clip,
        (
            lambda m, x: x[:, :, 1],
            lambda m, x: x[:, :, 1, ...],
            lambda m, x: x[..., 1, :, :],
            lambda m, x: x.select(2, 1),
            lambda m, x: x.select(-3, 1),
            lambda m, x: torch.select(x, 2, 1),
            lambda m, x: aten.select.int(x, 2, 1),
        ),
    ),
    ("select", clip, (lambda m, x: x[0], lambda m, x: x.select(0, 0), lambda m, x: x[0, :])),
    ("select", clip, (lambda m, x: x[..., -1], lambda m, x: x.select(-1, -1))),
    (
        "slice",
        clip,
        (
            lambda m, x: x[:, :, 1:3],
            lambda m, x: x[:, :, 1:3, :],
            lambda m, x: x[..., 1:3, :, :],
            lambda m, x: x.narrow(2, 1, 2),
            lambda m, x: torch.narrow(x, -3, 1, length=2),
            lambda m, x: aten.slice.Tensor(x, 2, 1, 3),
            lambda m, x: aten.slice.Tensor(x, 2, 1, 3, 1),
        ),
    ),
    (
        "slice",
        clip,
        (
            lambda m, x: x[:, 1:],
            lambda m, x: aten.slice.Tensor(x, 1, 1),
            lambda m, x: aten.slice.Tensor(x, 1, 1, 2**63 - 1),
        ),
    ),
    ("slice", clip, (lambda m, x: x[:, -2:], lambda m, x: x.narrow(1, -2, 2))),
    ("slice", clip, (lambda m, x: x[:], lambda m, x: x[...], lambda m, x: x[:, :])),
    ("getitem", clip, (lambda m, x: x[:, 1, 2], lambda m, x: x[:, 1, 2, ...])),
    ("getitem", clip, (lambda m, x: x[0, ..., 1], lambda m, x: x[0, :, :, :, 1])),
    ("getitem", clip, (lambda m, x: x[:, [0, 1]], lambda m, x: x[:, (0, 1), :])),
    (
        "unsqueeze",
        clip,
        (
            lambda m, x: x[:, None],
            lambda m, x: x.unsqueeze(1),
            lambda m, x: torch.unsqueeze(x, -5),
            lambda m, x: x[:, None, ...],
        ),
    ),
    ("unsqueeze", clip, (lambda m, x: x[..., None], lambda m, x: x.unsqueeze(-1))),
    (
        "stack",
        clip,
        (
            lambda m, x: torch.stack([x, x], -1),
            lambda m, x: torch.stack((x, x), dim=5),
            lambda m, x: aten.stack.default([x, x], -1),
        ),
    ),
    (
        "cat",
        clip,
        (
            lambda m, x: torch.cat([x, x], -1),
            lambda m, x: torch.concat((x, x), dim=4),
            lambda m, x: torch.concatenate((x, x), axis=4),
        ),
    ),
    (
        "view",
        clip,
        (
            lambda m, x: x.view(2, -1),
            lambda m, x: x.view((2, -1)),
            lambda m, x: x.view([2, -1]),
            lambda m, x: x.view(torch.Size((2, -1))),
            lambda m, x: aten.view.default(x, [2, -1]),
        ),
    ),
    (
        "reshape",
        clip,
        (
            lambda m, x: x.reshape(2, -1),
            lambda m, x: torch.reshape(x, (2, -1)),
            lambda m, x: torch.reshape(x, shape=(2, -1)),
            lambda m, x: aten.reshape.default(x, [2, -1]),
        ),
    ),
    (
        "flatten",
        clip,
        (
            lambda m, x: x.flatten(1),
            lambda m, x: torch.flatten(x, 1, -1),
            lambda m, x: x.flatten(start_dim=-4, end_dim=4),
        ),
    ),
    (
        "unflatten",
        clip,
        (lambda m, x: x.unflatten(1, (2, 2)), lambda m, x: x.unflatten(-4, [2, 2])),
    ),
    (
        "permute",
        clip,
        (
            lambda m, x: x.permute(0, 2, 1, 3, 4),
            lambda m, x: x.permute((0, 2, 1, -2, -1)),
            lambda m, x: torch.permute(x, (0, 2, 1, 3, 4)),
            lambda m, x: x.permute(dims=(0, 2, 1, 3, 4)),
        ),
    ),
    ("movedim", clip, (lambda m, x: x.movedim(1, -1), lambda m, x: torch.moveaxis(x, (1,), (4,)))),
    (
        "transpose",
        clip,
        (
            lambda m, x: x.transpose(1, 2),
            lambda m, x: x.transpose(-3, -4),
            lambda m, x: torch.swapaxes(x, 2, 1),
            lambda m, x: x.swapdims(1, 2),
        ),
    ),
    ("transpose", clip, (lambda m, x: x.mT, lambda m, x: x.transpose(3, 4))),
    ("squeeze", clip, (lambda m, x: x.squeeze(-1), lambda m, x: torch.squeeze(x, (4,)))),
    ("squeeze", clip, (lambda m, x: x.squeeze(), lambda m, x: torch.squeeze(x))),
    (
        "expand",
        lambda: clip()[:, :1],
        (
            lambda m, x: x.expand(-1, 4, -1, -1, -1),
            lambda m, x: x.expand((-1, 4, -1, -1, -1)),
            lambda m, x: aten.expand.default(x, [-1, 4, -1, -1, -1]),
        ),
    ),
    ("repeat", line, (lambda m, x: x.repeat(1, 2, 1), lambda m, x: x.repeat((1, 2, 1)))),
    ("tile", line, (lambda m, x: x.tile(2, 1), lambda m, x: torch.tile(x, (2, 1)))),
    ("flip", line, (lambda m, x: x.flip(1, 2), lambda m, x: torch.flip(x, (-1, 1)))),
    ("roll", line, (lambda m, x: x.roll(1, 2), lambda m, x: torch.roll(x, (1,), (-1,)))),
    (
        "repeat_interleave",
        line,
        (
            lambda m, x: x.repeat_interleave(2, 1),
            lambda m, x: torch.repeat_interleave(x, 2, dim=-2),
        ),
    ),
    (
        "pad",
        clip,
        (
            lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 0)),
            lambda m, x: F.pad(x, [0, 0, 0, 0, 2, 0], value=0),
            lambda m, x: aten.pad.default(x, [0, 0, 0, 0, 2, 0]),
            lambda m, x: aten.constant_pad_nd.default(x, [0, 0, 0, 0, 2, 0]),
        ),
    ),
    (
        "pad",
        image,
        (
            lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
            lambda m, x: aten.reflection_pad2d.default(x, [1, 1, 1, 1]),
        ),
    ),
    (
        "interpolate",
        image,
        (
            lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            lambda m, x: F.interpolate(x, None, (2.0, 2.0), "bilinear", False),
            lambda m, x: aten.upsample_bilinear2d.vec(x, None, False, [2.0, 2.0]),
        ),
    ),
    ("contiguous", clip, (lambda m, x: x.contiguous(), lambda m, x: aten.contiguous.default(x))),
    ("clone", clip, (lambda m, x: x.clone(), lambda m, x: torch.clone(x))),
    (
        "to",
        clip,
        (
            lambda m, x: x.double(),
            lambda m, x: x.to(torch.float64),
            lambda m, x: x.to(dtype=torch.float64),
            lambda m, x: aten.to.dtype(x, torch.float64),
        ),
    ),
    ("to", clip, (lambda m, x: x.to("cpu"), lambda m, x: x.to(torch.device("cpu")))),
    ("to", clip, (lambda m, x: x.to(m.scale), lambda m, x: x.type_as(m.scale))),
    ("split", clip, (lambda m, x: x.split(2, 1), lambda m, x: torch.split(x, 2, dim=-4))),
    (
        "split",
        clip,
        (
            lambda m, x: x.split([1, 3], 1),
            lambda m, x: torch.split(x, split_size_or_sections=(1, 3), dim=1),
            lambda m, x: aten.split_with_sizes.default(x, [1, 3], 1),
        ),
    ),
    ("chunk", clip, (lambda m, x: x.chunk(2, -4), lambda m, x: torch.chunk(x, 2, dim=1))),
    ("unbind", clip, (lambda m, x: x.unbind(1), lambda m, x: torch.unbind(x, dim=-4))),
    (
        "rearrange",
        clip,
        (
            lambda m, x: rearrange(x, "b (c d) ... -> b d c ...", c=2),
            lambda m, x: rearrange(tensor=x, pattern="b ( c d)  ...->b d c ...", c=2),
            lambda m, x: reduce(x, "b (c d)... -> b d c ...", "rearrange", c=2),
        ),
    ),
    ("einops_reduce", clip, (lambda m, x: reduce(x, "b c t h w -> b c", "mean"),)),
    ("einops_repeat", line, (lambda m, x: repeat(x, "b c t -> b c (t k)", k=2),)),
)


def ids() -> list[str]:
    return [f"{position}-{name}" for position, (name, _, _) in enumerate(CASES)]


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


# ---- what differs is described differently -------------------------------------------------------

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


# ---- parameters ----------------------------------------------------------------------------------


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
