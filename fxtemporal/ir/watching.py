"""Finds changes to the model after optimization: see :class:`Watch` and :class:`LateHooks`.

A result shares the model's tensors and keeps its modules for their names. A user may replace a
tensor (``load_state_dict(assign=True)``), change a setting that was folded into a weight
(``norm.eps = 1e-3``), or put a hook on a module that the graph does not call any more.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule

from fxtemporal.support.errors import SpecializationError

__all__ = ["LateHooks", "Schedule", "Watch", "warn_of_late_hooks"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_TENSORS = ("_parameters", "_buffers")
_FIRST = 8
"""The number of first calls that are always checked."""
_SHARE = 0.005
"""The share of the time that all checks together may take after those calls."""


class Schedule:
    """Decides when to run a slow check: at the first calls, then from time to time.

    All living schedules share one budget of time.
    """

    _living = 0

    def __init__(self) -> None:
        self._calls = 0
        self._next = 0.0
        Schedule._living += 1

    def __del__(self) -> None:
        Schedule._living -= 1

    def due(self, check: Callable[[], bool]) -> bool:
        """The answer of ``check()`` if it is due, else True."""
        start = time.perf_counter()
        self._calls += 1
        if self._calls > _FIRST and start < self._next:
            return True
        answer = check()
        end = time.perf_counter()
        self._next = end + (end - start) * Schedule._living / _SHARE
        return answer


class Watch:
    """Checks that a result still has the tensors of its model, and the settings of its capture.

    New tensors of the model are taken over; a changed setting raises
    :class:`SpecializationError`.
    """

    def __init__(self, model: nn.Module, result: nn.Module, captured: fx.Graph) -> None:
        own = dict(result.named_modules(remove_duplicate=False))
        self._tensors = [
            [weakref.ref(module), own[path], kind, name, tensor]
            for path, module in model.named_modules(remove_duplicate=False)
            if path in own and not isinstance(module, ScriptModule)  # which both share
            for kind in _TENSORS
            for name, tensor in getattr(module, kind).items()
            if getattr(own[path], kind).get(name) is tensor
        ]
        graph: Any = result.graph
        gone = set(_called(captured)) - set(_called(graph))
        self._settings = [
            (own[path], path, name, value)
            for path in sorted(gone & set(own))
            for name, value in _settings(own[path])
        ]
        self._schedule = Schedule()

    def look(self) -> None:
        """Take over new tensors of the model, if a check is due.

        Raises:
            SpecializationError: a setting was changed, or a tensor replaced by one that differs in
                kind.
        """
        self._schedule.due(self._look)

    def _look(self) -> bool:
        changed = [entry for entry in self._tensors if _now(*entry) is not entry[4]]
        if changed:
            self._refuse_untied()
        for entry in changed:
            _, own, kind, name, known = entry
            entry[4] = _now(*entry)
            _take_over(own, kind, name, known, entry[4])
        for module, path, name, value in self._settings:
            now = getattr(module, name, None)
            if now is not value and now != value:
                raise SpecializationError(
                    f"{path}.{name} was {value!r} when this module was optimized, and became part "
                    f"of its graph; it is {now!r} now. Call fxtemporal.optimize again."
                )
        return True

    def _refuse_untied(self) -> None:
        """Refuse tied tensors that are no longer tied: a graph reads them by one name only."""
        found: dict[int, Any] = {}
        for entry in self._tensors:
            now = _now(*entry)
            if entry[4] is not None and found.setdefault(id(entry[4]), now) is not now:
                raise SpecializationError(
                    f"{entry[3]} was one tensor of several modules when the model was optimized, "
                    "and is no longer: call fxtemporal.optimize again"
                )


def _now(module: Any, own: nn.Module, kind: str, name: str, known: Any) -> Any:
    """The tensor that the model has now in place of ``known``."""
    theirs = module()
    return known if theirs is None else getattr(theirs, kind).get(name)


def _take_over(own: nn.Module, kind: str, name: str, known: Any, now: Any) -> None:
    if getattr(own, kind).get(name) is not known:
        return  # the user replaced the result's own tensor
    tensors = isinstance(known, torch.Tensor) and isinstance(now, torch.Tensor)
    if not tensors or known.shape != now.shape:
        raise SpecializationError(
            f"the model has another {name} than when it was optimized, of another shape: call "
            "fxtemporal.optimize again"
        )
    getattr(own, kind)[name] = now


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The settings of a layer that its class lists, and the weights that are None."""
    for name in getattr(type(module), "__constants__", ()):
        value = getattr(module, name, None)
        if value is None or isinstance(value, bool | int | float | str | tuple):
            yield name, value
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            yield name, None


def _called(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


class LateHooks(OrderedDict[int, Any]):
    """The hooks of a module that the graph does not call as the model does: adding one warns."""

    path = ""

    def __setitem__(self, key: int, hook: Any) -> None:
        warnings.warn(
            f"the optimized graph does not call {self.path!r} as the model does: this hook will "
            "not run, or on all frames at once. Put the hook on the model, and optimize it then",
            UserWarning,
            stacklevel=3,
        )
        super().__setitem__(key, hook)


def warn_of_late_hooks(result: fx.GraphModule, captured: fx.Graph) -> None:
    """Warn when a hook is put on a module of ``result`` that is not called as in ``captured``."""
    before, after = _called(captured), _called(result.graph)
    as_before = {path for path, count in after.items() if count == before.get(path)}
    for path, module in result.named_modules():
        parents = {path[:end] for end, sign in enumerate(path) if sign == "."} | {path}
        if not path or parents & as_before or any(getattr(module, name) for name in _HOOKS):
            continue
        for name in _HOOKS:
            hooks = LateHooks()
            hooks.path = path
            vars(module)[name] = hooks
