"""The (2+1)D convolution: one over space, then one over time, instead of a 3-D convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fxtemporal.functional.factors import Order, decomposed, weights

__all__ = ["Conv2Plus1d", "paper_rank"]

Size: TypeAlias = int | Sequence[int]
Triple: TypeAlias = tuple[int, int, int]
Rank: TypeAlias = Literal["paper"] | int | float
PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2Plus1d(nn.Module):
    """A (2+1)D convolution: (1, kH, kW) over space, then (kT, 1, 1) over time.

    (B, C_in, T, H, W) -> (B, mid_channels, T, H', W') -> (B, C_out, T', H', W'), as in R(2+1)D
    (Tran et al. 2018, arXiv 1711.11248): stride, padding and dilation are split between the two,
    with an optional normalization and non-linearity between them.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as for ``nn.Conv3d``, for the layer as a whole.
        mid_channels: channels between the two; by default the paper's (:func:`paper_rank`),
            which keeps the parameter count of the 3-D convolution.
        norm: True for ``nn.BatchNorm3d``, or a callable that makes a layer from ``mid_channels``.
        activation: a module, or a callable that makes one (``nn.ReLU``); None for none.
        order: ``"temporal-spatial"`` swaps the two convolutions.

    ``spatial`` and ``temporal`` are ``nn.Conv3d``; ``norm`` and ``activation`` are modules or None.
    So the state dict has ``spatial.*``, ``temporal.*`` and, with a norm, ``norm.*``. The last
    convolution has the bias. The first has one only if an activation follows it directly, since
    otherwise the later layers absorb it.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    spatial: nn.Conv3d
    temporal: nn.Conv3d
    norm: nn.Module | None
    activation: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        mid_channels: int | None = None,
        norm: bool | Callable[[int], nn.Module] = False,
        activation: nn.Module | Callable[[], nn.Module] | None = None,
        order: Order = "spatial-temporal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if order not in ("spatial-temporal", "temporal-spatial"):
            raise ValueError(
                f"order is {order!r}; it must be 'spatial-temporal' or 'temporal-spatial'"
            )
        spatial_first = order == "spatial-temporal"
        kernel = _triple("kernel_size", kernel_size)
        if mid_channels is None:
            # With temporal first, the two kernels are swapped, and so are the outer channels.
            ends = (in_channels, out_channels) if spatial_first else (out_channels, in_channels)
            mid_channels = paper_rank(*ends, kernel, groups=groups)
        if mid_channels < 1 or mid_channels % groups:
            raise ValueError(
                f"mid_channels is {mid_channels}; it must be a positive multiple of groups = "
                f"{groups}"
            )
        self.order = order
        self.mid_channels = mid_channels

        def convolution(name: str, inputs: int, outputs: int, biased: bool) -> nn.Conv3d:
            def part(values: Triple, rest: int) -> Triple:
                t, h, w = values
                return (rest, h, w) if name == "spatial" else (t, rest, rest)

            return nn.Conv3d(
                inputs,
                outputs,
                part(kernel, 1),
                part(_triple("stride", stride), 1),
                padding if isinstance(padding, str) else part(_triple("padding", padding), 0),
                part(_triple("dilation", dilation), 1),
                groups,
                biased,
                padding_mode,
                device,
                dtype,
            )

        first, second = ("spatial", "temporal") if spatial_first else ("temporal", "spatial")
        inner_bias = bias and activation is not None and not norm
        self.add_module(first, convolution(first, in_channels, mid_channels, inner_bias))
        if norm is True:
            self.norm = nn.BatchNorm3d(mid_channels, device=device, dtype=dtype)
        elif norm:
            self.norm = norm(mid_channels).to(device=device, dtype=dtype)
        else:
            self.norm = None
        if activation is None or isinstance(activation, nn.Module):
            self.activation = activation
        else:
            self.activation = activation()
        self.add_module(second, convolution(second, mid_channels, out_channels, bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, T, H, W) -> (B, C_out, T', H', W'); without BatchNorm also without B."""
        spatial_first = self.order == "spatial-temporal"
        x = self.spatial(x) if spatial_first else self.temporal(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        out: Tensor = self.temporal(x) if spatial_first else self.spatial(x)
        return out

    def extra_repr(self) -> str:
        return f"mid_channels={self.mid_channels}, order={self.order!r}"

    @classmethod
    def from_conv3d(cls, conv: nn.Conv3d, rank: Rank = "paper") -> Conv2Plus1d:
        """The closest (2+1)D convolution of a given rank; at full rank it equals ``conv``.

        ``W[o, c, t, h, w] = sum_m A[o, m, t] · B[m, c, h, w]``: the truncated SVD of the weight as
        a (C_out·kT) × (C_in·kH·kW) matrix, with the singular values split evenly between the
        factors. In a grouped convolution each group has its own matrix and SVD, and an equal share
        of the rank. The bias goes to ``temporal``; ``spatial`` has none, so that padding with zeros
        still pads with zeros. Every other padding mode acts on each axis separately anyway.

        Args:
            conv: is not changed. The result has its dtype, device, ``requires_grad`` and mode.
            rank: the channels between the factors: ``"paper"`` (:func:`paper_rank`), an integer
                from 1 to the full rank (a multiple of ``groups``), or a fraction in (0, 1] of the
                full rank, ``min(C_in·kH·kW, kT·C_out)``. Note: 1 is one channel, 1.0 the full rank.

        Raises:
            ValueError: ``conv`` is not a plain ``nn.Conv3d``, its weight has no values to factorize
                (meta device), or not finite ones, or the rank is out of range.
        """
        if type(conv) is not nn.Conv3d:
            raise ValueError(
                f"from_conv3d: {type(conv).__name__} is not nn.Conv3d itself, so its forward may "
                "compute something else"
            )
        weight = conv.weight.detach()
        if weight.is_meta:
            raise ValueError("from_conv3d: the weight is on the meta device and has no values")
        if not torch.isfinite(weight).all():
            raise ValueError("from_conv3d: the weight has entries that are not finite")
        kept = _mid_channels(conv, rank) // conv.groups
        found = decomposed(weight, conv.groups, "spatial-temporal")
        result = cls.of_factors(
            conv.weight,
            conv.bias,
            found.right[:, :kept],
            found.left[..., :kept],
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            padding_mode=conv.padding_mode,
        )
        return result.train(conv.training)

    @classmethod
    def of_factors(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        right: Tensor,
        left: Tensor,
        *,
        order: Order = "spatial-temporal",
        **settings: Any,
    ) -> Conv2Plus1d:
        """A layer whose two weights are the factors of a matrix.

        Args:
            weight: the (C_out, C_in/groups, kT, kH, kW) weight that is replaced: the result has
                its dtype, device and ``requires_grad``.
            bias: (C_out,), or None. The new bias has the ``requires_grad`` of a parameter given.
            right: (groups, m, C_in/groups·taps), the first convolution.
            left: (groups, C_out/groups·taps, m), the second convolution.
            order: whether the first convolution is over space or over time.
            **settings: stride, padding, dilation and padding_mode, as for ``nn.Conv3d``.
        """
        outputs, inputs, kt, kh, kw = weight.shape
        result = cls(
            inputs * right.shape[0],
            outputs,
            (kt, kh, kw),
            groups=right.shape[0],
            bias=bias is not None,
            mid_channels=right.shape[0] * right.shape[1],
            order=order,
            device="meta",
            **settings,
        )

        def parameter(values: Tensor, like: Tensor) -> nn.Parameter:
            values = values.detach().to(device=weight.device, dtype=weight.dtype, copy=True)
            return nn.Parameter(values.contiguous(), requires_grad=like.requires_grad)

        spatial, temporal = result.spatial, result.temporal
        pair = (spatial, temporal) if order == "spatial-temporal" else (temporal, spatial)
        for conv, values in zip(pair, weights(right, left, (kt, kh, kw), order), strict=True):
            conv.weight = parameter(values, weight)
        if bias is not None:
            pair[1].bias = parameter(bias, bias if isinstance(bias, nn.Parameter) else weight)
        return result

    def product(self) -> Tensor:
        """The (C_out, C_in/groups, kT, kH, kW) product of the two weights, in float64."""
        groups = self.spatial.groups
        spatial, temporal = (c.weight.detach().double() for c in (self.spatial, self.temporal))
        if self.order == "spatial-temporal":
            inner, outer = (torch.unflatten(w, 0, (groups, -1)) for w in (spatial, temporal))
            whole = torch.einsum("gomt,gmchw->gocthw", outer[..., 0, 0], inner[:, :, :, 0])
        else:
            inner, outer = (torch.unflatten(w, 0, (groups, -1)) for w in (temporal, spatial))
            whole = torch.einsum("gomhw,gmct->gocthw", outer[:, :, :, 0], inner[..., 0, 0])
        return whole.flatten(0, 1)


def paper_rank(in_channels: int, out_channels: int, kernel_size: Size, *, groups: int = 1) -> int:
    """The number of middle channels that gives a (2+1)D convolution the weights of the 3-D one.

    ``M = floor(kT·kH·kW·N_in·N_out / (kH·kW·N_in + kT·N_out))``, at least 1 (arXiv 1711.11248,
    section 3.5, where kH = kW = d). It is always below the full rank. With ``groups``, it is the M
    of one group times ``groups``.
    """
    kt, kh, kw = _triple("kernel_size", kernel_size)
    inputs, outputs = kh * kw * in_channels // groups, kt * out_channels // groups
    return groups * max(1, inputs * outputs // (inputs + outputs))


def _mid_channels(conv: nn.Conv3d, rank: Rank) -> int:
    kt, kh, kw = conv.kernel_size
    groups = conv.groups
    one_group = min(conv.in_channels // groups * kh * kw, conv.out_channels // groups * kt)
    full = groups * one_group
    if rank == "paper":
        ends = (conv.in_channels, conv.out_channels)
        return paper_rank(*ends, (kt, kh, kw), groups=groups)
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"rank is {rank}; a fraction of the full rank must be in (0, 1]")
        return groups * max(1, round(rank * one_group))
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank is {rank!r}; it must be 'paper', an integer or a float in (0, 1]")
    if not 1 <= rank <= full:
        raise ValueError(f"rank is {rank}; the full rank of this kernel is {full}")
    if rank % groups:
        raise ValueError(f"rank is {rank}; it must be a multiple of groups = {groups}")
    return rank


def _triple(name: str, value: Size) -> Triple:
    if isinstance(value, int):
        return (value, value, value)
    if len(value) != 3:
        raise ValueError(f"{name} is {tuple(value)}; it must be an integer, or three: T, H, W")
    return (value[0], value[1], value[2])
