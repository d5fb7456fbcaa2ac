"""Torch-TensorRT, which needs a GPU: our calls, against functions of the package's signatures."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_lowering import Frames, clip

import fxtemporal
from fxtemporal import LoweringError

DRY_RUN = """
The graph consists of 12 Total Operators, of which 11 operators are supported, 91.67% coverage

      TRT Engine #1 - Submodule name: _run_on_acc_0
      TRT Engine #2 - Submodule name: _run_on_acc_1
"""


def compile_(
    exported_program: Any,
    inputs: Any = None,
    *,
    arg_inputs: Any = None,
    kwarg_inputs: Any = None,
    workspace_size: int = 0,
    min_block_size: int = 5,
    require_full_compilation: bool = False,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    dryrun: bool | str = False,
) -> Any:
    """As of torch_tensorrt 2.14, without what we leave at its default."""
    if isinstance(dryrun, str):
        Path(dryrun).write_text(DRY_RUN)
    return exported_program


def save(
    module: Any, file_path: str = "", *, arg_inputs: Any = None, kwarg_inputs: Any = None
) -> None:
    assert isinstance(arg_inputs, list)
    torch.export.save(module, file_path)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in for the package, on a machine that says it has a GPU."""
    fake = ModuleType("torch_tensorrt")
    fake.__version__ = "2.14.0"  # type: ignore[attr-defined]
    fake.dynamo = ModuleType("torch_tensorrt.dynamo")  # type: ignore[attr-defined]
    fake.dynamo.compile = compile_
    fake.save = save  # type: ignore[attr-defined]
    fake.load = torch.export.load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.delitem(sys.modules, "fxtemporal.lowering.torch_tensorrt", raising=False)
    module = importlib.import_module("fxtemporal.lowering.torch_tensorrt")
    monkeypatch.setattr(module, "absent", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    yield fake
    sys.modules.pop("fxtemporal.lowering.torch_tensorrt", None)


def test_what_is_compiled_runs_and_its_coverage_is_told(package: ModuleType) -> None:
    model = Frames().eval()
    artifact = fxtemporal.lower(model, (clip(2),), "torch_tensorrt", workspace="1GiB")
    assert artifact.detail["library"] == "torch_tensorrt 2.14.0"
    assert artifact.detail["operators"] == 12
    assert artifact.detail["operators_in_tensorrt"] == 11
    assert artifact.detail["engines"] == 2
    torch.testing.assert_close(artifact(clip(2)), model(clip(2)).detach())


def test_without_a_gpu_nothing_is_compiled(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fxtemporal.lowering.torch_tensorrt")
    monkeypatch.setattr(module, "absent", lambda: "no GPU")
    with pytest.raises(LoweringError, match="needs an NVIDIA GPU"):
        fxtemporal.lower(Frames().eval(), (clip(2),), "torch_tensorrt")


def test_our_calls_fit_the_package_where_it_is_installed() -> None:
    package = pytest.importorskip("torch_tensorrt", exc_type=ImportError)
    real = inspect.signature(package.dynamo.compile).parameters
    assert set(inspect.signature(compile_).parameters) <= set(real)
    assert set(inspect.signature(save).parameters) <= set(
        inspect.signature(package.save).parameters
    )
