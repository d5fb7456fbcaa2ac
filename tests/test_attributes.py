"""Parameters, buffers and numbers may stand where activations do: nothing takes them for nodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from fxtemporal.capture.capture import capture
from fxtemporal.ir.values import rank, shape
from tests.zoo import noise

Use = Callable[["Holder", Tensor], Tensor]


class Holder(nn.Module):
    """A loop over frames, and something made of parameters beside it."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.conv = nn.Conv2d(3, 4, 1)
        self.three = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.cell = nn.LSTMCell(4, 4)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.clip = nn.Parameter(torch.randn(1, 3, 5, 6, 6))
        self.frames = nn.Parameter(torch.randn(2, 5, 3, 6, 6))
        self.state = nn.Parameter(torch.randn(2, 4))
        self.rows = nn.Parameter(torch.randn(2, 5, 4))
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("count", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 1)
        return frames.mean() + self.use(self, x).mean()


def recurrence(m: Holder, x: Tensor) -> Tensor:
    h, c = m.state, m.state
    for t in range(x.size(1)):
        h, c = m.cell(m.rows[:, t], (h, c))
    return h + c


def states_alone(m: Holder, x: Tensor) -> Tensor:
    h, c = m.state, m.state
    for t in range(x.size(1)):
        h, c = m.cell(x[:, t].mean((2, 3)) @ m.state[:2, :3].T @ m.state, (h, c))
    return h


def growing(m: Holder, x: Tensor) -> Tensor:
    out = m.frames[:, :1]
    for t in range(x.size(1)):
        out = torch.cat([out, m.frames[:, t : t + 1] * 2], 1)
    return out


def running(m: Holder, x: Tensor) -> Tensor:
    total = m.frames[:, 0]
    for t in range(1, x.size(1)):
        total = torch.maximum(total, m.frames[:, t])
    return total


def clips(m: Holder, x: Tensor) -> Tensor:
    outs = [m.three(m.clip[:, :, t : t + 3]).flatten(1) for t in range(3)]
    return torch.stack(outs, 1)


def joined_clip(m: Holder, x: Tensor) -> Tensor:
    return m.three(torch.cat([x.transpose(1, 2), m.clip], 0))


USES: dict[str, Use] = {
    "view": lambda m, x: x * m.mean.view(1, 1, -1, 1, 1),
    "reshape": lambda m, x: x * m.mean.reshape(3, 1, 1),
    "expand": lambda m, x: x + m.mean[:, None, None].expand(3, 6, 6),
    "unflatten": lambda m, x: m.state.unflatten(1, (2, 2)),
    "flatten": lambda m, x: m.clip.flatten(1) + m.frames.flatten(2).sum(),
    "permute": lambda m, x: m.clip.permute(0, 2, 1, 3, 4).contiguous(),
    "contiguous": lambda m, x: F.conv2d(m.frames[0].contiguous(), m.conv.weight),
    "conv of a parameter": lambda m, x: m.three(m.clip),
    "padded parameter": lambda m, x: m.three(F.pad(m.clip, (0, 0, 0, 0, 2, 0))),
    "frames of a parameter": lambda m, x: torch.stack([m.conv(f) for f in m.frames.unbind(1)]),
    "norm of a parameter": lambda m, x: F.batch_norm(m.conv(m.frames[:, 0]), *m.state.detach()**2),
    "pool of a parameter": lambda m, x: F.max_pool3d(m.clip, (1, 2, 2)),
    "average of a parameter": lambda m, x: F.avg_pool3d(m.clip, (2, 1, 1)),
    "linear on a parameter": lambda m, x: F.linear(m.clip, torch.ones(2, 6)),
    "recurrent over a parameter": lambda m, x: m.gru(m.rows)[0],
    "windows of a parameter": lambda m, x: m.clip.unfold(2, 2, 1),
    "joined": lambda m, x: torch.cat([x, m.frames], 1),
    "squeezed": lambda m, x: m.three(m.clip[:, :, :1]).squeeze(2),
    "size of a parameter": lambda m, x: x.reshape(x.size(0), -1)[:, : m.clip.size(1)],
    "number tensor": lambda m, x: x / m.count,
    "number": lambda m, x: x * torch.tensor(2.0),
    "gate": lambda m, x: torch.where(m.frames > 0, m.frames, 0.0) + torch.maximum(m.frames, x),
    "recurrence": recurrence,
    "states alone": states_alone,
    "growing": growing,
    "running": running,
    "clips": clips,
    "joined clip": joined_clip,
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_a_parameter_stands_where_an_activation_may(name: str) -> None:
    model, x = Holder(USES[name]).eval(), noise(2, 5, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fxtemporal.audit(model, (x,))
        fast = fxtemporal.optimize(model, (x,), tune="static", progress=False)
    assert report.remarks
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert not [r for r in fxtemporal.report(fast).remarks if r.status == "failed"]


def test_the_shape_of_what_is_no_node_is_not_known() -> None:
    program = capture(Holder(USES["view"]), (noise(2, 5, 3, 6, 6),))
    view = next(n for n in program.graph.nodes if n.target == "view")
    op = program.op(view)
    assert op is not None
    assert shape(op.args["input"]) is None
    assert rank(op.args["input"]) is None
    assert rank(3) is None
