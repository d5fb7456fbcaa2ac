"""Whether the answer to a question is lost in the expression that asks it.

``if torch.is_grad_enabled() and self.gradient_checkpointing:`` goes one way, whether gradients are
recorded or not, while ``self.gradient_checkpointing`` is False. Nearly every model of diffusers
asks so, and a trace for each answer would double the time that capturing takes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["makes_no_difference"]

_PLAIN = (bool, int, type(None))
_TESTS = (ast.If, ast.IfExp, ast.While)


def makes_no_difference(frame: types.FrameType) -> bool:
    """Whether the call that ``frame`` makes now is one side of an ``and`` that is False either way.

    Only attributes of local variables are looked at, and only plain values in them: nothing runs.
    False where the source cannot be read, or is not that of the code that runs.
    """
    code = frame.f_code
    position = list(code.co_positions())[frame.f_lasti // 2]
    found = _conjunctions(code).get(position)
    if found is None:
        return False
    others, is_test = found
    for other in others:
        try:
            value = _plain(other, frame)
        except LookupError:
            return False
        if value is False or (is_test and not value):
            return True
        if not value:
            return False
    return False


@functools.lru_cache(maxsize=64)
def _conjunctions(code: types.CodeType) -> dict[Any, tuple[list[ast.expr], bool]]:
    """By the position of each call in an ``and``: what stands behind it, and whether it is a test.

    Empty where ``code`` does not come from its file as this is now.
    """
    text = "".join(linecache.getlines(code.co_filename))
    try:
        tree = ast.parse(text)
        same = any(_equal(code, other) for other in _codes(compile(text, code.co_filename, "exec")))
    except (SyntaxError, ValueError):
        return {}
    found: dict[Any, tuple[list[ast.expr], bool]] = {}
    tests = {id(node.test) for node in ast.walk(tree) if isinstance(node, _TESTS)}
    for node in ast.walk(tree) if same else ():
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            for number, value in enumerate(node.values):
                if isinstance(value, ast.Call):
                    at = (value.lineno, value.end_lineno, value.col_offset, value.end_col_offset)
                    found[at] = (node.values[number + 1 :], id(node) in tests)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _equal(one: types.CodeType, other: types.CodeType) -> bool:
    names = one.co_qualname == other.co_qualname and one.co_names == other.co_names
    return names and one.co_firstlineno == other.co_firstlineno and one.co_code == other.co_code


def _plain(expression: ast.expr, frame: types.FrameType) -> Any:
    """The value of ``expression``; ``LookupError`` where reading it could run code."""
    value = _read(expression, frame)
    if not isinstance(value, _PLAIN):
        raise LookupError
    return value


def _read(expression: ast.expr, frame: types.FrameType) -> Any:
    if isinstance(expression, ast.Name):
        return frame.f_locals[expression.id]
    if not isinstance(expression, ast.Attribute):
        raise LookupError
    owner, name = _read(expression.value, frame), expression.attr
    if isinstance(owner, nn.Module) and name == "training":
        return vars(owner)[name]
    value = inspect.getattr_static(owner, name, _MISSING)
    if value is _MISSING or hasattr(type(value), "__get__"):
        raise LookupError
    return value


_MISSING = object()
