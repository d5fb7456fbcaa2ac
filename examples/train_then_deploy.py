"""From training to a file that runs without this package: train, optimize, check, export, load.

The model of ``cnn_lstm.py`` learns whether a bright square moves to the left or to the right. It is
trained as it was written; the optimized one must then be right on the same clips.
Run it: ``python examples/train_then_deploy.py [clips.pt2]``.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from cnn_lstm import build
from torch import Tensor, nn

import fxtemporal

CLIPS, FRAMES, SIDE, SQUARE = 100, 10, 32, 8
EPOCHS, BATCH = 12, 8


def moving_squares(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips (N, T, 3, H, W) of a square in noise, and labels (N,): 0 left, 1 right."""
    clips = 0.3 * torch.randn(CLIPS, FRAMES, 3, SIDE, SIDE, generator=generator)
    labels = torch.arange(CLIPS) % 2
    tops = torch.randint(0, SIDE - SQUARE, (CLIPS,), generator=generator).tolist()
    starts = torch.randint(0, SIDE - SQUARE - 2 * FRAMES + 3, (CLIPS,), generator=generator)
    for clip, label, top, start in zip(clips, labels.tolist(), tops, starts.tolist(), strict=True):
        lefts = [start + 2 * t for t in range(FRAMES)]
        for frame, left in zip(clip, lefts if label else lefts[::-1], strict=True):
            frame[:, top : top + SQUARE, left : left + SQUARE] += 1
    return clips, labels


def train(model: nn.Module, clips: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(clips), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(clips[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(clips):.4f}")
    model.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def export(model: nn.Module, clips: Tensor, path: Path) -> None:
    """Save as a ``.pt2`` that takes any number of clips."""
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        # said of every nn.LSTM; its weights are exported as parameters all the same
        warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights")
        program = torch.export.export(model, (clips,), dynamic_shapes=any_batch, strict=False)
    torch.export.save(program, path)


def run(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    clips, labels = moving_squares(generator)
    held_out = CLIPS // 5
    model = build()
    train(model, clips[held_out:], labels[held_out:], generator)
    clips, labels = clips[:held_out], labels[:held_out]

    with torch.no_grad():
        fast = fxtemporal.optimize(model, (clips,))
        print(fxtemporal.report(fast))

        trained, optimized = model(clips), fast(clips)
        before, after = accuracy(trained, labels), accuracy(optimized, labels)
        print(f"accuracy on {held_out} clips: trained {before:.1%}, optimized {after:.1%}")
        if before != after:
            raise SystemExit("the optimized model does not decide as the trained one does")

        export(fast, clips[:2].clone(), path)  # the file keeps its example, hence a small copy
        deployed = torch.export.load(path).module()
        difference = (deployed(clips) - trained).abs().max().item()
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): largest difference {difference:.1e}")
        torch.testing.assert_close(deployed(clips), trained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deployed(clips[:3]), trained[:3], rtol=1e-4, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="?", help="default: a temporary folder")
    options = parser.parse_args()
    if options.path is not None:
        run(options.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "cnn_lstm.pt2")


if __name__ == "__main__":
    main()
