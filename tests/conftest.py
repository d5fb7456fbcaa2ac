"""One thread a test process: the suite runs as many processes as there are cores."""

import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Helpers whose asserts say what they compared, as those of a test file do.
pytest.register_assert_rewrite("tests.capture_cases")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_FOLDER = Path(tempfile.mkdtemp(prefix="fxtemporal-tests-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one measured."""
    monkeypatch.setenv("FXTEMPORAL_CACHE", str(_FOLDER / str(next(_NUMBERS))))


@pytest.fixture
def in_float64() -> Iterator[None]:
    """A test works in float64, where a right rewrite is right to 1e-12 and a wrong one is not."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
