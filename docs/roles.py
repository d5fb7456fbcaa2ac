"""Docstrings of the package as Markdown, for the reference.

Roles become links where the reference has the name, and code elsewhere; ``text::`` before an
indented block loses a colon; names of parameters that share one description stand on one line.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import fxtemporal

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")
_BLOCK = re.compile(r"(\S)::$", re.MULTILINE)
_NAMES = re.compile(r"^( +)((?:\w+, )+\w+),\n +((?:\w+, )*\w+: )", re.MULTILINE)
_LINKED = frozenset(f"fxtemporal.{name}" for name in fxtemporal.__all__)


def markdown(text: str) -> str:
    def linked(match: re.Match[str]) -> str:
        name = match[1]
        full = name if name.startswith("fxtemporal.") else f"fxtemporal.{name}"
        return f"[`{name}`][{full}]" if full in _LINKED else f"`{name}`"

    return _NAMES.sub(r"\1\2, \3", _BLOCK.sub(r"\1:", _ROLE.sub(linked, text)))


class Roles(griffe.Extension):
    """Rewrites each docstring as it is found."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
