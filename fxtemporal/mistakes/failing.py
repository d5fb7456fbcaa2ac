"""Common mistakes that make the forward fail, recognized by the layer that refused its input."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fxtemporal.mistakes.finding import Finding, Mistake
from fxtemporal.support.errors import ForwardError

__all__ = ["failing", "telling_cure"]

_FRAMES = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d)
_CLIPS = (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d, nn.BatchNorm3d)
_PER_FRAME = (
    "wrap the layer in fxtemporal.nn.TimeDistributed, or fold time into the batch: x.flatten(0, 1)"
)
_PER_MAP = "flatten the map of each frame first, x.flatten(2), or average it, x.mean((-2, -1))"
_PER_STEP = (
    "average the map of each frame, x.mean((-2, -1)), or flatten it, x.flatten(2): a recurrent "
    "layer takes (B, T, features)"
)
_CLIP = "give it (B, C, T, H, W): x.unsqueeze(2) for single frames, x.unsqueeze(0) for one clip"


def failing(model: nn.Module, error: ForwardError) -> Finding | None:
    """The common mistake that made the forward fail; None if the cause is another one."""
    found = _mistake(model, error)
    if found is None:
        return None
    code, cure = found
    target = error.module_path or type(model).__name__
    return Finding(code, target, error.location, f"the forward fails here: {error.text}", cure)


@contextmanager
def telling_cure(model: object) -> Iterator[None]:
    """Append the cure to the message of a :class:`ForwardError` that a common mistake caused."""
    try:
        yield
    except ForwardError as error:
        mistake = failing(model, error) if isinstance(model, nn.Module) else None
        if mistake is not None:
            error.args = (f"{error}. To mend it: {mistake.cure}",)
        raise


def _mistake(model: nn.Module, error: ForwardError) -> tuple[Mistake, str] | None:
    module = _module(model, error.module_path)
    text = error.text.lower().replace("-", "")
    shapes = re.findall(r"\[([\d, ]+)\]", error.shapes or text)
    ranks = [len(sizes.split(",")) for sizes in shapes]
    expects = _expected(text)
    if isinstance(module, nn.RNNBase) or any(name in text for name in ("lstm", "gru", "rnn")):
        if any(n > 3 for n in ranks) or "4d" in text or "5d" in text:
            return Mistake.MAP_INTO_RECURRENCE, _PER_STEP
        return None
    if isinstance(module, _CLIPS) or 5 in expects:
        return (Mistake.MISSING_TIME_AXIS, _CLIP) if 4 in ranks or "got 4d" in text else None
    if isinstance(module, _FRAMES) or 4 in expects:
        return (Mistake.FRAME_LAYER_ON_CLIP, _PER_FRAME) if 5 in ranks or "got 5d" in text else None
    linear = isinstance(module, nn.Linear) or "mat1 and mat2" in text
    if linear and any(n > 3 for n in ranks):
        return Mistake.FRAME_LAYER_ON_CLIP, _PER_MAP
    return None


def _expected(text: str) -> set[int]:
    """The ranks that a layer accepts, as its error message names them."""
    if "expected" not in text:
        return set()
    return {int(n) for n in re.findall(r"(\d)d", text.partition("got")[0])}


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
