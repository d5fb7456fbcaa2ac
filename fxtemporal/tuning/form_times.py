"""How long each form of one Conv3d takes, and a copy into the other memory layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from fxtemporal.functional import FORMS
from fxtemporal.functional.packed import Weights
from fxtemporal.passes.conv3d_choice import FORMATS, LAST, ToChoose
from fxtemporal.tuning.engines import ENGINES, compile_with
from fxtemporal.tuning.timing import interleaved

__all__ = ["copy_time", "form_times"]


class _Alone(nn.Module):
    """One form of one layer, its weight prepared, its result in a layout."""

    def __init__(self, site: ToChoose, form: str, layout: str, target: str) -> None:
        super().__init__()
        weight = site.weight.detach()
        self.form, self.geometry, self.layout = FORMS[form], site.geometry, FORMATS[layout]
        self.prepared: Weights = self.form.prepare(weight, site.geometry)
        if target == "eager" and self.form.pack is not None:
            self.prepared = self.form.pack(self.prepared, site.geometry.groups)
        self.bias = weight.new_zeros(site.geometry.out_channels) if site.bias else None

    def forward(self, x: Tensor) -> Tensor:
        result = self.form.run(x, self.prepared, self.bias, self.geometry)
        return result.contiguous(memory_format=self.layout)


def form_times(site: ToChoose, forms: Iterable[str], layout: str, target: str) -> dict[str, float]:
    """Milliseconds of each form, its result brought to ``layout``: medians, interleaved."""
    geometry, weight = site.geometry, site.weight
    assert geometry.size is not None
    assert geometry.frames is not None
    sizes = (site.batch, geometry.in_channels, geometry.frames, *geometry.size)
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(sizes, generator=generator, device=weight.device).to(weight.dtype)
    x = x.contiguous(memory_format=FORMATS[layout])
    calls: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for form in forms:
            alone = _Alone(site, form, layout, target)
            if target == "eager":
                calls[form] = partial(alone, x)
                continue
            with suppress(Exception):  # what an engine does not know, it refuses in any way
                calls[form] = partial(compile_with(ENGINES[target], alone, (x,)).run, x)
        return interleaved(calls, "conv3d")


def copy_time(like: Tensor) -> float:
    """Milliseconds of a copy of a tensor like that into channels_last_3d."""
    x = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    call = partial(x.contiguous, memory_format=torch.channels_last_3d)
    return interleaved({LAST: call}, LAST)[LAST]
