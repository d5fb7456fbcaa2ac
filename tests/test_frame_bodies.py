"""What people run on each frame today: transformers, gated and split channels, tiles, tokens."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxtemporal
from benchmarks._torchvision import torchvision_models
from benchmarks.measure import CountConvolutions
from fxtemporal import SpecializationError
from fxtemporal.analysis.families import families_of
from fxtemporal.capture.capture import capture
from tests.strictly import strictly
from tests.zoo import noise


class PerFrame(nn.Module):
    """``body`` on every frame of (B, T, ...)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[:, t]) for t in range(x.shape[1])], dim=1)


class Attention(nn.Module):
    """As timm writes it: q, k and v from one layer, heads moved forward."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 4, channels // 4)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        if self.by == "index":
            q, k, v = qkv[0], qkv[1], qkv[2]
        else:
            q, k, v = qkv.unbind(0)
        if self.by == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(dim=-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, channels))


class Tokens(nn.Module):
    """A class token in front of the patches, positions added, an encoder behind."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = einops.rearrange(self.patches(x), "b c h w -> b (h w) c")
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], dim=1) + self.positions
        return self.encoder(y)[:, 0]


class Halves(nn.Module):
    """Channels in halves: a gate, and a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        y = torch.cat((a, b * torch.sigmoid(a)), dim=1)
        batch, channels, height, width = y.size()
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return y.view(batch, channels, height, width)


class WithContext(nn.Module):
    """A map of coordinates made in each frame, and one of the batch from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        row = torch.linspace(-1, 1, x.shape[-1]).expand(x.shape[0], 1, x.shape[-2], -1)
        return self.conv(torch.cat([x, row], dim=1))


class Residual(nn.Module):
    """torchvision's stochastic depth, which is under ``torch.fx.wrap``, leaves eval mode alone."""

    def __init__(self) -> None:
        super().__init__()
        torchvision_models()
        ops = importlib.import_module("torchvision.ops")
        self.conv, self.drop = nn.Conv2d(3, 3, 3, padding=1), ops.StochasticDepth(0.2, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))


BODIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "attention by index": (lambda: Attention("index"), (7, 16)),
    "attention by unbind": (lambda: Attention("unbind"), (7, 16)),
    "fused attention": (lambda: Attention("fused"), (7, 16)),
    "tokens": (Tokens, (3, 8, 8)),
    "halves": (Halves, (3, 8, 8)),
    "context": (WithContext, (3, 8, 8)),
    "wrapped by a library": (Residual, (3, 8, 8)),
}


@pytest.mark.parametrize(("build", "frame"), BODIES.values(), ids=BODIES.keys())
def test_the_whole_body_runs_once(build: Any, frame: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = PerFrame(build()).eval()
    result = strictly(model, (noise(2, 4, *frame),), tune="static")
    (remark,) = fxtemporal.report(result).by_status("applied")
    assert "left_because" not in remark.detail
    assert fxtemporal.report(result).frontend == "fx"
    for batch, frames in ((2, 4), (3, 4), (1, 4), (2, 6)):
        x = noise(batch, frames, *frame)
        with torch.no_grad():
            wide = copy.deepcopy(model).double()(x.double())
            own = float((model(x) - wide).abs().max())
            error = float((result(x) - wide).abs().max())
        assert error <= max(4 * own, 2e-6 * float(wide.abs().max()))
    fixed = [entry.expression for entry in fxtemporal.report(result).specializations]
    assert "x.shape[1]" not in fixed


def test_rows_and_columns_of_tiles() -> None:
    class Tiles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            rows = []
            for i in range(0, 12, 4):
                row = [self.conv(x[:, :, i : i + 4, j : j + 4]) for j in range(0, 8, 4)]
                rows.append(torch.cat(row, dim=3))
            return torch.cat(rows, dim=2)

    model = Tiles().eval()
    result = strictly(model, (noise(2, 3, 12, 8),), tune="static")
    for batch in (2, 3):
        x = noise(batch, 3, 12, 8)
        with CountConvolutions() as counter:
            mine = result(x)
        torch.testing.assert_close(mine, model(x))
        assert counter.count == 1


def test_an_encoder_that_drops_out_is_refused() -> None:
    model = PerFrame(Tokens()).train()
    x = noise(2, 3, 3, 8, 8)
    result = strictly(model, (x,), tune="static")
    codes = [
        entry["code"]
        for remark in fxtemporal.report(result).remarks
        for entry in remark.detail.get("left_because", ())
    ]
    assert "randomness" in codes


def test_a_custom_part_in_an_encoder_is_not_taken_for_torchs() -> None:
    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    body = Tokens()
    body.encoder.layers[0].linear1 = Squared(16, 32)
    model = PerFrame(body).eval()
    x = noise(2, 3, 3, 8, 8)
    result = strictly(model, (x,), tune="static")
    torch.testing.assert_close(result(x), model(x))
    assert sum(n.op == "call_module" and "encoder" in n.target for n in result.graph.nodes) == 3


def test_a_function_that_the_user_wrapped_stays_one_node() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([by_its_data(self.conv(x[:, t])) for t in range(x.size(1))], 1)

    model = Opaque().eval()
    x = noise(2, 3, 3, 8, 8)
    result = strictly(model, (x,), tune="static")
    torch.testing.assert_close(result(x), model(x))
    assert sum(node.target is by_its_data for node in result.graph.nodes) == 3


@fx.wrap
def by_its_data(x: Tensor) -> Tensor:
    return x * 2 if float(x.detach().sum()) > 0 else x * 3


def test_families_of_a_split_are_of_one_length() -> None:
    program = capture(PerFrame(Halves()), (noise(2, 4, 3, 8, 8),))
    names = {family.name for family in families_of(program).all if len(family.lanes) == 4}
    assert {"conv2d", "chunk", "sigmoid", "cat"} <= names


class Gates(nn.Module):
    """A recurrent loop that splits its gates at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3 + 4, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), 4, x.size(3), x.size(4))
        for t in range(x.size(1)):
            i, f, o, g = self.conv(torch.cat([x[:, t], h], dim=1)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


@pytest.mark.parametrize("build", [Gates, lambda: PerFrame(Halves()), lambda: PerFrame(Tokens())])
def test_torch_compile_takes_the_result_in_one_graph(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    x = noise(2, 3, 3, 8, 8)
    result = strictly(model, (x,), tune="static")
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(result, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


COMPUTED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "flatten": lambda f, n: f.flatten(n - 3, n - 2),
    "movedim": lambda f, n: f.movedim((n - 4,), (1,)),
    "transpose": lambda f, n: f.transpose(n - 4, n - 2),
    "permute": lambda f, n: f.permute((n - 3, n - 4, n - 2)),
    "squeeze": lambda f, n: f.squeeze(n - 4),
    "sum": lambda f, n: f.sum(n - 4),
    "cat": lambda f, n: torch.cat([f, f], n - 4),
    "chunk": lambda f, n: f.chunk(2, n - 4)[0],
    "select": lambda f, n: f.select(n - 4, 0),
    "pad": lambda f, n: F.pad(f, (n - 3, n - 4)),
    "layer_norm": lambda f, n: F.layer_norm(f, f.shape[1:]),
    "layer_norm over samples": lambda f, n: F.layer_norm(f, f.shape),
    "attention": lambda f, n: F.scaled_dot_product_attention(f, f, f, scale=n**-0.5),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_arguments_that_are_computed_from_sizes(name: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            frames = range(x.shape[1])
            return torch.stack([COMPUTED[name](x[:, t].tanh(), x.shape[-1]) for t in frames], 1)

    model, x = Net(), noise(2, 5, 3, 4)
    result = strictly(model, (x,), tune="static")
    for given in (x, noise(3, 5, 3, 4), noise(2, 5, 4, 4)):
        torch.testing.assert_close(result(given), model(given))
    for given in (noise(2, 7, 3, 4), noise(2, 5, 3, 3)):
        with contextlib.suppress(SpecializationError):  # refused, or right
            found = result(given)
            torch.testing.assert_close(found, model(given))
