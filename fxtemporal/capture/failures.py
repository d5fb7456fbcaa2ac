"""Why a capture failed: the model fails on its inputs, or the tracer cannot follow it."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import nn

from fxtemporal.capture.tracing.errors import OpError
from fxtemporal.ir.source import is_user_file, short_location
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.errors import ForwardError
from fxtemporal.support.quiet import quiet

__all__ = ["raise_if_model_fails", "reason_of"]


def raise_if_model_fails(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], error: Exception
) -> None:
    """Run ``model`` itself on the example inputs, and raise :class:`ForwardError` if it fails.

    If it runs, the tracer is the one that cannot follow the forward.
    """
    args, kwargs = own_inputs(example)
    try:
        with stand_in(model) as other, torch.no_grad(), quiet():
            other.module(*args, **kwargs)
    except Exception as own:  # whatever the model raises, the message passes it on
        raise _forward_error(own, error) from own


def _forward_error(own: Exception, traced: Exception) -> ForwardError:
    """An error that says why and where the model fails on the example inputs."""
    message = str(own).strip().splitlines()[0] if str(own).strip() else type(own).__name__
    frames = [
        frame for frame in traceback.extract_tb(own.__traceback__) if is_user_file(frame.filename)
    ]
    where = short_location(frames[-1].filename, frames[-1].lineno or 0) if frames else None
    module, shapes = "", ""
    if isinstance(traced, OpError):
        where = traced.location or where
        module, shapes = traced.module_path, traced.operand_shapes
    said = f" in module '{module}'" if module else ""
    said += f" at {where}" if where else ""
    said += f" on {shapes}" if shapes else ""
    text = f"the model fails on the example inputs{said}: {message}"
    return ForwardError(text, message, where, module, shapes)


def reason_of(error: Exception) -> str:
    """One line: what stopped the tracer, and at which line of the user's code."""
    cause = error.__cause__ if isinstance(error, OpError) and error.__cause__ else error
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)]
    where = f" ({short_location(frames[-1].filename, frames[-1].lineno or 0)})" if frames else ""
    if isinstance(error, OpError) and error.location:
        where = f" ({error.location})"
    return f"{type(cause).__name__}: {text}{where}"
