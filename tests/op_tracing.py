"""Graphs of one op, for the tests of descriptions: layers and inputs, a trace, its last node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops.layers.torch import Rearrange, Reduce
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxtemporal.ir.ops import Op, describe

aten = torch.ops.aten
Fn = Callable[..., Any]


class Tracer(fx.Tracer):
    """Everything from torch and einops is a leaf, containers too."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, Rearrange | Reduce) or super().is_leaf_module(m, name)


class Layers(nn.Module):
    """The layers that the cases share."""

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
