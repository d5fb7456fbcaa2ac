"""Temporal Winograd convolution: fewer products for several frames of the result at once.

F(m, r) computes m outputs of a filter of r taps in m + r - 1 products instead of m·r. Here a
"product" is a whole conv2d of a frame, and the transforms around it are adds of frames::

    F(2, 3)   y = Aᵀ [(G w) ⊙ (Bᵀ d)]      frames d0..d3 of a tile, taps w0..w2, results y0, y1
              v = d0 - d2,  d1 + d2,  d2 - d1,  d3 - d1
              u = w0,  (w0 + w1 + w2)/2,  (w0 - w1 + w2)/2,  w2
              y = u0·v0 + u1·v1 + u2·v2,  u1·v1 - u2·v2 + u3·v3       4 conv2d instead of 6

The matrices are those of Toom and Cook: two polynomials are multiplied through their values at the
points 0, 1, -1, 2, -2 and infinity. A wider tile needs more points, and is less accurate.

A product may include frames of the tile that the kernel of a result does not reach. Their terms
cancel only within rounding: with m > 2, a frame of large numbers adds its rounding to the other
results of its tile, and one NaN or infinite value makes all of them NaN. With m = 2 no product of a
result includes such a frame: the first result does not use the point at infinity, the only one with
the last frame, and the second not the point 0, the only one with the first.

A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016
(arXiv:1509.09308); S. Winograd, Arithmetic Complexity of Computations, 1980.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from fxtemporal.functional.geometry import ConvGeometry, Pair, pad_space, pad_time
from fxtemporal.functional.packed import Weights
from fxtemporal.functional.taps import conv_frames, frames_last, lay_out

__all__ = ["winograd", "winograd_domain", "winograd_taps", "winograd_weight"]

Terms: TypeAlias = tuple[tuple[int, float], ...]

_POINTS = (0, 1, -1, 2, -2)  # and infinity
_PRODUCTS = len(_POINTS) + 1
_PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Sums:
    """The rows of a matrix; two rows that differ only in signs, as for p and -p, form a pair.

    A pair (i, j, same, opposite) shares its halves: row i is same + opposite, row j is
    same - opposite.
    """

    size: int
    pairs: tuple[tuple[int, int, Terms, Terms], ...]
    singles: tuple[tuple[int, Terms], ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Fraction]]) -> Sums:
        pairs = []
        left = set(range(len(rows)))
        for i, j in combinations(range(len(rows)), 2):
            entries = list(zip(rows[i], rows[j], strict=True))
            same = _terms([a if a == b else Fraction(0) for a, b in entries])
            opposite = _terms([a if a == -b else Fraction(0) for a, b in entries])
            alike = all(abs(a) == abs(b) for a, b in entries)
            if alike and same and opposite and {i, j} <= left:
                pairs.append((i, j, same, opposite))
                left -= {i, j}
        return cls(len(rows), tuple(pairs), tuple((i, _terms(rows[i])) for i in sorted(left)))

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each row as a sum of ``tensors``."""
        out: dict[int, Tensor] = {}
        for i, terms in self.singles:
            out[i] = _sum(terms, tensors)
        for i, j, same, opposite in self.pairs:
            s, d = _sum(same, tensors), _sum(opposite, tensors)
            out[i], out[j] = s + d, s - d
        return [out[i] for i in range(self.size)]

    def apply_transposed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each column as a sum of ``tensors``; pairs share their sums and their differences."""
        parts = []
        for i, j, same, opposite in self.pairs:
            a, b = tensors[i], tensors[j]
            parts += [(same, a + b), (opposite, a - b)]
        parts += [(terms, tensors[i]) for i, terms in self.singles]
        out: dict[int, Tensor] = {}
        for terms, part in parts:
            for column, coefficient in terms:
                if column in out:
                    out[column] = torch.add(out[column], part, alpha=coefficient)
                else:
                    out[column] = part if coefficient == 1.0 else part * coefficient
        return [out[column] for column in range(len(out))]


def _terms(row: Sequence[Fraction]) -> Terms:
    """(index, coefficient) of the non-zero entries of a row; one of coefficient 1 first, if any."""
    terms = [(i, float(entry)) for i, entry in enumerate(row) if entry]
    return tuple(sorted(terms, key=lambda term: term[1] != 1.0))


def _sum(terms: Terms, tensors: Sequence[Tensor]) -> Tensor:
    """Σ coefficient·tensor; a coefficient of ±1 costs no product."""
    (index, coefficient), *rest = terms
    total = tensors[index]
    if coefficient != 1.0:
        total = total * coefficient
    for index, coefficient in rest:
        total = torch.add(total, tensors[index], alpha=coefficient)
    return total


@dataclass(frozen=True)
class Transform:
    """The matrices of F(m, r): the frames of a tile, (m+r-1, m+r-1), Bᵀ; the taps, (m+r-1, r), G;
    and the products, (m+r-1, m), A, which is applied transposed.

    Row 1 of A, for the point 1, is all ones: a term added to product 1 is added to all results.
    """

    frames: Sums
    taps: Sums
    products: Sums


def _transform(m: int, r: int) -> Transform:
    """F(m, r), for m ≥ 2 and r ≥ 2."""
    points = [Fraction(p) for p in _POINTS[: m + r - 2]]
    frames, taps, products = [], [], []
    for point in points:
        others = [p for p in points if p != point]
        scale = prod(point - p for p in others)
        frames.append([*_polynomial(others), Fraction(0)])
        taps.append([point**k / scale for k in range(r)])
        products.append([point**i for i in range(m)])
    frames.append(_polynomial(points))  # and the row of infinity
    taps.append([Fraction(k == r - 1) for k in range(r)])
    products.append([Fraction(i == m - 1) for i in range(m)])
    return Transform(Sums.of(frames), Sums.of(taps), Sums.of(products))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of Π (x - root), the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        raised = [Fraction(0), *coefficients]
        scaled = [*(-root * c for c in coefficients), Fraction(0)]
        coefficients = [a + b for a, b in zip(raised, scaled, strict=True)]
    return coefficients


_TRANSFORMS = {
    (m, r): _transform(m, r) for m in range(2, 6) for r in range(2, 6) if m + r - 1 <= _PRODUCTS
}


# ------------------------------------------------------------------------------- the domain


def winograd_domain(m: int) -> Callable[[ConvGeometry], Iterator[str]]:
    """The domain of F(m, kT)."""

    def blockers(geometry: ConvGeometry) -> Iterator[str]:
        stride, dilation = geometry.stride[0], geometry.dilation[0]
        longest = _phase_taps(geometry)[0]
        if stride > 1 and dilation > 1:
            yield f"time has the stride {stride} and the dilation {dilation}"
        if longest == 1:
            yield f"at stride {stride} no two of the {geometry.kernel[0]} taps meet the same frames"
        if m + longest - 1 > _PRODUCTS:
            yield f"F({m}, {longest}) needs more than {_PRODUCTS} products, and is inaccurate"
        if geometry.dtype is None:
            yield "the dtype is not known"
        elif geometry.dtype not in _PRECISE:
            yield f"in {geometry.dtype} it would be less accurate than conv3d"

    return blockers


def _phase_taps(geometry: ConvGeometry) -> list[int]:
    """The numbers of taps that meet frames 0, s, 2s, ..., frames 1, s + 1, ..., for stride s."""
    stride, taps = geometry.stride[0], geometry.kernel[0]
    return [-(-(taps - phase) // stride) for phase in range(min(stride, taps))]


# ------------------------------------------------------------------------------- the weight


def winograd_weight(weight: Tensor, m: int, stride: int = 1, groups: int = 1) -> Tensor:
    """The transformed taps, the weights of the conv2d calls.

    Args:
        weight: (C_out, C/groups, kT, kH, kW).
        m: number of frames of the result in a tile.
        stride: temporal stride. Each phase is transformed separately: phase p has the taps p,
            p + stride, ...; a phase of one tap is not transformed.
        groups: groups of the convolution, which decide the layout.

    Returns:
        (N, C_out, C/groups, kH, kW), where N is m + kT - 1 at stride 1; for kT = 3 at stride 2 it
        is m + 2: the m + 1 of taps 0 and 2, and tap 1.
    """
    parts = []
    for phase in range(min(stride, weight.shape[2])):
        taps = weight[:, :, phase::stride].permute(2, 0, 1, 3, 4)
        r = taps.shape[0]
        if r > 1:
            taps = torch.stack(_TRANSFORMS[m, r].taps.apply(taps.unbind()))
        parts.append(taps)
    return lay_out(torch.cat(parts), groups)


def winograd_taps(m: int) -> Callable[[Tensor, ConvGeometry], Tensor]:
    """``prepare`` of F(m, kT): :func:`winograd_weight`."""

    def prepare(weight: Tensor, geometry: ConvGeometry) -> Tensor:
        return winograd_weight(weight, m, geometry.stride[0], geometry.groups)

    return prepare


# ------------------------------------------------------------------------------ the computing


def winograd(m: int) -> Callable[[Tensor, Weights, Tensor | None, ConvGeometry], Tensor]:
    """``compute`` of the :class:`Form` of F(m, kT)."""

    def compute(
        x: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        return _winograd(m, x, prepared, bias, geometry)

    compute.__doc__ = f"""Temporal Winograd convolution, {m} frames of the result at a time.

    Domain: float32, float64 or complex; kT taps with {m} + kT - 1 ≤ {_PRODUCTS}, where kT is
    divided by the temporal stride and rounded up; kT > 1; a stride or a dilation in time, not both.
    Arguments, result and errors as for :func:`conv3d`.

    A tile of {m} + kT - 1 frames is transformed by adds, (Bᵀ d); each of the transformed frames
    meets one transformed tap in a conv2d; and {m} frames of the result are sums of those, so that
    {m} frames cost {m} + kT - 1 conv2d instead of {m}·kT. T' is rounded up to whole tiles. Dilated
    taps meet every n-th frame, so the clip is n clips, interleaved. A stride n parts the frames
    into n phases, each with its own taps, whose results are added: kT = 3 at stride 2 is
    F({m}, 2) on the even frames and one tap on the odd ones. Input and result are in
    channels_last_3d. Prepared: the transformed taps, :func:`winograd_weight`.

    In float32, relative to the largest value of the result, the error is up to about 2e-6 with up
    to 4 products a tile, 4e-6 with 5 and 6e-6 with 6; conv3d's own is up to about 1e-6. In float16
    and bfloat16 it is more than twice that of conv3d, so these are refused.

    {_spreading(m)}
    """
    return compute


def _spreading(m: int) -> str:
    if m == 2:
        return """A result is made of the frames that conv3d makes it of, and no others: values that
    are NaN, infinite or very large stay where conv3d has them."""
    return """The frames of a tile meet: the error of each result is relative to the largest frame
    of its tile, also where the kernel does not reach it (7e-4 beside a frame that is 1e4 times as
    large), and a NaN or infinite value makes all results of the tile NaN."""


def _winograd(
    m: int, x: Tensor, prepared: Weights, bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Compute F(m, kT). The clip becomes (tile, frame of a tile, lane); a lane is one of the clips
    that a dilation interleaves, or one phase of a stride.
    """
    x, (before, _), inside = pad_space(frames_last(x), geometry)
    stride, dilation = geometry.stride[0], geometry.dilation[0]
    phases, lanes = _phase_taps(geometry), stride * dilation
    tiles = (geometry.out_frames + m * dilation - 1) // (m * dilation)
    length = tiles * m + phases[0] - 1
    x = pad_time(x, before, length * lanes - x.shape[2] - before)
    x = torch.unflatten(x.transpose(1, 2), 1, (length, lanes))
    total, first = None, 0
    for phase, r in enumerate(phases):
        clip = x if stride == 1 else x[:, :, phase : phase + 1]
        used = m + r - 1 if r > 1 else 1
        taps = prepared[first : first + used]
        first += used
        out = _tiled(m, r, tiles, clip, taps, bias if phase == 0 else None, geometry, inside)
        total = out if total is None else total.add_(out)
    assert total is not None
    return total[:, : geometry.out_frames].permute(0, 4, 1, 2, 3)


def _tiled(
    m: int,
    r: int,
    tiles: int,
    x: Tensor,
    taps: Weights,
    bias: Tensor | None,
    geometry: ConvGeometry,
    inside: Pair,
) -> Tensor:
    """(B, length, lanes, C, H, W) -> (B, tiles·m·lanes, H', W', C_out), with r taps at stride 1."""

    def conv(frames: Tensor, tap: Tensor, bias: Tensor | None) -> Tensor:
        lanes = frames.shape[1:3]
        out = conv_frames(frames.flatten(1, 2), tap, bias, geometry, inside)
        return torch.unflatten(out.permute(0, 1, 3, 4, 2), 1, lanes)

    if r == 1:
        return conv(x[:, : tiles * m], taps[0], bias).flatten(1, 2)
    transform = _TRANSFORMS[m, r]
    frames = [x[:, j : j + tiles * m - m + 1 : m] for j in range(m + r - 1)]
    products = [
        conv(v, u, bias if k == 1 else None)
        for k, (v, u) in enumerate(zip(transform.frames.apply(frames), taps, strict=True))
    ]
    return torch.stack(transform.products.apply_transposed(products), dim=2).flatten(1, 3)
