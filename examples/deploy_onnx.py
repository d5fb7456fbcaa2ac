"""A per-frame loop, re-rolled and written as ONNX, and run by ONNX Runtime without this package.

Run it: ``python examples/deploy_onnx.py`` (``pip install 'fxtemporal[onnx]'``).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from cnn_lstm import build

import fxtemporal


def main() -> int:
    model, clip = build(), torch.randn(2, 10, 3, 32, 32)
    tune = "static" if "--quick" in sys.argv else fxtemporal.Tune(target="onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            fast = fxtemporal.optimize(model, (clip,), tune=tune)
            artifact = fxtemporal.lower(fast, (clip,), "onnx", path, original=model)
        except (fxtemporal.LoweringError, ImportError) as error:
            print(f"not written: {error}")
            return 0
        before, after = artifact.detail["original"], artifact.detail
        print(f"nodes {before['nodes']} → {after['nodes']}, {after['bytes'] / 1e6:.1f} MB")

        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        print("takes", [(given.name, given.shape) for given in session.get_inputs()])
        other = torch.randn(5, 10, 3, 32, 32)  # the batch is free
        (result,) = session.run(None, {"clip": other.numpy()})
        with torch.no_grad():
            error = (torch.from_numpy(result) - model(other)).abs().max()
        print(f"largest difference {error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
