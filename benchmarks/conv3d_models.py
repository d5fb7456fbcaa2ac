"""The networks of 3-D convolutions that are measured: torchvision's, and four kinds it has not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._torchvision import resnet18, video_model
from benchmarks.models import Case, clip_case

__all__ = ["C3D", "CONV3D", "CausalAutoencoder", "UNet3d", "inflated"]


class C3D(nn.Module):
    """(B, 3, 16, H, W) -> (B, classes): eight dense 3×3×3 convolutions (arXiv 1412.0767)."""

    def __init__(self, classes: int = 101) -> None:
        super().__init__()
        widths: list[int | tuple[int, ...]] = [64, (1, 2, 2), 128, (2, 2, 2), 256, 256, (2, 2, 2)]
        widths += [512, 512, (2, 2, 2), 512, 512, (2, 2, 2)]
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if isinstance(width, tuple):
                layers.append(nn.MaxPool3d(width, width))
            else:
                layers += [nn.Conv3d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3, 4)))


class UNet3d(nn.Module):
    """(B, 1, D, H, W) -> (B, classes, D, H, W): a 3-D U-Net (arXiv 1606.06650)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128), classes: int = 3) -> None:
        super().__init__()
        self.down, self.up, self.join = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = 1
        for width in widths:
            self.down.append(self._twice(channels, width))
            channels = width
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose3d(channels, width, 2, stride=2))
            self.join.append(self._twice(2 * width, width))
            channels = width
        self.head = nn.Conv3d(channels, classes, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv3d(channels, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for place, block in enumerate(self.down):
            x = block(x if place == 0 else F.max_pool3d(x, 2))
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(kept[:-1]), strict=True):
            x = join(torch.cat([up(x), skip], dim=1))
        return self.head(x)


def inflated(model: nn.Module) -> nn.Module:
    """An image network for clips: each kernel repeated over time, divided by how often (I3D).

    J. Carreira and A. Zisserman, arXiv 1705.07750, section 2.4.
    """
    for name, child in list(model.named_children()):
        setattr(model, name, inflated(child))
    match model:
        case nn.Conv2d():
            taps = 3 if model.kernel_size[0] > 1 else 1
            kernel, stride = (taps, *model.kernel_size), (1, *model.stride)
            assert not isinstance(model.padding, str)
            padding = (taps // 2, *model.padding)
            conv = nn.Conv3d(
                model.in_channels,
                model.out_channels,
                (kernel[0], kernel[1], kernel[2]),
                (stride[0], stride[1], stride[2]),
                (padding[0], padding[1], padding[2]),
                bias=model.bias is not None,
            )
            with torch.no_grad():
                conv.weight.copy_((model.weight / taps).unsqueeze(2).expand_as(conv.weight))
            return conv
        case nn.BatchNorm2d():
            return nn.BatchNorm3d(model.num_features)
        case nn.MaxPool2d():
            size, stride, padding = (
                int(v) for v in (model.kernel_size, model.stride, model.padding)
            )
            return nn.MaxPool3d((1, size, size), (1, stride, stride), (0, padding, padding))
        case nn.AdaptiveAvgPool2d():
            return nn.AdaptiveAvgPool3d(1)
    return model


class CausalConv3d(nn.Module):
    """A convolution that sees the past alone: zeros are put before the clip."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, 2, 0)))


class CausalBlock(nn.Module):
    """(B, C, T, H, W) -> the same: two causal convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = CausalConv3d(channels, channels), CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class CausalAutoencoder(nn.Module):
    """(B, 3, T, H, W) -> the same: as the autoencoders of video diffusion models are built."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), latent: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [CausalConv3d(3, widths[0])]
        for before, after in itertools.pairwise(widths):
            layers += [CausalBlock(before), CausalConv3d(before, after, (2, 2, 2))]
        layers += [CausalBlock(widths[-1]), nn.Conv3d(widths[-1], latent, 1)]
        layers += [nn.Conv3d(latent, widths[-1], 1), CausalBlock(widths[-1])]
        turned = widths[::-1]
        for before, after in itertools.pairwise(turned):
            layers += [nn.Upsample(scale_factor=2), CausalConv3d(before, after), CausalBlock(after)]
        self.layers = nn.Sequential(*layers, CausalConv3d(widths[0], 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _inflated_resnet() -> nn.Module:
    return inflated(resnet18(num_classes=101))


def _video(name: str, *shape: int) -> Case:
    build: Callable[[], nn.Module] = partial(video_model, name)
    return clip_case(name, build, *shape)


CONV3D: Mapping[str, Case] = {
    case.name: case
    for case in (
        _video("r3d_18", 1, 3, 16, 112, 112),
        _video("mc3_18", 1, 3, 16, 112, 112),
        _video("r2plus1d_18", 1, 3, 16, 112, 112),
        _video("s3d", 1, 3, 16, 224, 224),
        _video("swin3d_t", 1, 3, 16, 224, 224),
        _video("mvit_v1_b", 1, 3, 16, 224, 224),
        clip_case("unet3d", UNet3d, 1, 1, 64, 64, 64),
        clip_case("c3d", C3D, 1, 3, 16, 112, 112),
        clip_case("inflated_resnet18", _inflated_resnet, 1, 3, 16, 112, 112),
        clip_case("causal_autoencoder", CausalAutoencoder, 1, 3, 8, 64, 64),
    )
}
