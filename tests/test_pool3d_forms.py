"""Each 3-D pooling gets the exact form that its window has, or says why not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxtemporal
from fxtemporal import Code, Remark
from fxtemporal.functional.pool3d import POOL_FORMS
from tests.zoo import noise

RULE = "pool3d-forms"


def clip(
    batch: int = 2, frames: int = 6, side: int = 7, dtype: torch.dtype = torch.float64
) -> Tensor:
    return noise(batch, 3, frames, side, side).to(dtype)


def optimized(model: nn.Module, *example: Any, **more: Any) -> fx.GraphModule:
    settings = {"tune": "static", "passes": [RULE], **more}
    return fxtemporal.optimize(model, example or None, **settings)


def remarks(module: nn.Module) -> list[Remark]:
    return [r for r in fxtemporal.report(module).remarks if r.rule == RULE]


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


CASES: dict[str, tuple[str | None, Callable[[], nn.Module]]] = {
    "max, spatial": ("max_pool3d_spatial", lambda: nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    "max, every other frame": ("max_pool3d_spatial", lambda: nn.MaxPool3d((1, 2, 2), 2)),
    "max, temporal": ("max_pool3d_temporal", lambda: nn.MaxPool3d((2, 1, 1))),
    "max, temporal, dilated": (
        "max_pool3d_temporal",
        lambda: nn.MaxPool3d((3, 1, 1), (1, 2, 1), (1, 0, 0), (2, 1, 1), ceil_mode=True),
    ),
    "max, one entry": ("max_pool3d_spatial", lambda: nn.MaxPool3d(1, 2)),
    "max, dense": (None, lambda: nn.MaxPool3d(2)),
    "max, time and width": (None, lambda: nn.MaxPool3d((2, 1, 2))),
    "avg, spatial": (
        "avg_pool3d_spatial",
        lambda: nn.AvgPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), True, False),
    ),
    "avg, temporal": (
        "avg_pool3d_temporal",
        lambda: nn.AvgPool3d((2, 1, 1), (1, 1, 1), (1, 0, 0), divisor_override=3),
    ),
    "avg, dense": (None, lambda: nn.AvgPool3d((2, 7, 7))),
    "adaptive, all": ("adaptive_avg_pool3d_mean", lambda: nn.AdaptiveAvgPool3d(1)),
    "adaptive, space": (
        "adaptive_avg_pool3d_mean",
        lambda: nn.AdaptiveAvgPool3d((None, 1, 1)),
    ),
    "adaptive, time": ("adaptive_avg_pool3d_mean", lambda: nn.AdaptiveAvgPool3d((1, None, None))),
    "adaptive, windows": ("adaptive_avg_pool3d_spatial", lambda: nn.AdaptiveAvgPool3d((1, 3, 2))),
    "adaptive, frames": ("adaptive_avg_pool3d_temporal", lambda: nn.AdaptiveAvgPool3d((4, 1, 1))),
    "adaptive, dense": (None, lambda: nn.AdaptiveAvgPool3d((2, 3, 3))),
}


@cache
def of_case(name: str) -> tuple[nn.Sequential, fx.GraphModule]:
    model = nn.Sequential(CASES[name][1]())
    return model, optimized(model, clip())


@pytest.mark.parametrize("name", CASES)
def test_each_window_gets_its_form(name: str) -> None:
    form, _ = CASES[name]
    _, result = of_case(name)
    (remark,) = remarks(result)
    assert (remark.target, remark.detail["form"]) == ("0", form)
    called = {node.target for node in result.graph.nodes}
    if form is None:
        assert remark.status == "missed"
        assert [reason.code for reason in remark.reasons] == [Code.NO_FLAT_WINDOW]
    else:
        assert (remark.status, remark.reasons) == ("applied", ())
        assert POOL_FORMS[form].function in called


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_and_gradients_at_every_size(name: str) -> None:
    model, result = of_case(name)
    for batch, frames, side in ((2, 6, 7), (3, 6, 7), (1, 9, 8), (2, 7, 10)):
        grads = []
        for module in (model, result):
            x = clip(batch, frames, side).requires_grad_()
            out = module(x)
            out.square().sum().backward()
            grads.append((out, x.grad))
        for mine, theirs in zip(grads[1], grads[0], strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_lower_precision_in_each_layout(
    name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    model, result = of_case(name)
    for batch in (2, 3):
        x = clip(batch, dtype=dtype).contiguous(memory_format=layout)
        try:
            own = model(x)
        except RuntimeError:
            pytest.skip("torch has no such 3-D pooling of this dtype")
        mine, want = result(x), model(x.double())
        assert mine.dtype == dtype
        if CASES[name][0] is not None and "adaptive" not in name:
            assert mine.is_contiguous(memory_format=layout)
        eps = 2 * torch.finfo(dtype).eps * want.abs().max()
        assert (mine - want).abs().max() <= 2 * (own - want).abs().max() + eps


@pytest.mark.parametrize("name", CASES)
def test_twice_changes_nothing_and_audit_agrees(name: str) -> None:
    model, result = of_case(name)
    twice = optimized(result, clip())
    assert not fxtemporal.report(twice).by_status("applied")
    close(twice(clip(3)), model(clip(3)))
    assert fxtemporal.audit(model, (clip(),), passes=[RULE]).remarks == tuple(remarks(result))


@pytest.mark.parametrize("name", CASES)
def test_without_shapes_and_unbatched(name: str) -> None:
    model, _ = of_case(name)
    result = optimized(model)
    for x in (clip(3), clip(3)[0]):
        close(result(x), model(x))
    result = optimized(model, clip()[0])
    close(result(clip(1, 8)[0]), model(clip(1, 8)[0]))


class Functions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(x, (1, 2, 2), padding=(0, 1, 1))
        x = F.avg_pool3d(x, kernel_size=(2, 1, 1), stride=1)
        return F.adaptive_avg_pool3d(x, (x.size(2), 1, 1)) + F.adaptive_avg_pool3d(x, 1)


def test_functions_and_a_size_of_the_graph() -> None:
    model = Functions()
    result = optimized(model, clip())
    assert [remark.status for remark in remarks(result)].count("applied") >= 3
    for batch, frames in ((2, 6), (3, 8)):
        close(result(clip(batch, frames)), model(clip(batch, frames)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_an_exported_program(dynamic: bool) -> None:
    model = nn.Sequential(*(CASES[name][1]() for name in ("max, spatial", "adaptive, frames")))
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(model, (clip(),), dynamic_shapes=shapes)
    result = optimized(program, clip())
    assert [remark.status for remark in remarks(result)] == ["applied", "applied"]
    for batch in (2, 3) if dynamic else (2,):
        close(result(clip(batch)), model(clip(batch)))


def test_copies_and_compilers() -> None:
    model = nn.Sequential(*(CASES[name][1]() for name in ("max, spatial", "avg, temporal")))
    result = optimized(model, clip())
    x = clip(3, 8)
    free = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(result, (clip(),), dynamic_shapes=free).module()
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    for module in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), exported, compiled):
        close(module(x), model(x))


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.pool.register_forward_hook(doubled)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


class Scaled(nn.AvgPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


Scaled.__module__ = "torch.nn.mine"  # so that it is called, and not traced through


class Indices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d((1, 2, 2), return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        values, indices = self.pool(x)
        return values + indices


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d((1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x.round().long())


REFUSED: dict[str, tuple[Code, Callable[[], nn.Module]]] = {
    "hook": (Code.HOOKED_MODULE, Hooked),
    "subclass": (Code.SUBCLASS, lambda: nn.Sequential(Scaled((1, 2, 2)))),
    "indices": (Code.RETURNS_INDICES, Indices),
    "integers": (Code.UNSUPPORTED_OP, Integers),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    code, build = REFUSED[name]
    model = build()
    try:
        expected = model(clip())
    except RuntimeError:  # integers are not pooled in 3-D by every version of torch
        audit = fxtemporal.audit(model, (clip(),), passes=[RULE])
        assert code in [reason.code for remark in audit.remarks for reason in remark.reasons]
        return
    result = optimized(model, clip())
    (remark,) = remarks(result)
    assert (remark.status, [reason.code for reason in remark.reasons]) == ("missed", [code])
    close(result(clip()), expected)


def test_a_window_computed_in_the_forward() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool3d(x, (1, x.shape[3], x.shape[4]))

    model = Computed()
    result = optimized(model, clip())
    (remark,) = remarks(result)
    assert remark.status == "applied" or Code.SHAPES_UNKNOWN in [r.code for r in remark.reasons]
    close(result(clip(3, 8)), model(clip(3, 8)))
