"""Every setting of a Conv3d, in every form that is exact there: the whole way through the pass."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

from fxtemporal.capture.capture import capture
from fxtemporal.functional import FORMS
from fxtemporal.passes.conv3d_choice import CONTIGUOUS, LAST, FormChoice
from fxtemporal.passes.conv3d_forms import Conv3dForms
from fxtemporal.passes.pipeline import run_rules

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Space:
    """One layer and its input."""

    channels: tuple[int, int]
    groups: int
    kernel: Triple
    stride: Triple
    dilation: Triple
    padding: Triple | str
    mode: Any
    bias: bool
    dtype: torch.dtype
    layout: torch.memory_format
    batch: int | None
    frames: int
    size: tuple[int, int]
    repeated: bool
    """The kernel is the same at each tap."""
    pick: int
    keep_last: bool

    def build(self) -> nn.Conv3d:
        torch.manual_seed(0)
        inputs, outputs = (self.groups * count for count in self.channels)
        conv = nn.Conv3d(
            inputs,
            outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.mode,
            dtype=self.dtype,
        )
        if self.repeated:
            with torch.no_grad():
                conv.weight.copy_(conv.weight[:, :, :1].expand_as(conv.weight).clone())
        return conv.eval()

    def example(self, batch: int | None, frames: int) -> Tensor:
        shape = (self.groups * self.channels[0], frames, *self.size)
        generator = torch.Generator().manual_seed(frames)
        if batch is None:
            return torch.randn(shape, generator=generator).to(self.dtype)
        x = torch.randn((batch, *shape), generator=generator).to(self.dtype)
        return x.contiguous(memory_format=self.layout)


def triples(low: int, high: int) -> st.SearchStrategy[Triple]:
    return st.tuples(*(st.integers(low, high) for _ in range(3)))


spaces = st.builds(
    Space,
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    stride=triples(1, 2),
    dilation=triples(1, 2),
    padding=st.one_of(triples(0, 2), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last_3d]),
    batch=st.sampled_from([None, 0, 1, 2]),
    frames=st.integers(1, 9),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    repeated=st.booleans(),
    pick=st.integers(0, 10_000),
    keep_last=st.booleans(),
)


def check(space: Space, seen: Counter[str]) -> None:
    """Rewrite the layer into one of its forms, and compare at this T and batch, and at others."""
    try:
        conv, x = space.build(), space.example(space.batch, space.frames)
        with torch.no_grad():
            conv(x)
    except (RuntimeError, ValueError, NotImplementedError):
        return  # torch has no such layer, or not for this input
    traced = space.example(1, space.frames) if 0 in x.shape else x
    program = capture(nn.Sequential(conv), (traced,))
    sites = tuple(Conv3dForms().to_choose(program))
    if not sites:
        return
    forms = [form for form in sites[0].forms if form != "conv3d"]
    form = forms[space.pick % len(forms)]
    layout = LAST if space.keep_last else CONTIGUOUS
    rule = Conv3dForms({sites[0].key: FormChoice(form, layout, 2.0, 1.0)})
    outcome = run_rules(program, (rule,))
    assert [remark.status for _, remark in outcome.remarks] == ["applied"], outcome.remarks
    seen[form] += 1
    fast = outcome.program.gm
    others = [(space.batch, space.frames)]
    if space.batch is not None:
        others += [(2 - min(space.batch, 1), space.frames)]
    others += [(space.batch, space.frames + 1), (space.batch, max(1, space.frames - 1))]
    for batch, frames in others:
        compare(conv, fast, space.example(batch, frames))


@torch.no_grad()
def compare(conv: nn.Conv3d, fast: nn.Module, x: Tensor) -> None:
    try:
        expected = conv(x)
    except RuntimeError:
        return  # too few frames for the kernel
    got = fast(x.clone(memory_format=torch.preserve_format))
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if expected.numel() == 0:
        return
    exact = copy.deepcopy(conv).double()(x.double())
    scale = exact.abs().max().clamp(min=1e-3)
    own = (expected.double() - exact).abs().max() / scale
    bound = max(4 * float(own), 64 * torch.finfo(x.dtype).eps)
    assert float((got.double() - exact).abs().max() / scale) <= bound


def cases(examples: int, least: int) -> Callable[[], None]:
    """A test of so many random layers, in which each form is seen ``least`` times."""
    seen: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(spaces)
    def run(space: Space) -> None:
        check(space, seen)

    def test() -> None:
        run()
        missing = {form for form in FORMS if form != "conv3d" and seen[form] < least}
        assert not missing, (missing, seen)

    return test


def test_random_layers_in_a_form_of_theirs() -> None:
    cases(150, 0)()


@pytest.mark.long
def test_three_thousand_random_layers_in_a_form_of_theirs() -> None:
    cases(3500, 3)()
