"""Reads exceptions: what was said, at which line of the user's code, and whose fault it is."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fxtemporal.ir.source import is_own_file, is_user_file, is_written_here, short_location
from fxtemporal.support.errors import FxTemporalError, InternalError

__all__ = [
    "defect",
    "first_line",
    "handled_before",
    "innermost_line",
    "owning_defects",
    "root_cause",
    "user_line",
]


def first_line(error: BaseException) -> str:
    """``KeyError: 'video'``: the class of ``error``, and the first line of its text."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and "Traceback of TorchScript" in lines[1]:
        return lines[-1]
    text = lines[0].removesuffix(", but expected one of:").rstrip(" .") if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def user_line(error: BaseException) -> str | None:
    """``file:line`` of the user's code, the innermost one that ``error`` came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)]
    return short_location(frames[-1].filename, frames[-1].lineno or 0) if frames else None


def root_cause(error: BaseException) -> BaseException:
    """The first of a chain of errors, each raised ``from`` the one before it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def handled_before(error: BaseException) -> BaseException | None:
    """An error that the code was handling when it raised ``error``, in a call of the same code."""
    before = None if error.__suppress_context__ else error.__context__
    if before is None or before.__traceback__ is None:
        return None
    frames = {frame for frame, _ in traceback.walk_tb(error.__traceback__)}
    return before if before.__traceback__.tb_frame in frames else None


def innermost_line(error: BaseException) -> str | None:
    """``file:line`` of fxtemporal's or the user's own code, the innermost one."""
    last = _innermost(error)
    return None if last is None else short_location(last.filename, last.lineno or 0)


def _innermost(error: BaseException) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(error.__traceback__)
    known = [f for f in frames if is_own_file(f.filename) or is_written_here(f.filename)]
    return known[-1] if known else None


def defect(error: Exception, doing: str) -> FxTemporalError:
    """An error for one that nothing expected: it tells a defect of fxtemporal from the user's."""
    last, line = _innermost(error), innermost_line(error)
    where = f" at {line}" if line else ""
    if last is not None and is_written_here(last.filename):
        return FxTemporalError(f"{doing} called code that failed{where}: {first_line(error)}")
    return InternalError(
        f"fxtemporal itself failed in {doing}{where}: {first_line(error)}. Please report it, with "
        "the traceback and the files that FXTEMPORAL_DUMP=folder writes"
    )


@contextmanager
def owning_defects(doing: str) -> Iterator[None]:
    """Raise :func:`defect` for every error that is not fxtemporal's own. Also a decorator."""
    try:
        yield
    except (FxTemporalError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a defect raises
        raise defect(error, doing) from error
