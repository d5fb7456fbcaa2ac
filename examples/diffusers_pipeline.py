"""The autoencoder of a diffusers pipeline, optimized where the pipeline calls it.

The parts are small and random, so nothing is downloaded; a pretrained pipeline works the same way.
Run it: ``python examples/diffusers_pipeline.py`` (``pip install 'fxtemporal[zoo]'``).
"""

from __future__ import annotations

import sys

import torch

import fxtemporal


def pipeline():  # type: ignore[no-untyped-def]
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    pipe = WanPipeline(**parts, vae=vae.eval(), transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> int:
    try:
        pipe = pipeline()
    except ImportError as error:
        print(f"{error}: pip install 'fxtemporal[zoo]'")
        return 0

    def clip() -> torch.Tensor:
        return pipe(
            prompt_embeds=torch.ones(1, 4, 8),
            negative_prompt_embeds=torch.zeros(1, 4, 8),
            height=16,
            width=16,
            num_frames=9,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).frames

    before = clip()
    latents = torch.randn(1, 16, 3, 2, 2)
    # The pipeline calls the method as it did, and gets what it did: a DecoderOutput, or a tuple.
    fast = fxtemporal.optimize_in_place(
        pipe.vae.decode, (latents,), {"return_dict": False}, tune="static"
    )
    after = clip()
    applied = len(fxtemporal.report(fast).by_status("applied"))
    print(f"rewrites: {applied}")
    print(f"largest difference: {float((before - after).abs().max()):.1e}")
    del pipe.vae.decode  # and the model's own method is back
    return 0


if __name__ == "__main__":
    sys.exit(main())
