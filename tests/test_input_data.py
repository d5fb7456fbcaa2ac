"""Data of inputs that are settings: held by a guard, as numbers are; data of samples is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import CaptureError, SpecializationError
from tests.strictly import strictly
from tests.zoo import noise


class Tower(nn.Module):
    """Tokens of clips, and their grids: (tokens, C) and (clips, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, 4, 2, stride=2)
        self.table = nn.Embedding(64, 4)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        y = self.patch(x.view(-1, 3, 2, 2, 2)).view(-1, 4)
        places = []
        for t, h, w in grid.tolist():
            rows = torch.arange(h).unsqueeze(1).expand(h, w).flatten()
            columns = torch.arange(w).unsqueeze(0).expand(h, w).flatten()
            places.append((rows * 4 + columns).repeat(t))
        y = y + self.table(torch.cat(places))
        lengths = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        return torch.cat([part.cumsum(0) for part in torch.split(y, lengths.tolist())])


def tokens(grid: Tensor) -> Tensor:
    return noise(int(grid.prod(1).sum()), 24)


GRID = torch.tensor([[2, 2, 3], [1, 4, 2]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_sizes_in_a_tensor_are_held_as_numbers_are(dtype: torch.dtype) -> None:
    model, grid = Tower().eval(), GRID.to(dtype)
    fast = strictly(model, (tokens(grid), grid), tune="static")
    report = fxtemporal.report(fast)
    assert report.frontend == "fx"
    assert any("grid.tolist()" in str(fixed) for fixed in report.specializations)
    for _ in range(2):
        x = tokens(grid)
        torch.testing.assert_close(fast(x, grid.clone()), model(x, grid))


OTHERS = [
    torch.tensor([[1, 4, 3], [1, 4, 2]]),  # as many tokens, in other places
    torch.tensor([[2, 3, 2], [1, 4, 2]]),
    torch.tensor([[2, 2, 3], [1, 4, 2], [1, 1, 1]]),
    torch.tensor([[2, 2, 3]]),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_grid_is_refused_or_runs_the_original(other: Tensor) -> None:
    model = Tower().eval()
    with pytest.raises(SpecializationError, match="its data were read"):
        strictly(model, (tokens(GRID), GRID), tune="static")(tokens(other), other)
    fast = fxtemporal.optimize(model, (tokens(GRID), GRID), tune="static")
    x = tokens(other)
    with pytest.warns(UserWarning, match="right only where"):
        torch.testing.assert_close(fast(x, other), model(x, other))


class Reads(nn.Module):
    def __init__(self, read: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.read = read

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 1) * self.read(x, n)


SETTINGS = {
    "item": (lambda x, n: n.item(), torch.tensor(3)),
    "int": (lambda x, n: int(n), torch.tensor(3)),
    "a branch": (lambda x, n: 2 if n > 2 else 1, torch.tensor(3)),
    "any": (lambda x, n: 2 if (n > 2).any() else 1, torch.tensor([1, 3, 2])),
    "a flag": (lambda x, n: 2 if n else 1, torch.tensor(True)),
    "range": (lambda x, n: sum(range(int(n.max()))), torch.tensor([1, 3, 2])),
}
CLIP = noise(2, 4, 3, 6, 6)


@pytest.mark.parametrize("name", SETTINGS)
def test_other_reads_of_settings(name: str) -> None:
    read, n = SETTINGS[name]
    model = Reads(read).eval()
    fast = fxtemporal.optimize(model, (CLIP, n), tune="static")
    assert fxtemporal.report(fast).frontend == "fx"
    assert fxtemporal.report(fast).by_status("applied")
    torch.testing.assert_close(fast(CLIP, n), model(CLIP, n))
    longer = noise(3, 7, 3, 6, 6)
    torch.testing.assert_close(fast(longer, n), model(longer, n))
    assert not fxtemporal.report(fast).refused
    for other in (torch.zeros_like(n), n * 0 + 5 if n.dtype != torch.bool else ~n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(fast(CLIP, other), model(CLIP, other))
    assert fxtemporal.report(fast).refused


DATA = {
    "an entry a sample": (lambda x, n: float(n.max()), torch.tensor([4, 2])),
    "numbers with a fraction": (lambda x, n: float(n), torch.tensor(0.5)),
    "the clip": (lambda x, n: float(x.max()), torch.tensor(1)),
}


def test_lengths_of_whole_numbered_clips_are_data() -> None:
    model = Reads(lambda x, n: float(n.max())).eval()
    model.conv = nn.Sequential(ToFloat(), model.conv)
    clip = (CLIP * 9).to(torch.uint8)
    try:
        fast = fxtemporal.optimize(model, (clip, torch.tensor([4, 2])), tune="static")
    except CaptureError:
        return
    assert fxtemporal.report(fast).frontend in ("parts", "export")


class ToFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize("name", DATA)
def test_data_is_not_held(name: str) -> None:
    read, n = DATA[name]
    model = Reads(read).eval()
    try:
        fast = fxtemporal.optimize(model, (CLIP, n), tune="static")
    except CaptureError:
        return
    assert fxtemporal.report(fast).frontend in ("parts", "export")


def test_what_is_drawn_is_drawn_at_each_call() -> None:
    model = Reads(lambda x, n: torch.randint(0, 99, (int(n),)).tolist()[0]).eval()
    try:
        fast = fxtemporal.optimize(model, (CLIP, torch.tensor(3)), tune="static", verify=False)
    except CaptureError:
        return
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(CLIP, torch.tensor(3))
        torch.manual_seed(seed)
        torch.testing.assert_close(fast(CLIP, torch.tensor(3)), expected)


def test_the_input_is_only_looked_at() -> None:
    model, grid = Reads(lambda x, n: n.add(1).tolist()[0]).eval(), torch.tensor([3, 1, 1])
    version = grid._version
    fxtemporal.optimize(model, (CLIP, grid), tune="static")
    assert grid._version == version
    assert grid.tolist() == [3, 1, 1]
