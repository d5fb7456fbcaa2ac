"""Races between networks; each result is kept in the cache."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.ir.freeze import freeze
from fxtemporal.passes.conv3d_choice import ToChoose
from fxtemporal.support.torch_private import pytree
from fxtemporal.tuning.cache import Cache
from fxtemporal.tuning.form_times import copy_time, form_times
from fxtemporal.tuning.settings import Tune
from fxtemporal.tuning.timing import Refused, Timing, call_of, interleaved, on_engine, race

__all__ = ["Races"]


class Races:
    """Races of whole networks on the engine that ``tune`` names, each run once and remembered.

    The key of a result is the code and the layers of both, and the shapes of the inputs. With
    ``frozen``, modules are frozen (:func:`~fxtemporal.ir.freeze.freeze`) for engines other than
    eager mode, which then compile values derived from the weights as constants.
    """

    large = 32 * 2**20
    """Bytes of activations that leave every cache of the machine: about a last-level cache."""

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
        timing = self.raced(before, after, seconds)
        if named:
            self.cache.put(key, vars(timing))
        return timing

    def raced(self, before: nn.Module, after: nn.Module, seconds: float) -> Timing:
        """The race itself, which nobody remembers."""
        return race(self._on_engine(before), self._on_engine(after), self.inputs, seconds)

    def again(self, before: nn.Module, after: nn.Module, seconds: float) -> Timing:
        """A second race of the two, after both are compiled again, ``after`` first."""
        once_more = Races(self.inputs, self.tune, self.cache, self.frozen)
        for module in (after, before):
            once_more._on_engine(module)
        key = f"network again {self._named(before)} {self._named(after)} {self.tune.target}"
        return once_more.race(before, after, seconds, key)

    def wins(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether ``one`` runs, and is faster than ``other``."""
        try:
            return self.race(other, one, _SECONDS).speedup > 1
        except Exception:  # a view may refuse the layout, in any way
            return False

    def times(self, modules: Mapping[str, nn.Module], always: str) -> dict[str, float]:
        """Milliseconds of each, interleaved."""
        key = " ".join(
            ("networks", *(f"{n}={self._named(m)}" for n, m in modules.items()), self.tune.target)
        )
        if known := self.cache.get(key):
            return known
        found = self.interleaved(modules, always)
        self.cache.put(key, found)
        return found

    def interleaved(self, modules: Mapping[str, nn.Module], always: str) -> dict[str, float]:
        """The times themselves, which nobody remembers."""
        calls = {}
        with torch.no_grad(), torch.random.fork_rng(), ExitStack() as stack:
            for name, module in modules.items():
                running = self._on_engine(module)
                if not isinstance(running, Refused):
                    calls[name] = stack.enter_context(call_of(running, self.inputs))
            return interleaved(calls, always)

    def form_times(
        self, site: ToChoose, forms: Iterable[str], layout: str, target: str
    ) -> dict[str, float]:
        """Milliseconds of each form of one layer, its result in ``layout``."""
        return form_times(site, forms, layout, target)

    def copy_time(self, like: Tensor) -> float:
        """Milliseconds of a copy into channels_last_3d."""
        return copy_time(like)

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


_SECONDS = 1.0
"""Seconds for a race of which only the winner matters."""
_FIELDS = {"before", "after", "speedup", "low", "high", "rounds"}
