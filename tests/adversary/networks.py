"""Random networks of Conv3d layers, and of what stands around them.

The same drafts as for programs (:mod:`tests.adversary.draft`), without a loop over frames: ``f`` is
the clip (B, C, T, H, W), and each statement is a layer.
"""

import random

import torch

from . import programs
from .case import Call, Case, Input, tensors
from .draft import Draft
from .twists import control, model, world, writes

_LAYERS = """\
nn.BatchNorm3d({c})
nn.BatchNorm3d({c})
nn.BatchNorm3d({c})
nn.BatchNorm3d({c}, affine=False)
nn.BatchNorm3d({c})
nn.ReLU()
nn.MaxPool3d({pool})
nn.AvgPool3d({pool})
nn.BatchNorm3d({c}, eps=0.1, momentum=None)
nn.BatchNorm3d({c}, track_running_stats=False)
nn.SyncBatchNorm({c})
nn.InstanceNorm3d({c}, affine=True)
nn.GroupNorm(1, {c})
nn.LayerNorm([{h}, {w}])
nn.ReLU()
nn.ReLU(inplace=True)
nn.ReLU(inplace=True)
nn.LeakyReLU(0.1, inplace=True)
nn.Hardswish(inplace=True)
nn.SiLU()
nn.GELU()
nn.Sigmoid()
nn.PReLU()
nn.Dropout3d(0.2)
nn.Dropout(0.1, inplace=True)
nn.Identity()
nn.MaxPool3d({pool})
nn.MaxPool3d({kernel}, stride={stride}, padding={half})
nn.MaxPool3d((1, 2, 2), ceil_mode=True)
nn.MaxPool3d((1, 3, 3), stride=1, dilation=(1, 1, 1), padding=(0, 1, 1))
nn.AvgPool3d({pool})
nn.AvgPool3d((1, 2, 2), ceil_mode=True, count_include_pad=False)
nn.AvgPool3d((2, 1, 1), stride=1)
nn.AvgPool3d((1, 3, 3), 2, (0, 1, 1), divisor_override=4)
nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))
nn.LPPool3d(2, (1, 2, 2))
nn.AdaptiveAvgPool3d((None, 1, 1))
nn.AdaptiveAvgPool3d((1, None, None))
nn.AdaptiveAvgPool3d((2, 2, 2))
nn.AdaptiveAvgPool3d(1)
nn.AdaptiveMaxPool3d((None, 2, 2))
nn.FractionalMaxPool3d((1, 2, 2), output_ratio=0.9)
nn.ConvTranspose3d({c}, {n}, {pool}, stride={pool})
nn.ConvTranspose3d({c}, {n}, 3, padding=1)
nn.ConvTranspose3d({c}, {c}, (3, 1, 1), padding=(1, 0, 0), groups={c})
nn.Upsample(scale_factor=(1, 2, 2))
nn.Upsample(scale_factor=2, mode="trilinear")
nn.ConstantPad3d((1, 1, 0, 0, 2, 0), 0.5)
nn.ReplicationPad3d((0, 0, 0, 0, 2, 0))
nn.ReflectionPad3d(1)
nn.ZeroPad3d((1, 0, 1, 0, 1, 0))
nn.CircularPad3d((0, 0, 0, 0, 1, 1))
nn.Linear({w}, {n})
"""
_LINES = (
    "f = F.pad(f, (1, 1, 1, 1))",
    "f = F.pad(f, (0, 0, 0, 0, 2, 0))",
    "f = f * 0.5",
    "f = F.pad(f, (0, 0, 0, 0, 1, 1), mode='replicate')",
    "f = F.relu(f, inplace=True)",
    "f = F.interpolate(f, scale_factor=(1, 2, 2))",
    "f = f.relu_()",
    "f = f[:, :, ::2]",
    "f = F.interpolate(f, size=(4, 4, 4), mode='trilinear', align_corners=True)",
    "f = F.pad(f, (1, 1, 1, 1, 1, 1), value=0.3)",
    "f = f.transpose(3, 4)",
    "f = f.contiguous()",
    "f = F.max_pool3d(f, (1, 2, 2))",
    "f = F.avg_pool3d(f, (1, 2, 2))",
    "f = f[:, :, 1:]",
    "f = f.flip(2)",
    "f = torch.cat([f, f[:, :, :1]], 2)",
    "f = f - f.mean(2, keepdim=True)",
    "f = f.to(memory_format=torch.channels_last_3d)",
    "f = f.roll(1, 2)",
    "f = F.softplus(f)",
    "f = F.batch_norm(f, None, None, training=True)",
    "f = f.flatten(1, 2).unflatten(1, (-1, f.size(2)))",
    "f = F.max_pool3d(f, (2, 1, 1), return_indices=True)[0]",
    "f = f.squeeze(2).unsqueeze(2) if f.size(2) == 1 else f",
    "f = f * torch.sigmoid(f.mean((2, 3, 4), keepdim=True))",
    "f = F.dropout3d(f, 0.1, self.training)",
    "f = f.repeat_interleave(2, 2)",
    "f = f.permute(0, 2, 1, 3, 4).permute(0, 2, 1, 3, 4)",
    "f = f.detach()",
    "f.mul_(0.5)",
    "f[:, :, 0] = 0",
    "f = f.clamp(-1, 1)",
    "f = f + f.size(2)",
    "f = F.normalize(f, dim=1)",
    "f = f.chunk(2, 1)[0]",
    "f = f.softmax(2)",
    "f = f.cumsum(2)",
    "with torch.no_grad():\n    f = f * 2",
    "if self.training:\n    f = f * 2",
    "if f.size(2) > 3:\n    f = f[:, :, :3]",
    "f = torch.stack([v * 2 for v in f.unbind(2)], 2)",
    "f = F.conv3d(f, torch.ones(2, f.size(1), 1, 3, 3) / 9)",
    "f = f.mean(1, keepdim=True)",
)
_EXTRAS = (
    model.buffer_written,
    model.parameter_written,
    model.counter,
    model.cache,
    world.dtypes,
    writes.write_through_alias,
    writes.kept_then_written,
    world.odd_python,
    model.global_state,
    control.branch_on_values,
    world.randomness,
)


def network(seed: int) -> Case:
    """The network of a seed."""
    for attempt in range(100):
        rng = random.Random(f"network {seed} {attempt}")
        torch.manual_seed(rng.randrange(2**31))
        case = _composed(Draft(rng), seed)
        if case is not None:
            return case
    raise AssertionError(f"no network for seed {seed}")


def _composed(draft: Draft, seed: int) -> Case | None:
    rng = draft.rng
    layout = ""
    if draft.chance(0.25):
        layout = rng.choice(
            (
                "v.to(memory_format=torch.channels_last_3d)",
                "v.transpose(1, 2).contiguous().transpose(1, 2)",
                "v.transpose(3, 4)",
                "v[:, :1].expand_as(v)",
                "v.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)",
                "v[:, :, :, ::1]",
                "v.flip(2)",
            )
        )
    spec = Input("x", ("B", 3, "T0", 6, 6), 2, layout=layout, grad=draft.chance(0.06))
    example = Call(2, (rng.choice((3, 3, 4, 4, 5, 8)),), seed=0)
    (draft.scope["x"],) = tensors(Case("", "", "", (spec,), (), example), example)
    draft.scope["t"] = 1
    draft.say("body", "f = x")
    count = 0
    for _ in range(rng.choice((1, 2, 2, 3, 4, 6, 8))):
        for _ in range(8):
            kind = rng.choice(("conv",) * 5 + ("layer",) * 4 + ("line", "line", "branch", "again"))
            if _ADD[kind](draft):
                count += kind == "conv"
                break
    if not count and not _conv(draft):
        return None
    if draft.chance(0.25):
        programs._op(draft)
    if draft.chance(0.2):
        programs._apply(draft, rng.choice(_EXTRAS))
    if draft.chance(0.25):
        _conv(draft)
    if any(" t" in line for line in draft.parts["body"]):
        draft.parts["before"].append("t = 1")
    end = ("return f",) * 5 + (
        "return f.mean((3, 4))",
        "return f.flatten(1)",
        "return f, x",
        "return {'f': f}",
        "return f.mean((2, 3, 4))",
        "return [f, None]",
        "return f.unbind(2)",
        "return f.view(f.size(0), -1)",
    )
    draft.write("after", rng.choice(end))
    if not draft.fits("f", 20000):
        return None
    return _case(draft, seed, spec, example)


def conv_text(draft: Draft, channels: int, most: int = 6) -> tuple[str, int]:
    """A Conv3d of these input channels, as text, and its output channels."""
    rng = draft.rng
    kernel = rng.choice(
        (
            "3",
            "1",
            "(1, 3, 3)",
            "(3, 1, 1)",
            "(3, 3, 3)",
            "(2, 1, 1)",
            "(1, 1, 1)",
            "(1, 2, 3)",
            "(5, 1, 1)",
            "(2, 2, 2)",
            "(3, 1, 3)",
            "(3, 3, 1)",
            "2",
            "(1, 1, 3)",
            "(4, 3, 3)",
        )
    )
    groups, out = 1, rng.choice((2, 3, 4, most))
    if draft.chance(0.2):
        groups = rng.choice((channels, channels, 2, 3))
        out = groups * rng.choice((1, 1, 2))
    text = f"nn.Conv3d({channels}, {out}, {kernel}"
    if groups > 1:
        text += f", groups={groups}"
    if draft.chance(0.3):
        strides = ("2", "(1, 2, 2)", "(2, 1, 1)", "(1, 2, 1)", "(3, 1, 1)")
        text += f", stride={rng.choice(strides)}"
    if draft.chance(0.65):
        text += ", padding=" + rng.choice(
            (
                "1",
                "1",
                "(0, 1, 1)",
                "(1, 0, 0)",
                "(1, 1, 1)",
                "2",
                "(2, 0, 0)",
                "(1, 0, 2)",
                '"same"',
                '"valid"',
                "(2, 1, 1)",
            )
        )
    if draft.chance(0.15):
        text += ", dilation=" + rng.choice(("2", "(2, 1, 1)", "(1, 2, 2)", "(3, 1, 1)"))
    if draft.chance(0.2):
        text += ", bias=False"
    if draft.chance(0.15):
        text += f', padding_mode="{rng.choice(("reflect", "replicate", "circular", "zeros"))}"'
    return text + ")", out


def _conv(draft: Draft) -> bool:
    f = draft.get("f")
    if f.dim() < 2:
        return False
    text, out = conv_text(draft, f.size(1))
    wrapped = text
    if draft.chance(0.06):
        wrapped = draft.rng.choice(
            (
                "nn.utils.parametrizations.weight_norm({c})",
                "nn.utils.weight_norm({c})",
                "nn.utils.parametrizations.spectral_norm({c})",
                "{c}.requires_grad_(False)",
                "nn.Sequential({c}, nn.BatchNorm3d({n}), nn.ReLU(inplace=True))",
                "{c}.double().float()",
                "{c}.to(memory_format=torch.channels_last_3d)",
                "Own({c})",
                "Kept({n}, {c})",
            )
        ).format(c=text, n=out)
    elif draft.chance(0.3):
        wrapped = f"nn.Sequential({text}, nn.BatchNorm3d({out}))"
        if draft.chance(0.5):
            wrapped = wrapped[:-1] + ", nn.ReLU(inplace=True))"
    if "Own(" in wrapped:
        draft.say("prelude", _OWN)
    if "Kept(" in wrapped:
        draft.say("prelude", _KEPT)
    return _layer_text(draft, wrapped)


_OWN = """
class Own(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, v):
        return self.layer(v) + F.conv3d(v, self.layer.weight, padding=self.layer.padding,
            stride=self.layer.stride, dilation=self.layer.dilation, groups=self.layer.groups)
"""
_KEPT = """
class Kept(nn.Module):
    def __init__(self, n, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("mean", torch.zeros(n, 1, 1, 1))
    def forward(self, v):
        v = self.layer(v)
        if self.training:
            self.mean.mul_(0.9).add_(v.detach().mean((0, 2, 3, 4)).view_as(self.mean))
        return v - self.mean
"""


def _layer_text(draft: Draft, layer: str, call: str = "f = {m}(f)") -> bool:
    m = draft.name("m")
    value = draft.get("f")
    if not draft.say("init", f"self.{m} = {layer}"):
        return False
    if draft.say("body", call.format(m=f"self.{m}")) and draft.fits("f", 20000):
        if draft.get("f").dim() == 5:
            return True
        draft.parts["body"].pop()
    draft.parts["init"].pop()
    draft.scope["f"] = value
    return False


def _layer(draft: Draft) -> bool:
    rng = draft.rng
    _, c, _, h, w = draft.get("f").shape
    layer = rng.choice(_LAYERS.strip().splitlines()).format(
        c=c,
        h=h,
        w=w,
        n=rng.choice((2, 3, 4)),
        pool=rng.choice(("2", "(1, 2, 2)", "(2, 1, 1)", "(1, 3, 3)")),
        kernel=rng.choice(("3", "(1, 3, 3)", "(3, 1, 1)", "(3, 3, 1)")),
        stride=rng.choice(("1", "2", "(1, 2, 2)")),
        half=rng.choice(("0", "(0, 1, 1)", "(1, 0, 0)", "1")),
    )
    return _layer_text(draft, layer)


def _line(draft: Draft) -> bool:
    value = draft.get("f")
    line = draft.rng.choice(_LINES)
    body = list(draft.parts["body"])
    if line.startswith("f[") or "_(" in line or "inplace" in line:
        draft.scope["f"] = value.clone()
    if draft.say("body", line) and draft.fits("f", 20000) and draft.get("f").dim() == 5:
        return True
    draft.parts["body"], draft.scope["f"] = body, value
    return False


def _branch(draft: Draft) -> bool:
    """Branches that read one input, joined by cat or a sum, as in residual and inception blocks."""
    rng = draft.rng
    c = draft.get("f").size(1)
    names, lines = [], []
    state = {name: list(part) for name, part in draft.parts.items()}, dict(draft.scope)
    kernel = rng.choice(("1", "(1, 3, 3)", "(3, 1, 1)", "3"))
    for index in range(rng.choice((1, 2, 2, 3))):
        m, n = draft.name("b"), c if draft.chance(0.6) else rng.choice((2, 3))
        k = kernel if draft.chance(0.6) else rng.choice(("1", "(1, 3, 3)", "(3, 1, 1)", "3"))
        layer = f'nn.Conv3d({c}, {n}, {k}, padding="same"{", bias=False" * draft.chance(0.4)})'
        if draft.chance(0.3):
            layer = f"nn.Sequential({layer}, nn.BatchNorm3d({n}))"
        if names and draft.chance(0.1):
            m = names[0]
        else:
            draft.say("init", f"self.{m} = {layer}")
        names.append(m)
        lines.append(f"b{index} = self.{m}(f)")
        if draft.chance(0.15):
            lines.append(
                rng.choice(("f = f.relu_()", "f.mul_(0.5)", f"b{index}.relu_()", "f += 1"))
            )
    parts = [f"b{i}" for i in range(len(names))] + ["f"] * draft.chance(0.5)
    joined = rng.choice((f"torch.cat([{', '.join(parts)}], 1)", " + ".join(parts)))
    lines.append(f"f = {joined}")
    try:
        draft.scope["f"] = draft.get("f").clone()
    except RuntimeError:  # a view that was written where gradients are off
        draft.parts, draft.scope = state
        return False
    if draft.say("body", "\n".join(lines)) and draft.fits("f", 20000):
        return True
    draft.parts, draft.scope = state
    return False


def _again(draft: Draft) -> bool:
    """A layer that was used before, used again."""
    lines = [line for line in draft.parts["body"] if line.startswith("f = self.m")]
    if not lines:
        return False
    body, value = list(draft.parts["body"]), draft.get("f")
    if draft.say("body", draft.rng.choice(lines)) and draft.fits("f", 20000):
        return True
    draft.parts["body"], draft.scope["f"] = body, value
    return False


_ADD = {"conv": _conv, "layer": _layer, "line": _line, "branch": _branch, "again": _again}


def _case(draft: Draft, seed: int, spec: Input, example: Call) -> Case:
    rng = draft.rng
    parts = draft.parts
    pad = "    "
    lines = list(parts["prelude"])
    lines += ["class Net(nn.Module):", pad + "def __init__(self):", pad * 2 + "super().__init__()"]
    lines += [pad * 2 + line for line in parts["init"]]
    lines += [pad + "def forward(self, x):"]
    for name in ("before", "body", "after"):
        lines += [pad * 2 + line for line in parts[name]]
    source = "\n".join(lines).replace("SIZE", "x.size(2)") + "\n"
    builds = (
        ("Net().eval()",) * 5
        + ("Net()",) * 3
        + (
            "shaken(Net()).eval()",
            "Net().to(memory_format=torch.channels_last_3d).eval()",
            "Net().eval().requires_grad_(False)",
        )
    )
    build = rng.choice(builds)
    if "BatchNorm" in source and draft.chance(0.6):
        build = build.replace("shaken(Net())", "Net()").replace("Net()", "shaken(Net())")
    if "shaken" in build:
        source += _SHAKEN
    return Case(
        name=f"network{seed}",
        source=source,
        build=build,
        inputs=(spec,),
        calls=programs.calls(rng, example, cheap=False),
        example=example,
        given=not draft.chance(0.15),
        audited=draft.chance(0.12),
        dtype=rng.choice(("float32",) * 14 + ("float64", "bfloat16", "float16")),
    )


# Statistics and weights as after training, so that a folded BatchNorm is no identity.
_SHAKEN = """
def shaken(net):
    for p in [*net.parameters(), *net.buffers()]:
        if p.is_floating_point() and not isinstance(p, nn.parameter.UninitializedTensorMixin):
            p.data = p.data + 0.2 * torch.rand(p.shape)
    return net
"""
