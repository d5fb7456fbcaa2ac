"""What fxtemporal needs of torch that torch does not promise to keep, one file a concern.

No other file names anything of torch that begins with an underscore (``tests/test_structure.py``
holds that). A name that is missing in another version of torch is an error that says so, when
fxtemporal is imported; where fxtemporal can do without, it does, as the file says.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["needed"]


def needed(name: str) -> Any:
    """What ``name`` stands for: ``"torch._C._select_conv_backend"``.

    Raises:
        ImportError: this version of torch has it no more.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fxtemporal needs {name}, which torch {torch.__version__} does not have: install a "
            "version of torch that fxtemporal was made for, and please report this"
        ) from error
