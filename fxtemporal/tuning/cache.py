"""A cache of measured times on disk.

One JSON file per environment, in the folder that :class:`fxtemporal.Tune` names, else in
``$FXTEMPORAL_CACHE``, else in ``~/.cache/fxtemporal`` (``$XDG_CACHE_HOME``). The environment is all
that every time depends on: the versions of torch, of the engine's packages and of fxtemporal, the
device's name and instruction set, and the number of threads. An entry's key says the rest in words,
with the engine as its last word::

    conv3d 64->64 k(3, 3, 3) s(1, 1, 1) ... 112x112 float32 contiguous eager   {"conv3d": 6.1, ...}

A file that cannot be read counts as empty, and a folder that cannot be written is ignored: the
cache saves time, but nothing depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from fxtemporal.support.files import write_whole
from fxtemporal.tuning.engines import ENGINES, versions

__all__ = ["Cache", "default_folder", "environment"]

_FORMAT = 2
"""Version of the files: increased when the figures of older files mean something else."""


def default_folder() -> Path:
    """The folder of the cache unless another one is named."""
    if (named := os.environ.get("FXTEMPORAL_CACHE")) is not None:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fxtemporal"


def environment(device: torch.device, target: str) -> dict[str, str]:
    """All that figures of the engine ``target`` depend on, besides what is measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {_cpu()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "format": str(_FORMAT),
        "fxtemporal": version("fxtemporal"),
        "torch": torch.__version__,
        **versions([ENGINES[target]]),
        "device": name,
        "threads": str(torch.get_num_threads()),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


class Cache:
    """``{key: {name: milliseconds}}``; read once, and written as a whole by :meth:`save`."""

    def __init__(self, folder: Path | None, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._entries: dict[str, dict[str, float]] = {}
        self._new: dict[str, dict[str, float]] = {}
        self._path: Path | None = None
        if folder is not None:
            text = json.dumps(self.environment, sort_keys=True)
            self._path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
            self._entries = self._read(self._path)

    def get(self, key: str) -> dict[str, float]:
        """The figures stored under ``key``."""
        return {**self._entries.get(key, {}), **self._new.get(key, {})}

    def put(self, key: str, figures: Mapping[str, float]) -> None:
        self._new.setdefault(key, {}).update(figures)

    def save(self) -> None:
        """Merge new figures with those that others wrote meanwhile, and replace the file."""
        if self._path is None or not self._new:
            return
        entries = self._read(self._path)
        for key, figures in self._new.items():
            entries[key] = {**entries.get(key, {}), **figures}
        content = {"environment": self.environment, "milliseconds": entries}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(content, indent=1, sort_keys=True))
        self._entries, self._new = entries, {}

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, float]]:
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
        ):
            found = json.loads(path.read_text())["milliseconds"]
            return {
                str(key): {str(name): float(ms) for name, ms in figures.items()}
                for key, figures in found.items()
            }
        return {}
