"""Many clips through an optimized model, on several workers, with Ray Data.

One machine by default; a cluster by its address alone: ``--address ray://head:10001``.
Run it: ``python examples/stream_with_ray.py`` (``pip install 'ray[data]'``).
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from cnn_lstm import build

import fxtemporal

FRAMES, SIZE = 10, 32
SHARE = 0.5
"""Of a core that each worker asks for, so that all of them fit on a small machine, too."""


class Classifier:
    """A worker: the optimized model arrives once, and stays."""

    def __init__(self, model: torch.nn.Module) -> None:
        torch.set_num_threads(1)
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        logits = self.model(torch.from_numpy(batch["clip"]))
        return {"id": batch["id"], "label": logits.argmax(1).numpy()}


def clips(batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Where a real job would decode videos: a clip for each id."""
    made = [np.random.default_rng(i).standard_normal((FRAMES, 3, SIZE, SIZE)) for i in batch["id"]]
    return {"id": batch["id"], "clip": np.stack(made).astype(np.float32)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--address", help="of a cluster; default: this machine")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    try:
        import ray
    except ImportError:
        print("not run: ray is not installed: pip install 'ray[data]'")
        return 0

    example = torch.randn(8, FRAMES, 3, SIZE, SIZE)
    fast = fxtemporal.optimize(build(), (example,), tune="static")
    ray.init(address=options.address, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    start = time.perf_counter()
    found = (
        ray.data.range(options.clips)
        .map_batches(clips, batch_size=8, num_cpus=SHARE)
        .map_batches(
            Classifier,
            fn_constructor_args=(fast,),
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            batch_size=8,
            num_cpus=SHARE,
        )
        .take_all()
    )
    seconds = time.perf_counter() - start
    labels = {row["id"]: row["label"] for row in found}
    print(f"{len(labels)} clips in {seconds:.1f} s on {options.workers} workers")
    with torch.no_grad():
        first = torch.from_numpy(clips({"id": np.arange(8)})["clip"])
        same = [labels[i] for i in range(8)] == fast(first).argmax(1).tolist()
    print(f"labels as in this process: {same}")
    ray.shutdown()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
