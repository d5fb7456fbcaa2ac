"""A stand-in for the user's model: a copy that runs in its place, so that the model never changes.

A forward may write anything that it can reach: parameters and buffers, attributes, lists, deques
and dicts, plain objects, other modules, the variables of a hook's closure. A stand-in is a model of
the same classes in which all of these are copies::

    with stand_in(model) as other:          other.module.cache is a copy of model.cache
        other.module(x)                     writes into the copies
    assert other.original(other.module.conv) is model.conv

State that code refers to by name cannot be copied. It is recorded and restored: attributes of the
model's classes, and global variables that its code uses. So is the state of the random number
generators of torch, Python and NumPy.

With ``share_parameters`` the parameters are the model's own: for a trace, which computes nothing
from them. A copied tensor keeps its class, its strides and its aliases.
"""

from __future__ import annotations

import array
import collections
import copy as copying
import functools
import io
import itertools
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule

from fxtemporal.ir.shared_state import ABSENT, Change, RandomStates, SharedState
from fxtemporal.ir.source import is_user_file
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.dispatch import DisableTorchFunction
from fxtemporal.support.torch_private.transforms import leaving_transforms

__all__ = ["StandIn", "own_inputs", "stand_in"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...))
_CONTAINERS = (dict, list, set, collections.OrderedDict)
_TUPLES = (tuple, frozenset)
_LIBRARY_OBJECTS = (types.SimpleNamespace, collections.UserDict, collections.UserList)
"""Python's own classes whose objects hold what a user puts into them."""
_BYTES = (bytearray, array.array, io.BytesIO, io.StringIO)
_LARGE = 2**28
"""Bytes above which an array is assumed to be data that no forward writes."""


class StandIn:
    """``module``, a copy of a model, with the original of each of its parts."""

    def __init__(
        self, model: nn.Module, share_parameters: bool = False, watched: bool = False
    ) -> None:
        self._share_parameters = share_parameters
        self._copies: dict[int, Any] = {}
        self._kept: list[Any] = []  # the objects whose ids are in _copies must not be freed
        self._originals: dict[int, Any] = {}
        self._names: dict[int, str] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._pending: list[tuple[Callable[[Any, Any, str], None], Any, Any, str]] = []
        self._shared = SharedState(model)
        with torch.inference_mode(False), torch.no_grad(), DisableTorchFunction():
            copied = self._copy(model, "self")
            while self._pending:
                fill, original, copy, name = self._pending.pop()
                fill(original, copy, name)
        assert isinstance(copied, nn.Module)
        self.module = copied
        self._before: dict[int, tuple[Any, str, dict[Any, Any]]] = {}
        if watched:
            self.forget_changes()

    def original(self, value: Any) -> Any:
        """The original of ``value``; ``value`` itself if it is not a copy."""
        return self._originals.get(id(value), value)

    def changes(self) -> Iterator[Change]:
        """All attributes and entries written since the copy, without numbers in tensors."""
        for key, (owner, name, after) in self._contents().items():
            before = self._before[key][2]
            for entry in {**before, **after}:
                old, new = before.get(entry, ABSENT), after.get(entry, ABSENT)
                if not _same(old, new):
                    yield Change(owner, name, _called(name, entry), old, new)
        yield from self._shared.changes()

    def forget_changes(self) -> None:
        """Take the present state as the one that changes are compared with."""
        self._before = self._contents()

    def close(self) -> None:
        """Restore the state that is shared with the model."""
        self._shared.restore()

    def _contents(self) -> dict[int, tuple[Any, str, dict[Any, Any]]]:
        found = {}
        for copy in self._copies.values():
            if id(copy) in self._originals and (entries := _entries(copy)) is not None:
                found[id(copy)] = copy, self._names[id(copy)], entries
        return found

    # -- copies ------------------------------------------------------------------------------------

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, _PLAIN):
            return value
        known = self._copies.get(id(value), ABSENT)
        if known is not ABSENT:
            return known
        if type(value) in _CONTAINERS and not value and not getattr(value, "__dict__", None):
            return self._note(value, type(value)(), name)
        copy = value
        with suppress(Exception):  # an object that cannot be copied is shared
            copy = self._shell(value, name)
        return self._note(value, copy, name)

    def _note(self, value: Any, copy: Any, name: str) -> Any:
        self._copies[id(value)] = copy
        self._kept.append(value)
        if copy is not value:
            self._originals[id(copy)] = value
            self._names[id(copy)] = name
        return copy

    def _later(
        self, fill: Callable[[Any, Any, str], None], value: Any, copy: Any, name: str
    ) -> Any:
        self._note(value, copy, name)
        self._pending.append((fill, value, copy, name))
        return copy

    def _shell(self, value: Any, name: str) -> Any:
        """An empty copy that is filled later, so that objects may refer to themselves."""
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, ScriptModule):  # its compiled code refers to it and its parts
            return value if self._share_parameters else copying.deepcopy(value)
        if isinstance(value, nn.Module):
            return self._later(self._fill_object, value, object.__new__(kind), name)
        if isinstance(value, types.MethodType):
            return types.MethodType(
                self._copy(value.__func__, name), self._copy(value.__self__, name)
            )
        if isinstance(value, types.FunctionType):
            return self._function(value, name)
        if isinstance(value, functools.partial):
            return self._partial(value, name)
        if isinstance(value, weakref.ref):
            referent = value()
            return value if referent is None else weakref.ref(self._copy(referent, name))
        if isinstance(value, dict | list | set | collections.deque):
            empty = _empty_like(value)
            if not value and not getattr(value, "__dict__", None):
                return self._note(value, empty, name)
            return self._later(self._fill_container, value, empty, name)
        if isinstance(value, _TUPLES):
            parts = [self._copy(part, name) for part in value]
            if all(mine is part for mine, part in zip(parts, value, strict=True)):
                return value
            make: Any = getattr(kind, "_make", kind)
            return make(parts)
        if isinstance(value, random.Random) or kind.__module__.split(".")[0] == "numpy":
            return _generator_or_array(value)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, _BYTES):
            return copying.copy(value)
        if isinstance(value, itertools.count):
            return itertools.count(*value.__reduce__()[1])
        if _is_plain_object(value) and not self._shared.holds(value):
            return self._later(self._fill_object, value, object.__new__(kind), name)
        return value

    def _fill_object(self, value: Any, copy: Any, name: str) -> None:
        derived = getattr(type(value), "_derived", ())
        for key, entry in list(getattr(value, "__dict__", {}).items()):
            copied = None if key in derived else self._copy(entry, f"{name}.{key}")
            copy.__dict__[key] = copied
        for slot in _slots(value):
            with suppress(AttributeError):
                object.__setattr__(copy, slot, self._copy(getattr(value, slot), f"{name}.{slot}"))

    def _fill_container(self, value: Any, copy: Any, name: str) -> None:
        if getattr(value, "__dict__", None):
            self._fill_object(value, copy, name)
        if isinstance(value, dict):
            of_modules = name.endswith("._modules")
            ordered = isinstance(value, collections.OrderedDict)
            put = collections.OrderedDict.__setitem__ if ordered else dict.__setitem__
            for key, entry in list(dict.items(value)):  # as it lies
                mine = self._copy(key, name) if _by_identity(key) else key
                inner = f"{name[:-9]}.{key}" if of_modules else f"{name}[{key!r:.40}]"
                put(copy, mine, self._copy(entry, inner))
        elif isinstance(value, set):
            copy.update(self._copy(e, name) if _by_identity(e) else e for e in value)
        else:
            copy.extend(self._copy(entry, f"{name}[{i}]") for i, entry in enumerate(list(value)))

    def _function(self, function: types.FunctionType, name: str) -> Any:
        """A copy of a function, with its own copies of the variables that it closes over."""
        self._shared.code(function)
        if not function.__closure__:
            return function
        cells = tuple(types.CellType() for _ in function.__closure__)
        copy = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            cells,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
        copy.__dict__.update(function.__dict__)
        self._note(function, copy, name)
        for variable, cell, own in zip(
            function.__code__.co_freevars, function.__closure__, cells, strict=True
        ):
            self._copies.setdefault(id(cell), own)
            self._kept.append(cell)
            with suppress(ValueError):  # a variable without a value
                own.cell_contents = self._copy(cell.cell_contents, f"{name}'s {variable}")
        return copy

    def _partial(self, value: Any, name: str) -> Any:
        parts = [self._copy(part, name) for part in (value.func, *value.args)]
        keywords = {key: self._copy(entry, name) for key, entry in value.keywords.items()}
        return functools.partial(parts[0], *parts[1:], **keywords)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor``; copies of tensors that share memory share memory too."""
        kind = type(tensor)
        if self._share_parameters and isinstance(tensor, nn.Parameter):
            return tensor
        if kind not in (torch.Tensor, nn.Parameter, nn.Buffer):
            return copying.deepcopy(tensor)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            copy = tensor.detach().clone()
        elif tensor.is_conj() or tensor.is_neg():
            copy = tensor.detach().clone(memory_format=torch.preserve_format)
        else:
            storage = tensor.untyped_storage()
            if (own := self._storages.get(storage._cdata)) is None:
                own = storage.clone()  # type: ignore[no-untyped-call]
                self._storages[storage._cdata] = own
                self._kept.append(storage)
            copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            copy.set_(own, tensor.storage_offset(), tensor.size(), tensor.stride())
        if kind is nn.Parameter:
            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        elif tensor.requires_grad:
            copy.requires_grad_()
        if vars(tensor):
            vars(copy).update(vars(tensor))
            copy.__class__ = kind
        return copy


@contextmanager
def stand_in(
    model: nn.Module, *, share_parameters: bool = False, watched: bool = False
) -> Iterator[StandIn]:
    """A copy of ``model`` to run; afterwards shared state and random states are restored.

    ``watched``: record the state, so that :meth:`StandIn.changes` can be asked for.
    """
    states = RandomStates()
    other = StandIn(model, share_parameters, watched)
    try:
        with leaving_transforms():
            yield other
    finally:
        other.close()
        states.restore()


# -- kinds of objects ------------------------------------------------------------------------------


def _empty_like(value: Any) -> Any:
    if isinstance(value, collections.deque):
        return type(value)(maxlen=value.maxlen)
    if isinstance(value, collections.defaultdict):
        return type(value)(value.default_factory)
    kind: Any = type(value)
    return kind.__new__(kind)


def _by_identity(value: Any) -> bool:
    """Whether ``value`` hashes by identity, so that as a dict key it must become its copy."""
    return (
        isinstance(value, nn.Module | torch.Tensor)
        or getattr(type(value), "__hash__", None) is object.__hash__
    )


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an object of a Python class, copied attribute by attribute."""
    kind = type(value)
    if isinstance(value, type | types.ModuleType | fx.Graph | fx.Node) or hasattr(kind, "__del__"):
        return False
    if isinstance(value, _LIBRARY_OBJECTS):
        return True
    if not hasattr(value, "__dict__") and not _slots(value):
        return False
    module = sys.modules.get(kind.__module__)
    if kind.__module__.split(".")[0] in ("torch", "enum", "tqdm"):
        return kind.__module__.startswith(("torch.nn", "torch.utils.hooks", "torch.distributions"))
    return module is None or is_user_file(str(getattr(module, "__file__", "?") or "?"))


def _slots(value: Any) -> tuple[str, ...]:
    kind: Any = type(value)
    return _slots_of(kind)


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: Any) -> tuple[str, ...]:
    named = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    flat = [(n,) if isinstance(n, str) else tuple(n) for n in named]
    return tuple(s for names in flat for s in names if s not in ("__dict__", "__weakref__"))


def _generator_or_array(value: Any) -> Any:
    if isinstance(value, random.Random):
        copy = type(value)()
        copy.setstate(value.getstate())
        return copy
    if getattr(value, "nbytes", 0) > _LARGE:
        return value
    return copying.deepcopy(value)


# -- the contents of a copy, to find writes --------------------------------------------------------


def _entries(owner: Any) -> dict[Any, Any] | None:
    """The attributes and entries of a mutable object by name; None for other objects."""
    if isinstance(owner, types.FunctionType):
        cells = zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True)
        return {f"'s {name}": cell.cell_contents for name, cell in cells if _is_set(cell)}
    if isinstance(owner, random.Random | itertools.count):
        return {"": sys.intern(repr(owner.__reduce__()))}
    if type(owner).__module__.split(".")[0] == "numpy":
        state = getattr(getattr(owner, "bit_generator", owner), "state", owner)
        return {"": sys.intern(repr(state.tobytes() if hasattr(state, "tobytes") else state))}
    if isinstance(owner, _BYTES):
        return {"": owner.getvalue() if isinstance(owner, io.IOBase) else bytes(owner)}
    found: dict[Any, Any] = {}
    if isinstance(owner, dict):
        entries = dict.items(owner)
        found = {(id(key) if _by_identity(key) else key): value for key, value in entries}
    elif isinstance(owner, list | collections.deque):
        found = dict(enumerate(owner))
    elif isinstance(owner, set):
        found = {id(value): value for value in owner}
    elif isinstance(owner, torch.Tensor) or not (hasattr(owner, "__dict__") or _slots(owner)):
        return None
    attributes = {f".{name}": value for name, value in getattr(owner, "__dict__", {}).items()}
    slots = {f".{slot}": getattr(owner, slot, ABSENT) for slot in _slots(owner)}
    return found | attributes | slots


def _same(old: Any, new: Any) -> bool:
    """Whether a later call cannot tell them apart; torch.export replaces dicts by equal ones."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if type(old) is dict:
        return list(old) == list(new) and all(map(_same, old.values(), new.values()))
    if type(old) in (list, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return isinstance(new, _PLAIN) and bool(old == new)


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not ABSENT
    except ValueError:
        return False


def _called(name: str, entry: Any) -> str:
    """The name of an entry in a message: ``self.encoder.cache``."""
    if isinstance(entry, str) and entry.startswith((".", "'s ")):
        return name + entry
    for held in ("._buffers", "._parameters"):
        if name.endswith(held):
            return f"{name.removesuffix(held)}.{entry}"
    return name


def own_inputs(inputs: Any) -> Any:
    """Copies of the inputs, with the same nesting and the tensors' memory layouts."""
    return pytree.tree_map_only(torch.Tensor, _as_it_lies, inputs)


def _as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of ``tensor``, including gaps and overlapping entries."""
    copy = tensor.clone()
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.numel()
    if not plain or copy.stride() == tensor.stride() or tensor.is_conj() or tensor.is_neg():
        return copy
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    flat = tensor.as_strided((span,), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride(), 0)
