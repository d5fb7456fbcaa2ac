"""Silence is one thread's, and leaves nothing behind in whatever order threads end theirs."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable

import pytest
import torch

import fxtemporal
from fxtemporal.support.quiet import quiet
from tests.zoo import noise


def in_thread(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def speak() -> None:
    logging.getLogger("torch.spoken").error("logged")
    warnings.warn("warned", UserWarning, stacklevel=1)
    print("written", file=sys.stderr)


@pytest.mark.parametrize("here", [True, False])
def test_only_the_thread_that_is_quiet_is_not_heard(
    here: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    heard = 0 if here else 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet():
            if here:
                speak()
            else:
                in_thread(speak).join()
        assert (len(seen), len(caplog.messages)) == (heard, heard)
        speak()
    assert [str(w.message) for w in seen] == ["warned"] * (heard + 1)
    assert caplog.messages == ["logged"] * (heard + 1)
    assert capsys.readouterr().err.count("written") == heard + 1


def test_threads_that_end_in_another_order_leave_nothing() -> None:
    before = list(warnings.filters), sys.stderr, logging.root.manager.disable
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            done.wait(10)

    with quiet():
        thread = in_thread(other)
        assert inside.wait(10)
    done.set()
    thread.join()
    assert (list(warnings.filters), sys.stderr, logging.root.manager.disable) == before
    assert not any(handler.filters for handler in logging.root.handlers)


def test_some_that_optimize_leave_the_process_as_it_was() -> None:
    before = sys.stderr, torch.backends.mha.get_fastpath_enabled()
    failures: list[Exception] = []

    def run() -> None:
        try:
            layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
            for _ in range(3):
                fxtemporal.optimize(layer, (noise(2, 3, 8),), tune="static", progress=False)
        except Exception as error:
            failures.append(error)

    for thread in [in_thread(run) for _ in range(3)]:
        thread.join()
    assert not failures
    assert (sys.stderr, torch.backends.mha.get_fastpath_enabled()) == before
