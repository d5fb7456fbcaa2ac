"""Silences logs, warnings and stderr while something is tried that may fail.

It affects this thread only: other threads' logs, warnings and output are still shown. No previous
state is saved and restored, so that two threads can be quiet at once, and end in any order.
"""

from __future__ import annotations

import collections
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet"]

_quiet_threads: collections.Counter[int] = collections.Counter()
_changes = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's logs and warnings before an error: the error itself has the information."""
    here = threading.get_ident()
    with _changes:
        _quiet_threads[here] += 1
        _listen(handlers=_quiet_threads[here] == 1)
    try:
        yield
    finally:
        with _changes:
            _quiet_threads[here] -= 1
            if not _quiet_threads[here]:
                del _quiet_threads[here]
            if not _quiet_threads:
                _leave()


def _is_quiet() -> bool:
    return threading.get_ident() in _quiet_threads


class _AnyText:
    """Pattern of a warning filter that matches every text in a quiet thread, and none elsewhere."""

    def match(self, text: str) -> bool:
        return _is_quiet()


class _Stderr:
    """``stream`` without the output of quiet threads."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if _is_quiet() else int(self.stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _unheard(record: logging.LogRecord) -> bool:
    return record.thread not in _quiet_threads


_FILTER: Any = ("ignore", _AnyText(), Warning, None, 0)


def _listen(handlers: bool) -> None:
    if _FILTER not in warnings.filters[:1]:
        warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
        warnings._filters_mutated()  # type: ignore[attr-defined]
    if not isinstance(sys.stderr, _Stderr):
        sys.stderr = _Stderr(sys.stderr)
    for handler in _handlers() if handlers else ():
        if _unheard not in handler.filters:
            handler.addFilter(_unheard)


def _leave() -> None:
    """Remove filters and stream; one that another thread has wrapped stays, but has no effect."""
    if _FILTER in warnings.filters:
        warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]
        warnings._filters_mutated()  # type: ignore[attr-defined]
    if isinstance(sys.stderr, _Stderr):
        sys.stderr = sys.stderr.stream
    for handler in _handlers():
        handler.removeFilter(_unheard)


def _handlers() -> Iterator[logging.Handler]:
    """The log handlers that torch's logs may reach."""
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            yield from list(logger.handlers)
    if logging.lastResort is not None:
        yield logging.lastResort
