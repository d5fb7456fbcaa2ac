"""Let the number of frames go free again.

A Python loop over ``range(x.size(1))`` fixed T while it was traced. Once it is re-rolled, no op may
depend on T any more; then the check of it can go. That nothing else took T in (``sum(outs) / len
(outs)`` leaves a number behind) is told by tracing again with other numbers of frames: the graphs
must be the same, node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxtemporal.analysis.families import is_input
from fxtemporal.graph import Program
from fxtemporal.specializations import TRIP_COUNT, expect, length

__all__ = ["freed", "trip_counts"]

_FEW = (2, 3)
_MANY = 16
"""So many frames differ from few in what integer division and branches make of them."""


def trip_counts(program: Program) -> Iterator[tuple[int, int]]:
    """``(dim, T)`` of the inputs' sizes that only loops read."""
    for (_, dim), checks in _by_size(program).items():
        value = checks[0].args[1]
        only_loops = all(set(check.meta.get("reads", ("?",))) == {TRIP_COUNT} for check in checks)
        if only_loops and isinstance(value, int) and value > 1:
            yield dim, value


def freed(program: Program, dim: int, frames: int, again: Callable[[int], Program]) -> bool:
    """Make ``program`` right for every number of frames, if it can be; say whether it was.

    Args:
        program: rewritten, and changed in place where the answer is True.
        dim: the dimension of the inputs that counts frames.
        frames: how many there were.
        again: gives the program, rewritten in the same way, for another number of frames.
    """
    if not any(_counts(node, frames) for node in program.graph.nodes):
        return False
    loose = program.copy()
    if not _loosen(loose, dim, frames):
        return False
    expected = _form(loose.graph)
    more = {2 * frames + 1} if frames <= _MANY else set()
    for other in sorted({*_FEW, *more} - {frames}):
        try:
            tried = again(other)
        except Exception:  # the model itself may not take so many frames
            return False
        if not _loosen(tried, dim, other) or _form(tried.graph) != expected:
            return False
    return _loosen(program, dim, frames)


def _by_size(program: Program) -> dict[tuple[fx.Node, int], list[fx.Node]]:
    """The checks of each size of an input: of the size itself, or of the frames it is cut into."""
    found: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for check in program.graph.nodes:
        held = program.held_size(check) if check.target is expect else None
        if held is not None and is_input(held[0]):
            found.setdefault(held, []).append(check)
    return found


def _counts(node: fx.Node, frames: int) -> bool:
    """Whether ``node`` was written with the number of frames."""
    argument = node.meta.get("counts_frames")
    return argument is not None and frames in _numbers(node.args[argument])


def _numbers(argument: Any) -> tuple[Any, ...]:
    return tuple(argument) if isinstance(argument, list | tuple) else (argument,)


def _loosen(program: Program, dim: int, frames: int) -> bool:
    """Read the number of frames anew at every call, and check it no more."""
    mine = {
        base: checks
        for (base, along), checks in _by_size(program).items()
        if along == dim and checks[0].args[1] == frames
    }
    if not mine:
        return False
    for check in (check for checks in mine.values() for check in checks):
        program.graph.erase_node(check)
    base = next(iter(mine))
    with program.graph.inserting_after(base):
        size = program.graph.call_method("size", (base, dim))
    for node in program.graph.nodes:
        if _counts(node, frames):
            index = node.meta["counts_frames"]
            sizes = tuple(size if n == frames else n for n in _numbers(node.args[index]))
            node.update_arg(index, sizes if isinstance(node.args[index], tuple | list) else size)
            node.meta.pop("val", None)
    for node in reversed(list(program.graph.nodes)):
        if not node.users and _only_counts(program, node):
            program.graph.erase_node(node)
    program.refresh()
    return True


def _only_counts(program: Program, node: fx.Node) -> bool:
    op = program.op(node) if node.op.startswith("call") else None
    return node.target is length or (op is not None and op.name in ("size", "shape", "unbind"))


def _form(graph: fx.Graph) -> list[Any]:
    """The graph but for names, and for where the code of a check stands."""
    number = {node: position for position, node in enumerate(graph.nodes)}

    def plain(argument: Any) -> Any:
        return ("node", number[argument]) if isinstance(argument, fx.Node) else argument

    form = []
    for node in graph.nodes:
        args = node.args[:2] if node.target is expect else node.args
        form.append(
            (
                node.op,
                node.target,
                repr(torch.utils._pytree.tree_map(plain, (args, node.kwargs))),
            )
        )
    return form
