"""What a model holds, as far as Python can reach it, and what the interpreter holds around it.

``snapshot(model)`` is taken before and after; ``differences`` names what is not as it was.
"""

import builtins
import collections
import dataclasses
import math
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import _dynamo as _  # noqa: F401  (its import replaces torch.manual_seed)
from torch import nn

_STOP = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, torch.dtype)
_NAMESPACES = (
    torch,
    torch.nn.functional,
    torch.Tensor,
    torch.nn,
    nn.Module,
    torch.linalg,
    torch.special,
    torch.fft,
    builtins,
    math,
    random,
    torch.autograd.Function,
    torch.utils.checkpoint,
    np.random,
    torch.fx.wrap.__globals__,
)
_DEPTH, _MOST = 24, 20_000
_FOREIGN = ("torch.fx", "torch._", "fxtemporal")  # what a trace leaves is seen, not walked


@dataclasses.dataclass
class Entry:
    """One object at one path."""

    value: Any  # kept alive, so that its id stays its own
    kind: str
    facts: tuple[Any, ...]
    copy: torch.Tensor | None = None
    version: int = -1


def snapshot(root: Any, name: str = "model") -> dict[str, Entry]:
    """Every object that can be reached from ``root``, by the path to it."""
    found: dict[str, Entry] = {}
    stack: list[tuple[str, Any, frozenset[int]]] = [(name, root, frozenset())]
    while stack and len(found) < _MOST:
        path, value, above = stack.pop()
        found[path] = entry = _entry(value)
        if entry.kind in ("plain", "tensor") or id(value) in above or len(above) > _DEPTH:
            continue
        # only what it lies in is left out: which of two paths to it comes first may change
        inside = above | {id(value)}
        stack += [(path + suffix, part, inside) for suffix, part in _parts(value)]
    return found


def _entry(value: Any) -> Entry:
    if isinstance(value, torch.Tensor):
        facts: tuple[Any, ...] = (value.dtype, value.requires_grad, type(value).__name__)
        try:  # an uninitialized parameter has no shape, an inference tensor no version
            facts += (tuple(value.shape),)
            version = value._version
            copy = value.detach().clone()
            facts += (value.stride(), value.grad is None if value.is_leaf else None)
        except (RuntimeError, TypeError):
            return Entry(value, "tensor", facts)
        return Entry(value, "tensor", facts, copy, version)
    if value is None or isinstance(value, int | float | complex | str | bytes):
        return Entry(value, "plain", (type(value), repr(value)))
    if isinstance(value, np.ndarray):
        return Entry(value, "plain", (value.dtype, value.tobytes()))
    if isinstance(value, _STOP):
        return Entry(value, "plain", (id(value),))
    if isinstance(value, Mapping):
        return Entry(value, "container", (type(value), tuple(map(str, value))))
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return Entry(value, "container", (type(value), len(value)))
    return Entry(value, "object", (type(value), tuple(getattr(value, "__dict__", ()))))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if type(value).__module__.startswith(_FOREIGN):
        return
    if isinstance(value, Mapping):
        for key, part in list(value.items()):
            if not isinstance(key, torch.Tensor):
                yield f"[{key!r}]", part
    elif isinstance(value, list | tuple | collections.deque):
        for index, part in enumerate(value):
            yield f"[{index}]", part
    elif isinstance(value, types.FunctionType):
        for free, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f".<{free}>", cell.cell_contents
            except ValueError:
                continue
        yield ".__defaults__", value.__defaults__
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif hasattr(value, "__dict__") and not isinstance(value, Mapping):
        yield from ((f".{key}", part) for key, part in list(vars(value).items()))


def differences(before: dict[str, Entry], after: dict[str, Entry]) -> list[str]:
    """What is not as it was, identity and version counters included."""
    lines = [f"{path} is gone" for path in before if path not in after]
    lines += [f"{path} is new ({after[path].kind})" for path in after if path not in before]
    for path in before.keys() & after.keys():
        old, new = before[path], after[path]
        if old.kind != new.kind:
            lines.append(f"{path} was a {old.kind}, is a {new.kind}")
        elif old.kind != "plain" and old.value is not new.value and not _fleeting(new.value):
            lines.append(f"{path} is another object")
        elif old.facts != new.facts:
            lines.append(f"{path} was {old.facts}, is {new.facts}"[:200])
        elif old.copy is not None and new.copy is not None and not same(old.copy, new.copy):
            lines.append(f"{path} has other values")
        elif old.version != new.version:
            lines.append(f"{path} has a new version")
    return sorted(lines)


def _fleeting(value: Any) -> bool:
    return isinstance(value, types.MethodType) or (isinstance(value, tuple) and not value)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise the same values, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(((a == b) | ((a != a) & (b != b))).all())


def world() -> dict[str, Any]:
    """The state of the interpreter that no call may change."""
    numpy_state = np.random.get_state()
    return {
        "torch's random state": torch.get_rng_state(),
        "NumPy's random state": (numpy_state[1].tobytes(), numpy_state[2:]),  # type: ignore[union-attr]
        "Python's random state": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "the number of threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "names": [dict(v) if isinstance(v, dict) else dict(vars(v)) for v in _NAMESPACES],
    }


def world_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of the interpreter's state is not as it was."""
    lines = []
    for name, old in before.items():
        new = after[name]
        if name == "names":
            for space, a, b in zip(_NAMESPACES, old, new, strict=True):
                title = getattr(space, "__name__", "a namespace")
                names = [
                    key
                    for key in {**a, **b}
                    if a.get(key) is not b.get(key)
                    and key != "__warningregistry__"  # where Python notes what was warned of
                    # a module that was imported for the first time replaces nothing
                    and (key in a or not isinstance(b[key], types.ModuleType))
                ]
                lines += [f"{title}.{key} was replaced" for key in sorted(names)[:3]]
        elif isinstance(old, torch.Tensor):
            lines += [f"{name} changed"] * (not torch.equal(old, new))
        elif old != new:
            lines.append(f"{name} changed")
    return lines
