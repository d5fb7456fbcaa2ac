"""Writes the graph's code after every pass to files, if ``$FXTEMPORAL_DUMP`` names a folder.

::

    $ FXTEMPORAL_DUMP=graphs python train.py
    $ diff graphs/VideoNet/00-captured.py graphs/VideoNet/02-time-distribute.py
"""

from __future__ import annotations

import os
from pathlib import Path

from fxtemporal.ir.program import Program
from fxtemporal.support.errors import FxTemporalError
from fxtemporal.support.files import write_whole

__all__ = ["Dump"]


class Dump:
    """Writes ``00-captured.py``, ``01-split-concat.py``, … to a folder named after ``model``.

    Files of an earlier run are removed. Does nothing if no folder is named.

    Raises:
        FxTemporalError: a file cannot be written.
    """

    def __init__(self, model: object) -> None:
        folder = os.environ.get("FXTEMPORAL_DUMP")
        self._folder = Path(folder) / type(model).__name__ if folder else None
        self._count = 0
        for old in self._folder.glob("[0-9][0-9]-*.py") if self._folder else ():
            old.unlink()

    @property
    def wanted(self) -> bool:
        return self._folder is not None

    def __call__(self, name: str, program: Program) -> None:
        """Write the code of ``program`` as the next file."""
        if self._folder is None:
            return
        path = self._folder / f"{self._count:02}-{name}.py"
        self._count += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, program.graph.python_code("self").src.lstrip("\n"))
        except OSError as error:
            raise FxTemporalError(f"FXTEMPORAL_DUMP: {path} cannot be written: {error}") from error
