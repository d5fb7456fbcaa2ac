"""Video, image, audio and time-series models that transformers defines, small and random."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase, configured
from benchmarks.zoo.frames import FramesLSTM, FramesMean
from benchmarks.zoo.weights import noisy

__all__ = ["CASES"]

_Shape = tuple[int, ...]
_Config = dict[str, Any]
_Inputs = Callable[[], dict[str, Any]]


def _class(name: str) -> Any:
    """A class by its name, ``"vit.ViTModel"`` where only the module of the model exports it."""
    torchvision_models()  # transformers imports torchvision
    family, _, class_name = name.rpartition(".")
    if family:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    else:
        module = importlib.import_module("transformers")
    return getattr(module, class_name)


def _model(name: str, config: _Config) -> nn.Module:
    """The class of this name with random weights, in eval mode."""
    cls = _class(name)
    return noisy(cls(cls.config_class(**config)))


_case = partial(configured, "transformers", _model, frames=1)


_VIT: _Config = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.02,
}
_VIDEO_VIT = _VIT | {"num_frames": 8}
_TIMESFORMER = _VIDEO_VIT | {"num_labels": 5}
_TEXT: _Config = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
_LLAMA = _TEXT | {"model_type": "llama", "num_key_value_heads": 4}
_CLIP_VISION = _VIT | {"model_type": "clip_vision_model", "projection_dim": 32}
_XCLIP_VISION = _VIDEO_VIT | {
    "mit_hidden_size": 32,
    "mit_intermediate_size": 64,
    "mit_num_hidden_layers": 1,
    "mit_num_attention_heads": 4,
}
_XCLIP: _Config = {
    "vision_config": _XCLIP_VISION,
    "text_config": _TEXT,
    "projection_dim": 32,
    "prompt_layers": 1,
    "prompt_num_attention_heads": 4,
}
_VJEPA2: _Config = {
    "patch_size": 8,
    "crop_size": 32,
    "frames_per_clip": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "mlp_ratio": 2,
    "num_pooler_layers": 1,
    "pred_hidden_size": 32,
    "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 1,
}
_VIDEOPRISM: _Config = {
    "image_size": 32,
    "tubelet_size": [1, 8, 8],
    "num_frames": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_spatial_layers": 2,
    "num_temporal_layers": 2,
}
_VIDEOMT: _Config = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "mlp_ratio": 2,
    "num_blocks": 1,
    "num_queries": 5,
}
_RESNET: _Config = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_RESNET_BACKBONE = _RESNET | {"model_type": "resnet", "out_features": ["stage4"]}
_TVP = _TEXT | {
    "backbone_config": _RESNET_BACKBONE,
    "num_frames": 4,
    "max_img_size": 128,
    "visual_prompt_size": 8,
    "type_vocab_size": 2,
}
_LLAVA_NEXT_VIDEO: _Config = {
    "vision_config": _CLIP_VISION,
    "text_config": _LLAMA,
    "video_token_index": 1,
    "image_token_index": 2,
    "vision_feature_layer": -1,
    "image_grid_pinpoints": [[32, 32]],
}
_VIDEO_LLAVA: _Config = {
    "vision_config": _CLIP_VISION,
    "text_config": _LLAMA,
    "video_token_index": 1,
    "image_token_index": 2,
    "vision_feature_layer": -1,
}
_QFORMER = _TEXT | {"encoder_hidden_size": 32, "pad_token_id": 0}
_INSTRUCT_BLIP_VIDEO: _Config = {
    "vision_config": _VIT,
    "qformer_config": _QFORMER,
    "text_config": {
        "model_type": "opt",
        "vocab_size": 99,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "num_query_tokens": 4,
    "video_token_index": 1,
}
_SMOLVLM: _Config = {
    "vision_config": _VIT,
    "text_config": _LLAMA,
    "scale_factor": 2,
    "image_token_id": 1,
}
_QWEN2_VL: _Config = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 8,
    "mlp_ratio": 2,
}
_QWEN2_5_VL: _Config = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 8,
    "window_size": 32,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}
_QWEN3_VL: _Config = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}

_CLIP = (2, 8, 3, 32, 32)  # two clips of eight frames


def _token_ids(placeholders: int) -> Tensor:
    """Text of two samples around the placeholders of a video's tokens."""
    before, after = torch.randint(3, 90, (2, 4)), torch.randint(3, 90, (2, 4))
    return torch.cat([before, torch.ones(2, placeholders, dtype=torch.long), after], 1)


def _language(placeholders: int, **videos: _Shape) -> _Inputs:
    """Token ids with placeholders, and random tensors of the shapes ``videos``."""

    def inputs() -> dict[str, Any]:
        values: dict[str, Any] = {"input_ids": _token_ids(placeholders), "use_cache": False}
        return values | {name: torch.randn(shape) for name, shape in videos.items()}

    return inputs


def _masked(tokens: int) -> _Inputs:
    """A mask over every other token of two clips."""
    return lambda: {"bool_masked_pos": (torch.arange(tokens) % 2 == 0).expand(2, tokens)}


def _instruct_blip() -> dict[str, Any]:
    """A clip of four frames, four query tokens for each, and two texts."""
    return {
        "qformer_input_ids": torch.randint(3, 90, (2, 6)),
        "input_ids": _token_ids(4 * 4),
        "use_cache": False,
    }


_VIDEO: list[ZooCase] = [
    _case("VideoMAEModel", _VIDEO_VIT, _CLIP),
    _case("VideoMAEForVideoClassification", _VIDEO_VIT | {"num_labels": 5}, _CLIP),
    _case(
        "VideoMAEForPreTraining",
        _VIDEO_VIT
        | {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 32,
        },
        _CLIP,
        _masked(4 * 16),
    ),
    _case("TimesformerForVideoClassification", _TIMESFORMER, _CLIP),
    _case(
        "TimesformerForVideoClassification",
        _TIMESFORMER | {"attention_type": "joint_space_time"},
        _CLIP,
        variant="(joint)",
    ),
    _case(
        "TimesformerForVideoClassification",
        _TIMESFORMER | {"attention_type": "space_only"},
        _CLIP,
        variant="(space)",
    ),
    _case("VivitModel", _VIDEO_VIT | {"tubelet_size": [2, 8, 8]}, _CLIP),
    _case(
        "VivitForVideoClassification",
        _VIDEO_VIT | {"tubelet_size": [2, 8, 8], "num_labels": 5},
        _CLIP,
    ),
    # X-CLIP's vision tower takes all frames of all clips as one batch.
    _case("XCLIPVisionModel", _XCLIP_VISION, (8, 3, 32, 32), batch=None, frames=0),
    _case(
        "XCLIPModel",
        _XCLIP,
        None,
        lambda: {"input_ids": torch.randint(3, 90, (2, 7)), "pixel_values": torch.randn(_CLIP)},
    ),
    _case("VJEPA2Model", _VJEPA2, _CLIP),
    _case("VJEPA2ForVideoClassification", _VJEPA2 | {"num_labels": 5}, _CLIP),
    _case("VideoPrismVisionModel", _VIDEOPRISM, _CLIP),
    _case("VideoPrismForVideoClassification", _VIDEOPRISM | {"num_labels": 5}, _CLIP),
    _case("VideomtForUniversalSegmentation", _VIDEOMT, (2, 3, 3, 64, 64)),
    # TVP's embedding of columns works for one sample only.
    _case(
        "TvpModel",
        _TVP,
        None,
        lambda: {
            "input_ids": torch.randint(3, 90, (1, 6)),
            "pixel_values": torch.randn(1, 4, 3, 128, 128),
            "attention_mask": torch.ones(1, 6, dtype=torch.long),
        },
        batch=None,
    ),
    _case(
        "LlavaNextVideoForConditionalGeneration",
        _LLAVA_NEXT_VIDEO,
        None,
        _language(4 * 4, pixel_values_videos=(2, 4, 3, 32, 32)),
    ),
    _case(
        "VideoLlavaForConditionalGeneration",
        _VIDEO_LLAVA,
        None,
        _language(4 * 17, pixel_values_videos=(2, 4, 3, 32, 32)),
    ),
    _case(
        "InstructBlipVideoForConditionalGeneration",
        _INSTRUCT_BLIP_VIDEO,
        (2, 4, 3, 32, 32),
        _instruct_blip,
    ),
    _case("SmolVLMModel", _SMOLVLM, None, _language(4 * 4, pixel_values=(2, 4, 3, 32, 32))),
]


def _grid(**more: list[int]) -> _Inputs:
    """The grid of a clip, three steps of 4 by 4 patches, and the tensors ``more``."""
    return lambda: {
        "grid_thw": torch.tensor([[3, 4, 4]]),
        **{name: torch.tensor(values) for name, values in more.items()},
    }


_TOWERS: list[ZooCase] = [
    _case(name, config, (3 * 16, width), _grid(**more), batch=None, frames=None)
    for name, config, width, more in (
        ("qwen2_vl.Qwen2VisionTransformerPretrainedModel", _QWEN2_VL, 384, {}),
        ("qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel", _QWEN2_5_VL, 384, {}),
        ("qwen3_vl.Qwen3VLVisionModel", _QWEN3_VL, 384, {}),
        ("VideoLlama3VisionModel", _VIT, 192, {"merge_sizes": [2]}),
    )
]

_SAM2_VISION: _Config = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 16,
}
_SAM2_VIDEO: _Config = {
    "image_size": 64,
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 16,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 64,
}
_STAGES: _Config = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SWIN: _Config = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}
_SEGFORMER: _Config = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
}
_DETR: _Config = {
    "backbone_config": _RESNET_BACKBONE,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 6,
}
_IMAGE = (2, 3, 32, 32)
_IMAGE_64 = (2, 3, 64, 64)


def _memory_encoder() -> Built:
    """SAM 2's encoder of the masks that it found in earlier frames."""
    cls = _class("sam2_video.Sam2VideoMemoryEncoder")
    config = _class("Sam2VideoModel").config_class(**_SAM2_VIDEO)
    return Built(noisy(cls(config)), (torch.randn(2, 32, 4, 4), torch.randn(2, 1, 64, 64)))


_IMAGES: list[ZooCase] = [
    *(
        _case(name, config, shape, frames=None)
        for name, config, shape in (
            ("ViTModel", _VIT, _IMAGE),
            ("Dinov2Model", _VIT | {"mlp_ratio": 2}, _IMAGE),
            ("SiglipVisionModel", _VIT, _IMAGE),
            ("InstructBlipVideoVisionModel", _VIT, _IMAGE),
            ("ConvNextModel", _STAGES, _IMAGE_64),
            ("SwinModel", _SWIN, _IMAGE),
            ("SegformerForSemanticSegmentation", _SEGFORMER, _IMAGE_64),
            ("DetrForObjectDetection", _DETR, _IMAGE_64),
            ("Sam2VisionModel", _SAM2_VISION, _IMAGE_64),
        )
    ),
    ZooCase("transformers", "Sam2VideoMemoryEncoder", _memory_encoder, None, 0, None),
]

_SPEECH: _Config = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 8, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_ENCODEC: _Config = {
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 32,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "target_bandwidths": [24.0],
}
_PATCHTST: _Config = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "prediction_length": 8,
}
_PATCHTSMIXER: _Config = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
    "num_layers": 2,
    "prediction_length": 8,
}

_SERIES: list[ZooCase] = [
    _case("Wav2Vec2Model", _SPEECH, (2, 3200)),
    _case("HubertModel", _SPEECH, (2, 3200)),
    _case("EncodecModel", _ENCODEC, (2, 1, 1600), frames=2),
    _case("PatchTSTModel", _PATCHTST, (2, 32, 3)),
    _case("PatchTSTForPrediction", _PATCHTST, (2, 32, 3)),
    _case("PatchTSMixerForPrediction", _PATCHTSMIXER, (2, 32, 3)),
]


class _Pooled(nn.Module):
    """The features of an image that a model returns as ``pooler_output``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x).pooler_output
        return features.flatten(1)


class _ClassToken(nn.Module):
    """The token of a vision transformer that stands for the whole image."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        token: Tensor = self.encoder(pixel_values=x).last_hidden_state[:, 0]
        return token


def _frames_then_lstm(encoder: nn.Module, features: int) -> nn.Module:
    return FramesLSTM(_Pooled(encoder), features, hidden=24)


def _frames_then_mean(encoder: nn.Module, features: int) -> nn.Module:
    return FramesMean(_ClassToken(encoder), nn.Linear(features, 5))


class _FramesThenTransformer(nn.Module):
    """An image model on each frame, and a transformer over the frames."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.position = nn.Parameter(torch.randn(1, 16, features))
        self.temporal = nn.TransformerEncoderLayer(features, 4, 64, batch_first=True)
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.encoder(x[:, t, :, :, :]).pooler_output for t in range(x.size(1))]
        tokens = torch.stack(frames, 1) + self.position[:, : x.size(1)]
        logits: Tensor = self.head(self.temporal(tokens).mean(1))
        return logits


class _FramesThenCell(nn.Module):
    """An image model and a recurrent cell, one frame after the other."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.cell = nn.GRUCell(features, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 24)
        logits = []
        for t in range(x.shape[1]):
            state = self.cell(self.encoder(x[:, t]).pooler_output, state)
            logits.append(self.head(state))
        return torch.stack(logits, dim=1)


class _FramesAsBatch(nn.Module):
    """An image model on all frames as one batch, and the maximum over the frames."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        features = self.encoder(x.flatten(0, 1)).pooler_output
        logits: Tensor = self.head(features.view(batch, frames, -1).amax(dim=1))
        return logits


def _framewise(
    label: str,
    wrapper: Callable[[nn.Module, int], nn.Module],
    name: str,
    config: _Config,
    shape: _Shape,
) -> ZooCase:
    """An image model with 32 features in a wrapper that applies it to the frames of a clip."""

    def build() -> Built:
        return Built(wrapper(_model(name, config), 32).eval(), (torch.randn(shape),))

    return ZooCase("transformers", f"{label}({name})", build, frames=1)


_FRAMEWISE: list[ZooCase] = [
    _framewise("FramesThenLSTM", _frames_then_lstm, "ViTModel", _VIT, _CLIP),
    _framewise("FramesThenLSTM", _frames_then_lstm, "ResNetModel", _RESNET, (2, 6, 3, 64, 64)),
    _framewise("FramesThenMean", _frames_then_mean, "Dinov2Model", _VIT | {"mlp_ratio": 2}, _CLIP),
    _framewise(
        "FramesThenTransformer", _FramesThenTransformer, "ConvNextModel", _STAGES, (2, 6, 3, 64, 64)
    ),
    _framewise("FramesThenCell", _FramesThenCell, "SiglipVisionModel", _VIT, _CLIP),
    _framewise("FramesAsBatch", _FramesAsBatch, "SwinModel", _SWIN | {"embed_dim": 8}, _CLIP),
]

CASES: tuple[ZooCase, ...] = (*_VIDEO, *_TOWERS, *_IMAGES, *_SERIES, *_FRAMEWISE)
