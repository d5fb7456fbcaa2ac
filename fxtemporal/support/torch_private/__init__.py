"""All uses of private names of torch, one file per concern.

No other file uses a name of torch that begins with an underscore (``tests/test_structure.py``
checks this). If a name is missing in another version of torch, importing fxtemporal raises an error
that names it; each file says if fxtemporal can work without it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["needed"]


def needed(name: str) -> Any:
    """The object called ``name``, such as ``"torch._C._select_conv_backend"``.

    Raises:
        ImportError: this version of torch does not have it.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fxtemporal needs {name}, which torch {torch.__version__} does not have: install a "
            "version of torch that fxtemporal was made for, and please report this"
        ) from error
