"""What a result does at a call that its guards refuse: see :class:`Otherwise`."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.ir.shallow_copy import HOOK_TABLES, forget_hooks, twin
from fxtemporal.ir.source import is_user_file
from fxtemporal.support.errors import FxTemporalError, SpecializationError
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import is_fake

__all__ = ["Otherwise"]

Recapture = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], nn.Module]
"""Optimizes a model for the arguments of one call."""

_MOST = 8
"""The number of results for other sizes that are kept."""


class Otherwise:
    """Runs the original in place of a result, at a call that a guard of the result refuses.

    The guards stand before all that a caller could see of the call, so nothing is done twice::

        fast = fxtemporal.optimize(model, (clip,))          # 16 frames, which the forward reads
        fast(longer)                                        # the model's numbers, and one warning

    The original is a twin of the model: its own modules over the same tensors. Before it runs, it
    gets the tensors, modes and hooks that the result has now.

    Args:
        original: the model, which itself is never run.
        recapture: makes a result for the sizes of the call, which is kept for the next ones.
        hooks_traced: the graph of the result holds what the hooks of the model do. If not, the
            result runs the hooks of the model itself, around this too.
    """

    def __init__(
        self,
        original: nn.Module,
        recapture: Recapture | None = None,
        *,
        hooks_traced: bool = False,
    ) -> None:
        self._original = twin(original)
        self._recapture = recapture
        self._hooks_traced = hooks_traced
        if not hooks_traced:
            forget_hooks(self._original)
        self._made: OrderedDict[Hashable, nn.Module | None] = OrderedDict()
        self._refused: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def refused(self) -> dict[str, int]:
        """How many calls each guard has refused."""
        return dict(self._refused)

    def __call__(self, result: nn.Module, why: SpecializationError, args: Any, kwargs: Any) -> Any:
        """The outputs of the call ``result(*args, **kwargs)``, which was refused for ``why``.

        Raises:
            SpecializationError: ``why``, if another trace or a compiler runs the result.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        if torch.compiler.is_compiling() or any(map(_is_symbolic, leaves)):
            raise why
        self._note(why)
        chosen = None if self._recapture is None else self._variant(result, args, kwargs)
        if chosen is not None:
            try:
                return self._run_as(result, chosen, args, kwargs)
            except SpecializationError:  # it asks for more than the sizes
                pass
        return self._run_as(result, self._original, args, kwargs)

    def _run_as(self, result: nn.Module, other: nn.Module, args: Any, kwargs: Any) -> Any:
        """The outputs of ``other`` over the contents of ``result``, which gets what it sets."""
        self._follow(other, result)
        try:
            return other(*args, **kwargs) if self._hooks_traced else other.forward(*args, **kwargs)
        finally:
            own = dict(result.named_modules())
            for path, module in other.named_modules():
                kept = own[path]._buffers if path in own else {}
                for name in kept.keys() & module._buffers:
                    if module._buffers[name] is not kept[name]:
                        kept[name] = _put(module._buffers[name], kept[name])

    def _follow(self, follower: nn.Module, result: nn.Module) -> None:
        """Give ``follower`` the tensors, modes and hooks that ``result`` has now."""
        own = dict(follower.named_modules())
        for path, module in result.named_modules():
            mine = own.get(path)
            if mine is None:
                continue
            mine.training = module.training
            if path and not self._hooks_traced:
                mine.__dict__.update(
                    (name, vars(module)[name]) for name in HOOK_TABLES if name in vars(module)
                )
            for name in ("_parameters", "_buffers"):
                kept, now = getattr(mine, name), getattr(module, name)
                kept.update((key, now[key]) for key in kept.keys() & now.keys())

    def _note(self, why: SpecializationError) -> None:
        """Count the refusal, and warn of it the first time."""
        self._refused[why.fixed] += 1
        if self._refused[why.fixed] == 1:
            does = "runs the original" if self._recapture is None else "is optimized again"
            warnings.warn(
                f"the optimized model is right only where {why.fixed}. A call of another kind "
                f"{does}, this one and all later ones: report(result).refused counts them. Give "
                "example inputs of this kind, or otherwise='error' to get an error",
                stacklevel=_frames_to_the_caller(),
            )

    def _variant(
        self, result: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> nn.Module | None:
        """The result for calls of this kind; None if the model could not be optimized for them."""
        modes = tuple(module.training for module in result.modules())
        key = (*map(_kind, pytree.tree_leaves((args, kwargs))), modes)
        with self._lock:
            if key not in self._made:
                assert self._recapture is not None
                self._follow(self._original, result)
                try:
                    self._made[key] = self._recapture(self._original, args, kwargs)
                except FxTemporalError:
                    self._made[key] = None
                while len(self._made) > _MOST:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Otherwise:
        return Otherwise(self._original, self._recapture, hooks_traced=self._hooks_traced)


def _frames_to_the_caller() -> int:
    """The number of stack frames from the caller of this out to the user's code."""
    frame: types.FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += 1
        if is_user_file(frame.f_code.co_filename):
            return count
        frame = frame.f_back
    return 1


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, fx.Proxy | torch.SymInt | torch.SymFloat) or is_fake(value)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, Hashable) else id(leaf)


def _put(value: Any, held: Any) -> Any:
    """``held`` with the numbers of ``value``, as in a graph; ``value`` if it is of another kind."""
    if not isinstance(value, torch.Tensor) or not isinstance(held, torch.Tensor):
        return value
    kinds = [(t.shape, t.dtype, t.device, t.layout) for t in (value, held)]
    return held.copy_(value) if kinds[0] == kinds[1] else value
