"""What the tests of time-distribute ask: the rewrite of a loop, and how results differ."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxtemporal
from benchmarks.measure import CountConvolutions, relative_error
from fxtemporal.support.errors import SpecializationError
from tests.awkward_loops.case import Case
from tests.strictly import strictly
from tests.zoo import Awkward

BOUND = 1e-12
LINE = re.compile(r"\S+\.py:\d+")


def optimized(model: Any, example: tuple[Any, ...], verify: bool = False) -> fx.GraphModule:
    return strictly(model, example, tune="static", verify=verify)


@cache
def rerolled(kind: type[Awkward] | Case) -> tuple[nn.Module, fx.GraphModule]:
    """A model and what the rewrite alone makes of it; for tests that change neither."""
    model = kind.build()
    example = kind.inputs(*kind.at) if isinstance(kind, Case) else model.example()
    return model, optimized(model, example)


def outcome(model: nn.Module, inputs: Any) -> tuple[Any, Any, Any]:
    """What a call gives, and what it leaves in its inputs and buffers; the model stays."""
    model = copy.deepcopy(model)
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(*inputs)
    return outputs, inputs, dict(model.named_buffers())


def differs(model: nn.Module, fast: nn.Module, inputs: Any, free: bool = False) -> str | None:
    """How the two differ on ``inputs``; ``free``: the result may also refuse this size."""
    try:
        expected = outcome(model, inputs)
    except Exception:  # the model does not take this size: nothing is promised
        return None
    try:
        actual = outcome(fast, inputs)
    except SpecializationError as error:
        return None if free else f"SpecializationError: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return distance(actual, expected)


def distance(actual: Any, expected: Any) -> str | None:
    """What keeps two results from being equal, within rounding of the largest number in them.

    (One tensor may hold nothing but rounding: the mean of what a layer norm gave.)
    """
    try:
        if relative_error(actual, expected) <= BOUND:
            return None
    except ValueError as problem:
        return str(problem)
    leaves = [pytree.tree_leaves(result) for result in (actual, expected)]
    pairs = [(a, b) for a, b in zip(*leaves, strict=True) if isinstance(b, Tensor) and b.numel()]
    if any(not torch.equal(a.isnan(), b.isnan()) for a, b in pairs):
        return "NaN on one side only"
    scale = max(float(b.nan_to_num(0, 0, 0).abs().max()) for _, b in pairs)
    apart = ((a.double() - b.double()).masked_fill(a == b, 0.0).nan_to_num(0.0) for a, b in pairs)
    worst = max(float(difference.abs().max()) for difference in apart)
    return None if worst <= BOUND * scale else f"{worst} apart, of {scale}"


def all_differences(
    model: nn.Module,
    fast: nn.Module,
    example: Callable[[int, int], Any],
    at: tuple[int, int],
    fixed: bool = False,
) -> dict[tuple[int, int], str]:
    """At the traced size and at other batches equal; at other lengths equal, or refused."""
    batch, length = at
    exact = [at, (1, length), (3, length), (length, length)]
    free = [(batch, length + 1), (3, length - 1), (length, 2 * length)]
    exact, free = ([at], exact + free) if fixed else (exact, free)
    found = {size: differs(model, fast, example(*size)) for size in exact}
    found |= {size: differs(model, fast, example(*size), free=True) for size in free}
    return {size: text for size, text in found.items() if text is not None}


def convolutions(model: nn.Module, inputs: Any) -> int:
    with CountConvolutions() as counter:
        outcome(model, inputs)
    return counter.count


def remarks(fast: nn.Module) -> list[fxtemporal.Remark]:
    return [r for r in fxtemporal.report(fast).remarks if r.rule == "time-distribute"]


def reasons(fast: nn.Module) -> dict[str, str]:
    """Every reason of every loop, those of the ops that stayed behind included."""
    found = [reason.to_dict() for remark in remarks(fast) for reason in remark.reasons]
    found += [entry for remark in remarks(fast) for entry in remark.detail.get("left_because", ())]
    return {entry["code"]: entry["text"] for entry in found}


def listing(gm: fx.GraphModule) -> list[Any]:
    """The ops of a graph in order, without the names that nodes go by."""
    return [(node.op, str(node.target), len(node.all_input_nodes)) for node in gm.graph.nodes]
