"""Tells user code from library code, and formats ``file:line``."""

from __future__ import annotations

import os
import sysconfig

import torch

__all__ = ["is_own_file", "is_user_file", "is_written_here", "short_location"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, _PACKAGE, "<")
_STANDARD = sysconfig.get_path("stdlib") + os.sep


def is_user_file(filename: str) -> bool:
    """Whether ``filename`` is the user's code, or that of a model library the user calls."""
    if filename.startswith(_LIBRARIES) or f"{os.sep}einops{os.sep}" in filename:
        return False
    return not filename.startswith(_STANDARD) or f"{os.sep}site-packages{os.sep}" in filename


def is_own_file(filename: str) -> bool:
    """Whether ``filename`` is one of fxtemporal's."""
    return filename.startswith(_PACKAGE)


def is_written_here(filename: str) -> bool:
    """Whether ``filename`` is the user's own code, and no installed library."""
    return is_user_file(filename) and f"{os.sep}site-packages{os.sep}" not in filename


def short_location(filename: str, line: int) -> str:
    """``file:line``, relative to the working directory if the file is inside it."""
    below = os.getcwd() + os.sep
    return f"{filename.removeprefix(below)}:{line}"
