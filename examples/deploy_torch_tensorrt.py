"""A per-frame loop, re-rolled and compiled in process by Torch-TensorRT. Needs an NVIDIA GPU.

Run it: ``python examples/deploy_torch_tensorrt.py`` (``pip install 'fxtemporal[tensorrt]'``).
"""

from __future__ import annotations

import sys

import torch
from cnn_lstm import build

import fxtemporal
from fxtemporal.passes import PORTABLE_PASSES


def main() -> int:
    model, clip = build(), torch.randn(2, 10, 3, 32, 32)
    fast = fxtemporal.optimize(model, (clip,), passes=PORTABLE_PASSES, tune="static")
    try:
        artifact = fxtemporal.lower(fast, (clip,), "torch_tensorrt", min_block_size=1)
    except fxtemporal.LoweringError as error:
        print(f"not built: {error}")
        return 0
    detail = artifact.detail
    print(
        f"{detail.get('operators_in_tensorrt')} of {detail.get('operators')} operators in TensorRT"
    )
    with torch.no_grad():
        print(f"largest difference {(artifact(clip) - model(clip)).abs().max():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
