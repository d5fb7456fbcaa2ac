"""Each form of a 3-D pooling equals it, in every setting, layout and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxtemporal.functional import pool3d as pooling
from fxtemporal.functional.pool3d import POOL_FORMS
from fxtemporal.functional.pool3d import adaptive_avg_pool3d_mean as mean
from tests.zoo import noise

FLAT = {"spatial": (0,), "temporal": (1, 2)}


def clip(batch: int, sizes: tuple[int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """Few values, so that maxima are tied."""
    x = (noise(batch, 3, *sizes) * 2).round().to(dtype)
    if layout == "channels_last_3d":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "strided":
        return torch.cat([x, x], dim=1)[:, ::2]
    return x[0] if layout == "unbatched" else x


@st.composite
def windows(draw: Any, flat: str) -> dict[str, Any]:
    kernel = [1 if axis in FLAT[flat] else draw(st.integers(1, 3)) for axis in range(3)]
    return {
        "kernel_size": tuple(kernel),
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(3)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": draw(st.booleans()),
    }


inputs = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "sizes": st.tuples(*(st.integers(3, 7) for _ in range(3))),
        "layout": st.sampled_from(["contiguous", "channels_last_3d", "strided", "unbatched"]),
        "dtype": st.sampled_from([torch.float64, torch.float32]),
    }
)


def same(form: str, original: Any, given: dict[str, Any], x: Tensor, exact: bool) -> None:
    ways = [original, POOL_FORMS[form].function]
    outputs, grads = [], []
    for way in ways:
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = way(leaf, **given)
        out.mul(torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        outputs.append(out)
        grads.append(leaf.grad)
    tolerance = 0 if exact else 32 * torch.finfo(x.dtype).eps
    for mine, theirs in ((outputs[1], outputs[0]), (grads[1], grads[0])):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        scale = theirs.abs().max().clamp_min(1)
        assert (mine - theirs).abs().max() <= tolerance * scale


@pytest.mark.parametrize("flat", FLAT)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=inputs)
def test_maxima(flat: str, data: Any, kind: dict[str, Any]) -> None:
    window = data.draw(windows(flat))
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(3))
    x = clip(**kind)
    reach = [d * (k - 1) for d, k in zip(dilation, window["kernel_size"], strict=True)]
    assume(all(r < n for r, n in zip(reach, kind["sizes"], strict=True)))
    same(f"max_pool3d_{flat}", F.max_pool3d, {**window, "dilation": dilation}, x, exact=True)


@pytest.mark.parametrize("flat", FLAT)
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kind=inputs,
    count_include_pad=st.booleans(),
    divisor_override=st.sampled_from([None, 1, 5]),
)
def test_averages(flat: str, data: Any, kind: dict[str, Any], **more: Any) -> None:
    window = data.draw(windows(flat))
    same(f"avg_pool3d_{flat}", F.avg_pool3d, {**window, **more}, clip(**kind), exact=False)


sizes = st.sampled_from([None, 1, 2, 3])


@settings(max_examples=60, deadline=None)
@given(output_size=st.tuples(sizes, sizes, sizes), kind=inputs)
def test_adaptive_averages(output_size: tuple[int | None, ...], kind: dict[str, Any]) -> None:
    window = pooling.PoolWindow(sizes=output_size)
    for name, form in POOL_FORMS.items():
        if form.op != "adaptive_avg_pool3d":
            continue
        x = clip(**kind)
        if any(form.blockers(window)):
            with pytest.raises(ValueError, match=name):
                form.function(x, output_size)
        else:
            same(name, F.adaptive_avg_pool3d, {"output_size": output_size}, x, exact=False)


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_outside_its_domain_a_form_refuses(flat: str, kind: str) -> None:
    function = POOL_FORMS[f"{kind}_pool3d_{flat}"].function
    x = clip(1, (4, 4, 4), "contiguous", torch.float64)
    with pytest.raises(ValueError, match="reaches over"):
        function(x, (2, 2, 2), (2, 2, 2))
    kernel = (1, 2, 2) if flat == "spatial" else (2, 1, 1)
    padding = (1, 0, 0) if flat == "spatial" else (0, 1, 0)
    with pytest.raises(ValueError, match="padded"):
        function(x, kernel, kernel, padding)
    with pytest.raises(ValueError, match="must be"):
        function(x[0, 0], kernel, kernel)


def test_an_empty_axis_is_an_error_as_it_was() -> None:
    for name, arguments in (
        ("max_pool3d_spatial", ((1, 2, 2), (1, 2, 2))),
        ("adaptive_avg_pool3d_mean", ((None, 1, 1),)),
        ("adaptive_avg_pool3d_temporal", ((2, 1, 1),)),
    ):
        form = POOL_FORMS[name]
        with pytest.raises(RuntimeError):
            getattr(F, form.op)(torch.zeros(2, 3, 0, 4, 4), *arguments)
        with pytest.raises(RuntimeError):
            form.function(torch.zeros(2, 3, 0, 4, 4), *arguments)
    empty = torch.zeros(2, 3, 0, 4, 4)
    both = [way(empty, (1, 1, 1)) for way in (F.adaptive_avg_pool3d, mean)]
    assert all(out.shape == (2, 3, 1, 1, 1) and out.isnan().all() for out in both)


def test_nan_is_kept() -> None:
    x = clip(1, (4, 4, 4), "contiguous", torch.float32)
    x[0, 0, 1, 1, 1] = float("nan")
    window = ((1, 2, 2), (1, 2, 2))
    mine, theirs = pooling.max_pool3d_spatial(x, *window), F.max_pool3d(x, *window)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert mine.isnan().any()


@pytest.mark.parametrize("name", POOL_FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_nothing_is_copied_and_the_format_is_kept(name: str, layout: str) -> None:
    form = POOL_FORMS[name]
    kernel = (2, 1, 1) if "temporal" in name else (1, 2, 2)
    arguments = {
        "adaptive_avg_pool3d_mean": ((1, None, None),),
        "adaptive_avg_pool3d_spatial": ((None, 2, 2),),
        "adaptive_avg_pool3d_temporal": ((2, None, None),),
    }.get(name, (kernel, kernel))
    x = clip(2, (4, 6, 8), layout, torch.float32)
    with torch.profiler.profile() as profile:
        out = form.function(x, *arguments)
    called = {event.key for event in profile.key_averages()}
    copies = {"aten::clone", "aten::contiguous"}
    copies |= set() if "mean" in name else {"aten::copy_"}  # mean copies its divisor
    assert not called & copies
    wanted = torch.contiguous_format if layout == "contiguous" else torch.channels_last_3d
    assert "mean" in name or out.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("name", POOL_FORMS)
def test_any_size_in_one_exported_program(name: str) -> None:
    form = POOL_FORMS[name]
    kernel = (2, 1, 1) if "temporal" in name else (1, 2, 2)
    arguments = {
        "adaptive_avg_pool3d_mean": ((1, 1, 1),),
        "adaptive_avg_pool3d_spatial": ((None, 2, 2),),
        "adaptive_avg_pool3d_temporal": ((2, 1, 1),),
    }.get(name, (kernel, kernel))

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return form.function(x, *arguments)

    free = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    example = clip(2, (4, 6, 8), "contiguous", torch.float64)
    program = torch.export.export(Model(), (example,), dynamic_shapes=(free,)).module()
    for batch, size in ((3, (4, 6, 8)), (2, (6, 8, 4))):
        x = clip(batch, size, "contiguous", torch.float64)
        want = getattr(F, form.op)(x, *arguments)
        torch.testing.assert_close(program(x), want, rtol=1e-12, atol=1e-12)
