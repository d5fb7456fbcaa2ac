"""Measuring: is the rewritten network faster, on this device, at these shapes?

Two graphs are timed against each other in one process, turn by turn, so that both see the same
drift of the machine; the medians are compared. Rewrites are then tried without, a group at a time,
and a group that costs more than it gains is left out.
"""

from __future__ import annotations

import copy
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxtemporal.cache import Cache, default_folder
from fxtemporal.engines import ENGINES, compile_with
from fxtemporal.errors import PassError
from fxtemporal.freezing import freeze
from fxtemporal.sizes import in_bytes
from fxtemporal.stand_in import StandIn, own_inputs, stand_in

__all__ = [
    "Races",
    "Timing",
    "Tune",
    "Verdict",
    "interleaved",
    "on_engine",
    "race",
    "worth_keeping",
]


@dataclass(frozen=True)
class Tune:
    """How choices are measured.

    ``target`` is what will run the graph, and what is measured: ``"eager"``, ``"inductor"``,
    ``"openvino"`` or ``"onnxruntime"`` (:mod:`fxtemporal.engines`). ``seconds`` is the most that
    all measuring may take, ``margin`` what a rewrite must gain over noise before it counts (0.02:
    two per cent).

    ``memory_limit`` bounds the activations that one call holds at its peak: bytes, or a text like
    ``"512MiB"`` or ``"2GB"``; None: no limit. It holds for the peak at the example's shapes, as
    :mod:`fxtemporal.analysis.liveness` estimates it from the graph: tensors alive at once, inputs
    and outputs among them, without parameters, gradients, and what kernels allocate for themselves.
    Folded frames then run in as many chunks as it takes, or the loop stays a loop.

    ``cache``: a folder where what was measured of single layers is kept for the next time; True for
    the usual one (:mod:`fxtemporal.cache`), False for none.

    Raises:
        PassError: a setting that is out of range.
    """

    target: str = "eager"
    seconds: float = 60.0
    margin: float = 0.02
    memory_limit: int | str | None = None
    cache: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        if self.target not in ENGINES:
            raise PassError(f"tune: no engine {self.target!r}; there are {', '.join(ENGINES)}")
        if not self.seconds > 0:
            raise PassError(f"tune: seconds must be above 0, not {self.seconds}")
        if not 0 <= self.margin < 1:
            raise PassError(f"tune: margin must be a share between 0 and 1, not {self.margin}")
        if not isinstance(self.cache, bool | str | os.PathLike):
            raise PassError(f"tune: cache must be a folder, True or False, not {self.cache!r}")
        if self.memory_limit is not None:
            in_bytes(self.memory_limit, "tune: memory_limit")

    @property
    def folder(self) -> Path | None:
        """The folder of the cache."""
        if isinstance(self.cache, bool):
            return default_folder() if self.cache else None
        return Path(self.cache)

    @property
    def limit(self) -> int | None:
        """``memory_limit`` in bytes."""
        return (
            None if self.memory_limit is None else in_bytes(self.memory_limit, "tune: memory_limit")
        )


@dataclass(frozen=True)
class Timing:
    """Milliseconds of two graphs, interleaved: medians, and the quartiles of their ratio.

    ``speedup`` above 1: the second is the faster.
    """

    before: float
    after: float
    speedup: float
    low: float
    high: float
    rounds: int

    def wins(self, margin: float = 0.0) -> bool:
        """Whether the second is the faster, by more than ``margin`` and in most of the rounds."""
        return self.speedup > 1 + margin and self.low > 1

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


class _OnEngine(nn.Module):
    """What an engine made of a module, to be called like the module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


class _Refused(nn.Module):
    """A module that an engine does not take: it loses every race."""


def on_engine(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], target: str
) -> nn.Module:
    """``module`` as ``target`` runs it.

    Raises:
        PassError: the engine is not installed, or takes no such inputs.
    """
    if target == "eager":
        return module
    args, kwargs = inputs
    if kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
        raise PassError(f"tune: {target} takes tensors alone, by position; measure with 'eager'")
    try:
        return _OnEngine(compile_with(target, StandIn(module).module, args).run)
    except ImportError as error:
        raise PassError(f"tune: target={target!r} is not installed: {error}") from error
    except Exception:  # what an engine does not know, it refuses in any way
        return _Refused()


@contextmanager
def _call(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[Callable[[], object]]:
    """A call with inputs of its own, of a module whose weights and buffers are its own too."""
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

    ``rounds`` bounds how often, from and to; a race that one of them clearly wins ends early.
    """
    if isinstance(before, _Refused) or isinstance(after, _Refused):
        ratio = float(isinstance(before, _Refused)) - float(isinstance(after, _Refused)) + 1.0
        return Timing(0.0, 0.0, ratio, ratio, ratio, 0)
    runs: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), torch.random.fork_rng(), ExitStack() as stack:
        calls = [stack.enter_context(_call(module, inputs)) for module in (before, after)]
        deadline = time.perf_counter() + seconds
        first, second = (_milliseconds(call) for call in calls)
        if max(first, second) > _BRIEF and not 1 / _FAR <= first / second <= _FAR:
            ratio = first / second
            return Timing(first, second, ratio, ratio, ratio, 1)
        if max(first, second) < _QUICK:
            for warm_up in calls:
                warm_up()
        while len(runs[0]) < rounds[1]:
            pair = (0, 1) if len(runs[0]) % 2 == 0 else (1, 0)
            for which in pair:
                runs[which].append(_milliseconds(calls[which]))
            if len(runs[0]) >= rounds[0] and time.perf_counter() > deadline:
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

    What is hopeless by its first call that counts is not called again, but for ``always``.
    """
    if not calls:
        return {}
    runs = {name: [_milliseconds(call)] for name, call in calls.items()}
    for name, call in calls.items():
        if runs[name][0] < _QUICK:
            runs[name] = [_milliseconds(call)]
    best = min(times[0] for times in runs.values())
    racing = {n: c for n, c in calls.items() if runs[n][0] < _HOPELESS * best or n == always}
    deadline = time.perf_counter() + _SECONDS * len(racing)
    for laps in range(1, _LAPS[1]):
        if laps >= _LAPS[0] and time.perf_counter() > deadline:
            break
        for name, call in racing.items():
            runs[name].append(_milliseconds(call))
    return {name: statistics.median(times) for name, times in runs.items()}


_LAPS = (3, 7)
_SECONDS = 0.12
"""For all laps of one call that is interleaved with others."""

_HOPELESS = 1.8
"""So many times as long as the best has no chance."""

_LONGEST = 1.0
"""Seconds for one race of the network; slow ones take three rounds."""

_QUICK = 20.0
"""Milliseconds below which the first call is mostly what is done once."""

_BRIEF = 250.0
"""Milliseconds below which the first call may have paid for much besides its work."""

_FAR = 3.0
"""A race of slow networks is over at their first calls if one is so many times as fast."""

_CLEAR = ((3, 1.5), (5, 1.25), (9, 1.1))
"""After so many rounds a race is over if one of the two is that many times as fast."""


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


def _milliseconds(run: Callable[[], object]) -> float:
    """The time of one run, the device's work included."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return (time.perf_counter() - start) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Races:
    """Races of whole networks on the engine that ``tune`` names, each run once and remembered.

    What is remembered goes by the code and the layers of both, and the shapes of the inputs. With
    ``frozen``, an engine other than eager mode is given what :func:`~fxtemporal.freezing.freeze`
    makes of a module: it compiles what is derived from the weights as constants.
    """

    def __init__(
        self,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        tune: Tune,
        cache: Cache,
        frozen: bool = False,
    ) -> None:
        self.inputs = inputs
        self.tune = tune
        self.cache = cache
        self.frozen = frozen and tune.target != "eager"
        self._made: dict[int, tuple[nn.Module, nn.Module]] = {}

    def race(
        self, before: nn.Module, after: nn.Module, seconds: float, key: str | None = None
    ) -> Timing:
        key = key or f"network {self._named(before)} {self._named(after)} {self.tune.target}"
        named = isinstance(before, fx.GraphModule) and isinstance(after, fx.GraphModule)
        known = self.cache.get(key) if named else {}
        if known.keys() == _FIELDS:
            return Timing(**{**known, "rounds": int(known["rounds"])})  # type: ignore[arg-type]
        timing = race(self._on_engine(before), self._on_engine(after), self.inputs, seconds)
        if named:
            self.cache.put(key, vars(timing))
        return timing

    def again(self, before: nn.Module, after: nn.Module, seconds: float) -> Timing:
        """Another race of the two, each compiled once more, the second of them first."""
        once_more = Races(self.inputs, self.tune, self.cache, self.frozen)
        for module in (after, before):
            once_more._on_engine(module)
        key = f"network again {self._named(before)} {self._named(after)} {self.tune.target}"
        return once_more.race(before, after, seconds, key)

    def times(self, modules: Mapping[str, nn.Module], always: str) -> dict[str, float]:
        """Milliseconds of each, interleaved: see :func:`interleaved`."""
        key = " ".join(
            ("networks", *(f"{n}={self._named(m)}" for n, m in modules.items()), self.tune.target)
        )
        if known := self.cache.get(key):
            return known
        calls = {}
        with torch.no_grad(), torch.random.fork_rng(), ExitStack() as stack:
            for name, module in modules.items():
                running = self._on_engine(module)
                if not isinstance(running, _Refused):
                    calls[name] = stack.enter_context(_call(running, self.inputs))
            found = interleaved(calls, always)
        self.cache.put(key, found)
        return found

    def _named(self, module: nn.Module) -> str:
        leaves = pytree.tree_leaves(self.inputs)
        tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        given = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        text = f"{getattr(module, 'code', '')}{module!r}{given!r}{self.frozen}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _on_engine(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._made:
            given = module
            if self.frozen and isinstance(module, fx.GraphModule):
                given = copy.deepcopy(module)
                freeze(given)
            self._made[id(module)] = module, on_engine(given, self.inputs, self.tune.target)
        return self._made[id(module)][1]


_FIELDS = {"before", "after", "speedup", "low", "high", "rounds"}


@dataclass(frozen=True)
class Verdict:
    """What became of groups of rewrites: the final race of the ``network``, and races without a
    group against with it: those that it ``lost``, and so is left out, and what others gain.
    """

    network: Timing
    lost: Mapping[str, Timing]
    gains: Mapping[str, Timing]


def worth_keeping(
    groups: Sequence[str],
    build: Callable[[frozenset[str]], nn.Module],
    races: Races,
    tick: Callable[[str], None],
    sure: frozenset[str] = frozenset(),
) -> Verdict:
    """Which groups of rewrites do not pay, and what each gains or costs.

    ``build(groups)`` gives the module with just those groups applied. From all of them, each group
    is left out in turn and stays out where the network is faster without it; if what remains does
    not beat the original, nothing stays. Groups that are ``sure`` were measured before, site by
    site: they are left out only if the network turns out slower with them. What an engine compiles
    twice runs faster once than the other time, so that there the network has to win by a margin,
    and again when both are compiled anew.
    """
    tune = races.tune
    margin = 0.0 if tune.target == "eager" else tune.margin
    deadline = time.perf_counter() + tune.seconds
    share = tune.seconds / (2 * len(groups) + 2)
    kept = frozenset(groups)
    lost: dict[str, Timing] = {}
    gains: dict[str, Timing] = {}

    original, current = build(frozenset()), build(kept)

    def leave_out(some: Iterable[str]) -> None:
        nonlocal kept, current
        for group in some if len(groups) > 1 else ():
            if time.perf_counter() > deadline:
                break
            tick(f"measuring without {group}")
            without = build(kept - {group})
            timing = races.race(without, current, min(share, _LONGEST))
            if timing.speedup < 1 - tune.margin:
                lost[group] = timing
                kept, current = kept - {group}, without
            else:
                gains[group] = timing

    leave_out(group for group in groups if group not in sure)
    tick("measuring the network")
    timing = races.race(original, current, min(share, _LONGEST))
    if not timing.wins(margin) and kept & sure:
        leave_out(group for group in groups if group in sure)
        timing = races.race(original, current, min(share, _LONGEST))
    if kept and tune.target != "eager" and timing.wins(margin):
        again = races.again(original, current, min(share, _LONGEST))
        timing = min(timing, again, key=lambda race: race.speedup)
    if kept and not timing.wins(margin):
        lost.update(dict.fromkeys(kept, timing))
        kept = frozenset()
    if len(kept) == 1:
        gains = dict.fromkeys(kept, timing)
    return Verdict(timing, lost, {group: gain for group, gain in gains.items() if group in kept})
