"""The form of each Conv3d is chosen by what was measured, in one layout a region."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from fxtemporal.analysis.layout_regions import layout_regions
from fxtemporal.capture.capture import capture
from fxtemporal.functional import FORMS, ConvGeometry, conv3d_in_form
from fxtemporal.passes.conv3d_choice import CONTIGUOUS, LAST
from fxtemporal.tuning import conv3d_forms as choosing
from fxtemporal.tuning.races import Races
from fxtemporal.tuning.settings import Tune
from fxtemporal.tuning.timing import Timing
from tests.zoo import noise


class Net(nn.Module):
    """(B, 3, T, H, W) -> (B, 5): two dense convolutions, one of them with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv3d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 6, (3, 3, 3), padding=1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        return self.head(self.conv2(x).mean((2, 3, 4)))


def clip(batch: int = 2, frames: int = 6, size: int = 8) -> Tensor:
    return noise(batch, 3, frames, size, size)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``fastest(form, layout)``: that form takes one millisecond there, everything else two."""

    def decide(form: str, layout: str = CONTIGUOUS) -> list[str]:
        measured: list[str] = []

        def timed(site: Any, forms: Any, where: str, target: str) -> dict[str, float]:
            forms = list(forms)
            measured.append(f"{site.key} {where}")
            return {f: 1.0 if f == form and where == layout else 2.0 for f in forms}

        def race(before: Any, after: Any, *_: Any, **__: Any) -> Timing:
            return Timing(2.0, 1.0, 2.0, 2.0, 2.0, 5)

        def wins(*_: Any) -> bool:
            return False  # what the sums say

        monkeypatch.setattr(choosing, "_timed", timed)
        monkeypatch.setattr(choosing.FormChooser, "_copy", lambda self, like: 0.01)
        monkeypatch.setattr(Races, "wins", wins)
        monkeypatch.setattr("fxtemporal.tuning.races.race", race)
        return measured

    return decide


def optimized(model: nn.Module, x: Tensor, **settings: Any) -> Any:
    settings = {"cache": False} | settings
    return fxtemporal.optimize(model, (x,), tune=Tune(**settings), passes=["conv3d-forms"])


def forms_of(result: Any) -> dict[str, Any]:
    return {
        r.target: r.detail.get("form") if r.status == "applied" else r.reasons[0].code
        for r in fxtemporal.report(result).remarks
        if r.rule == "conv3d-forms"
    }


def assert_same(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        own = (model(x) - exact).abs().max()
        assert (fast(x) - exact).abs().max() <= 4 * own + 4e-6 * exact.abs().max()


GEOMETRY = ConvGeometry(
    3, 4, (3, 3, 3), padding=(1, 1, 1), frames=6, size=(8, 8), dtype=torch.float32
)
DENSE = [
    name
    for name, form in FORMS.items()
    if name not in ("conv3d", "conv3d_low_rank") and not any(form.blockers(GEOMETRY))
]


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("form", DENSE)
def test_the_fastest_form_is_taken_and_right(fastest: Any, form: str, layout: str) -> None:
    if (form, layout) == ("conv3d_channels_last_3d", CONTIGUOUS):
        pytest.skip("a contiguous region has no layer in it")
    fastest(form, layout)
    model = Net().eval()
    fast = optimized(model, clip())
    assert forms_of(fast) == {"conv1": form, "conv2": form}
    for batch, frames in ((2, 6), (1, 6), (3, 6), (2, 5), (2, 1), (2, 9)):
        assert_same(model, fast, clip(batch, frames))
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_nothing_is_faster_and_nothing_changes(fastest: Any) -> None:
    fastest("none")
    fast = optimized(Net().eval(), clip())
    assert set(forms_of(fast).values()) == {fxtemporal.ir.reasons.Code.NOT_FASTER}
    assert all(node.target is not conv3d_in_form for node in fast.graph.nodes)


def test_a_gain_within_the_margin_does_not_count(
    fastest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest("none")
    times = {"conv3d_taps": 0.97}
    monkeypatch.setattr(
        choosing, "_timed", lambda site, forms, *_: {f: times.get(f, 1.0) for f in forms}
    )
    assert "conv3d_taps" not in forms_of(optimized(Net().eval(), clip(), margin=0.05)).values()
    assert "conv3d_taps" in forms_of(optimized(Net().eval(), clip(), margin=0.02)).values()


def test_gradients_reach_the_parameters(fastest: Any) -> None:
    fastest("conv3d_winograd_2")
    model = Net().eval().double()
    fast, found = optimized(model, clip().double()), []
    for module in (model, fast):
        module(clip(3).double()).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_new_weights_are_noticed(fastest: Any) -> None:
    fastest("conv3d_winograd_4")
    model, other = Net().eval(), Net().eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    fast = optimized(model, clip())
    with torch.no_grad():
        fast(clip())
    fast.load_state_dict(other.state_dict())
    assert_same(other, fast, clip(3))


def test_what_was_measured_is_not_measured_again(fastest: Any, tmp_path: Path) -> None:
    measured = fastest("conv3d_taps")
    first = forms_of(optimized(Net().eval(), clip(), cache=tmp_path))
    count = len(measured)
    assert count == 4  # two sites in two layouts
    assert forms_of(optimized(Net().eval(), clip(), cache=tmp_path)) == first
    assert len(measured) == count
    optimized(Net().eval(), clip(size=9), cache=tmp_path)
    assert len(measured) == 2 * count


def test_no_time_leaves_what_was_not_measured(fastest: Any) -> None:
    measured = fastest("conv3d_taps")
    fast = optimized(Net().eval(), clip(), seconds=1e-9)
    assert measured == []
    assert set(forms_of(fast).values()) == {fxtemporal.ir.reasons.Code.NOT_FASTER}


def test_static_measures_nothing(fastest: Any) -> None:
    measured = fastest("conv3d_taps")
    fast = fxtemporal.optimize(Net().eval(), (clip(),), tune="static")
    assert measured == []
    assert fxtemporal.ir.reasons.Code.DENSE_KERNEL in forms_of(fast).values()


def test_really_measured() -> None:
    model = Net().eval()
    fast = optimized(model, clip())
    for batch in (1, 2, 3):
        assert_same(model, fast, clip(batch))


class Viewed(Net):
    """A view of what the convolutions give."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv2(F.relu(self.conv1(x)))
        return y.view(y.size(0), -1), y


def test_views_and_outputs_get_a_contiguous_tensor(fastest: Any) -> None:
    fastest("conv3d_channels_last_3d", LAST)
    model = Viewed().eval()
    fast = optimized(model, clip())
    assert "conv3d_channels_last_3d" in forms_of(fast).values()
    with torch.no_grad():
        flat, y = fast(clip(3))
        assert y.is_contiguous()
        torch.testing.assert_close(flat, model(clip(3))[0])


class Causal(nn.Module):
    """Zeros before the clip, as a causal network puts them."""

    def __init__(self, *pad: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pad = pad
        self.conv = nn.Conv3d(3, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


@pytest.mark.parametrize("form", ["conv3d_taps", "conv3d_winograd_2", "conv3d_stacked"])
@pytest.mark.parametrize("pad", [(0, 0, 0, 0, 2, 0), (0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 3, 1)])
def test_zeros_before_the_clip_become_part_of_the_layer(
    fastest: Any, form: str, pad: tuple[int, ...]
) -> None:
    fastest(form)
    model = Causal(*pad).eval()
    fast = optimized(model, clip())
    assert forms_of(fast) == {"conv": form}
    assert not any(node.target is F.pad for node in fast.graph.nodes)
    for batch, frames in ((2, 6), (1, 6), (3, 7), (2, 1)):
        assert_same(model, fast, clip(batch, frames))


@pytest.mark.parametrize("pad", [(1, 1, 0, 0, 2, 0), (0, 0, 0, 0, 2, -1), (1, 1)])
def test_other_paddings_stay(fastest: Any, pad: tuple[int, ...]) -> None:
    fastest("conv3d_taps")
    model = Causal(*pad).eval()
    fast = optimized(model, clip())
    assert any(node.target is F.pad for node in fast.graph.nodes)
    assert_same(model, fast, clip(3))


class Inflated(nn.Module):
    """One kernel, repeated over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(self.conv.weight[:, :, :1].expand(-1, -1, 3, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_kernel_of_low_rank_until_it_is_not(fastest: Any) -> None:
    fastest("conv3d_low_rank")
    model = Inflated().eval()
    fast = optimized(model, clip())
    assert forms_of(fast) == {"conv": "conv3d_low_rank"}
    for batch in (1, 2, 3):
        assert_same(model, fast, clip(batch))
    nn.init.normal_(model.conv.weight)  # full rank: the form no longer holds
    assert_same(model, fast, clip(3))
    fast(clip()).sum().backward()
    assert model.conv.weight.grad is not None


# -- regions ---------------------------------------------------------------------------------------


def test_a_region_ends_where_the_layout_does() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(3, 3, 3, padding=1), nn.Conv3d(3, 3, 3, padding=1)
            self.c = nn.Conv3d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x)) + self.b(x)
            return self.c(y.transpose(3, 4))

    program = capture(Two(), (clip(),))
    first, second = layout_regions(program)
    assert [len(region.nodes) for region in (first, second)] == [4, 1]
    assert [node.name for node in first.entering] == ["x"]
    assert [node.name for node in first.leaving] == ["add"]


# -- afterwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["conv3d_taps", "conv3d_winograd_2", "conv3d_channels_last_3d"])
def test_what_is_made_of_it_afterwards(fastest: Any, form: str) -> None:
    fastest(form, LAST)
    model = Net().eval()
    fast = optimized(model, clip())
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(fast, (clip(4),), dynamic_shapes=({0: batch},))
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        for module in (exported.module(), compiled, copy.deepcopy(fast)):
            for count in (2, 3):
                assert_same_values(model, module, clip(count))
        with tempfile.TemporaryFile() as file:
            torch.save(fast, file)
            file.seek(0)
            assert_same_values(model, torch.load(file, weights_only=False), clip(3))
    frozen = fxtemporal.optimize(
        model, (clip(),), tune=Tune(cache=False), passes=["conv3d-forms"], freeze=True
    )
    assert_same(model, frozen, clip(3))


def assert_same_values(model: nn.Module, module: Any, x: Tensor) -> None:
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_optimized_again_it_stays(fastest: Any) -> None:
    fastest("conv3d_taps")
    model = Net().eval()
    fast = optimized(model, clip())
    again = optimized(fast, clip())
    assert forms_of(again) == {}
    assert_same(model, again, clip(3))
