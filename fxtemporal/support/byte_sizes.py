"""Sizes of memory, as people write them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from fxtemporal.support.errors import PassError

__all__ = ["in_bytes"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{0,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def in_bytes(size: int | str, name: str) -> int:
    """The number of bytes that ``512``, ``"512MiB"`` or ``"1.5 GB"`` stands for.

    Raises:
        PassError: ``size`` is not a size of at least one byte; the message calls it ``name``.
    """
    found: int | None = None
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)) is not None:
        units = {unit.lower(): factor for unit, factor in _UNITS.items()}
        factor = units.get(match[2].lower())
        found = None if factor is None else math.floor(Fraction(match[1].rstrip(".")) * factor)
    elif isinstance(size, int) and not isinstance(size, bool):
        found = size
    if found is None or found < 1:
        raise PassError(
            f"{name} must be a number of bytes above 0, or a text like '512MiB' or "
            f"'2GB' ({', '.join(unit for unit in _UNITS if unit)}), not {size!r}"
        )
    return found
