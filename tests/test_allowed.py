"""Loops that are re-rolled although that changes the result, because the user allowed it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal.passes import DEFAULT_PASSES
from fxtemporal.passes.time_distribute import TimeDistribute
from tests.zoo import noise

BATCHNORM, RANDOMNESS = "training-batchnorm", "randomness"


class Frames(nn.Module):
    """(B, T, 3, H, W) -> (B, T, 4): ``layer`` stands behind the convolution."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x[:, t]) for t in range(x.size(1))], 1)


def by_hand(model: Frames, x: Tensor) -> Tensor:
    return model.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def clip(batch: int = 2, frames: int = 5) -> Tensor:
    return noise(batch, frames, 3, 8, 8)


def optimized(model: nn.Module, allow: Sequence[str], **settings: Any) -> Any:
    passes = [TimeDistribute(allow), *DEFAULT_PASSES]
    return fxtemporal.optimize(model, (clip(),), passes=passes, tune="static", **settings)


@pytest.mark.parametrize(
    ("layer", "allow"),
    [
        (nn.BatchNorm2d(4), [BATCHNORM]),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), [BATCHNORM]),
        (nn.Dropout(0.5), [RANDOMNESS]),
        (nn.Dropout2d(0.5), [RANDOMNESS]),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3)), [BATCHNORM, RANDOMNESS]),
    ],
    ids=["BatchNorm2d", "InstanceNorm2d", "Dropout", "Dropout2d", "both"],
)
@pytest.mark.parametrize("batch", [2, 3])
def test_what_is_allowed_is_batched_as_by_hand(
    layer: nn.Module, allow: list[str], batch: int
) -> None:
    model = Frames(copy.deepcopy(layer)).train()
    twin, fast = copy.deepcopy(model), optimized(model, allow)
    (remark,) = [r for r in fxtemporal.report(fast).remarks if r.rule == TimeDistribute.name]
    assert remark.status == "applied"
    assert {reason["code"] for reason in remark.detail["allowed"]} == set(allow)
    torch.manual_seed(3)
    got = fast(clip(batch))
    torch.manual_seed(3)
    torch.testing.assert_close(got, by_hand(twin, clip(batch)))
    torch.testing.assert_close(fast.state_dict(), twin.state_dict())
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_report_says_that_the_numbers_differ() -> None:
    report = fxtemporal.report(optimized(Frames(nn.BatchNorm2d(4)).train(), [BATCHNORM]))
    assert report.comparison.exact is False
    assert report.comparison.relative_error > 1e-3


def test_the_model_is_left_alone() -> None:
    model = Frames(nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    optimized(model, [BATCHNORM])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_one_code_does_not_allow_another() -> None:
    fast = optimized(Frames(nn.BatchNorm2d(4), nn.Dropout(0.5)).train(), [RANDOMNESS])
    (remark,) = [r for r in fxtemporal.report(fast).remarks if r.rule == TimeDistribute.name]
    assert BATCHNORM in {reason["code"] for reason in remark.detail["left_because"]}


def test_an_exact_loop_stays_exact() -> None:
    fast = optimized(Frames(nn.BatchNorm2d(4)).eval(), [BATCHNORM, RANDOMNESS])
    report = fxtemporal.report(fast)
    assert report.comparison.exact
    assert report.comparison.equal
    assert "allowed" not in report.remarks[0].detail


class ByLength(Frames):
    """Doubled from the eighth frame on, which shows at no smaller number of frames."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.net(x[:, t]) for t in range(x.size(1))]
        return torch.stack(outputs, 1) * (1 if len(outputs) < 8 else 2)


@pytest.mark.parametrize("layers", [(), (nn.Dropout(0.5),)], ids=["exact", "dropout"])
def test_another_number_of_frames_is_right_or_refused(layers: Sequence[nn.Module]) -> None:
    model = ByLength(*copy.deepcopy(layers)).train(bool(layers))
    fast = optimized(model, [RANDOMNESS])
    for frames in (5, 7, 8, 11):
        torch.manual_seed(1)
        try:
            got = fast(clip(frames=frames))
        except fxtemporal.SpecializationError:
            assert frames != 5
            continue
        torch.manual_seed(1)
        scale = 1 if frames < 8 else 2
        torch.testing.assert_close(got, by_hand(model, clip(frames=frames)) * scale)


def test_what_allows_nothing_leaves_the_number_of_frames_free() -> None:
    fast = optimized(Frames(), [RANDOMNESS])
    torch.testing.assert_close(fast(clip(3, 9)), by_hand(Frames(), clip(3, 9)))


def test_the_other_mode_is_refused() -> None:
    fast = optimized(Frames(nn.BatchNorm2d(4)).train(), [BATCHNORM])
    with pytest.raises(fxtemporal.SpecializationError, match="training"):
        fast.eval()(clip())


@pytest.mark.parametrize("allow", ["randomness", ["recurrence"], ["no-such-code"]])
def test_what_cannot_be_allowed(allow: Any) -> None:
    with pytest.raises(fxtemporal.PassError, match="randomness, training-batchnorm"):
        TimeDistribute(allow)
