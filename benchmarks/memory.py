"""How much memory one call of a model takes, measured in a process of its own.

The model travels to the child in a file. There, the kernel's record of the largest resident size is
cleared once the model is loaded and the libraries are warm, and read after the first call. What is
reported is the difference: activations and what the kernels allocate, not the model's parameters.

``resource.getrusage`` cannot tell this: on Linux a child starts with its parent's maximum.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._torchvision import torchvision_models

__all__ = ["peak_of_call"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_of_call(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes by which the resident size grows, at most, in a first call of ``model``.

    Raises:
        OSError: this system keeps no such record (it is not Linux).
        Exception: the model cannot be pickled, or the child ended early (out of memory).
    """
    if not _CLEAR.exists():
        raise OSError(f"{_CLEAR} is needed, which only Linux has")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save((model, inputs), path)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as child:
            return child.submit(_peak_in_child, path, torch.get_num_threads()).result()


def _peak_in_child(path: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    torchvision_models()  # pickles name its classes, which import by themselves only where they can
    model, inputs = torch.load(path, weights_only=False)
    with torch.no_grad():
        _warm()
        gc.collect()
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        model(*inputs)
        return _resident("VmHWM") - before


def _warm() -> None:
    """Load the code of the kernels, which is many megabytes and no model's own."""
    nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).relu()
    nn.LSTM(8, 8)(torch.zeros(2, 1, 8))


def _resident(name: str) -> int:
    """An entry of the process's status, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
