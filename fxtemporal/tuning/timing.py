"""Times modules and calls in alternation, to find the faster one and the ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxtemporal.ir.stand_in import StandIn, own_inputs, stand_in
from fxtemporal.support.clock import Deadline, milliseconds
from fxtemporal.support.errors import PassError
from fxtemporal.tuning.engines import ENGINES, compile_with

__all__ = [
    "Refused",
    "Timing",
    "call_of",
    "interleaved",
    "on_engine",
    "race",
]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of two graphs, interleaved: medians, and the quartiles of their ratio.

    ``speedup`` above 1: the second is faster.
    """

    before: float
    after: float
    speedup: float
    low: float
    high: float
    rounds: int

    def wins(self, margin: float = 0.0) -> bool:
        """Whether the second is faster, by more than ``margin``, and in most of the rounds."""
        return self.speedup > 1 + margin and self.low > 1

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


class _OnEngine(nn.Module):
    """A compiled module, to be called like the original module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


class Refused(nn.Module):
    """A module that an engine refuses: it loses every race."""


def on_engine(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], target: str
) -> nn.Module:
    """``module`` as ``target`` runs it.

    Raises:
        PassError: the engine is not installed, or does not take such inputs.
    """
    if target == "eager":
        return module
    args, kwargs = inputs
    if kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
        raise PassError(f"tune: {target} takes tensors alone, by position; measure with 'eager'")
    try:
        return _OnEngine(compile_with(ENGINES[target], StandIn(module).module, args).run)
    except ImportError as error:
        raise PassError(f"tune: target={target!r} is not installed: {error}") from error
    except Exception:  # an engine may refuse an op by any exception
        return Refused()


@contextmanager
def call_of(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[Callable[[], object]]:
    """A call on copies of the inputs, of a stand-in with copies of the weights and buffers."""
    args, kwargs = own_inputs(inputs)
    if isinstance(module, _OnEngine):
        yield partial(module, *args, **kwargs)
    else:
        with stand_in(module) as other:
            yield partial(other.module, *args, **kwargs)


def race(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    seconds: float,
    rounds: tuple[int, int] = (3, 25),
) -> Timing:
    """Time ``before(*inputs)`` against ``after(*inputs)`` for about ``seconds``.

    ``rounds`` is the least and the most number of rounds; a clear win ends the race early.
    """
    if isinstance(before, Refused) or isinstance(after, Refused):
        ratio = float(isinstance(before, Refused)) - float(isinstance(after, Refused)) + 1.0
        return Timing(0.0, 0.0, ratio, ratio, ratio, 0)
    runs: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), torch.random.fork_rng(), ExitStack() as stack:
        calls = [stack.enter_context(call_of(module, inputs)) for module in (before, after)]
        deadline = Deadline(seconds)
        first, second = (milliseconds(call) for call in calls)
        if max(first, second) > _BRIEF and not 1 / _FAR <= first / second <= _FAR:
            ratio = first / second
            return Timing(first, second, ratio, ratio, ratio, 1)
        if max(first, second) < _QUICK:
            for warm_up in calls:
                warm_up()
        while len(runs[0]) < rounds[1]:
            pair = (0, 1) if len(runs[0]) % 2 == 0 else (1, 0)
            for which in pair:
                runs[which].append(milliseconds(calls[which]))
            if len(runs[0]) >= rounds[0] and deadline.over:
                break
            if _decided(runs):
                break
    ratios = [b / a for b, a in zip(*runs, strict=True)]
    low, high = _quartiles(runs)
    return Timing(
        before=statistics.median(runs[0]),
        after=statistics.median(runs[1]),
        speedup=statistics.median(ratios),
        low=low,
        high=high,
        rounds=len(ratios),
    )


def interleaved(calls: Mapping[str, Callable[[], object]], always: str) -> dict[str, float]:
    """Milliseconds of each call: medians of rounds in which each has its turn.

    A call that is hopelessly slow in its first counted round is dropped, except ``always``.
    """
    if not calls:
        return {}
    runs = {name: [milliseconds(call)] for name, call in calls.items()}
    for name, call in calls.items():
        if runs[name][0] < _QUICK:
            runs[name] = [milliseconds(call)]
    best = min(times[0] for times in runs.values())
    racing = {n: c for n, c in calls.items() if runs[n][0] < _HOPELESS * best or n == always}
    deadline = Deadline(_SECONDS * len(racing))
    for laps in range(1, _LAPS[1]):
        if laps >= _LAPS[0] and deadline.over:
            break
        for name, call in racing.items():
            runs[name].append(milliseconds(call))
    return {name: statistics.median(times) for name, times in runs.items()}


_LAPS = (3, 7)
_SECONDS = 0.12
"""Seconds for all rounds of one call that is interleaved with others."""
_HOPELESS = 1.8
"""A call this many times slower than the best is dropped."""
_QUICK = 20.0
"""Milliseconds below which a first call is mostly one-time work."""
_BRIEF = 250.0
"""Milliseconds below which a first call may include much one-time work."""
_FAR = 3.0
"""A race of slow networks ends after their first calls if one is this many times faster."""
_CLEAR = ((3, 1.5), (5, 1.25), (9, 1.1))
"""``(rounds, factor)``: a race ends after so many rounds if one is faster by the factor."""


def _quartiles(runs: tuple[list[float], list[float]]) -> tuple[float, float]:
    """The lower and the upper quartile of the ratios."""
    low, _, high = statistics.quantiles([b / a for b, a in zip(*runs, strict=True)], n=4)
    return low, high


def _decided(runs: tuple[list[float], list[float]]) -> bool:
    """Whether more rounds would hardly change who wins."""
    for rounds, times in _CLEAR:
        if len(runs[0]) >= rounds:
            low, high = _quartiles(runs)
            if low > times or high < 1 / times:
                return True
    return False
