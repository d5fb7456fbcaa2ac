"""Compares the gradients of a result with those of the model.

A graph holds the ops of a forward, not what user code does to gradients in the backward: a custom
``torch.autograd.Function``, a hook on a tensor, a reentrant checkpoint. So the model and the result
run on the example inputs, a backward starts from the same random numbers, and the gradients of
every input and parameter are compared. The same is done with NaN and Inf in frames: a frame that
the model never reads must not spoil gradients. A result with other gradients refuses to train: see
:meth:`fxtemporal.ir.module.OptimizedModule.refuse_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxtemporal.ir.outputs import leaves_of
from fxtemporal.ir.shared_state import seed
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree

__all__ = ["other_gradients", "outputs_of_parameters"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
_ROUNDING = 2**12
"""Allowed error of a sum over many pixels, in units in the last place of the largest gradient."""
_UNTAKEN = "it cannot be differentiated"
_LARGE = 32
"""The least height or width, in pixels, that is halved for a cheaper example."""
Gradients = Mapping[str, Tensor | None]


def other_gradients(
    original: nn.Module, result: nn.Module, example: Example, *, thorough: bool
) -> str | None:
    """A text that names a gradient of ``result`` that differs from ``original``; None if none does.

    ``thorough``: compare in float64 if the model runs in it, and with bad frames too.
    """
    found: str | None = None
    tried, expected = example, None
    for double in (True, False) if thorough else (False,):
        for tried in (*_smaller(example), example):
            expected = _gradients(original, tried, double, again=tried is example)
            found = _compared(expected, result, tried, double)
            if expected is not None and found != _UNTAKEN:
                break
        if expected is not None and found is None:
            break  # a model may do something else in float64: only equal gradients end the search
    if found is not None:
        return found
    for bad in _bad_examples(tried, expected or {}) if thorough else ():
        if (expected := _gradients(original, bad, False)) is None:
            continue
        actual = _gradients(result, bad, False) or {}
        for name, mine in expected.items():
            theirs = actual.get(name)
            finite = mine is not None and bool(mine.isfinite().all())
            if finite and theirs is not None and not bool(theirs.isfinite().all()):
                return (
                    "where a frame that the model does not read holds NaN or Inf, that of "
                    f"{name} is NaN"
                )
    return None


def _smaller(example: Example) -> Iterator[Example]:
    """``example`` with half the height and width, where they are large: a quarter of the work."""
    leaves = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    sizes = {size for leaf in leaves for size in leaf.shape[3:] if size >= _LARGE}
    if sizes:
        yield pytree.tree_map_only(Tensor, _halved, example)


def _halved(tensor: Tensor) -> Tensor:
    for dim in range(3, tensor.dim()):
        if tensor.shape[dim] >= _LARGE:
            tensor = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
    return tensor


def outputs_of_parameters(model: nn.Module, example: Example) -> tuple[int, ...]:
    """The numbers of the outputs of ``model`` that depend on its parameters."""
    args, kwargs = own_inputs(pytree.tree_map_only(Tensor, Tensor.detach, example))
    try:
        with stand_in(model) as other, torch.enable_grad(), quiet():
            leaves = leaves_of(other.module(*args, **kwargs))
    except Exception:  # a model may fail in any way
        return ()
    return tuple(n for n, leaf in enumerate(leaves) if getattr(leaf, "requires_grad", False))


def _compared(
    expected: Gradients | None, result: nn.Module, example: Example, double: bool
) -> str | None:
    if expected is None:
        return None
    actual = _gradients(result, example, double)
    if actual is None:
        return _UNTAKEN
    largest = max((_largest(g) for g in expected.values() if g is not None), default=0.0)
    for name, mine in expected.items():
        if (problem := _difference(mine, actual.get(name), largest)) is not None:
            return f"the gradient of {name} {problem}"
    return None


def _gradients(
    model: nn.Module, example: Example, double: bool, *, again: bool = True
) -> Gradients | None:
    """The gradients of inputs and parameters; None if there are none.

    ``again``: if that fails, the gradients of the parameters alone.
    """
    for inputs_too in (True, False) if again else (True,):  # a forward may write into its input
        try:
            with stand_in(model) as other, torch.enable_grad(), quiet():
                return _backward(other.module, example, double, inputs_too)
        except Exception:  # a model may fail in any way
            continue
    return None


def _backward(
    module: nn.Module, example: Example, double: bool, inputs_too: bool
) -> Gradients | None:
    if double:
        module.double()
    convert: Callable[[Tensor], Tensor] = lambda t: (  # noqa: E731
        t.detach().to(torch.float64 if double and t.is_floating_point() else t.dtype, copy=True)
    )
    args, kwargs = pytree.tree_map_only(Tensor, convert, example)
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if inputs_too:
        for tensor in given:
            if tensor.is_floating_point():
                tensor.requires_grad_()
    seed(0)
    outputs = _floats(module(*args, **kwargs))
    seed(1)
    # randn_like draws in memory order, which may differ in the result.
    ends = [(t, torch.randn(t.shape, dtype=torch.float32).to(t)) for t in outputs]
    ends = [(t, cotangent) for t, cotangent in ends if t.requires_grad]
    if not ends:
        return None
    torch.autograd.backward([t for t, _ in ends], [cotangent for _, cotangent in ends])
    return {
        **{f"input {number}": tensor.grad for number, tensor in enumerate(given)},
        **{name: parameter.grad for name, parameter in module.named_parameters()},
    }


def _floats(outputs: Any) -> list[Tensor]:
    """The tensors of ``outputs`` that gradients can flow back from."""
    return [v for v in leaves_of(outputs) if isinstance(v, Tensor) and v.is_floating_point()]


def _largest(gradient: Tensor) -> float:
    if not gradient.numel():
        return 0.0
    largest = float(gradient.abs().max())
    return largest if math.isfinite(largest) else float(gradient.abs().nan_to_num(posinf=0.0).max())


def _furthest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; NaN if the shapes differ or are empty."""
    same = one.shape == other.shape and one.numel()
    return float((one - other).abs_().max()) if same else math.nan


def _difference(mine: Tensor | None, theirs: Tensor | None, largest: float) -> str | None:
    """The difference between two gradients, in words; None if they are close.

    ``largest`` of all gradients: a gradient that is exactly zero may have rounding of that size.
    """
    if mine is None or theirs is None:  # for an optimizer zeros differ from None
        if mine is theirs:
            return None
        return "is missing" if theirs is None else "is there, where the model gives none"
    eps = torch.finfo(mine.dtype).eps
    bound = eps**0.5 * _largest(mine) + min(_ROUNDING * eps, 2 * eps**0.5) * (largest or 1.0)
    close = _furthest(theirs, mine) <= bound or torch.allclose(
        theirs, mine, rtol=0.0, atol=bound, equal_nan=True
    )
    return None if close else "is another one"


def _bad_examples(example: Example, gradients: Gradients) -> Iterator[Example]:
    """``example`` with NaN, and with Inf, in entries that the model's gradients do not reach.

    Without gradients of inputs: with NaN in the first frame, and in the last.
    """
    leaves, structure = pytree.tree_flatten(example)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    known = {
        place: gradient
        for number, place in enumerate(places)
        if (gradient := gradients.get(f"input {number}")) is not None
    }
    if not known:
        for frame in (0, -1):
            yield pytree.tree_map_only(Tensor, partial(_with_bad_frame, frame=frame), example)
        return
    unread = {place: _unread(gradient) for place, gradient in known.items()}
    if not any(bool(mask.any()) for mask in unread.values()):
        return
    for value in (math.nan, math.inf):
        bad = [
            leaf.masked_fill(unread[place], value) if place in unread else leaf
            for place, leaf in enumerate(leaves)
        ]
        yield pytree.tree_unflatten(bad, structure)


def _unread(gradient: Tensor) -> Tensor:
    """A mask of whole entries of one of the first three dimensions whose gradient is zero."""
    found = torch.zeros_like(gradient, dtype=torch.bool)
    for dim in range(min(3, gradient.dim())) if gradient.numel() else ():
        rest = [other for other in range(gradient.dim()) if other != dim]
        found |= (gradient == 0).all(rest, keepdim=True) if rest else gradient == 0
    return found


def _with_bad_frame(tensor: Tensor, frame: int) -> Tensor:
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.shape[1] < 2:
        return tensor
    bad = tensor.clone()
    bad[:, frame] = math.nan
    return bad
