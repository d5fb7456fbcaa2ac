"""Image encoders of timm over the frames of a clip, in the spellings of video repositories."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase
from benchmarks.zoo.frames import FramesLSTM, FramesMean
from benchmarks.zoo.weights import settled

__all__ = ["CASES"]

PACKAGE = "timm"


def _encoder(name: str, **config: Any) -> nn.Module:
    """An image model of timm without its classifier."""
    torchvision_models()  # timm imports torchvision
    timm = importlib.import_module("timm")
    config = {"pretrained": False, **config}
    if not config.get("features_only"):
        config.setdefault("num_classes", 0)
    return cast(nn.Module, timm.create_model(name, **config))


def _width(encoder: nn.Module) -> int:
    """The number of features of one image."""
    return cast(int, getattr(encoder, "head_hidden_size", None) or encoder.num_features)


def _lstm(encoder: nn.Module) -> nn.Module:
    """An LSTM over the features."""
    return FramesLSTM(encoder, _width(encoder))


def _mean(encoder: nn.Module) -> nn.Module:
    """The mean of the logits."""
    return FramesMean(nn.Sequential(encoder, nn.Linear(_width(encoder), 5)))


class AppendedGRU(nn.Module):
    """Features appended to a list frame by frame, then a bidirectional GRU."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.gru = nn.GRU(_width(encoder), 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.size(0), x.size(1)
        features = []
        for t in range(frames):
            frame = x[:, t, :, :, :]
            features.append(self.encoder(frame).view(batch, -1))
        hidden, _ = self.gru(torch.stack(features, dim=1))
        result: Tensor = self.head(hidden.mean(dim=1))
        return result


class SummedLogits(nn.Module):
    """Logits added up in a running sum and divided by the number of frames."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for frame in x.unbind(1):
            logits = self.encoder(frame)
            total = logits if total is None else total + logits
        assert total is not None
        return total / x.size(1)


class PermutedFrames(nn.Module):
    """A comprehension over a clip (B, C, T, H, W) with the frames permuted to the front."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(_width(encoder), classes)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([self.encoder(frame) for frame in x.permute(2, 0, 1, 3, 4)])
        result: Tensor = self.head(features.max(dim=0).values)
        return result


class EnumeratedBuffer(nn.Module):
    """Features written into a preallocated tensor under ``enumerate``, then a Conv1d."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = _width(encoder)
        self.conv = nn.Conv1d(self.width, 16, kernel_size=3, padding=1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = x.new_zeros(x.shape[0], x.shape[1], self.width)
        for t, frame in enumerate(x.transpose(0, 1)):
            features[:, t] = self.encoder(frame)
        result: Tensor = self.head(F.relu(self.conv(features.transpose(1, 2))).mean(-1))
        return result


class AttentionPool(nn.Module):
    """Features weighted by a softmax over the frames."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.score = nn.Sequential(nn.Linear(_width(encoder), 16), nn.Tanh(), nn.Linear(16, 1))
        self.head = nn.Linear(_width(encoder), classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([self.encoder(x[:, t]).unsqueeze(1) for t in range(x.size(1))], dim=1)
        weights = self.score(features).softmax(dim=1)
        return self.head((weights * features).sum(dim=1)), weights.squeeze(-1)


class TransformerPool(nn.Module):
    """Features of all frames, flattened by hand, in a transformer with a class token."""

    def __init__(self, encoder: nn.Module, frames: int, classes: int = 5) -> None:
        super().__init__()
        width = _width(encoder)
        self.encoder = encoder
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, frames + 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.temporal = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        features = self.encoder(x.flatten(0, 1)).reshape(batch, frames, -1)
        tokens = torch.cat([self.token.expand(batch, -1, -1), features], dim=1)
        result: Tensor = self.head(self.temporal(tokens + self.position)[:, 0])
        return result


class FlattenedConv1d(nn.Module):
    """``view`` to one batch of images and back, then dilated Conv1d layers as in MS-TCN."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.reduce = nn.Conv1d(_width(encoder), 16, 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(16, 16, 3, padding=2**level, dilation=2**level) for level in range(3)
        )
        self.head = nn.Conv1d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        out = self.reduce(self.encoder(x.view(b * t, c, h, w)).view(b, t, -1).permute(0, 2, 1))
        for layer in self.layers:
            out = out + F.relu(layer(out))
        result: Tensor = self.head(out)
        return result


class StackedPyramid(nn.Module):
    """The feature maps of the frames, stacked level by level to clips (B, C, T, H, W)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> list[Tensor]:
        pyramids = [self.encoder(x[:, t]) for t in range(x.shape[1])]
        return [torch.stack(level, dim=2) for level in zip(*pyramids, strict=True)]


class FusedPyramid(nn.Module):
    """A feature pyramid per frame, each level convolved over time and summed at one size."""

    def __init__(self, encoder: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.encoder = encoder
        channels = cast(Any, encoder).feature_info.channels()
        self.lateral = nn.ModuleList(
            nn.Conv3d(channel, width, (3, 1, 1), padding=(1, 0, 0)) for channel in channels
        )

    def forward(self, x: Tensor) -> Tensor:
        levels: list[list[Tensor]] = [[] for _ in self.lateral]
        for frame in x.unbind(dim=1):
            for level, feature in zip(levels, self.encoder(frame), strict=True):
                level.append(feature)
        clips = [
            conv(torch.stack(level, dim=2))
            for conv, level in zip(self.lateral, levels, strict=True)
        ]
        size = clips[0].shape[2:]
        fused: Tensor = clips[0]
        for clip in clips[1:]:
            fused = fused + F.interpolate(clip, size=size, mode="nearest")
        return fused


class LastMapConvLSTM(nn.Module):
    """The last feature map of each frame, carried through a convolutional LSTM cell."""

    def __init__(self, encoder: nn.Module, hidden: int = 8) -> None:
        super().__init__()
        self.encoder = encoder
        self.hidden = hidden
        channels = cast(Any, encoder).feature_info.channels()[-1]
        self.gates = nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.encoder(x[:, t])[-1] for t in range(x.shape[1])]
        b, _, height, width = maps[0].shape
        h = x.new_zeros(b, self.hidden, height, width)
        c = torch.zeros_like(h)
        outputs = []
        for feature in maps:
            i, f, g, o = self.gates(torch.cat([feature, h], dim=1)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class CellPerFrame(nn.Module):
    """An LSTM cell stepped inside the loop that encodes the frames."""

    def __init__(self, encoder: nn.Module, hidden: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.cell = nn.LSTMCell(_width(encoder), hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), self.cell.hidden_size, device=x.device, dtype=x.dtype)
        c = torch.zeros_like(h)
        logits = []
        for t in range(x.size(1)):
            h, c = self.cell(self.encoder(x[:, t]), (h, c))
            logits.append(self.head(h))
        return torch.stack(logits, dim=1)


class FrameDifferences(nn.Module):
    """Features of consecutive frames subtracted from each other in a loop."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2 * _width(encoder), classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.encoder(frame.squeeze(1)) for frame in torch.split(x, 1, dim=1)]
        motion = [after - before for before, after in pairwise(features)]
        appearance = torch.stack(features, dim=1).mean(1)
        result: Tensor = self.head(torch.cat([appearance, torch.stack(motion, 1).mean(1)], 1))
        return result


class SelfAttentionOverFrames(nn.Module):
    """``chunk`` into frames, then multi-head self-attention over their features."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.attention = nn.MultiheadAttention(_width(encoder), 4, batch_first=True)
        self.head = nn.Linear(_width(encoder), classes)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.chunk(x, x.shape[1], dim=1)
        features = torch.stack([self.encoder(frame[:, 0]) for frame in frames], dim=1)
        attended, _ = self.attention(features, features, features, need_weights=False)
        result: Tensor = self.head((features + attended).mean(dim=1))
        return result


class TokensOfFrames(nn.Module):
    """The unpooled tokens of each frame joined to one sequence (B, T x N, C)."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.norm = nn.LayerNorm(_width(encoder))
        self.head = nn.Linear(_width(encoder), classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = [self.encoder.forward_features(x[:, :, t]) for t in range(x.shape[2])]
        result: Tensor = self.head(self.norm(torch.cat(tokens, dim=1)).mean(dim=1))
        return result


class DividedTokens(nn.Module):
    """Maps of all frames at once, with an attention over the frames of each position."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder: Any = encoder
        width = _width(encoder)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        images = x.transpose(1, 2).reshape(b * t, c, h, w)
        maps = self.encoder.forward_features(images)
        n = maps.shape[-2] * maps.shape[-1]
        tokens = maps.reshape(b, t, -1, n).permute(0, 3, 1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.head(tokens.mean(dim=(1, 2)))
        return result


class ShiftedFrames(nn.Module):
    """A temporal shift of the input channels before one batched call, as in TSM."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(_width(encoder), classes)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[0], x.shape[1]
        shifted = torch.zeros_like(x)
        shifted[:, :-1, :1] = x[:, 1:, :1]
        shifted[:, 1:, 1:2] = x[:, :-1, 1:2]
        shifted[:, :, 2:] = x[:, :, 2:]
        logits = self.head(self.encoder(shifted.flatten(0, 1)))
        result: Tensor = logits.unflatten(0, (b, t)).mean(1)
        return result


def _case(
    name: str,
    wrapper: Callable[[nn.Module], nn.Module],
    encoder: str,
    *,
    shape: tuple[int, ...] = (2, 4, 3, 64, 64),
    frames: int = 1,
    **config: Any,
) -> ZooCase:
    """The encoder in this wrapper, called with one random clip."""

    def build() -> Built:
        return settled(wrapper(_encoder(encoder, **config)), torch.randn(shape))

    return ZooCase(PACKAGE, name, build, frames=frames)


_PYRAMID: dict[str, Any] = {"features_only": True}

CASES: tuple[ZooCase, ...] = (
    _case("ResNet18StackedLSTM", _lstm, "resnet18", shape=(2, 6, 3, 64, 64)),
    _case("EfficientNetB0AppendedGRU", AppendedGRU, "efficientnet_b0"),
    _case("EfficientNetLite0SummedLogits", SummedLogits, "efficientnet_lite0", num_classes=5),
    _case("MobileNetV3UnboundMean", _mean, "mobilenetv3_small_050", shape=(2, 8, 3, 64, 64)),
    _case(
        "ConvNeXtPermutedFrames",
        PermutedFrames,
        "convnext_atto",
        shape=(2, 3, 6, 64, 64),
        frames=2,
    ),
    _case(
        "MaxVitAttentionPool",
        AttentionPool,
        "maxvit_rmlp_pico_rw_256",
        shape=(1, 4, 3, 64, 64),
        img_size=64,
    ),
    _case(
        "SwinTransformerSelfAttention",
        SelfAttentionOverFrames,
        "swin_tiny_patch4_window7_224",
        shape=(1, 4, 3, 64, 64),
        img_size=64,
        window_size=4,
        embed_dim=48,
        depths=(2, 2, 2, 2),
    ),
    _case(
        "VisionTransformerTransformerPool",
        lambda encoder: TransformerPool(encoder, frames=5),
        "vit_tiny_patch16_224",
        shape=(2, 5, 3, 64, 64),
        img_size=64,
        depth=6,
    ),
    _case(
        "VisionTransformerTokensOfFrames",
        TokensOfFrames,
        "vit_tiny_patch16_224",
        shape=(2, 3, 4, 64, 64),
        frames=2,
        img_size=64,
        depth=4,
    ),
    _case("RegNetEnumeratedBuffer", EnumeratedBuffer, "regnetx_002", shape=(2, 5, 3, 64, 64)),
    _case("DenseNetFlattenedConv1d", FlattenedConv1d, "densenet121", shape=(1, 6, 3, 64, 64)),
    _case("GhostNetCellPerFrame", CellPerFrame, "ghostnet_050"),
    _case("EdgeNeXtFrameDifferences", FrameDifferences, "edgenext_xx_small"),
    _case(
        "LevitUnboundMean",
        _mean,
        "levit_128s",
        shape=(2, 4, 3, 64, 64),
        img_size=64,
    ),
    _case(
        "CoAtNetStackedLSTM",
        _lstm,
        "coatnet_pico_rw_224",
        shape=(1, 4, 3, 64, 64),
        img_size=64,
    ),
    _case("MobileVitFusedPyramid", FusedPyramid, "mobilevit_xxs", **_PYRAMID),
    _case(
        "PoolFormerDividedTokens",
        DividedTokens,
        "poolformer_s12",
        shape=(1, 3, 4, 64, 64),
        frames=2,
    ),
    _case("ResNet18StackedPyramid", StackedPyramid, "resnet18", **_PYRAMID),
    _case(
        "MobileNetV2LastMapConvLSTM",
        LastMapConvLSTM,
        "mobilenetv2_050",
        shape=(2, 5, 3, 64, 64),
        **_PYRAMID,
    ),
    _case("ResNet10ShiftedFrames", ShiftedFrames, "resnet10t", shape=(2, 8, 3, 64, 64)),
    _case("ConvNeXtFusedPyramid", FusedPyramid, "convnext_atto", **_PYRAMID),
    _case("RepVGGSummedLogits", SummedLogits, "repvgg_a0", num_classes=5),
    _case("XceptionAttentionPool", AttentionPool, "legacy_xception", shape=(1, 4, 3, 96, 96)),
    _case("MnasNetTransformerPool", lambda e: TransformerPool(e, frames=4), "mnasnet_small"),
    _case("MixerAppendedGRU", AppendedGRU, "mixer_s32_224", img_size=64),
    _case("FastVitPermutedFrames", PermutedFrames, "fastvit_t8", shape=(1, 3, 4, 64, 64), frames=2),
)
