"""``python -O`` drops asserts: what a user meets is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from torch import nn

import fxtemporal

assert False, "this process must not check asserts"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.clip = nn.Conv3d(4, 4, (1, 3, 3))

    def forward(self, x):
        frames = torch.stack([self.conv(x[:, t]) for t in range(x.size(1))], 2)
        return self.clip(frames).flatten(1)


torch.manual_seed(0)
model, clip = Net().eval(), torch.randn(2, 5, 3, 10, 10)
print(fxtemporal.audit(model, (clip,)))
fast = fxtemporal.optimize(model, (clip,), tune="static")
print(fast.code, fxtemporal.report(fast), torch.equal(fast(clip), fast(clip)))
print(fast(torch.randn(1, 3, 3, 10, 10)).shape)
for wrong in ((torch.randn(2, 5, 3, 9),), ("clip",), (clip, clip)):
    try:
        fxtemporal.optimize(model, wrong, tune="static")
    except Exception as error:
        print(type(error).__name__, error)
artifact = fxtemporal.lower(fast, (clip,), backend="onnx", path="net.onnx")
print((artifact(clip) - model(clip)).abs().max() < 1e-4)
try:
    fxtemporal.lower(fast, (clip,), backend="onnx", path="net.onnx", no_such_option=1)
except Exception as error:
    print(type(error).__name__)
"""


def test_what_a_user_meets_is_the_same_without_asserts(tmp_path: Path) -> None:
    said = []
    for flags in ([], ["-O"]):
        script = SCRIPT if flags else SCRIPT.replace("assert False", "assert True")
        ran = subprocess.run(
            [sys.executable, *flags, "-W", "ignore", "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1]
    assert said[0].count("applied") >= 2
    assert "CaptureError" in said[0]
