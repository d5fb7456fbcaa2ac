"""Every op in its spellings: layers, functions, methods, operators, ATen."""

from __future__ import annotations

import einops
import torch
from torch import fx
from torch.nn import functional as F

from tests.op_tracing import Fn, aten, clip, image, line

rearrange, reduce, repeat = einops.rearrange, einops.reduce, einops.repeat
for name in ("rearrange", "reduce", "repeat"):
    fx.wrap(name)

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
