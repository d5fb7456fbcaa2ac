"""A per-frame loop, re-rolled and written for OpenVINO, and read back by OpenVINO itself.

Run it: ``python examples/deploy_openvino.py`` (``pip install 'fxtemporal[openvino]'``).
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
    tune = "static" if "--quick" in sys.argv else fxtemporal.Tune(target="openvino")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        try:
            fast = fxtemporal.optimize(model, (clip,), tune=tune)
            fxtemporal.lower(fast, (clip,), "openvino", path)
        except (fxtemporal.LoweringError, ImportError) as error:
            print(f"not written: {error}")
            return 0
        print("wrote", sorted(file.name for file in path.parent.iterdir()))

        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        other = torch.randn(5, 10, 3, 32, 32)  # the batch is free
        result = torch.from_numpy(compiled([other.numpy()])[0])
        with torch.no_grad():
            error = (result - model(other)).abs().max()
        print(f"largest difference {error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
