"""What overlapping clips repeat is computed once a frame: numbers, and frames convolved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import einops
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxtemporal
from tests.strictly import strictly
from tests.zoo import noise

Forward = Callable[["Clips", Tensor], Any]
RULE = "overlapping-windows"


class Clips(nn.Module):
    """``forward`` is one of the functions below; ``net`` runs on frames, ``head`` on a clip."""

    def __init__(self, forward: Forward, window: int = 4, step: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
        self.head = nn.Conv1d(5, 6, 2)
        self.window, self.step = window, step
        self.run = forward

    def starts(self, frames: int) -> range:
        return range(0, frames - self.window + 1, self.step)

    def tail(self, features: Tensor) -> Tensor:
        """(B, w, features) -> (B, 6)."""
        return self.head(features.transpose(1, 2)).mean(2)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class CountFrames(TorchDispatchMode):
    """How many frames 2-D convolutions see."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution and args[0].dim() == 4:
            self.frames += args[0].shape[0]
        return func(*args, **(kwargs or {}))


def frames_seen(model: nn.Module, x: Tensor) -> int:
    with CountFrames() as counter, torch.no_grad():
        model(x.clone())
    return counter.frames


def video(batch: int = 2, frames: int = 12, *, first: bool = False) -> Tensor:
    shape = (3, frames) if first else (frames, 3)
    return noise(batch, *shape, 6, 6)


def optimized(model: nn.Module, x: Tensor, **settings: Any) -> Any:
    return strictly(model, (x,), tune="static", **settings)


def assert_same(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    """Against float64; the original's own error is the yardstick."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        got, own = fast(x.clone()), model(x.clone())
    leaves = torch.utils._pytree.tree_leaves
    for e, g, o in zip(leaves(exact), leaves(got), leaves(own), strict=True):
        assert g.shape == e.shape
        bound = 4 * (o - e).abs().max() + 1e-6 * e.abs().max()
        assert (g - e).abs().max() <= bound


def remark(fast: nn.Module) -> Any:
    found = [r for r in fxtemporal.report(fast).remarks if r.rule == RULE]
    return found[0] if found else None


# -- how clips are written -------------------------------------------------------------------------


def nested(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        clip = x[:, i : i + self.window]
        features = [self.net(clip[:, t]) for t in range(self.window)]
        outs.append(self.tail(torch.stack(features, 1)))
    return torch.stack(outs, 1)


def flattened(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        clip = x[:, i : i + self.window]
        features = self.net(clip.flatten(0, 1))
        outs.append(self.tail(features.unflatten(0, (clip.size(0), self.window))))
    return torch.stack(outs, 1)


def viewed(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        clip = x.narrow(1, i, self.window)
        b, t, c, h, w = clip.shape
        outs.append(self.tail(self.net(clip.reshape(b * t, c, h, w)).view(b, t, -1)))
    return torch.stack(outs, 1)


def viewed_whatever(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        clip = x[:, i : i + self.window]
        b, t, c, h, w = clip.shape
        outs.append(self.tail(self.net(clip.reshape(-1, c, h, w)).reshape(b, t, -1)))
    return torch.stack(outs, 1)


def viewed_by_numbers(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        clip = x[:, i : i + self.window]
        features = self.net(clip.reshape(-1, 3, 6, 6))
        outs.append(self.tail(features.reshape(-1, self.window, 5)))
    return torch.stack(outs, 1)


def rearranged(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        frames = einops.rearrange(x[:, i : i + self.window], "b t c h w -> (b t) c h w")
        features = einops.rearrange(self.net(frames), "(b t) f -> b t f", t=self.window)
        outs.append(self.tail(features))
    return torch.stack(outs, 1)


def time_first(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        clip = x[:, i : i + self.window].transpose(0, 1)
        features = self.net(clip.flatten(0, 1)).unflatten(0, (self.window, -1))
        outs.append(self.tail(features.transpose(0, 1)))
    return torch.stack(outs, 1)


def unfolded(self: Clips, x: Tensor) -> Tensor:
    clips = x.unfold(1, self.window, self.step).movedim(-1, 2)
    features = self.net(clips.flatten(0, 2))
    return self.tail(features.unflatten(0, (-1, self.window))).unflatten(0, clips.shape[:2])


def unfolded_and_listed(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for clip in x.unfold(1, self.window, self.step).unbind(1):
        features = [self.net(clip[..., t]) for t in range(self.window)]
        outs.append(self.tail(torch.stack(features, 1)))
    return torch.stack(outs, 1)


def recurrent(self: Clips, x: Tensor) -> Tensor:
    outs = []
    for i in self.starts(x.size(1)):
        state = x.new_zeros(x.size(0), 5)
        for t in range(self.window):
            state = torch.tanh(state + self.net(x[:, i : i + self.window][:, t]))
        outs.append(state)
    return torch.stack(outs, 1)


def maps_and_features(self: Clips, x: Tensor) -> Any:
    maps, outs = [], []
    for i in self.starts(x.size(1)):
        clip = x[:, i : i + self.window]
        feature_maps = self.net[0](clip.flatten(0, 1))
        maps.append(feature_maps.unflatten(0, (-1, self.window)).mean(1))
        features = self.net[1:](feature_maps * 2)
        outs.append(self.tail(features.unflatten(0, (-1, self.window))))
    return torch.stack(maps, 1), torch.stack(outs, 1)


SPELLINGS = [
    nested,
    flattened,
    viewed,
    viewed_whatever,
    viewed_by_numbers,
    rearranged,
    time_first,
    unfolded,
    unfolded_and_listed,
    recurrent,
    maps_and_features,
]


@pytest.mark.parametrize("forward", SPELLINGS)
def test_each_frame_is_computed_once(forward: Forward) -> None:
    model, x = Clips(forward).eval(), video()
    fast = optimized(model, x)
    assert remark(fast).status == "applied", str(fxtemporal.report(fast))
    assert frames_seen(model, x) == 2 * 5 * 4
    assert frames_seen(fast, x) == 2 * 12
    assert frames_seen(fast, video(3)) == 3 * 12
    for batch in (1, 2, 3):
        assert_same(model, fast, video(batch))


def test_the_remark_says_what_was_saved() -> None:
    found = remark(optimized(Clips(nested).eval(), video()))
    assert found.target.startswith("net")
    assert found.detail["frames_before"] == 20
    assert found.detail["frames"] == 12
    assert (found.detail["clips"], found.detail["length"], found.detail["step"]) == (5, 4, 2)
    assert "tests/test_overlapping_windows.py:" in found.location


@pytest.mark.parametrize("forward", [nested, flattened, unfolded])
def test_channels_before_time(forward: Forward) -> None:
    def turned(self: Clips, x: Tensor) -> Any:
        return forward(self, x.transpose(1, 2))

    model, x = Clips(turned).eval(), video(first=True)
    fast = optimized(model, x)
    assert frames_seen(fast, x) == 2 * 12
    for batch in (1, 2, 3):
        assert_same(model, fast, video(batch, first=True))


def test_the_depth_of_a_volume() -> None:
    def forward(self: Clips, x: Tensor) -> Tensor:
        outs = []
        for i in self.starts(x.size(2)):
            slab = x[:, :, i : i + self.window]
            features = [self.net(slab[:, :, t]) for t in range(self.window)]
            outs.append(self.tail(torch.stack(features, 1)))
        return torch.stack(outs, 1)

    model, x = Clips(forward).eval(), video(first=True)
    fast = optimized(model, x)
    assert frames_seen(fast, x) == 2 * 12
    assert_same(model, fast, video(3, first=True))


def test_clips_that_leave_frames_out() -> None:
    model, x = Clips(nested, window=4, step=3).eval(), video(frames=12)  # frames 0..9
    fast = optimized(model, x)
    assert frames_seen(fast, x) == 2 * 10
    assert_same(model, fast, video(1))


def test_a_number_of_frames_that_nothing_fixed_stays_free() -> None:
    model = Clips(unfolded).eval()
    fast = optimized(model, video())
    for frames in (4, 5, 9, 16):
        assert frames_seen(fast, video(frames=frames)) == 2 * (frames - frames % 2)
        assert_same(model, fast, video(frames=frames))


def test_sizes_that_a_view_spells_out_are_held() -> None:
    fast = optimized(Clips(viewed_by_numbers).eval(), video())
    with pytest.raises(fxtemporal.SpecializationError, match=r"size"):
        fast(noise(2, 12, 3, 12, 12))


def test_gradients_are_the_same() -> None:
    model, x = Clips(flattened).eval().double(), video().double()
    fast = optimized(model, x)
    assert remark(fast).status == "applied"
    found = []
    for module in (model, fast):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        found.append([given.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# -- what has to stay ------------------------------------------------------------------------------


def untouched(forward: Forward, x: Tensor, **sizes: int) -> None:
    model = Clips(forward, **sizes).eval()
    twin = copy.deepcopy(model)
    fast = optimized(model, x)
    assert remark(fast) is None
    expected, got = twin(x.clone()), fast(x.clone())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_clips_that_do_not_overlap() -> None:
    untouched(flattened, video(), window=4, step=4)
    untouched(flattened, video(), window=2, step=4)


def test_statistics_are_those_of_all_clips() -> None:
    model = Clips(unfolded).train()
    twin, fast = copy.deepcopy(model), optimized(model, video())
    assert remark(fast).detail["ops"] == 1  # the convolution, and not what follows it
    torch.testing.assert_close(fast(video()), twin(video()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_mode_switched_on_afterwards_is_refused() -> None:
    fast = optimized(Clips(unfolded).eval(), video())
    with pytest.raises(fxtemporal.SpecializationError, match="training"):
        fast.train()(video())


def test_frames_that_meet_others_of_their_clip_first() -> None:
    def centred(self: Clips, x: Tensor) -> Tensor:
        clips = x.unfold(1, self.window, self.step).movedim(-1, 2)
        centre = (clips - clips.mean(2, keepdim=True)).flatten(0, 2)
        return self.tail(self.net(centre).unflatten(0, (-1, self.window)))

    untouched(centred, video())


def test_a_factor_for_each_clip() -> None:
    def weighed(self: Clips, x: Tensor) -> Tensor:
        clips = x.unfold(1, self.window, self.step).movedim(-1, 2).flatten(0, 2)
        weights = torch.linspace(0, 1, clips.shape[0]).view(-1, 1, 1, 1)
        return self.net(clips * weights)

    untouched(weighed, video())


def test_a_random_body_is_left() -> None:
    def dropped(self: Clips, x: Tensor) -> Tensor:
        clips = x.unfold(1, self.window, self.step).movedim(-1, 2).flatten(0, 2)
        return torch.nn.functional.dropout(clips, 0.5).sum() * 0 + clips.sum()

    fast = optimized(Clips(dropped).eval(), video())
    assert remark(fast) is None


# -- writes ----------------------------------------------------------------------------------------


def written_frames(self: Clips, x: Tensor) -> Tensor:
    frames = (x * 2).unfold(1, self.window, self.step).movedim(-1, 2).flatten(0, 2)
    frames.mul_(2)
    return self.net(frames)


def written_before(self: Clips, x: Tensor) -> Tensor:
    base = x * 2
    clips = base.unfold(1, self.window, self.step)
    base += 1
    return self.net(clips.movedim(-1, 2).flatten(0, 2))


def written_and_read(self: Clips, x: Tensor) -> Any:
    frames = x.unfold(1, self.window, self.step).movedim(-1, 2).flatten(0, 2)
    maps = self.net[0](frames)
    before = maps.sum()
    after = maps.relu_()
    return before, after.mean((2, 3)), maps.mean((2, 3))


def written_outside(self: Clips, x: Tensor) -> Any:
    frames = x.unfold(1, self.window, self.step).movedim(-1, 2).flatten(0, 2)
    maps = self.net[0](frames)
    rows = maps.unflatten(0, (x.size(0), -1))
    rows *= torch.arange(20.0).view(20, 1, 1, 1)
    return maps.tanh(), rows


def summed_outside(self: Clips, x: Tensor) -> Any:
    frames = x.unfold(1, self.window, self.step).movedim(-1, 2).flatten(0, 2)
    maps = torch.sin(self.net[0](frames))
    return maps.view(-1).add_(1).sum(), maps.exp()


@pytest.mark.parametrize(
    "forward",
    [written_frames, written_before, written_and_read, written_outside, summed_outside],
)
def test_writes_are_seen_by_whoever_saw_them(forward: Forward) -> None:
    model = Clips(forward).eval()
    fast = optimized(model, video(), verify=False)
    for batch in (1, 2, 3):
        if forward is not written_outside or batch == 2:
            assert_same(model, fast, video(batch))


def test_twice_over_changes_nothing() -> None:
    model, x = Clips(nested).eval(), video()
    fast = optimized(model, x)
    again = optimized(fast, x)
    assert remark(again) is None
    assert frames_seen(again, x) == frames_seen(fast, x)
    assert_same(model, again, x)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    forward=st.sampled_from(SPELLINGS),
    window=st.integers(2, 5),
    step=st.integers(1, 5),
    extra=st.integers(0, 6),
    batch=st.integers(1, 3),
)
def test_any_window_and_step(
    forward: Forward, window: int, step: int, extra: int, batch: int
) -> None:
    model, x = Clips(forward, window, step).eval(), video(batch, window + extra)
    fast = optimized(model, x, verify=False)
    clips = extra // step + 1
    covered = (clips - 1) * min(step, window) + window
    assert frames_seen(fast, x) == batch * covered
    assert_same(model, fast, x)
    assert_same(model, fast, video(batch % 3 + 1, window + extra))
