"""Checks on the state that a forward leaves behind on its model.

A graph is a function of its inputs, parameters and buffers. A forward that counts its calls, or
keeps a tensor for the next call, is not; it must be refused, or shown to be harmless.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.proxy import Proxy

from fxtemporal.capture.tracing.errors import StatefulError
from fxtemporal.capture.tracing.shape_tracer import is_leaf
from fxtemporal.ir.outputs import leaves_of
from fxtemporal.ir.shared_state import ABSENT, Change, RandomStates, seed
from fxtemporal.ir.stand_in import StandIn, own_inputs, stand_in
from fxtemporal.support.quiet import quiet

__all__ = ["refuse_unseen", "settle", "settle_export"]

_MODULE_FILE = nn.Module.__setattr__.__code__.co_filename
_EXPORTS_OWN = "self.constants"
"""An attribute that torch.export leaves on what it exports."""


def settle(
    model: nn.Module, traced: StandIn, states: RandomStates, example: Any
) -> tuple[str | None, frozenset[str]]:
    """Check all that the forward of ``traced`` wrote during capture.

    Returns a note on it, or None; and the settings of layers that run as they are, as written.

    The forward may set attributes that every call sets before it reads them, and keep a tensor in
    one that no later call reads. Any other change makes the next call a different function, which a
    graph cannot express.

    Raises:
        StatefulError: the next call may depend on this one, or on chance.
    """
    _refuse_chance(states)
    kept, settings = [], set()
    changes = list(traced.changes())
    unread = _set_first(model, example, traced, changes)
    for change in changes:
        owner, called = change.owner, change.called
        if owner is traced.module and "._tensor_constant" in called:
            continue  # where fx keeps tensors that are neither parameters nor buffers
        if isinstance(owner, nn.Module) and owner is not traced.module and is_leaf(owner):
            settings.add(f"{called} = {change.new!r:.200}")
            continue  # it runs as it is, and sets the same at each call
        if change.called in unread:
            kept.append(change.called)
            continue
        if change.of_buffer:
            text = f"the forward puts another tensor in place of the buffer {called}"
            raise StatefulError(text, exportable=True)
        if not (change.of_attribute and isinstance(change.new, Proxy | torch.Tensor)):
            raise StatefulError(f"the forward changes {called}, which its next call may read")
        kept.append(called)
    if not kept:
        return None, frozenset(settings)
    names = ", ".join(dict.fromkeys(kept))
    if not unread.issuperset(kept) and (example is None or not _repeats(model, example)):
        raise StatefulError(f"the forward keeps {names}, which its next call may read")
    return f"the forward keeps {names}; the optimized module does not", frozenset(settings)


def settle_export(model: nn.Module, exported: StandIn, states: RandomStates, example: Any) -> None:
    """Refuse writes of the forward that torch.export did not see: it tracks tensors only.

    Raises:
        StatefulError: the next call may depend on this one, or on chance.
    """
    _refuse_chance(states)
    _refuse_python(model, exported, example)


def _refuse_python(model: nn.Module, run: StandIn, example: Any) -> None:
    """Refuse a forward that changes anything but tensors, and what each call sets first."""
    changes = list(run.changes())
    unread = _set_first(model, example, run, changes)
    for change in changes:
        owner, new = change.owner, change.new
        tensors = isinstance(new, torch.Tensor) or isinstance(change.old, torch.Tensor)
        leaf = isinstance(owner, nn.Module) and owner is not run.module and is_leaf(owner)
        if not tensors and not leaf and change.called not in (_EXPORTS_OWN, *unread):
            raise StatefulError(
                f"the forward changes {change.called}, which its next call may read"
            )


def refuse_unseen(model: nn.Module, exported: ExportedProgram, example: Any) -> None:
    """Refuse writes to parameters and buffers that the exported program does not repeat.

    torch.export restores attributes and parameters, and does not see ``buffer.data = ...``. So the
    model and the exported program each run once, and their writes are compared.

    Raises:
        StatefulError: a later call would read it.
    """
    expected = _written(model, example)
    found = _written(exported.module(), example) if expected else {}
    for name, tensor in expected.items():
        if name not in found or not _same(found[name], tensor):
            raise StatefulError(
                f"the forward writes self.{name} in a way that torch.export does not see"
            )


def _written(model: nn.Module, example: Any) -> dict[str, torch.Tensor]:
    """The parameters and buffers that a call of ``model`` writes, with their values after it."""
    args, kwargs = own_inputs(example)
    before = _state(model)
    with stand_in(model, watched=True) as other, torch.no_grad(), quiet():
        seed(0)
        other.module(*args, **kwargs)
        _refuse_python(model, other, example)
        replaced = {change.called for change in other.changes()}
        return {
            name: tensor
            for name, tensor in _state(other.module).items()
            if f"self.{name}" in replaced or name not in before or not _same(before[name], tensor)
        }


def _set_first(
    model: nn.Module, example: Any, run: StandIn, changes: Sequence[Change]
) -> frozenset[str]:
    """The changed attributes that a call never reads before it sets them.

    A call is run with classes that note reads and writes of these attributes.
    """
    paths = {id(module): path for path, module in run.module.named_modules()}
    watched: dict[str, set[str]] = {}
    for change in changes:
        name = change.called.removeprefix(f"{change.place}.")
        plain = change.of_attribute and not change.of_buffer and name.isidentifier()
        if plain and id(change.owner) in paths and change.new is not ABSENT:
            watched.setdefault(paths[id(change.owner)], set()).add(name)
    if not watched or example is None:
        return frozenset()
    read: set[tuple[str, str]] = set()
    with stand_in(model) as other, torch.no_grad(), quiet():
        for path, names in watched.items():
            part = other.module.get_submodule(path)
            try:
                part.__class__ = _noting(type(part), path, names, read)
            except TypeError:  # a class with another layout
                return frozenset()
        args, kwargs = own_inputs(example)
        seed(0)
        try:
            other.module(*args, **kwargs)
        except Exception:  # it may ask for its own class
            return frozenset()
    return frozenset(
        f"{'.'.join(('self', *filter(None, (path,))))}.{name}"
        for path, names in watched.items()
        for name in names
        if (path, name) not in read
    )


def _noting(kind: Any, path: str, names: set[str], read: set[tuple[str, str]]) -> type:
    """A subclass of ``kind`` that notes which of ``names`` are read before they are set."""
    written: set[str] = set()

    def note(name: object) -> None:
        if name in names and name not in written:
            read.add((path, str(name)))

    def get(self: Any, name: str) -> Any:
        note(name)
        found = kind.__getattribute__(self, name)
        if name == "__dict__" and sys._getframe(1).f_code.co_filename != _MODULE_FILE:
            return _NotedDict(found, note, names, written)
        return found

    def put(self: Any, name: str, value: Any) -> None:
        written.add(name)
        kind.__setattr__(self, name, value)

    own = {"__getattribute__": get, "__setattr__": put}
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**own, **about})


class _NotedDict(collections.UserDict[str, Any]):
    """The ``__dict__`` of a module, for code other than ``nn.Module``'s own."""

    def __init__(
        self,
        held: dict[str, Any],
        note: Callable[[object], None],
        names: set[str],
        written: set[str],
    ) -> None:
        self.data = held
        self._note, self._names, self._written = note, names, written

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        self._note(name)
        return name in self.data

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            self._note(name)
        return iter(self.data)

    def __len__(self) -> int:
        return len(list(self))

    def __setitem__(self, name: str, value: Any) -> None:
        self._written.add(name)
        self.data[name] = value


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_chance(states: RandomStates) -> None:
    if (generator := states.drawn()) is not None:
        raise StatefulError(
            f"the forward draws from {generator}, and one draw would be in the graph for good"
        )


def _repeats(model: nn.Module, example: Any) -> bool:
    """Whether two calls of the same module give the same outputs."""
    results = []
    with stand_in(model) as other, torch.no_grad():
        for _ in range(2):
            args, kwargs = own_inputs(example)
            seed(0)
            results.append(leaves_of(other.module(*args, **kwargs)))
    return len(results[0]) == len(results[1]) and all(map(_same, *results))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other) or (
            one.shape == other.shape
            and torch.equal(one.isnan(), other.isnan())
            and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    return bool(one == other)
