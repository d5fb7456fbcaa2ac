"""The networks and layers of PyTorchVideo, narrow and on short clips (B, C, T, H, W)."""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase

__all__ = ["CASES"]

PACKAGE = "pytorchvideo"

_CLIP = (1, 3, 8, 64, 64)
_TWO_CLIPS = (2, 3, 4, 32, 32)


def _make(path: str, *args: Any, **config: Any) -> nn.Module:
    """Call ``module.name`` of PyTorchVideo, such as ``models.resnet.create_resnet``."""
    torchvision_models()  # PyTorchVideo imports torchvision
    module, name = path.rsplit(".", 1)
    make = getattr(importlib.import_module(f"pytorchvideo.{module}"), name)
    return cast(nn.Module, make(*args, **config))


def _case(
    name: str, path: str, *args: Any, shape: tuple[int, ...] = _CLIP, **config: Any
) -> ZooCase:
    """What ``path`` builds, called with one random tensor of this shape."""

    def build() -> Built:
        return Built(_make(path, *args, **config).eval(), (torch.randn(shape),))

    return ZooCase(PACKAGE, name, build)


def _slowfast(path: str, alpha: int = 4, **config: Any) -> Built:
    """A slow and a fast pathway, called with a list of two clips of one video."""
    model = _make(
        path,
        model_num_class=5,
        stem_dim_outs=(16, 4),
        slowfast_channel_reduction_ratio=(4,),
        slowfast_fusion_conv_stride=(alpha, 1, 1),
        head_pool_kernel_sizes=((4, 2, 2), (4 * alpha, 2, 2)),
        **config,
    )
    for module in model.modules():  # by default the first block writes into the caller's list
        if hasattr(module, "multipathway_blocks"):
            cast(Any, module).inplace = False
    fast = torch.randn(1, 3, 4 * alpha, 64, 64)
    return Built(model.eval(), ([fast[:, :, ::alpha].contiguous(), fast],))


def _slowfast_r50() -> Built:
    return _slowfast("models.slowfast.create_slowfast")


def _slowfast_16x8() -> Built:
    long = [(3, 1, 1)] * 6 + [(1, 1, 1)] * 17  # the fourth stage of SLOWFAST_16x8_R101_50_50
    slow = ((1, 1, 1), (1, 1, 1), tuple(long), (3, 1, 1))
    return _slowfast(
        "models.slowfast.create_slowfast",
        alpha=2,
        model_depth=101,
        slowfast_fusion_conv_kernel_size=(5, 1, 1),
        stage_conv_a_kernel_sizes=(slow, ((3, 1, 1),) * 4),
    )


def _mvit(**config: Any) -> dict[str, Any]:
    """The settings of a small MViT of four blocks with one change of resolution."""
    return {
        "spatial_size": 32,
        "temporal_size": 8,
        "depth": 4,
        "patch_embed_dim": 24,
        "embed_dim_mul": [[1, 2.0]],
        "atten_head_mul": [[1, 2.0]],
        "pool_q_stride_size": [[1, 1, 2, 2]],
        "pool_kv_stride_adaptive": [1, 4, 4],
        "pool_kvq_kernel": [3, 3, 3],
        "head_num_classes": 5,
    } | config


def _nonlocal() -> Built:
    make = "layers.nonlocal_net.create_nonlocal"
    model = _make(make, dim_in=16, dim_inner=8, pool_size=(1, 2, 2))
    return Built(model.eval(), (torch.randn(2, 16, 4, 16, 16),))


def _efficient_blocks() -> nn.Sequential:
    """A stack of the blocks for mobile processors: pointwise, depthwise, temporal, SE."""
    blocks = importlib.import_module("pytorchvideo.layers.accelerator.mobile_cpu.convolutions")
    attention = importlib.import_module("pytorchvideo.layers.accelerator.mobile_cpu.attention")
    pool = importlib.import_module("pytorchvideo.layers.accelerator.mobile_cpu.pool")
    return nn.Sequential(
        blocks.Conv3dTemporalKernel1BnAct(
            3, 8, spatial_kernel=3, spatial_stride=2, spatial_padding=1, activation="hswish"
        ),
        blocks.Conv3d5x1x1BnAct(8, 8, groups=8, activation="swish"),
        blocks.Conv3dPwBnAct(8, 16),
        blocks.Conv3d3x3x3DwBnAct(16, spatial_stride=2, activation="identity"),
        attention.SqueezeExcitation(16, num_channels_reduced=4, is_3d=True),
        blocks.Conv3d3x1x1BnAct(16, 16, groups=4),
        pool.AdaptiveAvgPool3dOutSize1(),
        blocks.Conv3dPwBnAct(16, 5, bias=True, use_bn=False, activation="identity"),
    )


def _efficient() -> Built:
    torchvision_models()
    return Built(_efficient_blocks().eval(), (torch.randn(_CLIP),))


def _deployable(model: nn.Module, clip: Tensor) -> Built:
    """The form for deployment: each Conv3d unrolled into Conv2d calls for the clip's frames."""
    conversion = importlib.import_module(
        "pytorchvideo.accelerator.deployment.mobile_cpu.utils.model_conversion"
    )
    return Built(conversion.convert_to_deployable_form(model, clip).eval(), (clip,))


def _efficient_deployable() -> Built:
    torchvision_models()
    return _deployable(_efficient_blocks(), torch.randn(1, 3, 6, 32, 32))


def _x3d_deployable() -> Built:
    model = _make("models.accelerator.mobile_cpu.efficient_x3d.EfficientX3d", num_classes=5)
    return _deployable(model, torch.randn(1, 3, 4, 64, 64))


def _masked_streams() -> Built:
    """Two streams of features with masks, pooled over time and concatenated."""
    streams = importlib.import_module("pytorchvideo.models.masked_multistream")
    fusion = importlib.import_module("pytorchvideo.layers.fusion")
    video = streams.MaskedSequential(
        nn.Linear(12, 16),
        streams.TransposeMultiheadAttention(16, num_heads=2),
        streams.MaskedTemporalPooling("avg"),
    )
    audio = streams.MaskedSequential(
        streams.TransposeTransformerEncoder(8, num_heads=2), nn.Linear(8, 16)
    )
    model = streams.MaskedMultiPathWay(
        multipathway_blocks=nn.ModuleList([video, audio]),
        multipathway_fusion=fusion.make_fusion_layer("concat", [16, 16]),
    )
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    inputs = [(torch.randn(2, 6, 12), mask), (torch.randn(2, 6, 8), mask.clone())]
    return Built(model.eval(), (inputs,))


def _masked_lstm() -> Built:
    """Features of a clip with a mask, in a packed LSTM with a learned default."""
    streams = importlib.import_module("pytorchvideo.models.masked_multistream")
    model = streams.MaskedSequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        streams.LSTM(16, 8, bidirectional=True),
        streams.LearnMaskedDefault(16),
    )
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    return Built(model.eval(), (torch.randn(2, 6, 12), mask))


_NARROW: dict[str, Any] = {"model_num_class": 5, "stem_dim_out": 16}
_HEAD: dict[str, Any] = {"head_pool_kernel_size": (8, 2, 2)}
_ALTERNATE = ((3, 1, 1), (1, 1, 1))

CASES: tuple[ZooCase, ...] = (
    _case(
        "slow_r50",
        "models.resnet.create_resnet",
        stem_conv_kernel_size=(1, 7, 7),
        **_NARROW,
        **_HEAD,
    ),
    _case(
        "c2d_r50",
        "models.resnet.create_resnet",
        stem_conv_kernel_size=(1, 7, 7),
        stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=((1, 1, 1),) * 4,
        head_pool_kernel_size=(4, 2, 2),
        **_NARROW,
    ),
    _case(
        "i3d_r50",
        "models.resnet.create_resnet",
        stem_conv_kernel_size=(5, 7, 7),
        stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=(
            (3, 1, 1),
            _ALTERNATE * 2,
            _ALTERNATE * 3,
            ((1, 1, 1), (3, 1, 1)),
        ),
        head_pool_kernel_size=(4, 2, 2),
        **_NARROW,
    ),
    _case(
        "slow_r50_strided",
        "models.resnet.create_resnet",
        shape=(1, 3, 16, 64, 64),
        stage_temporal_stride=(1, 2, 2, 2),
        head_pool_kernel_size=(2, 2, 2),
        **_NARROW,
    ),
    _case(
        "acoustic_resnet",
        "models.resnet.create_acoustic_resnet",
        shape=(1, 1, 64, 1, 40),
        model_num_class=5,
        stem_dim_out=16,
    ),
    _case("csn_r50", "models.csn.create_csn", head_pool_kernel_size=(1, 4, 4), **_NARROW),
    _case(
        "ir_csn_r101",
        "models.csn.create_csn",
        model_depth=101,
        stem_pool=nn.MaxPool3d,
        head_pool_kernel_size=(1, 2, 2),
        **_NARROW,
    ),
    _case(
        "r2plus1d_r50",
        "models.r2plus1d.create_r2plus1d",
        shape=(1, 3, 8, 64, 64),
        head_pool_kernel_size=(2, 2, 2),
        **_NARROW,
    ),
    _case(
        "x3d_xs",
        "models.x3d.create_x3d",
        shape=(1, 3, 4, 64, 64),
        input_clip_length=4,
        input_crop_size=64,
        model_num_class=5,
        head_dim_out=64,
    ),
    _case(
        "x3d_s_strided",
        "models.x3d.create_x3d",
        shape=(2, 3, 8, 32, 32),
        input_clip_length=4,
        input_crop_size=32,
        width_factor=1.0,
        depth_factor=1.0,
        stage_temporal_stride=(1, 1, 2, 1),
        model_num_class=5,
        head_dim_out=64,
        head_bn_lin5_on=True,
        head_activation=None,
    ),
    ZooCase(PACKAGE, "slowfast_r50", _slowfast_r50),
    ZooCase(PACKAGE, "slowfast_16x8_r101_50_50", _slowfast_16x8),
    _case(
        "mvit_base",
        "models.vision_transformers.create_multiscale_vision_transformers",
        shape=(1, 3, 8, 32, 32),
        **_mvit(),
    ),
    _case(
        "mvit_pool_first",
        "models.vision_transformers.create_multiscale_vision_transformers",
        shape=(1, 3, 8, 32, 32),
        **_mvit(
            cls_embed_on=False, pool_first=True, sep_pos_embed=False, head=None, pooling_mode="avg"
        ),
    ),
    _case(
        "EfficientX3d",
        "models.accelerator.mobile_cpu.efficient_x3d.EfficientX3d",
        shape=(1, 3, 4, 64, 64),
        num_classes=5,
    ),
    _case(
        "X3dBottleneckBlock",
        "models.accelerator.mobile_cpu.residual_blocks.X3dBottleneckBlock",
        shape=(2, 8, 4, 16, 16),
        in_channels=8,
        mid_channels=16,
        out_channels=8,
        spatial_stride=2,
        act_functions=("relu", "swish", "relu"),
    ),
    ZooCase(PACKAGE, "EfficientX3dDeployable", _x3d_deployable),
    ZooCase(PACKAGE, "EfficientBlocks", _efficient),
    ZooCase(PACKAGE, "EfficientBlocksDeployable", _efficient_deployable),
    ZooCase(PACKAGE, "NonLocal", _nonlocal),
    _case(
        "Conv2plus1d",
        "layers.convolutions.create_conv_2plus1d",
        shape=_TWO_CLIPS,
        in_channels=3,
        out_channels=8,
        stride=(1, 2, 2),
    ),
    _case(
        "ConvReduce3D",
        "layers.convolutions.ConvReduce3D",
        shape=_TWO_CLIPS,
        in_channels=3,
        out_channels=8,
        kernel_size=((1, 3, 3), (3, 1, 1)),
        padding=((0, 1, 1), (1, 0, 0)),
        stride=((1, 1, 1), (1, 1, 1)),
        reduction_method="cat",
    ),
    ZooCase(PACKAGE, "MaskedMultiPathWay", _masked_streams, frames=1),
    ZooCase(PACKAGE, "MaskedLSTM", _masked_lstm, frames=1),
)
