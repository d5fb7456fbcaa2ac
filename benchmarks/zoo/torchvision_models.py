"""torchvision's video networks, and its image networks over the frames of a clip."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._torchvision import resnet18, torchvision_models, video_model
from benchmarks.zoo.case import Built, ZooCase
from benchmarks.zoo.frames import FramesLSTM, FramesMean, StackedMaps
from benchmarks.zoo.weights import settled

__all__ = ["CASES"]

PACKAGE = "torchvision"


def _image_model(name: str, **config: Any) -> nn.Module:
    """One of torchvision's image classifiers by name, with random weights."""
    return cast(nn.Module, getattr(torchvision_models(), name)(weights=None, **config))


def _segmenter(name: str) -> nn.Module:
    """One of torchvision's segmentation networks by name, with random weights."""
    make = getattr(torchvision_models().segmentation, name)
    return cast(nn.Module, make(weights=None, weights_backbone=None, num_classes=4))


def _masks(name: str) -> nn.Module:
    """The masks of the frames of a clip (B, C, T, H, W) by this network."""
    return StackedMaps(Segmentation(_segmenter(name)), dim=2)


def _attribute(module: str, name: str) -> Any:
    """A class or function of a module below ``torchvision.models``."""
    torchvision_models()
    return getattr(importlib.import_module(f"torchvision.models.{module}"), name)


class CarriedState(nn.Module):
    """CNN and LSTM called one frame at a time, with the hidden state carried in the loop."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        self.lstm = nn.LSTM(width, 16, num_layers=2)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden: tuple[Tensor, Tensor] | None = None
        out = x
        for t in range(x.size(1)):
            features = self.encoder(x[:, t])
            out, hidden = self.lstm(features.unsqueeze(0), hidden)
        result: Tensor = self.head(F.relu(out[-1]))
        return result


class Segmentation(nn.Module):
    """The map that a segmentation network returns as ``"out"`` of its dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x)["out"]
        return result


class PairwiseFlow(nn.Module):
    """RAFT between consecutive frames of a clip, in a loop over pairs."""

    def __init__(self, flow: nn.Module, updates: int) -> None:
        super().__init__()
        self.flow = flow
        self.updates = updates

    def forward(self, x: Tensor) -> Tensor:
        flows = []
        for t in range(x.shape[1] - 1):
            predictions = self.flow(x[:, t], x[:, t + 1], num_flow_updates=self.updates)
            flows.append(predictions[-1])
        return torch.stack(flows, dim=1)


def _headless_resnet18() -> nn.Module:
    model = resnet18()
    cast(Any, model).fc = nn.Identity()
    return model


def _headless_mobilenet() -> nn.Module:
    model = _image_model("mobilenet_v3_small")
    cast(Any, model).classifier = nn.Identity()
    return model


def _small_raft() -> nn.Module:
    """The modules of ``raft_small``, on correlations of three levels for small images."""
    make = _attribute("optical_flow.raft", "_raft")
    correlations = _attribute("optical_flow.raft", "CorrBlock")(num_levels=3, radius=3)
    residual = _attribute("optical_flow.raft", "BottleneckBlock")
    model = make(
        weights=None,
        progress=False,
        feature_encoder_layers=(32, 32, 64, 96, 128),
        feature_encoder_block=residual,
        feature_encoder_norm_layer=nn.InstanceNorm2d,
        context_encoder_layers=(32, 32, 64, 96, 160),
        context_encoder_block=residual,
        context_encoder_norm_layer=None,
        corr_block_num_levels=3,
        corr_block_radius=3,
        motion_encoder_corr_layers=(96,),
        motion_encoder_flow_layers=(64, 32),
        motion_encoder_out_channels=82,
        recurrent_block_hidden_state_size=96,
        recurrent_block_kernel_size=(3,),
        recurrent_block_padding=(1,),
        flow_head_hidden_size=128,
        use_mask_predictor=False,
        corr_block=correlations,
    )
    return cast(nn.Module, model)


def _raft() -> Built:
    model = cast(Any, torchvision_models()).optical_flow.raft_small(weights=None)
    images = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    return Built(model.eval(), (images[0], images[1]), {"num_flow_updates": 3})


def _pairwise_raft() -> Built:
    model = PairwiseFlow(_small_raft(), updates=2)
    return Built(model.eval(), (torch.rand(1, 4, 3, 64, 64) * 2 - 1,))


def _case(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    frames: int | None = 2,
) -> ZooCase:
    """What ``make`` returns, called with one random clip."""
    return ZooCase(PACKAGE, name, lambda: settled(make(), torch.randn(shape)), frames=frames)


def _mvit(version: int) -> nn.Module:
    """Four blocks with the settings of ``mvit_v1_b`` or of ``mvit_v2_s``."""
    setting = _attribute("video.mvit", "MSBlockConfig")
    blocks = [
        setting(
            num_heads=heads,
            input_channels=before,
            output_channels=after,
            kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=[1, stride, stride],
            stride_kv=[1, pooled, pooled],
        )
        for heads, before, after, stride, pooled in (
            (1, 24, 24, 1, 4),
            (2, 24, 48, 2, 2),
            (2, 48, 48, 1, 2),
            (4, 48, 96, 2, 1),
        )
    ]
    return cast(
        nn.Module,
        _attribute("video.mvit", "MViT")(
            spatial_size=(64, 64),
            temporal_size=8,
            block_setting=blocks,
            residual_pool=version == 2,
            residual_with_cls_embed=version == 1,
            rel_pos_embed=version == 2,
            proj_after_attn=version == 2,
            num_classes=5,
        ),
    )


def _swin3d() -> nn.Module:
    return cast(
        nn.Module,
        _attribute("video.swin_transformer", "SwinTransformer3d")(
            patch_size=[2, 4, 4],
            embed_dim=24,
            depths=[2, 2, 2],
            num_heads=[2, 4, 4],
            window_size=[4, 4, 4],
            num_classes=5,
        ),
    )


_CLIP = (1, 3, 8, 56, 56)

CASES: tuple[ZooCase, ...] = (
    _case("r3d_18", lambda: video_model("r3d_18", num_classes=5), _CLIP),
    _case("mc3_18", lambda: video_model("mc3_18", num_classes=5), _CLIP),
    _case("r2plus1d_18", lambda: video_model("r2plus1d_18", num_classes=5), (1, 3, 4, 56, 56)),
    _case("S3D", lambda: video_model("s3d", num_classes=5), (1, 3, 14, 224, 224)),
    _case("MViTv1", lambda: _mvit(version=1), (1, 3, 8, 64, 64)),
    _case("MViTv2", lambda: _mvit(version=2), (1, 3, 8, 64, 64)),
    _case("SwinTransformer3d", _swin3d, (1, 3, 8, 64, 64)),
    _case("swin3d_t", lambda: video_model("swin3d_t", num_classes=5), (1, 3, 8, 64, 64)),
    ZooCase(PACKAGE, "raft_small", _raft, frames=None),
    ZooCase(PACKAGE, "RAFTPairwiseFlow", _pairwise_raft, frames=1),
    _case(
        "ResNet18FramesLSTM",
        lambda: FramesLSTM(_headless_resnet18(), 512, layers=2),
        (2, 6, 3, 64, 64),
        frames=1,
    ),
    _case(
        "ResNet18CarriedState",
        lambda: CarriedState(_headless_resnet18(), 512),
        (2, 5, 3, 64, 64),
        frames=1,
    ),
    _case(
        "MobileNetV3FramesLSTM",
        lambda: FramesLSTM(_headless_mobilenet(), 576, layers=2),
        (2, 8, 3, 64, 64),
        frames=1,
    ),
    _case(
        "ShuffleNetV2FramesMean",
        lambda: FramesMean(_image_model("shufflenet_v2_x0_5", num_classes=5)),
        (2, 6, 3, 64, 64),
        frames=1,
    ),
    _case(
        "SqueezeNetFramesMean",
        lambda: FramesMean(_image_model("squeezenet1_1", num_classes=5)),
        (2, 6, 3, 64, 64),
        frames=1,
    ),
    _case(
        "GoogLeNetFramesMean",
        lambda: FramesMean(_image_model("googlenet", num_classes=5, init_weights=False)),
        (1, 4, 3, 64, 64),
        frames=1,
    ),
    _case(
        "LRASPPFramesMasks",
        lambda: _masks("lraspp_mobilenet_v3_large"),
        (1, 3, 4, 64, 64),
    ),
    _case(
        "DeepLabV3FramesMasks",
        lambda: _masks("deeplabv3_mobilenet_v3_large"),
        (2, 3, 4, 64, 64),
    ),
    _case("FCNFramesMasks", lambda: _masks("fcn_resnet50"), (1, 3, 3, 64, 64)),
)
