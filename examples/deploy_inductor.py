"""A per-frame loop, compiled ahead of time to a package that another process runs without it.

Run it: ``python examples/deploy_inductor.py`` (needs a C++ compiler).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cnn_lstm import build

import fxtemporal

SERVE = """
import sys, torch

clip, expected = torch.load("sample.pt", weights_only=True)
result = torch._inductor.aoti_load_package("model.pt2")(clip)
assert "fxtemporal" not in sys.modules and "cnn_lstm" not in sys.modules
print(f"largest difference {(result - expected).abs().max():.1e}")
"""


def main() -> int:
    model, clip = build(), torch.randn(2, 10, 3, 32, 32)
    tune = "static" if "--quick" in sys.argv else fxtemporal.Tune(target="inductor")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        fast = fxtemporal.optimize(model, (clip,), tune=tune)
        try:
            artifact = fxtemporal.lower(fast, (clip,), "inductor", path)
        except fxtemporal.LoweringError as error:
            print(f"not written: {error}")
            return 0
        print(f"compiled in {artifact.detail['build_seconds']:.1f} s")
        other = torch.randn(5, 10, 3, 32, 32)  # the batch is free
        with torch.no_grad():
            torch.save((other, model(other)), Path(folder) / "sample.pt")
        subprocess.run([sys.executable, "-c", SERVE], cwd=folder, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
