"""What a result promises besides the numbers, where the caller asks for more, or for less."""

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
    """How alike the result and the model are; the defaults are what costs no speed.

    ``exact``: ``"rounding"``, or ``"bitwise"``: every bit of what was compared on this machine.
    ``nan``: ``"confined"``: what the model computes as a finite number is one, also of a clip with
    NaN or infinite frames. ``layout``: ``"any"``: outputs lie in memory as the last op leaves them.
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
        """Bit for bit leaves no room for a NaN where the model has a number."""
        return self.nan == "confined" or self.bitwise

    def to_dict(self) -> dict[str, Any]:
        """What is not as by default."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
