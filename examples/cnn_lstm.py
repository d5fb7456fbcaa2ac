"""A small CNN + LSTM clip classifier with the usual per-frame loop, before and after.

Run it: ``python examples/cnn_lstm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer


class CNNLSTM(nn.Module):
    """(B, T, 3, 32, 32) -> (B, 2)."""

    def __init__(self, hidden: int = 128, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.lstm = nn.LSTM(64 * 6 * 6, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, clip: Tensor) -> Tensor:
        features = []
        for t in range(clip.size(1)):
            features.append(self.features(clip[:, t]))
        states, _ = self.lstm(torch.stack(features, dim=1))
        return self.classifier(states[:, -1])


def build() -> nn.Module:
    """The classifier with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return CNNLSTM().eval()


def milliseconds(model: nn.Module, clip: Tensor) -> float:
    timer = Timer(
        "model(clip)",
        globals={"model": model, "clip": clip},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=1.0).median * 1e3


@torch.no_grad()
def main() -> None:
    import fxtemporal  # here, so that build() needs nothing but torch

    model, clip = build(), torch.randn(2, 10, 3, 32, 32)
    fast = fxtemporal.optimize(model, (clip,))
    print(fxtemporal.report(fast))

    before, after = milliseconds(model, clip), milliseconds(fast, clip)
    print(f"before {before:.2f} ms, after {after:.2f} ms: {before / after:.2f}x")
    print(f"largest difference {(model(clip) - fast(clip)).abs().max():.1e}")


if __name__ == "__main__":
    main()
