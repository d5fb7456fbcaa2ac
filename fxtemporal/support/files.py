"""Files that are written whole or not at all.

::

    with staged(path) as draft:           a place of the same name, in a folder of its own
        torch.save(model, draft)          whatever fails here, nothing is left behind
                                          and what stood at ``path`` stays
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
    """A place to build ``path`` at; all that lies there is moved in the end, ``last`` at last.

    Raises:
        OSError: the disk refuses it.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Put a file of ``text`` in the place of what stood at ``path``.

    Raises:
        OSError: the disk refuses it.
    """
    with staged(path) as draft:
        draft.write_text(text, encoding="utf-8")
