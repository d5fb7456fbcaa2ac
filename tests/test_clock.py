"""One clock: the device's work is part of a call's time."""

from __future__ import annotations

import time

import pytest
import torch

from fxtemporal.support.clock import Deadline, milliseconds, timed
from fxtemporal.tuning.side_by_side import interleaved


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU that works on for 20 ms after every call; when it was waited for."""
    found: list[float] = []

    def synchronize() -> None:
        found.append(time.perf_counter())
        time.sleep(0.02 * (len(found) % 2 == 0))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return found


def test_a_call_takes_what_its_device_takes(waits: list[float]) -> None:
    result, seconds = timed(lambda: 7)
    assert result == 7
    assert seconds >= 0.02
    assert milliseconds(lambda: None) >= 20
    assert len(waits) == 4


def test_calls_side_by_side_take_what_their_device_takes(waits: list[float]) -> None:
    found = interleaved({"one": lambda: None, "other": lambda: None}, rounds=3, warmup=0)
    assert all(duration.median >= 20 for duration in found.values())
    assert len(waits) == 12


def test_a_deadline() -> None:
    assert Deadline(0.0).over
    far = Deadline(60.0)
    assert not far.over
    assert 59 < far.left <= 60
