"""One thread a test process, as the suite runs as many processes as there are cores; and fixtures
that several files share."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.cli_cases import Run

# Helpers whose asserts say what they compared, as those of a test file do.
pytest.register_assert_rewrite("tests.capture_cases", "tests.cli_cases")

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


@pytest.fixture
def imports_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command imports the user's file of models: the next test imports its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("models_of_a_user", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The user's file of models, for the command line."""
    from tests.cli_cases import MODEL

    (tmp_path / "beside.py").write_text("CHANNELS = 3\n")
    (tmp_path / "models_of_a_user.py").write_text(MODEL)
    return str(tmp_path / "models_of_a_user.py")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""
    from fxtemporal.cli import main as cli
    from tests.cli_cases import Ran

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    return run
