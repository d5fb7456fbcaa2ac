"""What draws by the order of memory, or shows it, finds what conv3d leaves there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal

LAST = torch.channels_last_3d
NETS: dict[str, Callable[[], nn.Module]] = {
    "spatial": lambda: nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)), nn.Dropout(0.5)),
    "temporal": lambda: nn.Sequential(nn.Conv3d(3, 4, (3, 1, 1)), nn.ReLU(), nn.AlphaDropout(0.5)),
    "pointwise": lambda: nn.Sequential(nn.Conv3d(3, 4, 1, 2), nn.Dropout3d(0.5), nn.Dropout(0.5)),
    "same": lambda: nn.Sequential(nn.Conv3d(3, 4, (1, 5, 3), padding="same"), nn.Dropout(0.5)),
    "two": lambda: nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU(), nn.Conv3d(4, 4, (3, 1, 1)), nn.Dropout(0.5)
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3)), nn.AvgPool3d((2, 1, 1)), nn.Dropout(0.5)
    ),
    "max": lambda: nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3)), nn.MaxPool3d((1, 2, 2)), nn.Dropout(0.5)
    ),
    "classifier": lambda: nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.5)
    ),
}


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return maps + 0.1 * torch.randn_like(maps)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1))
        self.b = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(self.a(x).relu())
        return nn.functional.dropout(x, 0.3, self.training)


NETS |= {"noisy": Noisy, "residual": Residual}
CLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last_3d": lambda x: x.contiguous(memory_format=LAST),
    "frames first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], 4)[..., ::2],
}


def drawn(model: nn.Module, clip: Tensor) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        out: Tensor = model(clip)
    return out


def assert_alike(result: nn.Module, model: nn.Module, clip: Tensor, layout: bool = True) -> None:
    mine, theirs = drawn(result, clip), drawn(model, clip)
    torch.testing.assert_close(mine, theirs)
    if layout:
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("last", [False, True], ids=["weights", "weights last"])
@pytest.mark.parametrize("name", NETS)
def test_without_example_inputs(name: str, last: bool, clip: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    model = model.to(memory_format=LAST) if last else model
    x = CLIPS[clip](torch.randn(2, 3, 6, 8, 8))
    for training in (True, False):
        if name == "residual":  # reads its mode
            model.train(training)
        result = fxtemporal.optimize(model, None, tune="static", progress=False)
        laid = any("lays_out" in n.name or "among" in n.name for n in result.graph.nodes)
        assert laid == (name != "classifier")  # whose noise is drawn for a flat tensor
        model.train(training)
        # What conv3d makes of a layout that nobody saw is known where nothing stands before it.
        layout = clip == "contiguous" or name in ("spatial", "temporal", "pointwise", "same")
        assert_alike(result.train(training), model, x, layout)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval and then train"])
@pytest.mark.parametrize("name", NETS)
def test_with_example_inputs(name: str, training: bool, clip: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]().train(training or name == "residual")
    x = CLIPS[clip](torch.randn(2, 3, 6, 8, 8))
    passes = ["conv3d-forms", "pool3d-forms"]
    result = fxtemporal.optimize(model, (x,), passes=passes, tune="static", progress=False)
    assert any(node.name.startswith(("conv3d_", "avg_", "max_")) for node in result.graph.nodes)
    assert_alike(result.train(), model.train(), x)
    again = fxtemporal.optimize(result, (x,), passes=passes, tune="static", progress=False)
    assert len(again.graph.nodes) == len(result.graph.nodes)


def test_numbers_alone_are_laid_out_nowhere() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU(), nn.Conv3d(4, 4, (3, 1, 1)), nn.Flatten(1)
    )
    result = fxtemporal.optimize(model, None, tune="static", progress=False)
    names = {str(node.name) for node in result.graph.nodes}
    assert {"conv3d_spatial", "conv3d_temporal"} <= names
    assert not any("lays_out" in name or "among" in name for name in names)


class Unfakeable(nn.Module):
    """A norm whose ``momentum=None`` asks for a number, so that no shape behind it is known."""

    def __init__(self, ends: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(3, momentum=None)
        self.conv = nn.Conv3d(3, 4, (1, 3, 3), padding=(1, 0, 0))
        self.ends = ends

    def forward(self, x: Tensor) -> object:
        return self.ends(self.conv(self.norm(x)))


@pytest.mark.parametrize(
    "ends",
    [
        lambda maps: maps.unbind(2),
        lambda maps: {"all": maps, "halves": maps.chunk(2, 1)},
        lambda maps: (maps.split(3, 2), maps.mean(1)),
        lambda maps: [maps[:, :, t] for t in range(3)],
    ],
)
def test_views_that_go_out_behind_unknown_shapes(ends: Callable[[Tensor], object]) -> None:
    model = Unfakeable(ends)
    x = torch.randn(2, 3, 4, 8, 8)
    result = fxtemporal.optimize(model, (x,), tune="static", progress=False)
    assert any(node.name.startswith("conv3d_spatial") for node in result.graph.nodes)
    mine, theirs = (torch.utils._pytree.tree_leaves(m(x)) for m in (result, model))
    assert [out.stride()[-2:] for out in mine] == [out.stride()[-2:] for out in theirs]
    torch.testing.assert_close(mine, theirs)


class CausalBehindUnknownShapes(nn.Module):
    """Frames are padded in time first, so that one frame is shorter than the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(3, momentum=None)
        self.conv = nn.Conv3d(3, 4, (3, 1, 1))

    def forward(self, x: Tensor) -> object:
        return self.conv(nn.functional.pad(self.norm(x), (0, 0, 0, 0, 2, 0))).unbind(2)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_clip_shorter_than_the_kernel(frames: int) -> None:
    model = CausalBehindUnknownShapes()
    x = torch.randn(2, 3, frames, 4, 4)
    for example in ((x,), None):
        result = fxtemporal.optimize(model, example, tune="static", progress=False)
        mine, theirs = result(x), model(x)
        torch.testing.assert_close(mine, theirs)
        assert [out.stride() for out in mine] == [out.stride() for out in theirs]


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("shuffle", [nn.PixelUnshuffle(2), nn.PixelShuffle(2)])
def test_an_op_that_takes_some_layouts_only(shuffle: nn.Module, example: bool) -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), shuffle).eval()
    clip = torch.rand(2, 3, 4, 6, 6)
    given = (clip,) if example else None
    result = fxtemporal.optimize(model, given, tune="static", verify=False)
    assert fxtemporal.report(result).by_status("applied")
    torch.testing.assert_close(result(clip), model(clip))


def test_a_view_of_fewer_dimensions_keeps_its_gaps() -> None:
    """Gaps between strides come back only if the form's result is laid out before it is cut."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(3, 2, 2)
            self.conv = nn.Conv3d(2, 2, 1, padding=(1, 0, 2), padding_mode="reflect")

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.conv(self.up(x))[1].unbind(2)

    model = Cut().to(memory_format=torch.channels_last_3d).eval()
    x = torch.randn(2, 3, 4, 5, 6)
    fast = fxtemporal.optimize(model, (x,), tune="static")
    assert fxtemporal.report(fast).by_status("applied")
    assert [y.stride() for y in fast(x)] == [y.stride() for y in model(x)]


def test_a_flatten_that_may_be_a_view_has_no_layout_of_its_own() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(4, 2, (1, 2, 2), stride=(2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(1, 2)

    model = Flat().eval()
    fast = fxtemporal.optimize(model, None, tune="static")
    assert fxtemporal.report(fast).by_status("applied")
    for frames in (1, 2, 5):
        x = torch.randn(2, 4, frames, 6, 6)
        assert fast(x).stride() == model(x).stride()


def test_a_convolution_that_torch_computes_wrongly_gets_a_contiguous_input() -> None:
    """In bfloat16, one kernel a channel, one frame, padded in time: wrong in channels_last_3d."""
    model = nn.Sequential(nn.Conv3d(3, 6, (1, 1, 2)), nn.Conv3d(6, 12, 2, groups=6, padding=1))
    model = model.to(torch.bfloat16).eval()
    x = torch.randn(2, 3, 2, 4, 5, dtype=torch.bfloat16)
    for example in ((x,), None):
        fast = fxtemporal.optimize(model, example, tune="static")
        for frames in (1, 2, 3):
            clip = torch.randn(2, 3, frames, 4, 5, dtype=torch.bfloat16)
            torch.testing.assert_close(fast(clip), model(clip), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("write", [lambda a: a.zero_(), lambda a: a.sign_(), lambda a: a.mul_(2)])
@pytest.mark.parametrize("example", [True, False])
def test_a_write_into_a_view_that_a_layout_makes_a_copy(write: Any, example: bool) -> None:
    """``flatten`` of a contiguous tensor is a view, whatever op writes into it."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 3, (1, 1, 2), padding=(2, 0, 0))
            self.last = nn.Conv3d(3, 2, (2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            f = self.conv(x)
            write(f.flatten(1))
            return self.last(f)

    model = Writes().eval()
    given = (torch.randn(2, 3, 4, 5, 5),) if example else None
    fast = fxtemporal.optimize(model, given, tune="static")
    for frames in (1, 4, 7):
        x = torch.randn(2, 3, frames, 5, 5)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.to(memory_format=LAST),
        lambda y: y.contiguous(memory_format=LAST),
        lambda y: y.clone(memory_format=LAST),
        lambda y: torch.zeros_like(y, memory_format=LAST) + y,
        lambda y: y.to(torch.float32, memory_format=torch.preserve_format),
        lambda y: y.contiguous(),
    ],
)
@pytest.mark.parametrize("clip", CLIPS)
def test_a_layout_that_the_forward_asks_for(change: Callable[[Tensor], Tensor], clip: str) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv3d(3, 4, (1, 3, 3))
            self.last = nn.Conv3d(4, 2, (1, 1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(change(self.first(x)))  # type: ignore[no-any-return]

    model = Asks().eval()
    x = CLIPS[clip](torch.randn(2, 3, 6, 8, 8))
    result = fxtemporal.optimize(model, None, tune="static", progress=False)
    assert_alike(result, model, x, clip == "contiguous")


class Joined(nn.Module):
    """A channels-last clip beside a convolution that may be contiguous: torch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv3d(3, 2, (2, 1, 1), padding="same")
        self.last = nn.Conv3d(5, 2, (1, 2, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = nn.functional.pad(x, (0, 0, 0, 0, 2, 0))
        return self.last(torch.cat([y, self.side(y)], 1)).unbind(2)  # type: ignore[no-any-return]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("clip", CLIPS)
def test_views_of_a_clip_in_the_example_s_layout(clip: str, threads: int) -> None:
    """With one thread torch takes another kernel, which gives another layout."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Joined().eval()
        x = CLIPS[clip](torch.randn(2, 3, 4, 6, 6))
        result = fxtemporal.optimize(model, (x,), tune="static", progress=False)
        for mine, theirs in zip(result(x), model(x), strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.stride() == theirs.stride()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_weights_that_are_channels_last_where_sizes_of_one_leave_a_choice(groups: int) -> None:
    model = nn.Sequential(
        nn.AvgPool3d((2, 1, 1), 1),
        nn.Conv3d(6, 6, 2, groups=groups),
        nn.Conv3d(6, 6, (2, 1, 1), groups=6),
    )
    model = model.to(memory_format=LAST).eval()
    result = fxtemporal.optimize(model, None, tune="static", progress=False)
    assert_alike(result, model, torch.randn(2, 6, 4, 5, 5))
