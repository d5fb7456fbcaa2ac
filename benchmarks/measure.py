"""Measuring side by side: times, errors, convolutions executed, and the machine it was on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxtemporal.tuning.side_by_side import Durations as Timing
from fxtemporal.tuning.side_by_side import interleaved, quartiles, speedup
from fxtemporal.verification.comparison import relative_error

__all__ = [
    "CountConvolutions",
    "Timing",
    "interleaved",
    "machine",
    "machine_slug",
    "quartiles",
    "relative_error",
    "speedup",
]

# aten::convolution, aten::conv3d, mkldnn::_convolution_pointwise, onednn::qconv2d_pointwise;
# neither prims::convert_element_type nor the reordering of a weight.
_CONVOLUTION = re.compile(r"conv(olution|_|\d|$)(?!.*(backward|weight))")


class CountConvolutions(TorchDispatchMode):
    """Counts the convolutions that are executed inside the ``with`` block.

    Example::

        with CountConvolutions() as convolutions:
            model(clip)
        convolutions.count
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _CONVOLUTION.search(func.overloadpacket.__name__):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine_slug(environment: Mapping[str, Any]) -> str:
    """The CPU of :func:`machine` as a part of a file's name: ``"amd-epyc"``."""
    return re.sub(r"[^a-z0-9]+", "-", str(environment["cpu"]).lower()).strip("-")


def machine() -> dict[str, Any]:
    """What was measured on: CPU, cores this process may use, torch, its threads, UTC date."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
