"""Proxies that know the value behind them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute, Proxy, TraceError

from fxtemporal.capture.tracing.base_tracer import RecordingTracer
from fxtemporal.capture.tracing.errors import GradientModeError, StatefulError
from fxtemporal.ir.guards import TRIP_COUNT
from fxtemporal.ir.node_meta import has_value, needed_value

__all__ = ["NUMBER", "ReadingTracer", "ShapeProxy", "expression"]

NUMBER = (bool, int, float)
_CUTS = frozenset(
    """
        unbind split chunk tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk
    """.split()
)
"""Ops whose number of results depends on a size."""


_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_OF_GRADIENTS = ("requires_grad", "grad", "grad_fn", "is_leaf", *_HOOKS)


class ReadingTracer(RecordingTracer):
    """The tracer's methods that a proxy calls."""

    grad_mode: bool | None = None
    """What to answer a forward that asks whether gradients are recorded; None: refuse it."""

    def value_of(self, proxy: ShapeProxy, why: str) -> Any:
        """The value behind ``proxy``."""
        raise NotImplementedError

    def read(self, proxy: Any, why: str) -> Any:
        """The number that Python needs now; a guard holds the graph to this number."""
        raise NotImplementedError

    def check_length(self, proxy: ShapeProxy) -> None:
        """Guard the number of pieces that an op cut a tensor into: Python looped over them."""
        raise NotImplementedError


class ShapeProxy(Proxy):
    """A proxy with a value: ``needed_value(proxy.node)``."""

    tracer: ReadingTracer

    @property
    def known(self) -> bool:
        return has_value(self.node)

    @property
    def val(self) -> Any:
        if not self.known:
            raise TraceError("a number is read that is not known here")
        return needed_value(self.node)

    def __getattr__(self, name: str) -> Any:
        if not self.known:
            return _UnknownAttribute(self, name)
        value = getattr(self.val, name)  # AttributeError as the real object would raise it
        if callable(value) and name not in _HOOKS:
            return Attribute(self, name)
        if name == "ndim":
            return self.dim()
        if name in _OF_GRADIENTS:
            raise GradientModeError(f"the forward reads {name}, which only a real tensor has")
        if isinstance(self.val, torch.Tensor) and self.node.op == "get_attr" and name == "shape":
            return value
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tracer", "node"):
            object.__setattr__(self, name, value)
        elif name in _OF_GRADIENTS:
            raise GradientModeError(f"the forward sets {name}, which only a real tensor has")
        elif name == "data":
            raise StatefulError(
                "the forward puts other memory behind a tensor (x.data = ..., not x.copy_(...))"
            )
        elif self.node.op == "get_attr":
            text = (
                f"the forward sets {name} of self.{self.node.target}, which its next call may read"
            )
            raise StatefulError(text)
        else:
            object.__setattr__(self, name, value)

    def entry(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __getitem__(self, index: Any) -> Any:
        entry = self.entry(index)
        if entry.known and entry.val is None:  # Python may test ``is None``
            self.tracer.graph.erase_node(entry.node)
            return None
        return entry

    def __setitem__(self, index: Any, value: Any) -> None:
        if not self.known or not isinstance(self.val, torch.Tensor):
            raise TraceError("the forward puts an entry into a list or dict of its inputs")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        value = self.tracer.value_of(self, "len()")
        if isinstance(value, torch.Tensor):
            return self.tracer.read(self.size(0), "len()")  # type: ignore[no-any-return]
        cut = str(getattr(self.node.target, "__name__", self.node.target)) in _CUTS
        if cut or isinstance(value, torch.Size):
            self.tracer.check_length(self)
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        if self.known and isinstance(self.val, torch.Tensor):
            laps = int(self.tracer.read(self.size(0), TRIP_COUNT))
        else:
            laps = len(self)
        return iter([self[i] for i in range(laps)])

    def __bool__(self) -> bool:
        return bool(self.tracer.read(self, "a branch"))

    def __index__(self) -> int:
        return int(self.tracer.read(self, TRIP_COUNT))

    def __int__(self) -> int:
        return int(self.tracer.read(self, "int()"))

    def __float__(self) -> float:
        return float(self.tracer.read(self, "float()"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.read(self, "round()"), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = torch.as_tensor(self.tracer.read(self, "numpy")).numpy()
        return array if dtype is None else array.astype(dtype)

    def __str__(self) -> str:
        if not self.known:
            raise TraceError("str() of an input, and no example inputs were given")
        if not isinstance(self.val, torch.Tensor | list | tuple | dict):
            return str(self.tracer.read(self, "str()"))
        return repr(self)

    def __format__(self, spec: str) -> str:
        return format(self.tracer.read(self, "format()"), spec) if spec else str(self)

    def __hash__(self) -> int:
        if not self.known:
            raise TraceError("a look-up of an input, and no example inputs were given")
        if isinstance(self.val, NUMBER):
            return hash(self.tracer.read(self, "a look-up"))
        return id(self)

    def __contains__(self, item: Any) -> bool:
        return any(item is element or bool(item == element) for element in self)


class _UnknownAttribute(Attribute):
    """An attribute of an input whose value is not known: Python cannot look at it."""

    def __str__(self) -> str:
        raise TraceError(f"str() of {self.attr}, and no example inputs were given")

    def __format__(self, spec: str) -> str:
        return str(self)

    def __hash__(self) -> int:
        raise TraceError(f"a look-up of {self.attr}, and no example inputs were given")


def _write_in_place(name: str) -> None:
    """Define ``x += 1`` to write into x if x is a tensor, as without the tracer."""
    in_place = getattr(operator, name)
    anew = getattr(operator, name[1:], None) or getattr(operator, name[1:] + "_")

    def method(self: ShapeProxy, other: Any) -> Any:
        if self.known and not isinstance(self.val, torch.Tensor):
            return anew(self, other)
        return self.tracer.create_proxy("call_function", in_place, (self, other), {})

    setattr(ShapeProxy, f"__{name}__", method)


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
):
    _write_in_place(_name)


def expression(node: fx.Node, levels: int = 5) -> str:
    """``node`` as the user would write it: ``x.size(1)``, ``x.shape[1] // 2``.

    A node deeper than ``levels`` is written as its name in the graph: otherwise the text of a
    residual network would double at each addition.
    """

    def text(argument: Any) -> str:
        return expression(argument, levels - 1) if isinstance(argument, fx.Node) else repr(argument)

    if node.op in ("placeholder", "get_attr"):
        return str(node.target).lstrip("*")
    if levels == 0:
        return node.name
    arguments = [text(argument) for argument in node.args]
    if node.op == "call_method" and arguments:
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        if node.target is getattr:
            return f"{arguments[0]}.{node.args[1]}"
        if name == "getitem":
            return f"{arguments[0]}[{arguments[1]}]"
        signs = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/"}
        signs |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        if name in signs and len(arguments) == 2:
            return f"({arguments[0]} {signs[name]} {arguments[1]})"
        return f"{name}({', '.join(arguments)})"
    return node.name
