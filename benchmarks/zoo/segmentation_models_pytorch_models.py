"""Segmentation models of segmentation_models_pytorch over the frames of a clip."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase
from benchmarks.zoo.frames import CarriedMask, StackedMaps

__all__ = ["CASES"]

PACKAGE = "segmentation_models_pytorch"


def _segmenter(name: str, encoder: str = "resnet18", **config: Any) -> nn.Module:
    """A 2-D segmentation model with random weights."""
    torchvision_models()  # the package imports torchvision through timm
    package = importlib.import_module(PACKAGE)
    return cast(nn.Module, getattr(package, name)(encoder, encoder_weights=None, **config))


class AppendedProbabilities(nn.Module):
    """Probabilities appended frame by frame from a clip (B, C, T, H, W)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        masks = []
        for t in range(x.size(2)):
            logits = self.network(x[:, :, t])
            masks.append(logits.softmax(dim=1).unsqueeze(2))
        return torch.cat(masks, dim=2)


class FlattenedMasks(nn.Module):
    """All frames in one batch, and the masks smoothed over time by a depthwise Conv3d."""

    def __init__(self, network: nn.Module, classes: int = 2) -> None:
        super().__init__()
        self.network = network
        self.smooth = nn.Conv3d(classes, classes, (3, 1, 1), padding=(1, 0, 0), groups=classes)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        masks = self.network(x.reshape(b * t, c, h, w)).reshape(b, t, -1, h, w)
        result: Tensor = self.smooth(masks.transpose(1, 2))
        return result


class OneFrame(nn.Module):
    """One step of a stream: a frame and the running mask in, the blended mask out."""

    def __init__(self, network: nn.Module, momentum: float = 0.7) -> None:
        super().__init__()
        self.network = network
        self.momentum = momentum

    def forward(self, frame: Tensor, mask: Tensor) -> Tensor:
        return torch.lerp(mask, torch.sigmoid(self.network(frame)), self.momentum)


class BlendedMasks(nn.Module):
    """The stream of ``OneFrame`` over a whole clip, from a given first mask."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.step = OneFrame(network)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        masks = []
        for frame in x.transpose(0, 1):
            mask = self.step(frame, mask)
            masks.append(mask)
        return torch.stack(masks, dim=1), mask


class BottleneckGRU(nn.Module):
    """Encoder and decoder per frame, with a convolutional GRU over the deepest features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        parts = cast(Any, network)
        self.encoder, self.decoder, self.head = (
            parts.encoder,
            parts.decoder,
            parts.segmentation_head,
        )
        width = parts.encoder.out_channels[-1]
        self.gates = nn.Conv2d(2 * width, 2 * width, 1)
        self.candidate = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor | None = None
        masks = []
        for t in range(x.shape[1]):
            features = list(self.encoder(x[:, t]))
            deepest = features[-1]
            if state is None:
                state = torch.zeros_like(deepest)
            reset, update = self.gates(torch.cat([deepest, state], 1)).sigmoid().chunk(2, dim=1)
            candidate = torch.tanh(self.candidate(torch.cat([deepest, reset * state], 1)))
            state = (1 - update) * state + update * candidate
            features[-1] = state
            masks.append(self.head(self.decoder(features)))
        return torch.stack(masks, dim=1)


class MaskAndLabel(nn.Module):
    """A network with a classification head: the masks stacked, the labels averaged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = [self.network(frame.squeeze(1)) for frame in torch.split(x, 1, dim=1)]
        masks, labels = zip(*outputs, strict=True)
        return {"masks": torch.stack(masks, 1), "label": torch.stack(labels, 1).mean(1)}


def _case(
    name: str,
    wrapper: Callable[[nn.Module], nn.Module],
    network: str,
    *,
    shape: tuple[int, ...] = (1, 4, 3, 64, 64),
    mask: tuple[int, ...] | None = None,
    frames: int | None = 1,
    **config: Any,
) -> ZooCase:
    """The network in this wrapper, called with a random clip and, if asked for, a first mask."""

    def build() -> Built:
        model = wrapper(_segmenter(network, **{"classes": 2, **config}))
        first_mask = None if mask is None else {"mask": torch.zeros(mask)}
        return Built(model.eval(), (torch.randn(shape),), first_mask)

    return ZooCase(PACKAGE, name, build, frames=frames)


_NARROW: dict[str, Any] = {"decoder_channels": (32, 16, 16, 8, 8)}

CASES: tuple[ZooCase, ...] = (
    _case("UnetStackedMasks", StackedMaps, "Unet", shape=(2, 4, 3, 64, 64), **_NARROW),
    _case(
        "UnetPlusPlusStackedMasks",
        StackedMaps,
        "UnetPlusPlus",
        encoder="timm-mobilenetv3_small_minimal_100",
        **_NARROW,
    ),
    _case("FPNFlattenedMasks", FlattenedMasks, "FPN", encoder="efficientnet-b0"),
    _case(
        "PSPNetAppendedProbabilities",
        AppendedProbabilities,
        "PSPNet",
        shape=(2, 3, 5, 64, 64),
        frames=2,
    ),
    _case(
        "DeepLabV3PlusStackedMasks",
        StackedMaps,
        "DeepLabV3Plus",
        encoder="mobilenet_v2",
        shape=(2, 4, 3, 64, 64),
        decoder_channels=32,
    ),
    _case("DeepLabV3FlattenedMasks", FlattenedMasks, "DeepLabV3", decoder_channels=32),
    _case(
        "LinknetCarriedMask",
        CarriedMask,
        "Linknet",
        shape=(2, 5, 3, 64, 64),
        in_channels=4,
        classes=1,
    ),
    _case("MAnetStackedMasks", StackedMaps, "MAnet", decoder_pab_channels=16, **_NARROW),
    _case(
        "PANBlendedMasks",
        BlendedMasks,
        "PAN",
        shape=(1, 3, 3, 128, 128),
        mask=(1, 1, 128, 128),
        decoder_channels=16,
        classes=1,
    ),
    _case(
        "SegformerStackedMasks",
        StackedMaps,
        "Segformer",
        encoder="mit_b0",
        decoder_segmentation_channels=32,
    ),
    _case(
        "UPerNetAppendedProbabilities",
        AppendedProbabilities,
        "UPerNet",
        encoder="tu-convnext_atto",
        encoder_depth=4,
        shape=(1, 3, 4, 64, 64),
        frames=2,
        decoder_channels=32,
    ),
    _case("UnetBottleneckGRU", BottleneckGRU, "Unet", encoder="tu-resnet10t", **_NARROW),
    _case(
        "UnetMaskAndLabel",
        MaskAndLabel,
        "Unet",
        decoder_attention_type="scse",
        decoder_channels=(32, 32, 16, 16, 16),
        aux_params={"classes": 3, "pooling": "avg", "dropout": None},
    ),
    _case(
        "FPNOneFrame",
        OneFrame,
        "FPN",
        shape=(2, 3, 64, 64),
        mask=(2, 1, 64, 64),
        frames=None,
        classes=1,
        decoder_pyramid_channels=32,
        decoder_segmentation_channels=32,
    ),
    _case(
        "UnetCarriedMask",
        CarriedMask,
        "Unet",
        encoder="mobilenet_v2",
        shape=(2, 4, 3, 64, 64),
        in_channels=4,
        classes=1,
        **_NARROW,
    ),
    _case(
        "DPTStackedMasks",
        StackedMaps,
        "DPT",
        shape=(1, 2, 3, 224, 224),
        encoder="tu-vit_tiny_patch16_224",
        decoder_intermediate_channels=(16, 16, 32, 32),
        decoder_fusion_channels=16,
    ),
)
