"""All benchmarks by name: ``python -m benchmarks conv3d --only r3d_18 --save``.

``python -m benchmarks`` without a name lists them. What ``--save`` writes stands in
``benchmarks/results``, with the machine, the versions and the date; ``summary`` puts it together,
and into the README.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

BENCHMARKS = {
    "smoke": "every model of benchmarks.models before and after, eager mode (3 minutes)",
    "loops": "loops over time on eager PyTorch, Inductor, OpenVINO and ONNX Runtime (30 minutes)",
    "conv3d": "networks of Conv3d on the same engines (2 hours)",
    "factorize": "accuracy and time of a factorized network (15 minutes)",
    "deploy": "artifacts of every backend (40 minutes)",
    "predictions": "what an audit predicts, against what is measured (5 minutes)",
    "zoo": "models of other packages: do they go in, and come out right (1 hour)",
    "summary": "the results put together: benchmarks/results/summary-*.md, and README.md",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        for name, what in BENCHMARKS.items():
            print(f"  {name:12} {what}")
        return 0
    name, *rest = given
    if name not in BENCHMARKS:
        print(f"benchmarks: no {name!r}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    status: int = import_module(f"benchmarks.{name}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
