"""Signatures of ops, written as in Python: ``"select(input, dim: dim, index)"``.

An annotation names the *kind* of an argument (see :mod:`fxtemporal.ir.ops.canonical`), which brings
its value to one form. ``*``, ``*args`` and ``**kwargs`` have their Python meaning.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxtemporal.support.torch_private.operators import OpOverload

__all__ = [
    "IGNORED",
    "REQUIRED",
    "Arguments",
    "Signature",
    "UndescribedError",
    "bind_schema",
    "parse",
]

Arguments = dict[str, Any]

REQUIRED: Any = object()
"""Marks an argument without a default."""

RENAMED = {
    "self": "input",
    "axis": "dim",
    "axes": "dim",
    "keepdims": "keepdim",
    "train": "training",
}
"""``{another name that PyTorch accepts: the name used here}``."""


IGNORED = {"cudnn_enabled", "cudnn_enable"}
"""Arguments that choose a kernel, not a result."""


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "out": (None,),
    "generator": (None,),
    "return_indices": (False,),
    "requires_grad": (False,),
    "pin_memory": (None, False),
    "layout": (None, torch.strided),
}
"""Arguments that no op here has, and the values that have no effect."""


class UndescribedError(Exception):
    """A call has no description. Raised and caught inside this package only."""


@dataclass(frozen=True)
class Signature:
    name: str
    positional: tuple[str, ...]
    variadic: str | None
    keyword: tuple[str, ...]
    rest: str | None
    """``**axes``: the keywords that match no other argument, as pairs."""
    defaults: Mapping[str, Any]
    kinds: Mapping[str, str]

    @cached_property
    def names(self) -> tuple[str, ...]:
        variadic = () if self.variadic is None else (self.variadic,)
        rest = () if self.rest is None else (self.rest,)
        return self.positional + variadic + self.keyword + rest

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], renamed: Mapping[str, str]
    ) -> Arguments:
        """Arguments by name, with defaults for those left out."""
        if len(args) > len(self.positional) and self.variadic is None:
            raise UndescribedError(f"{self.name} takes {len(self.positional)} positional arguments")
        bound = dict(zip(self.positional, args, strict=False))
        if self.variadic is not None and len(args) > len(self.positional):
            bound[self.variadic] = tuple(args[len(self.positional) :])
        for name, value in kwargs.items():
            known = name if name in self.names else renamed.get(name) or RENAMED.get(name, name)
            if self.rest is not None and known not in self.names:
                bound[self.rest] = (*bound.get(self.rest, ()), (name, value))
                continue
            if known not in self.names and any(
                value is neutral for neutral in NEUTRAL.get(name, ())
            ):
                continue
            if known not in self.names or known in bound:
                raise UndescribedError(f"{self.name} has no argument {name}")
            bound[known] = value
        return self.fill(bound)

    def fill(self, bound: Mapping[str, Any]) -> Arguments:
        """Arguments in the order of the signature, with defaults for those left out."""
        filled = {name: bound.get(name, self.defaults[name]) for name in self.names}
        if any(value is REQUIRED for value in filled.values()):
            raise UndescribedError(f"{self.name} lacks an argument")
        return filled


def parse(text: str) -> Signature:
    """Parse a text like ``"sum(input, dim: dims=None, keepdim: bool=False, *, dtype=None)"``."""
    function = ast.parse(f"def {text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    spec = function.args
    defaults: dict[str, Any] = {arg.arg: REQUIRED for arg in spec.args}
    for arg, default in zip(reversed(spec.args), reversed(spec.defaults), strict=False):
        defaults[arg.arg] = ast.literal_eval(default)
    for arg, optional in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        defaults[arg.arg] = REQUIRED if optional is None else ast.literal_eval(optional)
    everything = [*spec.args, *spec.kwonlyargs]
    if spec.vararg is not None:
        defaults[spec.vararg.arg] = ()
        everything.append(spec.vararg)
    if spec.kwarg is not None:
        defaults[spec.kwarg.arg] = ()
    return Signature(
        name=function.name,
        positional=tuple(arg.arg for arg in spec.args),
        variadic=None if spec.vararg is None else spec.vararg.arg,
        rest=None if spec.kwarg is None else spec.kwarg.arg,
        keyword=tuple(arg.arg for arg in spec.kwonlyargs),
        defaults=defaults,
        kinds={a.arg: a.annotation.id for a in everything if isinstance(a.annotation, ast.Name)},
    )


def bind_schema(
    overload: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    renamed: Mapping[str, str],
    names: Sequence[str],
) -> Arguments:
    """Arguments of an ATen call under the names used here.

    An argument that is not in ``names`` must have the schema's default, and is dropped.
    """
    schema = overload._schema.arguments
    bound: Arguments = {}
    for position, argument in enumerate(schema):
        name = renamed.get(argument.name) or RENAMED.get(argument.name, argument.name)
        if position < len(args):
            value = args[position]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        elif argument.has_default_value():
            value = argument.default_value
        else:
            raise UndescribedError(f"{overload} lacks {argument.name}")
        if name in names:
            bound[name] = value
        elif name in IGNORED or (argument.has_default_value() and _neutral(name, value)):
            continue
        elif not (argument.has_default_value() and _same(value, argument.default_value)):
            raise UndescribedError(f"{overload} is called with {argument.name}")
    return bound


def _neutral(name: str, value: Any) -> bool:
    return any(value is neutral for neutral in NEUTRAL.get(name, ()))


def _same(value: Any, default: Any) -> bool:
    simple = bool | int | float | str | None
    return value is default or (
        isinstance(value, simple) and isinstance(default, simple) and value == default
    )
