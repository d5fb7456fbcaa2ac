"""What a forward can write that no copy of its model can hold: see :class:`SharedState`.

Code names its global variables and its classes, so these are the same for a model and for a copy of
it. They are remembered before the copy is run, and put back afterwards.
"""

from __future__ import annotations

import collections
import dis
import inspect
import random
import sys
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
"""Stands for an attribute or entry that is not there."""

_CODE = (types.FunctionType, staticmethod, classmethod, property, types.ModuleType)


@dataclass(frozen=True)
class Change:
    """``called``, an entry of ``owner``, was ``old`` and is ``new``; either may be ``ABSENT``."""

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
    """A mutable object, and what it held."""

    owner: Any
    name: str
    before: dict[Any, Any]


class SharedState:
    """The class attributes and global variables that the code of a model may write.

    Of a namespace only the names that the code uses; of the objects behind them, what is in lists,
    dicts, sets, deques, tensors and plain objects.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, _Place] = {}
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: set[Any] = set()
        self._whole: list[tuple[dict[str, Any], set[str]]] = []
        for kind in {type(module) for module in model.modules()}:
            self._class(kind)

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one of the objects behind a name."""
        return id(value) in self._places

    def changes(self) -> Iterator[Change]:
        """All of it that was written; not numbers in tensors."""
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
        """Put all of it back."""
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
        """Remember the global variables that ``function`` uses, and the functions it calls."""
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
            if name in data:
                self._value(value, name)

    def _remember(self, owner: Any, name: str, before: dict[Any, Any]) -> None:
        self._places[id(owner)] = _Place(owner, name, before)
        for entry, value in before.items():
            self._value(value, f"{name}.{entry}")

    def _value(self, value: Any, name: str) -> None:
        if id(value) in self._places or id(value) in self._tensors or isinstance(value, nn.Module):
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
    """The global names that ``code`` uses, with that of the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _written(code: types.CodeType) -> set[str]:
    """The global names that ``code``, or a function defined in it, gives a value."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found.union(*map(_written, inner))


def _of_user(value: Any) -> bool:
    module = sys.modules.get(type(value).__module__)
    return is_user_file(str(getattr(module, "__file__", "") or "?"))


def _entries(owner: Any, only: dict[Any, Any] | None = None) -> dict[Any, Any]:
    """What is in ``owner``, by position, key or name; of namespaces ``only`` these."""
    if isinstance(owner, type):
        return {name: value for name, value in vars(owner).items() if not name.startswith("__")}
    if isinstance(owner, dict) and "__builtins__" in owner:
        return {name: owner[name] for name in only or () if name in owner}
    if isinstance(owner, dict):
        return dict(owner)
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
        held.clear()
        held.update(before)


class RandomStates:
    """The states of the random number generators of torch, Python and NumPy, to be put back."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if used else None
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def drawn(self) -> str | None:
        """Which generator outside of torch was drawn from since; None where none was."""
        if random.getstate() != self._python:
            return "Python's random"
        if self._numpy is not None:
            now = sys.modules["numpy"].random.get_state(legacy=False)
            if _plain(now) != _plain(self._numpy):
                return "NumPy's random"
        return None

    def restore(self) -> None:
        """Put all of them back."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if random.getstate() != self._python:
            random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def seed(number: int) -> None:
    """Seed what a call can draw from; what :class:`RandomStates` puts back.

    ``torch.manual_seed`` is for users: where CUDA was not used yet, it decides on the numbers that
    they will draw there, and nobody can put that back.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)


def _plain(state: Any) -> Any:
    """The state of a generator of NumPy, with bytes in place of arrays, which compare by entry."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tobytes() if hasattr(state, "tobytes") else state
