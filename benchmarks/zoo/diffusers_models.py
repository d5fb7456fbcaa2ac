"""Video and image models that diffusers defines, in small random configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase, configured
from benchmarks.zoo.weights import noisy

__all__ = ["CASES"]

_Shape = tuple[int, ...]
_Config = dict[str, Any]
_Inputs = Callable[[], dict[str, Any]]


def _model(name: str, config: _Config) -> nn.Module:
    """The class of this name with random weights, in eval mode."""
    torchvision_models()  # diffusers imports transformers, and that imports torchvision
    import diffusers

    return noisy(getattr(diffusers, name)(**config))


_case = partial(configured, "diffusers", _model)


def _autoencoder(
    name: str,
    config: _Config,
    video: _Shape,
    latents: _Shape,
    *,
    variant: str = "",
    whole: bool = False,
    decode_inputs: _Inputs = dict,
) -> list[ZooCase]:
    """The encoding and the decoding of one autoencoder; its whole forward too if ``whole``."""
    cases = [
        _case(name, config, video, variant=variant, method="encode"),
        _case(name, config, latents, decode_inputs, variant=variant, method="decode"),
    ]
    if whole:
        cases.append(_case(name, config, video, variant=variant))
    return cases


def _text(*, texts: int = 2, tokens: int = 8, mask: bool = False, **more: _Shape) -> _Inputs:
    """Time steps and text of two samples, with further random tensors of the shapes ``more``."""

    def inputs() -> dict[str, Any]:
        values: dict[str, Any] = {
            "timestep": torch.tensor([500, 250]),
            "encoder_hidden_states": torch.randn(texts, tokens, 16),
        }
        if mask:
            values["encoder_attention_mask"] = torch.ones(2, tokens)
        return values | {name: torch.randn(shape) for name, shape in more.items()}

    return inputs


def _with(inputs: _Inputs, **constants: Any) -> _Inputs:
    """The same inputs and some constants."""
    return lambda: inputs() | constants


_WAN_VAE: _Config = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
_WAN_22_VAE = _WAN_VAE | {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
_COGVIDEOX_VAE: _Config = {
    "block_out_channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_HUNYUAN_VAE: _Config = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_HUNYUAN_15_VAE: _Config = {
    "latent_channels": 4,
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 1,
    "spatial_compression_ratio": 8,
    "downsample_match_channel": False,
    "upsample_match_channel": False,
}
_LTX_VAE: _Config = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 1,
}
_LTX_091_VAE = _LTX_VAE | {
    "decoder_block_out_channels": (16, 32, 64),
    "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
_LTX_2_VAE: _Config = {
    "latent_channels": 8,
    "block_out_channels": (16, 32, 64, 128),
    "decoder_block_out_channels": (16, 32, 64),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "patch_size": 1,
}
_MOCHI_VAE: _Config = {
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
}
_ALLEGRO_VAE: _Config = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 128,
}
_SVD_VAE: _Config = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "block_out_channels": (32, 64),
}
_MAGVIT_VAE: _Config = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_COSMOS_VAE: _Config = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decode_block_out_channels": (8, 8, 8, 8),
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
_KVAE: _Config = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}
_VIDTOK: _Config = {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}
_KL: _Config = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (32, 64),
}


def _allegro(shape: _Shape, method: str) -> ZooCase:
    """A method of Allegro's autoencoder, which works in tiles only, on one tile."""

    def build() -> Built:
        model: Any = _model("AutoencoderKLAllegro", _ALLEGRO_VAE)
        model.enable_tiling()
        return Built(model, (torch.randn(shape),))

    return ZooCase("diffusers", f"AutoencoderKLAllegro.{method}", build, method)


_VIDEO_17 = (1, 3, 17, 32, 32)
_VIDEO_9 = (2, 3, 9, 32, 32)

_AUTOENCODERS: list[ZooCase] = [
    *_autoencoder("AutoencoderKLWan", _WAN_VAE, _VIDEO_17, (1, 16, 5, 4, 4), whole=True),
    *_autoencoder(
        "AutoencoderKLWan",
        _WAN_22_VAE,
        _VIDEO_17,
        (1, 16, 5, 2, 2),
        variant="(residual)",
    ),
    *_autoencoder("AutoencoderKLQwenImage", _WAN_VAE, _VIDEO_9, (2, 16, 3, 4, 4)),
    *_autoencoder("AutoencoderKLCogVideoX", _COGVIDEOX_VAE, _VIDEO_17, (1, 4, 5, 4, 4), whole=True),
    *_autoencoder(
        "AutoencoderKLHunyuanVideo", _HUNYUAN_VAE, _VIDEO_17, (1, 4, 5, 4, 4), whole=True
    ),
    *_autoencoder("AutoencoderKLHunyuanVideo15", _HUNYUAN_15_VAE, _VIDEO_17, (1, 4, 5, 4, 4)),
    *_autoencoder("AutoencoderKLLTXVideo", _LTX_VAE, _VIDEO_17, (1, 8, 5, 8, 8), whole=True),
    *_autoencoder(
        "AutoencoderKLLTXVideo",
        _LTX_091_VAE,
        _VIDEO_17,
        (1, 8, 3, 4, 4),
        variant="(timestep)",
        decode_inputs=lambda: {"temb": torch.tensor([0.05])},
    ),
    *_autoencoder("AutoencoderKLLTX2Video", _LTX_2_VAE, _VIDEO_17, (1, 8, 3, 4, 4)),
    *_autoencoder("AutoencoderKLMochi", _MOCHI_VAE, (1, 3, 13, 32, 32), (1, 12, 3, 4, 4)),
    *_autoencoder("AutoencoderKLMagvit", _MAGVIT_VAE, _VIDEO_17, (1, 4, 5, 4, 4), whole=True),
    *_autoencoder("AutoencoderKLCosmos", _COSMOS_VAE, _VIDEO_17, (1, 4, 3, 4, 4)),
    *_autoencoder("AutoencoderKLKVAEVideo", _KVAE, _VIDEO_9, (2, 4, 5, 16, 16)),
    *_autoencoder("AutoencoderVidTok", _VIDTOK, (1, 3, 16, 32, 32), (1, 4, 4, 4, 4)),
    _allegro((1, 3, 24, 128, 128), "encode"),
    _allegro((1, 4, 6, 16, 16), "decode"),
    # Stable Video Diffusion decodes all frames of a clip as one batch.
    _case(
        "AutoencoderKLTemporalDecoder",
        _SVD_VAE,
        (6, 4, 16, 16),
        lambda: {"num_frames": 6},
        method="decode",
        batch=None,
        frames=0,
    ),
    _case(
        "AutoencoderKLTemporalDecoder",
        _SVD_VAE,
        (6, 3, 32, 32),
        lambda: {"num_frames": 6},
        batch=None,
        frames=0,
    ),
    _case("AutoencoderKL", _KL, (2, 3, 32, 32), frames=None),
    _case("AutoencoderKL", _KL, (2, 4, 16, 16), method="decode", frames=None),
]

_WAN: _Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
}
_COGVIDEOX: _Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 17,
    "max_text_seq_length": 8,
}
_CONSISID = _COGVIDEOX | {
    "cross_attn_interval": 1,
    "is_train_face": True,
    "cross_attn_dim_head": 1,
    "cross_attn_num_heads": 1,
    "LFE_id_dim": 2,
    "LFE_vit_dim": 2,
    "LFE_depth": 5,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 1,
    "LFE_output_dim": 21,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 1,
}
_HUNYUAN: _Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
_HUNYUAN_15: _Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 12,
    "rope_axes_dim": (2, 6, 8),
    "target_size": 16,
    "task_type": "t2v",
}
_LTX: _Config = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
_MOCHI: _Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 4,
    "max_sequence_length": 8,
}
_ALLEGRO: _Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "caption_channels": 16,
}
_LATTE: _Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 16,
    "video_length": 6,
}
_COSMOS: _Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
}
_EASY_ANIMATE: _Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 1,
    "mmdit_layers": 1,
    "time_embed_dim": 2,
    "text_embed_dim": 16,
    "sample_width": 16,
    "sample_height": 16,
}
_SANA: _Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "sample_size": 8,
}
_MOTIF: _Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4, 4),
}

_LATENTS = (2, 4, 5, 8, 8)  # two samples of five frames
_FRAMES_FIRST = (2, 5, 4, 8, 8)

_TRANSFORMERS: list[ZooCase] = [
    _case("WanTransformer3DModel", _WAN, _LATENTS, _text()),
    _case(
        "WanVACETransformer3DModel",
        _WAN | {"vace_layers": [0], "vace_in_channels": 12},
        _LATENTS,
        _text(control_hidden_states=(2, 12, 5, 8, 8)),
    ),
    _case("SkyReelsV2Transformer3DModel", _WAN, _LATENTS, _text()),
    _case("ChronoEditTransformer3DModel", _WAN, _LATENTS, _text()),
    _case("CogVideoXTransformer3DModel", _COGVIDEOX, _FRAMES_FIRST, _text(), frames=1),
    _case(
        "ConsisIDTransformer3DModel",
        _CONSISID,
        _FRAMES_FIRST,
        _with(_text(id_cond=(2, 2)), id_vit_hidden=[torch.ones(2, 2, 2)]),
        frames=1,
    ),
    _case(
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN,
        _LATENTS,
        _with(_text(mask=True, pooled_projections=(2, 8)), guidance=torch.tensor([600.0, 600.0])),
    ),
    _case(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN_15,
        _LATENTS,
        _with(
            _text(mask=True, encoder_hidden_states_2=(2, 6, 8)),
            timestep=torch.tensor([500.0, 250.0]),
            encoder_attention_mask_2=torch.ones(2, 6),
            image_embeds=torch.zeros(2, 3, 12),
        ),
    ),
    # LTX's transformer takes the patches of all frames in one dimension.
    _case(
        "LTXVideoTransformer3DModel",
        _LTX,
        (2, 5 * 8 * 8, 8),
        _with(_text(mask=True), num_frames=5, height=8, width=8),
        frames=None,
    ),
    _case("MochiTransformer3DModel", _MOCHI, _LATENTS, _text(mask=True)),
    _case("AllegroTransformer3DModel", _ALLEGRO, _LATENTS, _text()),
    _case("LatteTransformer3DModel", _LATTE, (2, 4, 6, 8, 8), _text()),
    _case(
        "CosmosTransformer3DModel",
        _COSMOS,
        _LATENTS,
        _with(_text(), fps=30, padding_mask=torch.zeros(1, 1, 8, 8)),
    ),
    _case("EasyAnimateTransformer3DModel", _EASY_ANIMATE, _LATENTS, _text()),
    _case("SanaVideoTransformer3DModel", _SANA, _LATENTS, _text()),
    _case("MotifVideoTransformer3DModel", _MOTIF, _LATENTS, _text()),
    # The temporal layer of several U-Nets: all frames of all clips are one batch.
    _case(
        "TransformerTemporalModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "norm_num_groups": 8,
        },
        (6, 32, 8, 8),
        lambda: {"num_frames": 6},
        batch=None,
        frames=0,
    ),
]

_UNET_3D: _Config = {
    "sample_size": 8,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
_UNET_SVD: _Config = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "cross_attention_dim": 16,
    "num_attention_heads": 8,
    "layers_per_block": 1,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
}
_UNET_MOTION: _Config = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "cross_attention_dim": 16,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "layers_per_block": 1,
}
_UNET_2D: _Config = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "layers_per_block": 1,
}
_SPARSE_CONTROL: _Config = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "motion_num_attention_heads": 2,
    "layers_per_block": 1,
}


def _adapted() -> Built:
    """AnimateDiff: an image U-Net that a MotionAdapter makes a video one."""
    torchvision_models()
    from diffusers import UNetMotionModel

    unet = _model("UNet2DConditionModel", _UNET_2D | {"attention_head_dim": 2})
    adapter = _model(
        "MotionAdapter",
        {
            "block_out_channels": (16, 32),
            "motion_layers_per_block": 1,
            "motion_num_attention_heads": 2,
            "motion_norm_num_groups": 8,
            "motion_max_seq_length": 16,
        },
    )
    model = noisy(UNetMotionModel.from_unet2d(unet, adapter))
    return Built(model, (torch.randn(_LATENTS),), _text(texts=10)())


_UNETS: list[ZooCase] = [
    _case("UNet3DConditionModel", _UNET_3D, _LATENTS, _text()),
    _case(
        "UNetSpatioTemporalConditionModel",
        _UNET_SVD,
        (2, 5, 8, 8, 8),
        _text(tokens=1, added_time_ids=(2, 3)),
        frames=1,
    ),
    # Its blocks take the text once for each frame of each sample.
    _case("UNetMotionModel", _UNET_MOTION, _LATENTS, _text(texts=10)),
    ZooCase("diffusers", "UNetMotionModel(MotionAdapter)", _adapted),
    _case(
        "I2VGenXLUNet",
        _UNET_3D,
        _LATENTS,
        _with(
            _text(image_latents=_LATENTS, image_embeddings=(2, 16)),
            fps=torch.tensor([8, 8]),
        ),
    ),
    _case(
        "SparseControlNetModel",
        _SPARSE_CONTROL,
        _LATENTS,
        _text(texts=10, controlnet_cond=_LATENTS, conditioning_mask=(2, 1, 5, 8, 8)),
    ),
    _case("UNet2DConditionModel", _UNET_2D, (2, 4, 16, 16), _text(), frames=None),
]

CASES: tuple[ZooCase, ...] = (*_AUTOENCODERS, *_TRANSFORMERS, *_UNETS)
