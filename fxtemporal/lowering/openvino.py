"""Builds an OpenVINO model: ``model.xml``, with its weights in ``model.bin`` next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import openvino

from fxtemporal.lowering.artifact import Manifest
from fxtemporal.lowering.export import Exported, Free
from fxtemporal.support.errors import LoweringError
from fxtemporal.support.torch_private import pytree
from fxtemporal.tuning.sessions import Session, openvino_session

__all__ = ["FREE", "absent", "build", "start"]

FREE: Free = "batch"


def build(
    exported: Exported,
    path: Path,
    *,
    precision: Literal["float32", "float16"] = "float32",
) -> dict[str, Any]:
    """Write the program as an OpenVINO model.

    Args:
        precision: dtype of the weights in the file: ``"float16"`` halves it, and rounds them.
    """
    if precision not in ("float32", "float16"):
        raise LoweringError(f"openvino: precision is float32 or float16, not {precision!r}")
    model = openvino.convert_model(exported.program)
    given = pytree.tree_leaves(exported.asked)
    if len(model.inputs) == len(given):  # drop inputs that are numbers, which the graph has fixed
        for place in sorted(set(range(len(given))) - set(exported.shapes), reverse=True):
            model.remove_parameter(model.get_parameters()[place])
    shapes = [*exported.shapes.values()]
    if len(model.inputs) != len(shapes):
        raise LoweringError(f"openvino reads {len(model.inputs)} of {len(shapes)} inputs")
    sizes = [[s if isinstance(s, int) else -1 for s in shape] for shape in shapes]
    model.reshape({i: openvino.PartialShape(shape) for i, shape in enumerate(sizes)})
    openvino.save_model(model, str(path), compress_to_fp16=precision == "float16")
    detail: dict[str, Any] = {"nodes": len(model.get_ops())}
    return detail if precision == "float32" else {**detail, "precision": precision}


def absent() -> str | None:
    """Why an artifact cannot run here; None if it can."""
    return None


def start(path: Path, manifest: Manifest) -> Session:
    return openvino_session(str(path))
