"""Keep per-frame loops from coming back: fails where a model's loop cannot be re-rolled.

A line for a CI job: ``python examples/audit_in_ci.py``. Nothing is changed and nothing is timed.
The exit status is 1 if a loop was missed, or if no loop was found where one is expected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from cnn_lstm import build
from torch import Tensor, nn

import fxtemporal

RULE = "time-distribute"

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "cnn_lstm": (build, (torch.zeros(2, 10, 3, 32, 32),)),
}


def problems(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """A sentence for each loop that would stay a loop."""
    report = fxtemporal.audit(model, inputs)
    loops = [remark for remark in report.remarks if remark.rule == RULE]
    if not loops:
        return ["no loop over frames was found"]
    return [
        f"{remark.location or remark.target}: {reason.text} [{reason.code}]"
        for remark in loops
        if remark.status != "applied"
        for reason in remark.reasons
    ]


def main() -> int:
    failed = False
    for name, (build_model, inputs) in MODELS.items():
        found = problems(build_model(), inputs)
        print(f"{name}: {'missed' if found else 'every loop over frames re-rolls'}")
        for problem in found:
            print(f"  {problem}")
        failed = failed or bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
