"""Writes files completely or not at all.

::

    with staged(path) as draft:           the same name, in a temporary folder
        torch.save(model, draft)          if this fails, nothing is left behind,
                                          and an old file at ``path`` is kept
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["staged", "write_whole"]


@contextmanager
def staged(path: Path, last: str | None = None) -> Iterator[Path]:
    """A temporary path to build ``path`` at; at the end all files next to it are moved into place.

    The file named ``last`` is moved last.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; an old file is replaced only when the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    with staged(path) as draft:
        draft.write_text(text, encoding="utf-8")
