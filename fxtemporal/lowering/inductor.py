"""Builds an AOTInductor package: a ``.pt2`` with a compiled library, which runs without the model.

It is machine code for this kind of machine and this version of torch. It can be loaded without
fxtemporal: ``torch._inductor.aoti_load_package("model.pt2")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fxtemporal.lowering.artifact import Manifest
from fxtemporal.lowering.export import Exported, Free
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.compilers import compile_package, load_package
from fxtemporal.tuning.sessions import Session

__all__ = ["FREE", "absent", "build", "start"]

FREE: Free = "batch"


def build(
    exported: Exported, path: Path, *, freezing: bool = True, max_autotune: bool = False
) -> dict[str, Any]:
    """Compile the program ahead of time.

    Args:
        freezing: make weights constants, in the fastest layout.
        max_autotune: let Inductor measure more choices, which takes long.
    """
    settings = {"freezing": freezing, "max_autotune": max_autotune}
    compile_package(exported.program, str(path), settings)
    return {}


def absent() -> str | None:
    """Why an artifact cannot run here; None if it can."""
    return None


def start(path: Path, manifest: Manifest) -> Session:
    package = load_package(str(path))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = manifest.arguments(tensors)
        leaves = pytree.tree_leaves(package(*args, **kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    return run
