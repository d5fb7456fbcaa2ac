"""``torch.compile`` with the rewrites inside: a step of training on a per-frame loop.

Run it: ``python examples/compile_and_train.py`` (needs a C++ compiler, as Inductor does).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cnn_lstm import build

import fxtemporal


def main() -> None:
    model, clip = build(), torch.randn(2, 10, 3, 32, 32)
    labels = torch.tensor([0, 1])
    reports: list[fxtemporal.Report] = []
    compiled = torch.compile(model, backend="fxtemporal", options={"on_report": reports.append})

    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        F.cross_entropy(run(clip), labels).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    applied = [r.rule for found in reports for r in found.by_status("applied")]
    print(f"{len(reports)} graphs, applied: {', '.join(applied)}")
    differences = [float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)]
    print(f"gradients: largest difference {max(differences):.1e}")


if __name__ == "__main__":
    main()
