"""How choices are made: by measuring, or by what is known beforehand."""

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
    """How choices are measured.

    ``target`` is what will run the graph, and what is measured: ``"eager"``, ``"inductor"``,
    ``"openvino"`` or ``"onnxruntime"`` (:mod:`fxtemporal.tuning.engines`). ``seconds`` is the most
    that all measuring may take, ``margin`` what a rewrite must gain over noise before it counts
    (0.02: two per cent).

    ``memory_limit`` bounds the activations that one call holds at its peak: bytes, or a text like
    ``"512MiB"`` or ``"2GB"``; None: no limit. It holds for the peak at the example's shapes, as
    :mod:`fxtemporal.analysis.peak_memory` estimates it from the graph: tensors alive at once,
    inputs and outputs among them, without parameters, gradients, and what kernels allocate for
    themselves. Folded frames then run in as many chunks as it takes, or the loop stays a loop.

    ``cache``: a folder where what was measured of single layers is kept for the next time; True for
    the usual one (:mod:`fxtemporal.tuning.cache`), False for none.

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
