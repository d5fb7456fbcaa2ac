"""What the user asks for: how far to cut, and with which data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fxtemporal.functional.factors import ORDERS, Order
from fxtemporal.support.errors import PassError

__all__ = ["Cut", "Factorize"]

Rank: TypeAlias = int | float | Literal["paper"]


@dataclass(frozen=True)
class Cut:
    """What is asked of one layer: ``bias``, whether its factors have one in any case."""

    rank: Rank
    order: Order = ORDERS[0]
    bias: bool = False


Ranks: TypeAlias = Mapping[str, Rank | Mapping[str, Any] | Cut]

_SHARES = ("flops", "params", "latency", "energy")


@dataclass(frozen=True)
class Factorize:
    """How far to cut each Conv3d: exactly one of the first six.

    Args:
        rank: channels between the factors: ``"paper"`` (M_i of arXiv 1711.11248, which keeps the
            number of parameters and so saves nothing by itself), an int, or a fraction of the full
            rank in (0, 1]. Or a dict of them by the names of layers, the rest of which are left:
            each a rank, or a dict with ``rank``, ``order`` and ``bias`` (whether the factors get
            one where the layer has none). ``report(result).ranks`` is one, with which a checkpoint
            of ``result`` gets the module that it loads into.
        flops: what may be left of the model's floating-point operations, as a share in (0, 1). It
            is divided between the layers so that the error of the output is least by prediction.
        params: the same for the number of parameters.
        latency: the same for the time that the layers take here, by measurement.
        energy: the share of the squared norm that each layer has to keep, in (0, 1).
        error: the most that the output of each layer may be off, relative to its norm, above 0.
        calibration: an iterable of example inputs, gone through several times: a list, or a
            DataLoader. Each entry is a tensor, a tuple or list of arguments (of which as many are
            taken as the model was given: labels are left aside), or a dict of keyword arguments.
            The factors then minimise the error of what the layer gives on that data; without it,
            that of the weight.

    Raises:
        PassError: none or several of them are given, or one is out of range.
    """

    rank: Rank | Ranks | None = None
    flops: float | None = None
    params: float | None = None
    latency: float | None = None
    energy: float | None = None
    error: float | None = None
    calibration: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        given = [name for name, _ in self._asked()]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise PassError(
                "Factorize: give one of rank, flops, params, latency, energy and error, not "
                f"{found}: rank must be 'paper', an int from 1, or a fraction in (0, 1]"
            )
        if isinstance(self.rank, Mapping):
            checked = {
                name: asked if isinstance(asked, Cut) else _checked(asked, name)
                for name, asked in self.rank.items()
            }
            object.__setattr__(self, "rank", checked)
        elif self.rank is not None:
            _check(self.rank)
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < 1):
                raise PassError(f"Factorize: {name} must be a share between 0 and 1, not {value!r}")
        if self.error is not None and not (_is_number(self.error) and self.error > 0):
            raise PassError(f"Factorize: error must be above 0, not {self.error!r}")
        if isinstance(self.calibration, Iterator):
            raise PassError(
                "Factorize: calibration is gone through several times, and an iterator only once: "
                "give a list or a DataLoader"
            )
        if self.calibration is not None and not isinstance(self.calibration, Iterable):
            raise PassError(
                f"Factorize: calibration must be an iterable, not {type(self.calibration).__name__}"
            )

    def _asked(self) -> Iterator[tuple[str, Any]]:
        for name in ("rank", *_SHARES, "error"):
            if (value := getattr(self, name)) is not None:
                yield name, value

    @property
    def budget(self) -> tuple[str, float] | None:
        """What is shared out between the layers, and how much of it may be left."""
        name, value = next(self._asked())
        return (name, value) if name in ("flops", "params", "latency") else None

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, as plain values."""
        asked = dict(self._asked())
        if isinstance(self.rank, Mapping):
            asked["rank"] = {name: vars(cut) for name, cut in self.rank.items()}
        return {
            **asked,
            **({"calibrated": True} if self.calibration is not None else {}),
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(rank: Any, name: str | None = None) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank <= 1
    if rank != "paper" and not whole and not share:
        of = "" if name is None else f" of {name!r}"
        raise PassError(
            f"Factorize: rank{of} must be 'paper', an int from 1, or a fraction in (0, 1], "
            f"not {rank!r}"
        )


def _checked(asked: Any, name: str) -> Cut:
    """What is asked of one layer; a dict where it is more than a rank."""
    given = asked if isinstance(asked, Mapping) else {"rank": asked}
    if "rank" not in given or not set(given) <= {"rank", "order", "bias"}:
        raise PassError(
            f"Factorize: rank of {name!r} must be a rank, or a dict with rank, order and bias, "
            f"not {asked!r}"
        )
    order, bias = given.get("order", ORDERS[0]), given.get("bias", False)
    if order not in ORDERS or not isinstance(bias, bool):
        raise PassError(
            f"Factorize: the order of {name!r} must be one of {ORDERS}, and its bias True or "
            f"False, not {asked!r}"
        )
    _check(given["rank"], name)
    return Cut(given["rank"], order, bias)
