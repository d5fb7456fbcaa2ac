"""The smallest case that fails in the same way.

Statements are deleted, compound ones replaced by their bodies, expressions by their parts, numbers
by smaller ones, options by the usual ones, as long as the oracle's verdict keeps its key.
"""

import ast
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from .case import Call, Case
from .oracle import Verdict, judge


def shrink(
    case: Case,
    verdict: Verdict,
    *,
    seconds: float = 40.0,
    judged: Callable[[Case], Verdict] = judge,
) -> tuple[Case, Verdict]:
    """A smaller case with a verdict of the same key, and that verdict."""
    end = time.monotonic() + seconds
    key = verdict.key

    def fails(trial: Case) -> Verdict | None:
        found = judged(trial)
        return found if found.key == key else None

    changed = True
    while changed and time.monotonic() < end:
        changed = False
        for options in (_options, _sources):
            again = True
            while again and time.monotonic() < end:
                again = False
                for trial in options(case, verdict):
                    if time.monotonic() > end:
                        break
                    try:
                        found = fails(trial)
                    except Exception:
                        continue
                    if found:
                        case, verdict, changed, again = trial, found, True, True
                        break
    return case, verdict


def _options(case: Case, verdict: Verdict) -> Iterator[Case]:
    """The case with fewer calls and plainer options."""
    put = dataclasses.replace
    if len(case.calls) > 1 or (case.calls and verdict.call is None):
        if verdict.call is not None:
            yield put(case, calls=(case.calls[verdict.call],))
            yield put(case, calls=case.calls[: verdict.call + 1])
        else:
            yield put(case, calls=())
        for index in range(len(case.calls)):
            yield put(case, calls=case.calls[:index] + case.calls[index + 1 :])
    for name, plain in (
        ("audited", False),
        ("threaded", False),
        ("dtype", "float32"),
        ("given", True),
        ("build", "Net().eval()"),
        ("build", "Net()"),
    ):
        if getattr(case, name) != plain and (case.build, plain) != ("Net().eval()", "Net()"):
            yield put(case, **{name: plain})
    for index, call in enumerate(case.calls):
        plain = [put(call, poison=""), put(call, gradients=""), put(call, gradients="parameters")]
        plain += [put(call, mode=""), put(call, batch=2), put(call, batch=1)]
        plain += [put(call, frames=case.example.frames)]
        if call.gradients != "inputs":
            plain.pop(2)
        if call.batch == 1:
            plain = [new for new in plain if new.batch == 1]
        for new in plain:
            if new != call:
                yield put(case, calls=(*case.calls[:index], new, *case.calls[index + 1 :]))
    for frames in (1, 2, 3):
        if frames < max(case.example.frames):
            few = tuple(min(n, frames) for n in case.example.frames)
            yield put(
                case,
                example=put(case.example, frames=few),
                calls=tuple(_as(call, case.example, few) for call in case.calls),
            )
    for index, spec in enumerate(case.inputs):
        plain_inputs = [put(spec, layout=""), put(spec, values="torch.randn(shape)")]
        plain_inputs += [put(spec, grad=False), put(spec, dtype="")]
        for axis, size in enumerate(spec.sizes):
            if isinstance(size, int) and size > 1:
                for less in {1, 2, size - 1} - {size}:
                    sizes = (*spec.sizes[:axis], less, *spec.sizes[axis + 1 :])
                    plain_inputs.append(put(spec, sizes=sizes))
        for new in plain_inputs:
            if new != spec:
                inputs = (*case.inputs[:index], new, *case.inputs[index + 1 :])
                yield put(case, inputs=inputs)


def _as(call: Call, example: Call, few: tuple[int, ...]) -> Call:
    return dataclasses.replace(call, frames=few) if call.frames == example.frames else call


def _sources(case: Case, verdict: Verdict) -> Iterator[Case]:
    """The case with less source: the largest pieces first."""
    seen = {case.source}
    for text in _variants(case.source):
        if text not in seen:
            seen.add(text)
            yield dataclasses.replace(case, source=text)
    if len(case.inputs) > 1:
        for index, spec in enumerate(case.inputs):
            text = case.source.replace(f", {spec.name})", ")", 1)
            text = text.replace(f" {spec.name}, ", " ", 1)
            rest = case.inputs[:index] + case.inputs[index + 1 :]
            calls = tuple(
                dataclasses.replace(call, frames=call.frames[:index] + call.frames[index + 1 :])
                for call in case.calls
            )
            frames = case.example.frames[:index] + case.example.frames[index + 1 :]
            sizes = {f"T{i}" if i else "T0" for i in range(len(rest))}
            if {size for spec in rest for size in spec.sizes if str(size)[0] == "T"} <= sizes:
                yield dataclasses.replace(
                    case,
                    source=text,
                    inputs=rest,
                    calls=calls,
                    example=dataclasses.replace(case.example, frames=frames),
                )


def _variants(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    for index, node in enumerate(ast.walk(tree)):
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield from _bodies(tree, index, field, value)
    for index, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.expr) and not isinstance(node, ast.Name | ast.Attribute):
            for build in _simpler(node):
                yield _with(tree, index, build)


def _bodies(tree: ast.Module, index: int, field: str, value: list[Any]) -> Iterator[str]:
    n = len(value)
    cuts = [(0, n // 2), (n // 2, n)] if n > 3 else []
    cuts += [(i, i + 1) for i in reversed(range(n))]
    for start, stop in cuts:
        if stop - start < n or not isinstance(value[0], ast.FunctionDef):
            fill = [ast.Pass()] if stop - start == n else []
            yield _edited(
                tree, index, field, lambda body, a=start, b=stop, f=fill: body[:a] + f + body[b:]
            )
    for i, part in enumerate(value):
        inner = [getattr(part, name, None) for name in ("body", "orelse")]
        if isinstance(part, ast.If | ast.For | ast.With | ast.While | ast.Try):
            for lines in inner:
                if lines:
                    yield _edited(
                        tree, index, field, lambda body, i=i, x=lines: body[:i] + x + body[i + 1 :]
                    )


def _edited(tree: ast.Module, index: int, field: str, edit: Any) -> str:
    fresh = copy.deepcopy(tree)
    node = list(ast.walk(fresh))[index]
    setattr(node, field, edit(getattr(node, field)))
    return ast.unparse(ast.fix_missing_locations(fresh)) + "\n"


def _simpler(node: ast.expr) -> Iterator[ast.expr]:
    """Expressions that may stand for one."""
    if isinstance(node, ast.Call):
        if (isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name)) or (
            isinstance(node.func, ast.Attribute) and node.func.value.id not in _MODULES
        ):
            yield node.func.value
        yield from node.args
        for i in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
        for i in range(1, len(node.args)):
            yield ast.Call(node.func, node.args[:i] + node.args[i + 1 :], node.keywords)
    elif isinstance(node, ast.BinOp):
        yield node.left
        yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 1:
        for i in range(len(node.elts)):
            yield type(node)(node.elts[:i] + node.elts[i + 1 :], node.ctx)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value > 2:
        yield ast.Constant(node.value - 1)


_MODULES = {"torch", "nn", "F", "self", "np", "math", "random", "collections"}


def _with(tree: ast.Module, index: int, new: ast.expr) -> str:
    fresh = copy.deepcopy(tree)
    old = list(ast.walk(fresh))[index]

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return copy.deepcopy(new) if node is old else self.generic_visit(node)

    try:
        return ast.unparse(ast.fix_missing_locations(Put().visit(fresh))) + "\n"
    except Exception:
        return ast.unparse(tree) + "\n"


def fingerprint(case: Case, verdict: Verdict) -> str:
    """Equal for shrunk cases that most likely show one fault: verdict, calls and operators used."""
    names = set()
    for node in ast.walk(ast.parse(case.source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            names.add(name.rsplit(".", 1)[-1] if "self." not in name else "a layer")
        elif isinstance(node, ast.If | ast.IfExp | ast.AugAssign | ast.With | ast.Subscript):
            names.add(type(node).__name__)
    names -= {"__init__", "super", "append", "stack", "range", "size", "Subscript", "len"}
    return " ".join([*verdict.key, *sorted(names)])
