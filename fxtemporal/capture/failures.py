"""Why a capture failed: the model fails on its inputs, or no attempt can follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from fxtemporal.capture.tracing.errors import OpError, StatefulError
from fxtemporal.ir.raised import first_line, handled_before, root_cause, user_line
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.errors import CaptureError, ForwardError, FxTemporalError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.module_calls import innermost_call

__all__ = ["raise_if_model_fails", "reason_of", "refusal"]


def raise_if_model_fails(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    traced: Exception | None = None,
) -> None:
    """Run ``model`` itself on the example inputs, and raise :class:`ForwardError` if it fails.

    If it runs, the tracer is the one that cannot follow the forward; ``traced`` is its error.
    """
    args, kwargs = own_inputs(example)
    with stand_in(model) as other, torch.no_grad(), quiet():
        try:
            other.module(*args, **kwargs)
        except FxTemporalError:
            raise
        except Exception as own:  # whatever the model raises, the message passes it on
            failed = _forward_error(own, other.module, traced)
            if failed.call is None or not type(failed.call[0]).__module__.startswith("torch.nn."):
                failed.call = _failing_op(model, example)
            raise failed from own


def _forward_error(own: Exception, model: nn.Module, traced: Exception | None) -> ForwardError:
    """An error that says why and where the model fails on the example inputs.

    A wrapper raises its own text ``from`` the error that it caught: that one is the cause.
    """
    root = root_cause(own)
    text, where = first_line(root), user_line(root) or user_line(own)
    call = innermost_call(root.__traceback__) or innermost_call(own.__traceback__)
    module, leaves = (model, ()) if call is None else (call[0], pytree.tree_leaves(call[1:]))
    path = {id(part): name for name, part in model.named_modules()}.get(id(module), "")
    shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
    if isinstance(traced, OpError) and traced.location == where:
        shapes = traced.operand_shapes or shapes
    said = f" in module '{path}'" if path else ""
    said += f" at {where}" if where else ""
    said += f" on {shapes}" if shapes else ""
    message = f"the model fails on the example inputs{said}: {text}"
    if root is not own:
        message += f" ({user_line(own)} passes it on as {first_line(own)})"
    elif (before := handled_before(own)) is not None:
        message += f" (while it handled {first_line(before)})"
    found = ForwardError(message, text, where, path, shapes)
    found.call = call
    return found


class _FailingOp(TorchFunctionMode):
    """Keeps the first call of an op that raised."""

    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.call = self.call or (func, args, kwargs or {})
            raise


def _failing_op(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The op that raises in a forward of the user's; None if it is no op of torch."""
    args, kwargs = own_inputs(example)
    ops = _FailingOp()
    with contextlib.suppress(Exception), stand_in(model) as other, torch.no_grad(), quiet(), ops:
        other.module(*args, **kwargs)
    return ops.call


def reason_of(error: Exception) -> str:
    """``model.py:12: ValueError: ...``: what stopped an attempt, and where in the user's code."""
    own = isinstance(error, TraceError | StatefulError | FxTemporalError)
    root = error if own else root_cause(error)
    where = user_line(root) or user_line(error)
    if isinstance(error, OpError) and error.location:
        where = error.location
    text = str(error) if own else first_line(root)
    return f"{where}: {text}" if where else text


def refusal(model: nn.Module, example: Any, tried: Iterable[tuple[str, str]]) -> CaptureError:
    """An error with the reasons of all attempts, ``(attempt, reason)``: the shortest first."""
    attempts: dict[str, list[str]] = {}
    for attempt, reason in tried:
        attempts.setdefault(reason, []).append(attempt)
    reasons = [
        f"{reason} ({', '.join(dict.fromkeys(attempts[reason]))})"
        for reason in sorted(attempts, key=len)
    ]
    sparse = any(
        isinstance(leaf, Tensor) and leaf.layout is not torch.strided
        for leaf in pytree.tree_leaves(example)
    )
    cure = (
        "Give dense example inputs, x.to_dense()"
        if sparse
        else "Move what these lines do out of the forward, or optimize a submodule that does not "
        "do it"
    )
    return CaptureError(
        f"{type(model).__name__} could not be captured: {'; '.join(reasons)}. {cure}."
    )
