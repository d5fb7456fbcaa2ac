"""Exports a module, with free sizes, as the program from which every backend starts.

A size is left free only if a test shows that this is right: the program runs at another size and
gives the module's numbers there. All other sizes are fixed, and a call at another one is refused.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from fxtemporal.capture.failures import reason_of
from fxtemporal.ir.admitted import AdmittedFrames
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.shared_state import seed
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.errors import LoweringError
from fxtemporal.support.torch_private import pytree
from fxtemporal.verification.comparison import Tolerance

__all__ = ["Example", "Exported", "Free", "close", "export", "leaves_of", "same"]

Example: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Free: TypeAlias = Literal["none", "batch", "frames", "all"]
"""The sizes that may be free: none; the batch; all but H and W (the last two of four or more
dimensions); all."""

_FEWER: tuple[Free, ...] = ("all", "frames", "batch", "none")
"""In order of trying: each frees fewer sizes than the one before it."""

Place: TypeAlias = tuple[int, int]
"""A dimension of an input: (number of the leaf among the arguments, dimension)."""

_SIZE = r"L\['\w+'\](?:\[[^\]]+\])*\.size\(\)\[\d+\]"
_PLAIN_CONDITION = re.compile(
    rf"{_SIZE} (?:<|>|<=|>=|==) \d+|\d+ (?:<|>|<=|>=|==) {_SIZE}|{_SIZE} == {_SIZE}"
)

LSTM_WEIGHTS = (
    r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ (was|were) assigned during"
)


@dataclass(frozen=True)
class Exported:
    """An exported program, with its free sizes and the inputs it was tested on.

    ``shapes`` has the sizes of each input tensor, by its number among the leaves of the arguments:
    a number for a fixed size, a name for a free one; sizes with one name must be equal. ``ranges``
    has the least and the largest value of each name, or None. ``names`` maps the program's symbols
    to the names. On each of ``samples``, which include ``asked``, the program gives the numbers of
    ``module``.
    """

    program: ExportedProgram
    module: nn.Module
    shapes: Mapping[int, tuple[int | str, ...]]
    ranges: Mapping[str, tuple[int, int | None]]
    names: Mapping[str, str]
    asked: Example
    samples: tuple[Example, ...]


def export(
    module: nn.Module, example: Example, free: Free = "all", *, guarded: bool = False
) -> Exported:
    """``module`` as a program that is right on ``example``, and at every size that it leaves free.

    ``guarded``: the program will be run by code that checks the conditions on its sizes, as
    torch.export's own module does. Otherwise only ranges are checked, so sizes that a branch of the
    forward compares with each other are fixed.

    Raises:
        LoweringError: torch.export refuses the module, or its program gives other numbers.
    """
    _check_outputs(module, example)
    if free in ("frames", "all"):
        for part in module.modules():
            if isinstance(part, AdmittedFrames):
                part.admit_around()
    # torch.export makes a size of 1 a constant: a batch of one is tried as a batch of two.
    wide: Example = pytree.tree_map_only(Tensor, _two_samples, example)
    failure: Exception | None = None
    fewer = _FEWER[_FEWER.index(free) :]
    for given, freed in [(e, f) for f in fewer[:-1] for e in (wide, example)] + [(example, "none")]:
        try:
            found = _freed(module, given, example, freed)
        except Exception as error:  # torch.export raises its own tree, and whatever the graph does
            failure = error
            continue
        if guarded or freed == "none" or not _has_other_conditions(found.program):
            return found
    if isinstance(failure, LoweringError):
        raise failure
    assert failure is not None
    what = type(module).__name__
    if isinstance(module, OptimizedModule):
        what = f"the optimized {what}"
    raise LoweringError(
        f"torch.export refuses {what}: {reason_of(failure)}. Use it in Python, or lower a "
        "submodule without what torch.export cannot take"
    ) from failure


def _check_outputs(module: nn.Module, example: Example) -> None:
    """Refuse outputs of a class that torch.export would hold as one object."""
    for _, leaf in leaves_of(module, example):
        kind = type(leaf)
        if not isinstance(leaf, Tensor) and kind.__module__ not in ("builtins", "torch"):
            raise LoweringError(
                f"{type(module).__name__} returns a {kind.__name__}, which a file cannot hold: "
                "return its tensors, or register it with torch.export.register_dataclass"
            )


def _freed(module: nn.Module, given: Example, asked: Example, free: str) -> Exported:
    fixed: set[Place] = set()
    while True:
        program = _exported(module, given, free, fixed)
        whole = program.module()
        shapes = _shapes(program)
        samples, wrong = [given], set[Place]()
        for name, places in _places(shapes).items():
            other = _resized(given, places, 1)
            if name.isidentifier() and _agree(module, whole, other):
                samples.append(other)
            else:
                wrong |= places
        if wrong:
            fixed |= wrong
            continue
        _check(module, whole, given)
        if _sizes(asked) != _sizes(given):
            _check(module, whole, asked)
            samples.append(asked)
        ranges = _ranges(program, shapes)
        for name, places in _places(shapes).items():
            one = _resized(given, places, None)
            if any(dim == 0 for _, dim in places) and _agree(module, whole, one):
                ranges[name] = 1, ranges[name][1]
                samples.append(one)
        names = _names(shapes)
        named = {
            number: tuple(size if isinstance(size, int) else names[size] for size in sizes)
            for number, sizes in shapes.items()
        }
        ranges = {names[symbol]: sizes for symbol, sizes in ranges.items()}
        return Exported(program, module, named, ranges, names, asked, tuple(samples))


def _exported(module: nn.Module, given: Example, free: str, fixed: set[Place]) -> ExportedProgram:
    args, kwargs = own_inputs(given)
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    numbers: Iterator[int] = iter(range(len(pytree.tree_leaves(given))))

    def dimensions(value: Any) -> Any:
        number = next(numbers)
        if not isinstance(value, Tensor):
            return None
        last = {"none": 0, "batch": 1, "frames": value.dim() - 2 * (value.dim() > 3)}
        return {
            dim: Dim.AUTO
            for dim, size in enumerate(value.shape[: last.get(free, value.dim())])
            if size != 1 and (number, dim) not in fixed
        }

    shapes: dict[str, Any] = pytree.tree_map(dimensions, dict(bound))
    with stand_in(module, share_parameters=True) as own, warnings.catch_warnings():
        warnings.filterwarnings("ignore", LSTM_WEIGHTS, UserWarning)
        return torch.export.export(own.module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _shapes(program: ExportedProgram) -> dict[int, tuple[int | str, ...]]:
    """The sizes of each input tensor; a size computed from others is given as its formula."""
    values = {node.name: value_of(node) for node in program.graph.nodes}
    inputs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    found: dict[int, tuple[int | str, ...]] = {}
    for number, entry in enumerate(inputs):
        if isinstance(entry.arg, TensorArgument):
            sizes = values[entry.arg.name].shape
            found[number] = tuple(size if isinstance(size, int) else str(size) for size in sizes)
    return found


def _places(shapes: Mapping[int, tuple[int | str, ...]]) -> dict[str, set[Place]]:
    """``{free size: the input dimensions that have it}``."""
    places: dict[str, set[Place]] = {}
    for number, sizes in shapes.items():
        for dim, size in enumerate(sizes):
            if isinstance(size, str):
                places.setdefault(size, set()).add((number, dim))
    return places


def _ranges(
    program: ExportedProgram, shapes: Mapping[int, tuple[int | str, ...]]
) -> dict[str, tuple[int, int | None]]:
    """The range of each free size for which the traced branches are right; None: no upper end."""
    known = {str(symbol): values for symbol, values in program.range_constraints.items()}
    ranges: dict[str, tuple[int, int | None]] = {}
    for name in _places(shapes):
        upper = known[name].upper
        ranges[name] = max(2, int(known[name].lower)), int(upper) if upper.is_Integer else None
    return ranges


def _has_other_conditions(program: ExportedProgram) -> bool:
    """Whether a branch depends on more than the range of a size or the equality of two sizes."""
    return not all(map(_PLAIN_CONDITION.fullmatch, program._guards_code))


def _names(shapes: Mapping[int, tuple[int | str, ...]]) -> dict[str, str]:
    """``{symbol of the program: name}``, with the names ``batch``, ``size_1``, ..."""
    names: dict[str, str] = {}
    for symbol, places in _places(shapes).items():
        batch = "batch" not in names.values() and any(dim == 0 for _, dim in places)
        names[symbol] = "batch" if batch else f"size_{len(names)}"
    return names


def _resized(example: Example, places: set[Place], more: int | None) -> Example:
    """``example`` with ``more`` additional entries along ``places``; None: with only one entry."""
    leaves, spec = pytree.tree_flatten(example)
    for number, dim in places:
        size = leaves[number].shape[dim]
        index = torch.arange(1 if more is None else size + more, device=leaves[number].device)
        leaves[number] = leaves[number].index_select(dim, index % size)
    resized: Example = pytree.tree_unflatten(leaves, spec)
    return resized


def _sizes(example: Example) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]


def _two_samples(tensor: Tensor) -> Tensor:
    """A copy of ``tensor``, with a batch of two if it was one. A file would store a view's base."""
    if tensor.dim() == 0 or tensor.shape[0] != 1:
        return tensor.clone()
    return tensor.repeat(2, *[1] * (tensor.dim() - 1))


def _agree(module: nn.Module, other: nn.Module, sample: Example) -> bool:
    try:
        _check(module, other, sample)
    except Exception:  # one of them may refuse a size by any exception
        return False
    return True


def _check(module: nn.Module, other: nn.Module, sample: Example) -> None:
    expected, actual = leaves_of(module, sample), leaves_of(other, sample)
    if not same(expected, actual):
        raise LoweringError(
            "torch.export's program gives other numbers than the optimized module. Please report "
            "this, with the model"
        )


def leaves_of(module: Any, sample: Example) -> list[tuple[str, Any]]:
    """``(path, value)`` of each output. Paths compare equal: torch.export changes the dict type."""
    args, kwargs = own_inputs(sample)
    protected = stand_in(module) if isinstance(module, nn.Module) else nullcontext()
    with protected as own, torch.no_grad(), torch.random.fork_rng():
        seed(0)
        call = module if own is None else own.module
        leaves, _ = pytree.tree_flatten_with_path(call(*args, **kwargs))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves]


def same(expected: list[tuple[str, Any]], actual: list[tuple[str, Any]]) -> bool:
    """Whether two lists of outputs are equal within rounding."""
    if [place for place, _ in expected] != [place for place, _ in actual]:
        return False
    pairs = zip(expected, actual, strict=True)
    return all(close(mine, theirs) for (_, mine), (_, theirs) in pairs)


def close(expected: Any, actual: Any, precision: torch.dtype | None = None) -> bool:
    """Whether two outputs are equal within the rounding of ``precision``, or of their own dtype."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return bool(expected == actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if not expected.dtype.is_floating_point or expected.numel() == 0:
        return torch.equal(expected, actual)
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    bound = Tolerance().bound(precision or expected.dtype, None) * scale
    return torch.allclose(
        actual.double().cpu(), expected.double().cpu(), rtol=0, atol=bound, equal_nan=True
    )
