"""Promises of a result besides its numbers: rounding, NaN and memory layout."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from fxtemporal.support.errors import PassError

__all__ = ["Exact", "Layout", "Nan", "Promises"]

Exact = Literal["rounding", "bitwise"]
Nan = Literal["any", "confined"]
Layout = Literal["same", "any"]


@dataclass(frozen=True)
class Promises:
    """How closely the result follows the model; the defaults cost no speed.

    ``exact``: ``"rounding"``; or ``"bitwise"``: equal bits in all that was compared on this
    machine. ``nan``: ``"confined"``: where the model gives a finite number, the result does too,
    even for a clip with NaN or infinite frames. ``layout``: ``"any"``: outputs keep the memory
    layout that the last op gave them.
    """

    exact: Exact = "rounding"
    nan: Nan = "any"
    layout: Layout = "same"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, known = getattr(self, field.name), get_args(hints[field.name])
            if value not in known:
                names = " or ".join(map(repr, known))
                raise PassError(f"{field.name} must be {names}, not {value!r}")

    @property
    def bitwise(self) -> bool:
        return self.exact == "bitwise"

    @property
    def confined(self) -> bool:
        """Whether NaN is confined; ``"bitwise"`` implies it."""
        return self.nan == "confined" or self.bitwise

    def to_dict(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
