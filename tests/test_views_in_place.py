"""Methods that turn a tensor into a view in place: ``y.squeeze_()``, ``y.detach_()``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxtemporal

CLIPS = [torch.rand(batch, 2, frames, 4, 4) for batch, frames in ((1, 3), (2, 3), (1, 5), (3, 4))]


class Model(nn.Module):
    def __init__(self, body: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(2, 2, (3, 1, 1))
        self.conv2d = nn.Conv2d(2, 2, 1)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def squeezed(self: Model, x: Tensor) -> Tensor:
    y = self.conv3d(x)
    z = y + 0
    z.squeeze_(2)
    return z.sum() * 2 + y


def with_a_view_before(self: Model, x: Tensor) -> Tensor:
    y = self.conv3d(x)
    flat = y.flatten(1)
    y.transpose_(1, 2)
    return y.sum((2, 3)) * flat.sum()


def size_before(self: Model, x: Tensor) -> Tensor:
    y = self.conv3d(x).clone()
    channels = y.shape[1]
    y.squeeze_()
    return y * channels + y.shape[0]


def one_object_with_two_names(self: Model, x: Tensor) -> Tensor:
    y = self.conv3d(x)
    same = y
    same.unsqueeze_(-1)
    return y.expand(*y.shape[:-1], 2) * 1


def behind_a_write(self: Model, x: Tensor) -> Tensor:
    return self.conv3d(x).relu_().unsqueeze_(0).sum(0)


def the_same_object_twice(self: Model, x: Tensor) -> Tensor:
    y = self.conv3d(x).contiguous()
    same = y.contiguous()
    y.unsqueeze_(0)
    return same * y.shape[0] + same.dim()


def detached(self: Model, x: Tensor) -> Tensor:
    return self.conv3d(x).detach_() * 2 + self.conv3d(x)


def detached_behind_a_write(self: Model, x: Tensor) -> Tensor:
    return self.conv3d(x).relu_().detach_() + self.conv3d(x)


def strided(self: Model, x: Tensor) -> Tensor:
    y = self.conv3d(x).clone()
    y.as_strided_((2, 3), (1, 2))
    return y + 1


def its_input(self: Model, x: Tensor) -> Tensor:
    x.unsqueeze_(0)
    return self.conv3d(x.squeeze(0))


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        squeezed,
        with_a_view_before,
        size_before,
        one_object_with_two_names,
        behind_a_write,
        the_same_object_twice,
        detached,
        detached_behind_a_write,
        strided,
        its_input,
    ],
)
def test_the_model_s_numbers(body: Callable[[Model, Tensor], Tensor], example: bool) -> None:
    model = Model(body).eval()
    try:
        result = fxtemporal.optimize(
            model, (CLIPS[0].clone(),) if example else None, tune="static", verify=example
        )
    except fxtemporal.CaptureError:
        assert not example  # a size that is not known
        return
    for clip in CLIPS:
        given, mine = clip.clone(), clip.clone()
        expected = model(given)
        actual = result(mine)
        torch.testing.assert_close(actual, expected)
        assert mine.shape == given.shape
        assert actual.requires_grad == expected.requires_grad


def unsqueezed_frames(self: Model, x: Tensor) -> Tensor:
    frames = []
    for t in range(x.shape[2]):
        frame = self.conv2d(x[:, :, t])
        frame.unsqueeze_(1)
        frames.append(frame)
    return torch.cat(frames, 1)


def turned_frames(self: Model, x: Tensor) -> Tensor:
    frames = []
    for t in range(x.shape[2]):
        frame = self.conv2d(x[:, :, t]).flatten(1)
        frame.t_()
        frames.append(frame)
    return torch.stack(frames, 0)


@pytest.mark.parametrize("body", [unsqueezed_frames, turned_frames])
def test_a_loop_that_turns_its_frames_is_re_rolled(
    body: Callable[[Model, Tensor], Tensor],
) -> None:
    model = Model(body).eval()
    result = fxtemporal.optimize(model, (CLIPS[0],), tune="static")
    statuses = {(remark.rule, remark.status) for remark in fxtemporal.report(result).remarks}
    assert ("time-distribute", "applied") in statuses
    for clip in CLIPS:
        torch.testing.assert_close(result(clip), model(clip))


def test_no_log_of_a_shape_that_does_not_fit(capfd: pytest.CaptureFixture[str]) -> None:
    """A value that is computed again after such a method does not fit the nodes before it."""
    fxtemporal.audit(Model(turned_frames).eval(), (CLIPS[0],))
    fxtemporal.audit(Model(the_same_object_twice).eval(), (CLIPS[0],))
    assert "fake_tensor" not in capfd.readouterr().err
