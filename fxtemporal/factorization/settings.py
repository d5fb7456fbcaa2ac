"""The user's settings of a factorization: ranks or a budget, and calibration data."""

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
    """The setting for one layer. ``bias``: its factors get a bias even if the layer has none."""

    rank: Rank
    order: Order = ORDERS[0]
    bias: bool = False


Ranks: TypeAlias = Mapping[str, Rank | Mapping[str, Any] | Cut]

_SHARES = ("flops", "params", "latency", "energy")


@dataclass(frozen=True)
class Factorize:
    """Settings of the (2+1)D factorization of Conv3d layers: give exactly one of the first six.

    Args:
        rank: channels between the factors: ``"paper"`` (M_i of arXiv 1711.11248, which keeps the
            number of parameters, and so saves none), an int, or a fraction of the full rank in
            (0, 1]. Or a dict by layer name; other layers are left. Each value is a rank, or a dict
            with ``rank``, ``order`` and ``bias`` (the factors get a bias even if the layer has
            none). ``report(result).ranks`` is such a dict: it makes the module into which a
            checkpoint of ``result`` can be loaded.
        flops: the share in (0, 1) of the model's floating-point operations to keep. It is divided
            between the layers so that the predicted error of the output is least.
        params: the same for the number of parameters.
        latency: the same for the time of the layers, measured on this machine.
        energy: the share in (0, 1) of the squared norm that each layer must keep.
        error: the largest allowed error of each layer's output, relative to its norm, above 0.
        calibration: an iterable of example inputs that can be iterated several times: a list, or a
            DataLoader. Each entry is a tensor, a tuple or list of arguments (cut to the number of
            the model's arguments: labels are ignored), or a dict of keyword arguments. The factors
            then minimise the error of the layer's output on that data; without it, the error of the
            weight.

    Raises:
        PassError: none or several of the six are given, or one is out of range.
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
        """The quantity that is divided between the layers, and the share of it to keep, if any."""
        name, value = next(self._asked())
        return (name, value) if name in ("flops", "params", "latency") else None

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
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
    """The checked setting of one layer, given as a rank or as a dict."""
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
