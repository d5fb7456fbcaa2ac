"""The guards of torch.export, as nodes of the graph.

Where a forward reads sizes, torch.export records as text what it assumed about them. The graph is
right only where all of these guards hold, so any other call must be refused::

    (L['clip'].size()[1] // 2) == 2                                  in the program
    guard(clip.size(1) // 2, 2, "clip.size(1) // 2", None, "...")   in the graph

torch compiles that text to a Python function. In a file it could be any code; :func:`is_guard`
says whether it is arithmetic on sizes and nothing else.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxtemporal.capture.tracing.shape_proxy import expression
from fxtemporal.ir.guards import guard
from fxtemporal.ir.node_meta import has_value, needed_value, value_of
from fxtemporal.ir.program import Program
from fxtemporal.support.torch_private import pytree

__all__ = ["check_exported_sizes", "free_sizes", "holds_on_example", "is_guard", "refuse_size"]

_ROOT = "L"
_FIXED = "torch.export fixed it"
_FOUND = "torch.export found it so"
_UNREADABLE = "torch.export found something about the sizes that no check can be made of"
_ASSUMED = "torch.export takes a free size for 2 or more, and the model does something else here"

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt", "isnan")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")
        if hasattr(torch, name)
    },
}
_GROWING = (ast.Pow, ast.LShift)
_LARGEST_POWER = 8
"""Largest exponent allowed: a file could hold 9**9**9, which takes too long to compute."""
_NUMBERS = {"math.inf": math.inf, "math.pi": math.pi}
_OF_TENSORS = ("size", "stride", "storage_offset")


class _UnreadableError(Exception):
    """A guard that uses other operations than those above."""


def is_guard(text: str) -> bool:
    """Whether ``text`` is arithmetic on sizes, comparisons, and nothing else."""
    try:
        return _is_arithmetic(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def check_exported_sizes(program: Program, exported: ExportedProgram) -> None:
    """Insert guards on all that ``exported`` assumes, after the inputs of ``program``."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    if not placeholders:
        return
    for node in list(program.graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn" and not node.users:
            program.graph.erase_node(node)
    checks = _Checks(program, placeholders, _user_inputs(exported))
    checks.fixed_sizes()
    checks.equal_sizes()
    paths = _paths(program, exported, placeholders)
    try:
        for text in exported._guards_code:
            checks.guard(ast.parse(text.strip(), mode="eval").body, paths)
    except (_UnreadableError, KeyError, SyntaxError):
        checks.all_sizes(_UNREADABLE)


def holds_on_example(program: Program) -> bool:
    """Whether the example inputs pass the guards of ``program``, as far as values are known."""
    checks = [node for node in program.graph.nodes if node.target is guard]
    return all(
        needed_value(check.args[0]) == check.args[1] for check in checks if has_value(check.args[0])
    )


def refuse_size(program: Program, exported: ExportedProgram, free: str, size: int) -> None:
    """Insert guards that refuse a call where the free size ``free`` of ``exported`` is ``size``."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    checks = _Checks(program, placeholders, _user_inputs(exported))
    for node, dim, found in checks.sizes():
        if str(found) == free:
            checks.check(operator.ne, checks.size(node, dim), size, _ASSUMED)


def free_sizes(exported: ExportedProgram) -> dict[str, list[tuple[int, int]]]:
    """``{free size of exported: [(number of the input, dimension), ...]}``."""
    found: dict[str, list[tuple[int, int]]] = {}
    for number, value in enumerate(_user_inputs(exported).values()):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if _fixed(size) is None:
                found.setdefault(str(size), []).append((number, dim))
    return found


def _user_inputs(exported: ExportedProgram) -> dict[str, Any]:
    """``{node name: value}`` of the inputs that a caller gives."""
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    return {
        node.name: value_of(node)
        for spec, node in zip(specs, nodes, strict=True)
        if spec.kind.name == "USER_INPUT"
    }


def _fixed(size: Any) -> int | None:
    """The number that torch.export fixed ``size`` to; None for a free size."""
    if isinstance(size, torch.SymInt):
        return None if size.node.expr.free_symbols else int(size)
    return int(size)


class _Checks:
    """Writes guards after the inputs of a program."""

    def __init__(
        self, program: Program, placeholders: list[fx.Node], exported: Mapping[str, Any]
    ) -> None:
        self._graph = program.graph
        self._exported = exported
        self._placeholders = placeholders
        self._last = placeholders[-1]
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}

    def sizes(self) -> Iterator[tuple[fx.Node, int, Any]]:
        """Each input, each of its dimensions, and the size in the exported program."""
        for node in self._placeholders:
            value = self._exported.get(node.name)
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                yield node, dim, size

    def fixed_sizes(self) -> None:
        for node, dim, size in self.sizes():
            if (number := _fixed(size)) is not None:
                self._expect(self.size(node, dim), number, f"{node.target}.size({dim})", _FIXED)

    def equal_sizes(self) -> None:
        """Guard that dimensions that share a free size are equal in a call."""
        first: dict[str, tuple[fx.Node, int]] = {}
        for node, dim, size in self.sizes():
            if _fixed(size) is not None:
                continue
            known = first.setdefault(str(size), (node, dim))
            if known != (node, dim):
                self.check(operator.eq, self.size(node, dim), self.size(*known), _FOUND)

    def all_sizes(self, why: str) -> None:
        """Guard that every free size equals that of the example."""
        for node, dim, size in self.sizes():
            if _fixed(size) is None:
                known = needed_value(node).shape[dim] if has_value(node) else int(size)
                self._expect(self.size(node, dim), known, f"{node.target}.size({dim})", why)

    def guard(self, tree: ast.AST, paths: Mapping[str, fx.Node]) -> None:
        if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And):
            for part in tree.values:
                self.guard(part, paths)
        elif isinstance(tree, ast.Compare) and len(tree.ops) == 1:
            left, right = self._value(tree.left, paths), self._value(tree.comparators[0], paths)
            self.check(_OPERATORS[type(tree.ops[0])], left, right, _FOUND)
        else:
            value = self._value(tree, paths)
            if isinstance(value, fx.Node):
                self._expect(value, True, expression(value), _FOUND)

    def check(self, function: Callable[..., Any], left: Any, right: Any, why: str) -> None:
        """Guard that ``function(left, right)`` is true; for ``left == number``, guard ``left``."""
        if function is operator.eq and isinstance(left, fx.Node) and type(right) is int:
            self._expect(left, right, expression(left), why)
        elif isinstance(left, fx.Node) or isinstance(right, fx.Node):
            value = self._call(function, left, right)
            self._expect(value, True, expression(value), why)

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        if (node, dim) not in self._sizes:
            self._sizes[node, dim] = self._insert("call_method", "size", (node, dim))
        return self._sizes[node, dim]

    def _value(self, tree: ast.AST, paths: Mapping[str, fx.Node]) -> Any:
        """A number, or the node that computes it."""
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.BinOp):
            sides = self._value(tree.left, paths), self._value(tree.right, paths)
            return self._call(_OPERATORS[type(tree.op)], *sides)
        if isinstance(tree, ast.UnaryOp) and type(tree.op) in _OPERATORS:
            return self._call(_OPERATORS[type(tree.op)], self._value(tree.operand, paths))
        if isinstance(tree, ast.BoolOp):
            function = _OPERATORS[type(tree.op)]
            value, *rest = [self._value(part, paths) for part in tree.values]
            for part in rest:
                value = self._call(function, value, part)
            return value
        if isinstance(tree, ast.Compare) and len(tree.ops) == 1:
            sides = self._value(tree.left, paths), self._value(tree.comparators[0], paths)
            return self._call(_OPERATORS[type(tree.ops[0])], *sides)
        return self._read(tree, paths)

    def _read(self, tree: ast.AST, paths: Mapping[str, fx.Node]) -> Any:
        text = ast.unparse(tree)
        if text in _NUMBERS:
            return _NUMBERS[text]
        if text in paths:
            return paths[text]
        match tree:
            case ast.Subscript(
                ast.Call(ast.Attribute(source, "size"), [], []), ast.Constant(int(dim))
            ):
                if (node := paths.get(ast.unparse(source))) is not None:
                    return self.size(node, dim)
            case ast.Call(function, args, []):
                if (known := _FUNCTIONS.get(ast.unparse(function))) is not None:
                    return self._call(known, *(self._value(arg, paths) for arg in args))
        raise _UnreadableError(text)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        if not any(isinstance(arg, fx.Node) for arg in args):
            return function(*args)
        return self._insert("call_function", function, args)

    def _expect(self, actual: fx.Node, value: Any, text: str, why: str) -> None:
        text = text[1:-1] if text.startswith("(") and text.endswith(")") else text
        self._insert("call_function", guard, (actual, value, text, None, why))

    def _insert(self, op: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.create_node(op, target, args)
        return self._last


def _paths(
    program: Program, exported: ExportedProgram, placeholders: list[fx.Node]
) -> dict[str, fx.Node]:
    """The inputs, by the names that guards use for them: ``L['clips'][0]``."""
    found = {f"{_ROOT}['flat_args'][{i}]": node for i, node in enumerate(placeholders)}
    spec = exported.call_spec.in_spec
    if spec is not None and spec.num_leaves == len(placeholders):
        args, kwargs = pytree.tree_unflatten(placeholders, spec)
        bound = inspect.signature(program.gm.forward).bind(*args, **kwargs)
        for path, node in pytree.tree_leaves_with_path(dict(bound.arguments)):
            found[_ROOT + pytree.keystr(path)] = node
            key = path[0].key if isinstance(path[0], pytree.MappingKey) else ""
            name, _, number = str(key).rpartition("_")
            if number.isdigit():  # the forward takes it as *name
                found.setdefault(f"{_ROOT}[{name!r}][{number}]{pytree.keystr(path[1:])}", node)
    return found


def _is_arithmetic(tree: ast.AST) -> bool:
    match tree:
        case ast.Constant(value):
            return isinstance(value, int | float | str)
        case ast.BinOp(left, sign, right):
            if type(sign) in _GROWING and (not _is_small(right) or _grows(left)):
                return False
            sides = left, right
            return (
                type(sign) in _OPERATORS
                and not any(map(_is_text, sides))
                and (all(map(_is_arithmetic, sides)))
            )
        case ast.UnaryOp(sign, operand):
            return type(sign) in _OPERATORS and _is_arithmetic(operand)
        case ast.BoolOp(_, values):
            return all(map(_is_arithmetic, values))
        case ast.Compare(left, signs, others):
            signed = all(type(sign) in _OPERATORS for sign in signs)
            return signed and all(map(_is_arithmetic, (left, *others)))
        case ast.IfExp(test, body, other):
            return all(map(_is_arithmetic, (test, body, other)))
        case ast.Call(ast.Attribute(source, name), args, []) if name in _OF_TENSORS:
            return _is_source(source) and all(map(_is_arithmetic, args))
        case ast.Call(function, args, []):
            return ast.unparse(function) in _FUNCTIONS and all(map(_is_arithmetic, args))
        case ast.Subscript(value, index):
            return _is_arithmetic(index) and (_is_source(value) or _is_arithmetic(value))
    return ast.unparse(tree) in _NUMBERS


def _is_text(tree: ast.AST) -> bool:
    return isinstance(tree, ast.Constant) and isinstance(tree.value, str)


def _is_small(tree: ast.AST) -> bool:
    return isinstance(tree, ast.Constant) and tree.value in range(_LARGEST_POWER + 1)


def _grows(tree: ast.AST) -> bool:
    return any(isinstance(part, _GROWING) for part in ast.walk(tree))


def _is_source(tree: ast.AST) -> bool:
    match tree:
        case ast.Subscript(value, ast.Constant()):
            return _is_source(value)
        case ast.Name(name):
            return name == _ROOT
    return False
