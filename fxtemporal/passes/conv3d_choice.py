"""The choice of a form for a Conv3d: the candidates, and the form chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from fxtemporal.functional import FORMS, ConvGeometry, Form

__all__ = ["CONTIGUOUS", "FORMATS", "LAST", "UNCHANGED", "FormChoice", "FormChoices", "ToChoose"]

CONTIGUOUS, LAST = "contiguous", "channels_last_3d"
FORMATS = {CONTIGUOUS: torch.contiguous_format, LAST: torch.channels_last_3d}
UNCHANGED = {CONTIGUOUS: "conv3d", LAST: "conv3d_channels_last_3d"}


@dataclass(frozen=True, eq=False)
class ToChoose:
    """One Conv3d that is to get a form, with all that decides how long each form takes.

    ``confined``: only forms that spread no NaN are candidates. ``bitwise``: only forms whose
    numbers equal those of conv3d to the last bit, for a clip of these sizes.
    """

    key: str
    node: fx.Node
    geometry: ConvGeometry
    weight: Tensor
    bias: bool
    batch: int
    confined: bool = False
    bitwise: bool = False

    def described(self, layout: str) -> str:
        g = self.geometry
        padding = g.padding if isinstance(g.padding, str) else tuple(g.padding)
        assert g.size is not None
        parts = (
            f"conv3d {g.in_channels}->{g.out_channels} k{tuple(g.kernel)} s{tuple(g.stride)}",
            f"p{padding} d{tuple(g.dilation)} g{g.groups} {g.padding_mode} t{g.time_padding}",
            f"{'bias' if self.bias else 'no-bias'} B{self.batch} T{g.frames}",
            f"{g.size[0]}x{g.size[1]} {str(g.dtype).removeprefix('torch.')} {layout}",
        )
        return " ".join(parts)

    @cached_property
    def forms(self) -> tuple[str, ...]:
        """Every form that is exact here, the reference first."""
        return tuple(
            name
            for name, form in FORMS.items()
            if (form.confined or not self.confined)
            and not any(form.blockers(self.geometry))
            and not any(form.weight_blockers(self.weight, self.geometry))
            and (name == "conv3d" or not self.bitwise or self._gives_the_bits(form))
        )

    def _gives_the_bits(self, form: Form) -> bool:
        """Whether ``form`` equals conv3d to the last bit, on a clip in either memory layout."""
        g = self.geometry
        assert g.frames is not None
        assert g.size is not None
        sizes = (self.batch, g.in_channels, g.frames, *g.size)
        generator = torch.Generator(self.weight.device).manual_seed(0)
        clip = torch.randn(sizes, generator=generator, device=self.weight.device, dtype=g.dtype)
        with torch.no_grad():
            prepared = form.prepare(self.weight, g)
            wanted = FORMS["conv3d"].run(clip, self.weight, None, g)
            clips = (clip.contiguous(memory_format=layout) for layout in FORMATS.values())
            return all(torch.equal(wanted, form.run(x, prepared, None, g)) for x in clips)


@dataclass(frozen=True)
class FormChoice:
    """The form chosen for one site, its region's layout, and milliseconds before and after."""

    form: str
    layout: str
    before: float
    after: float


FormChoices = Mapping[str, FormChoice]
