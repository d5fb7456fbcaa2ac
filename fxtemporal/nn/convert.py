"""Converts a 3-D network to R(2+1)D: every dense Conv3d becomes two convolutions, to be trained.

This is another architecture, not a cheaper form of the same numbers: between the factors are a
BatchNorm and a non-linearity, as in D. Tran et al., A Closer Look at Spatiotemporal Convolutions
for Action Recognition, CVPR 2018 (arXiv 1711.11248). To factorize a trained network see
:class:`fxtemporal.Factorize`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fxtemporal.ir.shallow_copy import carries_hooks
from fxtemporal.nn.conv2plus1d import Conv2Plus1d
from fxtemporal.support.errors import PassError
from fxtemporal.support.torch_private.layers import conv_forward

__all__ = ["MidChannels", "convert_to_2plus1d", "from_torchvision_r2plus1d"]

MidChannels: TypeAlias = (
    Literal["paper"] | int | Mapping[str, int] | Callable[[str, nn.Conv3d], int | None]
)

M = TypeVar("M", bound=nn.Module)


def convert_to_2plus1d(
    model: M,
    mid_channels: MidChannels = "paper",
    *,
    norm: bool | Callable[[int], nn.Module] = True,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> M:
    """A copy of ``model`` in which every Conv3d over time and space is a new :class:`Conv2Plus1d`.

    A convolution that is already flat in time or in space stays, with its weights. New convolutions
    have PyTorch's default initialization, for training from scratch.

    Args:
        model: is not changed.
        mid_channels: the channels between two factors: ``"paper"`` keeps each layer's number of
            parameters (:func:`fxtemporal.nn.paper_rank`); an int for all layers; a mapping from
            module paths, or patterns such as ``"layer1.*"``, of which the first match counts; or a
            function of the path and the layer. If no pattern matches, or the function returns None,
            the paper's number is used.
        norm: True for ``nn.BatchNorm3d`` between the factors, or a callable that makes a layer from
            the channels; False for none.
        activation: makes the non-linearity after the norm; None for none.

    Raises:
        PassError: a Conv3d carries hooks or a parametrization, is a subclass with its own forward,
            or shares its weight with another module: it is not clear how to replace it.
        ValueError: ``mid_channels`` is not a positive multiple of a layer's groups.

    Example::

        net = convert_to_2plus1d(torchvision.models.video.r3d_18())      # R(2+1)D-18
    """
    result = copy.deepcopy(model)
    replaced: dict[nn.Module, Conv2Plus1d] = {}
    homes = _homes(result)
    for path, module in list(result.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Conv3d) or not _is_dense(module):
            continue
        if module not in replaced:
            _require_plain(path, module, homes)
            mid = _chosen(mid_channels, path, module)
            replaced[module] = _pair(module, mid, norm, activation)
        if not path:
            return replaced[module]  # type: ignore[return-value]
        result.set_submodule(path, replaced[module])
    return result


def _is_dense(conv: nn.Conv3d) -> bool:
    return conv.kernel_size[0] > 1 and max(conv.kernel_size[1:]) > 1


def _homes(model: nn.Module) -> dict[Tensor, set[nn.Module]]:
    """The modules that hold each parameter."""
    homes: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                homes.setdefault(parameter, set()).add(module)
    return homes


def _require_plain(path: str, conv: nn.Conv3d, homes: Mapping[Tensor, set[nn.Module]]) -> None:
    name = path or "the model"
    if is_parametrized(conv):
        raise PassError(f"{name} has a parametrized weight: remove the parametrization first")
    if carries_hooks(conv):
        raise PassError(f"{name} carries hooks: remove them first, and add them to the result")
    if conv_forward(type(conv)) != conv_forward(nn.Conv3d) or "forward" in vars(conv):
        raise PassError(f"{name} is a {type(conv).__name__} with a forward of its own")
    if len(homes.get(conv.weight, ())) > 1:
        raise PassError(f"{name} shares its weight with another module: untie them first")


def _chosen(mid_channels: MidChannels, path: str, conv: nn.Conv3d) -> int | None:
    if mid_channels == "paper":
        return None
    if isinstance(mid_channels, int) and not isinstance(mid_channels, bool):
        return mid_channels
    if isinstance(mid_channels, Mapping):
        fits = (mid for pattern, mid in mid_channels.items() if fnmatchcase(path, pattern))
        return next(fits, None)
    if callable(mid_channels):
        return mid_channels(path, conv)
    raise PassError(
        "mid_channels must be 'paper', an int, a mapping from paths or a function, not "
        f"{mid_channels!r}"
    )


def _pair(
    conv: nn.Conv3d,
    mid: int | None,
    norm: bool | Callable[[int], nn.Module],
    activation: Callable[[], nn.Module] | None,
) -> Conv2Plus1d:
    pair = Conv2Plus1d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        mid_channels=mid,
        norm=norm,
        activation=None if activation is None else activation(),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    return pair.train(conv.training)


_TORCHVISION = (
    # the stem, which is a flat list of five layers
    (r"^stem\.0\.", "stem.0.spatial."),
    (r"^stem\.1\.", "stem.0.norm."),
    (r"^stem\.3\.", "stem.0.temporal."),
    (r"^stem\.4\.", "stem.1."),
    # conv1.0 and conv2.0 of a block: spatial, norm, (ReLU,) temporal
    (r"^(layer\d\.\d+\.conv\d\.0)\.0\.", r"\1.spatial."),
    (r"^(layer\d\.\d+\.conv\d\.0)\.1\.", r"\1.norm."),
    (r"^(layer\d\.\d+\.conv\d\.0)\.3\.", r"\1.temporal."),
)


def from_torchvision_r2plus1d(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of torchvision's ``r2plus1d_18``, renamed for a converted ``r3d_18``.

    It has torchvision's numbers of channels, 45 in the stem and one number per block::

        mid = {"stem.0": 45, "layer1.*": 144, "layer2.0.*": 230, "layer2.1.*": 288,
               "layer3.0.*": 460, "layer3.1.*": 576, "layer4.0.*": 921, "layer4.1.*": 1152}
        net = convert_to_2plus1d(r3d_18(), mid)
        net.load_state_dict(from_torchvision_r2plus1d(checkpoint))
    """
    return {_renamed(name): value for name, value in state_dict.items()}


def _renamed(name: str) -> str:
    for pattern, new in _TORCHVISION:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name
