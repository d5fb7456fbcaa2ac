"""A TensorRT engine of a per-frame loop, before and after it is re-rolled, built without a GPU.

``tensorrt_rtx`` builds for compute capabilities that are named; running the engine needs a GPU.
Run it: ``python examples/deploy_tensorrt.py`` (``pip install 'fxtemporal[tensorrt-rtx]'``).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from cnn_lstm import build

import fxtemporal
from fxtemporal.passes import PORTABLE_PASSES


def main() -> int:
    model, clip = build(), torch.randn(2, 10, 3, 32, 32)
    # What a CPU likes tells nothing of a GPU: the form of each convolution is left to TensorRT.
    fast = fxtemporal.optimize(model, (clip,), passes=PORTABLE_PASSES, tune="static")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.engine"
        try:
            artifact = fxtemporal.lower(
                fast,
                (clip,),
                "tensorrt",
                path,
                original=model,
                compute_capabilities=["8.0", "8.9"],
                batch=(1, 8),
            )
        except fxtemporal.LoweringError as error:
            print(f"not built: {error}")
            return 0
        before, after = artifact.detail["original"], artifact.detail
        print(
            f"{after['library']}: layers {before['layers']} → {after['layers']}, "
            f"built in {before['engine_seconds']:.1f} → {after['engine_seconds']:.1f} s, "
            f"{after['bytes'] / 1e6:.1f} MB"
        )
        try:
            result = fxtemporal.load(path)(clip)
        except fxtemporal.LoweringError as error:
            print(f"not run: {error}")
            return 0
        with torch.no_grad():
            print(f"largest difference {(result - model(clip)).abs().max():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
