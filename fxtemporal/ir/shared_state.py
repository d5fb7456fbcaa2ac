"""State that a forward can write and that a model shares with its copies: :class:`SharedState`.

Code refers to global variables and classes by name, so a copy of a model uses the same ones. They
are recorded before the copy runs, and restored afterwards.
"""

from __future__ import annotations

import collections
import dis
import functools
import inspect
import random
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxtemporal.ir.source import is_user_file

__all__ = ["ABSENT", "Change", "RandomStates", "SharedState", "seed"]

ABSENT = object()
"""Marks an attribute or entry that does not exist."""

_CODE = (types.FunctionType, staticmethod, classmethod, property, types.ModuleType)


@dataclass(frozen=True)
class Change:
    """A write: ``called``, an entry of ``owner``, was ``old`` and is ``new``, or ``ABSENT``."""

    owner: Any
    place: str
    called: str
    old: Any
    new: Any

    @property
    def of_buffer(self) -> bool:
        """Whether it is a buffer of a module."""
        return self.place.endswith("._buffers")

    @property
    def of_attribute(self) -> bool:
        """Whether it is an attribute of an object, not an entry of a container."""
        return not isinstance(self.owner, dict | list | set | collections.deque)


@dataclass(frozen=True)
class _Place:
    """A mutable object, and its contents at the start."""

    owner: Any
    name: str
    before: dict[Any, Any]


class SharedState:
    """The class attributes and global variables that the code of a model may write.

    Only the names that the code uses are recorded; of their objects, the contents of lists, dicts,
    sets, deques, tensors and plain objects.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, _Place] = {}
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: set[Any] = set()
        self._whole: list[tuple[dict[str, Any], set[str]]] = []
        for kind in {type(module) for module in model.modules()}:
            self._class(kind)

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one of the recorded objects."""
        return id(value) in self._places

    def changes(self) -> Iterator[Change]:
        """Every write since the start, without writes of numbers into tensors."""
        for namespace, names in self._whole:
            for name in namespace.keys() - names:
                called = f"{namespace.get('__name__')}.{name}"
                yield Change(namespace, called, called, ABSENT, namespace[name])
        for place in self._places.values():
            after = _entries(place.owner, place.before)
            for entry in {**place.before, **after}:
                old, new = place.before.get(entry, ABSENT), after.get(entry, ABSENT)
                if old is not new:
                    yield Change(place.owner, place.name, f"{place.name}.{entry}", old, new)

    def restore(self) -> None:
        """Undo all writes."""
        for namespace, names in self._whole:
            for name in namespace.keys() - names:
                del namespace[name]
        for place in self._places.values():
            after = _entries(place.owner, place.before)
            keys = {**place.before, **after}
            if any(place.before.get(k, ABSENT) is not after.get(k, ABSENT) for k in keys):
                _refill(place.owner, place.before, after)
        with torch.no_grad():
            for tensor, before in self._tensors.values():
                if tensor.shape == before.shape and not torch.equal(tensor, before):
                    tensor.copy_(before)

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            module = sys.modules.get(base.__module__)
            path = str(getattr(module, "__file__", "") or "?")
            if base in self._seen or base is object or not is_user_file(path):
                continue
            self._seen.add(base)
            held = _entries(base)
            self._places[id(base)] = _Place(base, base.__qualname__, held)
            for name, value in held.items():
                if not isinstance(value, _CODE):
                    self._value(value, f"{base.__qualname__}.{name}")
            for value in held.values():
                for function in _functions(value):
                    self.code(function)

    def code(self, function: types.FunctionType) -> None:
        """Record the global variables that ``function`` uses, and those of functions it calls."""
        function = inspect.unwrap(function)
        if function in self._seen or not isinstance(function, types.FunctionType):
            return
        self._seen.add(function)
        namespace = function.__globals__
        if not is_user_file(str(namespace.get("__file__", "")) or "?"):
            return
        used = {n: namespace[n] for n in _names(function.__code__) if n in namespace}
        for value in used.values():
            if isinstance(value, types.FunctionType):
                self.code(value)
            elif isinstance(value, type):
                self._class(value)
        data = {n: v for n, v in used.items() if not isinstance(v, (*_CODE, type))}
        if "globals" in function.__code__.co_names:  # it may write any
            self._whole.append((namespace, set(namespace)))
            data |= {n: v for n, v in namespace.items() if not n.startswith("__")}
        new = _written(function.__code__) - namespace.keys()
        data |= dict.fromkeys(new, ABSENT)
        if not data:
            return
        known = self._places.get(id(namespace))
        before = data if known is None else {**data, **known.before}
        self._places[id(namespace)] = _Place(namespace, str(namespace.get("__name__")), before)
        for name, value in used.items():
            if name in data and not isinstance(value, (*_CODE, type)):
                self._value(value, name)

    def _remember(self, owner: Any, name: str, before: dict[Any, Any]) -> None:
        self._places[id(owner)] = _Place(owner, name, before)
        for entry, value in before.items():
            self._value(value, f"{name}.{entry}")

    def _value(self, value: Any, name: str) -> None:
        if id(value) in self._places or id(value) in self._tensors:
            return
        if isinstance(value, nn.Module | threading.Thread):  # a thread writes its own state
            return
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and not value.is_meta:
                self._tensors[id(value)] = value, value.detach().clone()
        elif isinstance(value, dict | list | set | collections.deque):
            self._remember(value, name, _entries(value))
        elif isinstance(value, tuple):
            for entry in value:
                self._value(entry, name)
        elif type(value) is not type and hasattr(value, "__dict__") and _of_user(value):
            self._remember(value, name, _entries(value))


def _functions(value: Any) -> Iterator[types.FunctionType]:
    found = getattr(value, "__func__", value)
    for function in (found, *(getattr(value, n, None) for n in ("fget", "fset"))):
        if isinstance(function, types.FunctionType):
            yield function


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that ``code``, or a function defined in it, uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


@functools.lru_cache(maxsize=2**14)
def _written(code: types.CodeType) -> frozenset[str]:
    """The global names that ``code``, or a function defined in it, assigns."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(found.union(*map(_written, inner)))


def _of_user(value: Any) -> bool:
    module = sys.modules.get(type(value).__module__)
    return is_user_file(str(getattr(module, "__file__", "") or "?"))


def _entries(owner: Any, only: dict[Any, Any] | None = None) -> dict[Any, Any]:
    """The contents of ``owner`` by position, key or name; of a namespace the names ``only``."""
    if isinstance(owner, type):
        return {name: value for name, value in vars(owner).items() if not name.startswith("__")}
    if isinstance(owner, dict) and "__builtins__" in owner:
        return {name: owner[name] for name in only or () if name in owner}
    if isinstance(owner, dict):
        return dict(dict.items(owner))  # as it lies: a library's own items() may import modules
    if isinstance(owner, list | collections.deque):
        return dict(enumerate(owner))
    if isinstance(owner, set):
        return {id(value): value for value in owner}
    return dict(vars(owner))


def _refill(owner: Any, before: dict[Any, Any], after: dict[Any, Any]) -> None:
    if isinstance(owner, type):
        for name in {**before, **after}:
            value = before.get(name, ABSENT)
            with suppress(AttributeError, TypeError):
                if value is ABSENT:
                    delattr(owner, name)
                elif after.get(name, ABSENT) is not value:
                    setattr(owner, name, value)
    elif isinstance(owner, dict) and "__builtins__" in owner:
        for name, value in before.items():
            if value is ABSENT:
                owner.pop(name, None)
            else:
                owner[name] = value
    elif isinstance(owner, list):
        owner[:] = list(before.values())
    elif isinstance(owner, set | collections.deque):
        owner.clear()
        owner.update(before.values()) if isinstance(owner, set) else owner.extend(before.values())
    else:
        held = owner if isinstance(owner, dict) else vars(owner)
        ordered = isinstance(held, collections.OrderedDict)
        kind: Any = collections.OrderedDict if ordered else dict
        kind.clear(held)
        for name, value in before.items():
            kind.__setitem__(held, name, value)


class RandomStates:
    """The states of the random number generators of torch, Python and NumPy, to restore later."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if used else None
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def drawn(self) -> str | None:
        """The generator outside of torch that was used since then; None if none was."""
        if random.getstate() != self._python:
            return "Python's random"
        if self._numpy is not None:
            now = sys.modules["numpy"].random.get_state(legacy=False)
            if _plain(now) != _plain(self._numpy):
                return "NumPy's random"
        return None

    def restore(self) -> None:
        """Restore all states."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if random.getstate() != self._python:
            random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def seed(number: int) -> None:
    """Seed torch's generators, which :class:`RandomStates` can restore.

    ``torch.manual_seed`` is not used: if CUDA was not used yet, it fixes the numbers that the user
    will draw there later, and that cannot be undone.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)


def _plain(state: Any) -> Any:
    """The state of a NumPy generator with bytes for arrays, so that it compares as a whole."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tobytes() if hasattr(state, "tobytes") else state
