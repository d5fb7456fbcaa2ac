"""Win back what a deep cut costs: factorize, distil from the original, save and load by name.

A C3D-style network that reads moving handwritten digits is cut to a fifth of its floating-point
operations. The student then learns to give what the original gives (Hinton et al., arXiv
1503.02531), for which no labels are needed; the checkpoint keeps its ranks beside its weights, and
what is loaded goes through ``optimize`` once more, for deployment.

Run it in the root of the repository: ``python -m examples.finetune`` (needs scikit-learn).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxtemporal
from benchmarks.digits import accuracy, clips, trained
from fxtemporal import Factorize

SHARE = 0.2
BATCH, TEMPERATURE, RATE = 64, 4.0, 2e-3


def cut(model: nn.Module, data: Tensor, share: float = SHARE) -> nn.Module:
    """``model`` with ``share`` of its FLOPs left; nothing else is done to it, so that it trains."""
    settings = Factorize(flops=share, calibration=data.split(32))
    return fxtemporal.optimize(model, (data[:8],), factorize=settings, passes=[], tune="static")


def distil(student: nn.Module, teacher: nn.Module, data: Tensor, epochs: int) -> None:
    """Train ``student`` to give, on the clips in ``data``, what ``teacher`` gives."""
    with torch.no_grad():
        wanted = torch.cat([teacher(part) for part in data.split(BATCH)])
    steps = epochs * -(-len(data) // BATCH)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    student.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data))
        for batch in order.split(BATCH):
            logits = [x / TEMPERATURE for x in (student(data[batch]), wanted[batch])]
            own, target = (x.log_softmax(1) for x in logits)
            loss = F.kl_div(own, target, log_target=True, reduction="batchmean") * TEMPERATURE**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)
    student.eval()


def save(student: nn.Module, path: Path) -> None:
    ranks = fxtemporal.report(student).ranks
    torch.save({"ranks": ranks, "weights": student.state_dict()}, path)


def load(original: nn.Module, clip: Tensor, path: Path) -> nn.Module:
    """The student in ``path``: ``original`` at the ranks it was saved with, and its weights."""
    saved = torch.load(path, weights_only=True)
    settings = Factorize(rank=saved["ranks"])
    model = fxtemporal.optimize(original, (clip,), factorize=settings, passes=[], tune="static")
    model.load_state_dict(saved["weights"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--clips", type=int, default=6400, help="to train on")
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = trained()
    data, _ = clips(options.clips, seed=3)
    test = clips(2000, seed=1, held_out=True)

    student = cut(teacher, data[:512])
    print(fxtemporal.report(student).factorization())
    before, deep = accuracy(teacher, *test), accuracy(student, *test)
    distil(student, teacher, data, options.epochs)
    after = accuracy(student, *test)
    print(f"{100 * before:.2f} % → cut {100 * deep:.2f} % → fine-tuned {100 * after:.2f} %")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.pt"
        save(student, path)
        loaded = load(teacher, data[:8], path)
    with torch.no_grad():
        assert torch.equal(loaded(data[:8]), student(data[:8]))
    fast = fxtemporal.optimize(loaded, (data[:8],))
    print(f"as deployed {100 * accuracy(fast, *test):.2f} %")


if __name__ == "__main__":
    main()
