"""Settings for choices that are made by measuring."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fxtemporal.support.byte_sizes import in_bytes
from fxtemporal.support.errors import PassError
from fxtemporal.tuning.cache import default_folder
from fxtemporal.tuning.engines import ENGINES

__all__ = ["Tune"]


@dataclass(frozen=True)
class Tune:
    """Settings for measuring: the engine, the time, the memory limit and the cache.

    ``target`` is the engine that will run the graph, and on which choices are timed: ``"eager"``,
    ``"inductor"``, ``"openvino"`` or ``"onnxruntime"`` (:mod:`fxtemporal.tuning.engines`).
    ``seconds`` limits the time of all measuring. ``margin`` is the gain that a rewrite needs before
    it counts as faster (0.02: two per cent).

    ``memory_limit`` bounds the peak of activations of one call: bytes, or a text like ``"512MiB"``
    or ``"2GB"``; None: no limit. It applies to the peak at the example's shapes, as
    :mod:`fxtemporal.analysis.peak_memory` estimates it from the graph: all tensors alive at once,
    with inputs and outputs, without parameters, gradients and the workspaces of kernels. Folded
    frames then run in as many chunks as needed, or the loop stays a loop.

    ``cache``: a folder that keeps the times of measurements; True for the default folder
    (:mod:`fxtemporal.tuning.cache`), False for no cache.

    Raises:
        PassError: a setting that is out of range.
    """

    target: str = "eager"
    seconds: float = 60.0
    margin: float = 0.02
    memory_limit: int | str | None = None
    cache: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        if self.target not in ENGINES:
            raise PassError(f"tune: no engine {self.target!r}; there are {', '.join(ENGINES)}")
        if not self.seconds > 0:
            raise PassError(f"tune: seconds must be above 0, not {self.seconds}")
        if not 0 <= self.margin < 1:
            raise PassError(f"tune: margin must be a share between 0 and 1, not {self.margin}")
        if not isinstance(self.cache, bool | str | os.PathLike):
            raise PassError(f"tune: cache must be a folder, True or False, not {self.cache!r}")
        if self.memory_limit is not None:
            in_bytes(self.memory_limit, "tune: memory_limit")

    @property
    def folder(self) -> Path | None:
        """The folder of the cache."""
        if isinstance(self.cache, bool):
            return default_folder() if self.cache else None
        return Path(self.cache)

    @property
    def limit(self) -> int | None:
        """``memory_limit`` in bytes."""
        return (
            None if self.memory_limit is None else in_bytes(self.memory_limit, "tune: memory_limit")
        )
