"""torchvision's models, on builds of torch where its compiled ops do not load.

The wheels of torchvision are linked against a CUDA build of torch. Beside a CPU build, importing it
stops at ``operator torchvision::nms does not exist``: two schemas are missing, and none of its
models needs them. Where torchvision imports by itself, nothing here happens.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["resnet18", "torchvision_models", "video_model"]

_SCHEMAS = ("nms", "qnms")
_schemas: torch.library.Library | None = None  # the schemas live as long as this object


def _define_missing_schemas() -> None:
    global _schemas
    _schemas = torch.library.Library("torchvision", "DEF")
    for name in _SCHEMAS:
        _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@functools.cache
def torchvision_models() -> ModuleType:
    """The module ``torchvision.models``.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _define_missing_schemas()
    return importlib.import_module("torchvision.models")


def video_model(name: str, **kwargs: Any) -> nn.Module:
    """One of torchvision's video models by name (``"r3d_18"``), with random weights."""
    return getattr(torchvision_models().video, name)(weights=None, **kwargs)


def resnet18(**kwargs: Any) -> nn.Module:
    """torchvision's ResNet-18 with random weights."""
    return torchvision_models().resnet18(weights=None, **kwargs)
