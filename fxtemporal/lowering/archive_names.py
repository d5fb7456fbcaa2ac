"""Checks the names in an archive of a program, so that none of them can become code.

``torch.export.load`` makes a Python function of a ``.pt2``: the names of inputs, parameters and
values become source code without escaping. So each name must be a valid identifier::

    "x"                       an input
    "y=print('hello')"        refused: the default would run when the function is made
"""

from __future__ import annotations

import json
import keyword
import re
import zipfile
from collections.abc import Iterator
from typing import Any

__all__ = ["bad_entry", "bad_name"]

_NAME = re.compile(r"[A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_MODULE = re.compile(r"[A-Za-z0-9_.@]*")
_SPECS = ("in_spec", "out_spec")
_LARGEST_RATIO = 100
"""Refuse an entry that unpacks to more than this many times its size in the file."""
_SMALL = 2**20


def bad_entry(archive: zipfile.ZipFile) -> str | None:
    """The first fault in the entries of an archive, without unpacking any; None if all are fine."""
    seen: set[str] = set()
    for entry in archive.filelist:
        name = entry.filename
        if name in seen:
            return f"two entries called {name!r}"
        seen.add(name)
        parts = name.split("/")
        if ".." in parts or name.startswith("/") or "\\" in name or ":" in name or "\0" in name:
            return f"an entry outside of it, {name!r}"
        if entry.flag_bits & 1:
            return f"an encrypted entry, {name!r}"
        if entry.file_size > max(_SMALL, _LARGEST_RATIO * entry.compress_size):
            return f"an entry that unpacks to {entry.file_size} bytes, {name!r}"
    return None


def bad_name(program: Any) -> str | None:
    """The first invalid name in the JSON of a program; None if all are valid."""
    for kind, value in _names(program):
        fits = _MODULE if kind == "fqn" else _NAME
        if not isinstance(value, str) or not fits.fullmatch(value):
            return repr(value)[:80]
        if kind == "argument" and (not value.isidentifier() or keyword.iskeyword(value)):
            return repr(value)[:80]
    return None


def _names(value: Any) -> Iterator[tuple[str, Any]]:
    """``(kind, name)`` for every name in a JSON value."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        if not isinstance(part, dict):
            continue
        for key, entry in part.items():
            if key == "metadata":
                continue
            if entry is not None and (key == "name" or key.endswith("_name")):
                yield "name", entry
            elif key == "fqn":
                yield "fqn", entry
            elif key == "forward_arg_names":
                yield from (("argument", name) for name in entry or ())
            elif key in _SPECS and isinstance(entry, str):
                yield from (("argument", name) for name in _keywords(entry))
            elif key.endswith("_values") and isinstance(entry, dict):
                yield from (("name", name) for name in entry)
            pending.append(entry)


def _keywords(spec: str) -> Iterator[Any]:
    """The names of keyword arguments in the serialized structure of a function's inputs."""
    layout = json.loads(spec)
    children = layout[1].get("children_spec") or () if isinstance(layout, list) else ()
    for child in children[1:2] if layout[1].get("type") == "builtins.tuple" else ():
        if child.get("type") == "builtins.dict":
            yield from json.loads(child.get("context") or "[]")
