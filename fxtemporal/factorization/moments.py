"""Statistics of data: second moments of patches, and a regression on a layer's output.

Only sums are kept, whose size does not depend on the amount of data: the second moment of the
patches that the first factor reads, (D, D) per group; and, once that factor is chosen, the moments
from which the second factor is regressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from fxtemporal.functional import ConvGeometry
from fxtemporal.functional.factors import Order
from fxtemporal.functional.geometry import Triple, pad

__all__ = ["Regression", "SecondMoment"]

_ENTRIES = 2**25
"""The most entries of patches in memory at a time."""

_RIDGE = 1e-6
"""Share of the mean moment added to each one: directions that data does not show stay small."""


class SecondMoment:
    """Σ p·pᵀ over the patches p that the first factor of a layer reads: (groups, D, D)."""

    def __init__(self, geometry: ConvGeometry, order: Order) -> None:
        self._geometry = geometry
        self._order = order
        self.sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add the patches of an input of the layer, (B, C, T, H, W)."""
        g, spatial = self._geometry, self._order == "spatial-temporal"
        own = (False, True, True) if spatial else (True, False, False)
        x = _padded(x, g, own)
        for piece in _pieces(x, g, axis=2 if spatial else 3, own=own):
            rows = _patches(
                piece, _only(g.kernel, own), _only(g.stride, own), _only(g.dilation, own)
            )
            rows = torch.unflatten(rows, 0, (g.groups, -1))
            moment = (rows @ rows.transpose(1, 2)).double().cpu()
            self.sum = moment if self.sum is None else self.sum.add_(moment)


class Regression:
    """The second factor and the bias that fit the layer's output best.

    ``y ≈ left · z + bias``, where z are the patches of the first factor's output.
    """

    def __init__(self, geometry: ConvGeometry, order: Order) -> None:
        self._geometry = geometry
        self._order = order
        self._zz: Tensor | None = None
        self._yz: Tensor | None = None
        self._yy: Tensor | None = None

    def add(self, z: Tensor, y: Tensor) -> None:
        """Add outputs: ``z`` (B, m, T, H, W) of the first factor, ``y`` (B, C_out, T', H', W')."""
        g, spatial = self._geometry, self._order == "spatial-temporal"
        own = (True, False, False) if spatial else (False, True, True)
        kernel, stride, dilation = (_only(v, own) for v in (g.kernel, g.stride, g.dilation))
        for one, wanted in zip(torch.split(_padded(z, g, own), 1), torch.split(y, 1), strict=True):
            rows = torch.unflatten(_patches(one, kernel, stride, dilation), 0, (g.groups, -1))
            rows = torch.cat([rows, rows.new_ones(g.groups, 1, rows.shape[2])], dim=1)
            out = wanted[0].flatten(1).to(rows.dtype)
            out = torch.unflatten(out, 0, (g.groups, -1))
            zz = (rows @ rows.transpose(1, 2)).double().cpu()
            yz = (out @ rows.transpose(1, 2)).double().cpu()
            yy = out.square().sum(2).double().cpu()
            if self._zz is None or self._yz is None or self._yy is None:
                self._zz, self._yz, self._yy = zz, yz, yy
            else:
                self._zz += zz
                self._yz += yz
                self._yy += yy

    def solve(self) -> tuple[Tensor, Tensor, float]:
        """``(left, bias, error)``: (groups, C_out/groups·taps, m), (C_out,), and the error of y.

        The error is relative to the norm of y without its mean, which the bias represents.
        """
        assert self._zz is not None
        assert self._yz is not None
        assert self._yy is not None
        taps = _count(self._geometry.kernel, self._order)
        zz, yz = self._zz, self._yz
        count = zz[:, -1:, -1:]
        ridge = _RIDGE * zz.diagonal(dim1=1, dim2=2)[:, :-1].mean(1)
        weights = torch.zeros_like(zz.diagonal(dim1=1, dim2=2))
        weights[:, :-1] = ridge[:, None]
        solved = torch.linalg.solve(zz + torch.diag_embed(weights), yz.transpose(1, 2))
        found = solved.transpose(1, 2)  # (groups, C_out/groups, m·taps + 1)
        left, bias = found[..., :-1], found[..., -1]
        residual = self._yy - 2 * (found * yz).sum(2) + ((found @ zz) * found).sum(2)
        spread = self._yy - yz[..., -1].square() / count[:, 0]
        error = float((residual.clamp_min(0).sum() / spread.sum().clamp_min(1e-30)).sqrt())
        rows = torch.unflatten(left, 2, (-1, taps)).transpose(2, 3).flatten(1, 2)
        return rows, bias.flatten(), error


def _count(kernel: Triple, order: Order) -> int:
    return kernel[0] if order == "spatial-temporal" else kernel[1] * kernel[2]


def _only(values: Sequence[int], own: Sequence[bool]) -> Triple:
    t, h, w = (value if mine else 1 for value, mine in zip(values, own, strict=True))
    return (t, h, w)


def _padded(x: Tensor, geometry: ConvGeometry, own: Sequence[bool]) -> Tensor:
    """``x`` padded along the axes that a factor works on, as the layer pads them."""
    whole, _ = pad(x, geometry, (False, False, False))
    crop = [
        slice(None) if mine else slice(before, before + size)
        for mine, (before, _), size in zip(own, geometry.pads, x.shape[2:], strict=True)
    ]
    return whole[(slice(None), slice(None), *crop)]


def _pieces(x: Tensor, geometry: ConvGeometry, axis: int, own: Sequence[bool]) -> Iterator[Tensor]:
    """Parts of ``x``, along an axis that the factor does not work on, with few enough patches."""
    taps = 1
    for kernel, mine in zip(geometry.kernel, own, strict=True):
        taps *= kernel if mine else 1
    each = x[0].numel() // x.shape[axis] * taps
    for one in torch.split(x, 1):
        yield from torch.split(one, max(1, _ENTRIES // max(each, 1)), axis)


def _patches(x: Tensor, kernel: Triple, stride: Triple, dilation: Triple) -> Tensor:
    """(B, C, T, H, W) -> (C·taps, positions): the patch that each position of the result reads."""
    count = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    seen = []
    for offsets in product(*map(range, kernel)):
        cut = [
            slice(d * at, d * at + s * (n - 1) + 1, s)
            for at, d, s, n in zip(offsets, dilation, stride, count, strict=True)
        ]
        seen.append(x[(slice(None), slice(None), *cut)])
    stack = torch.stack(seen, dim=2)  # (B, C, taps, T', H', W')
    rows = stack.movedim(0, 2).flatten(2).flatten(0, 1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
