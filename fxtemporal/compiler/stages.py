"""optimize as a list of stages.

::

    capture → lossy rules (if asked) → forms → exact rules, verified → only what pays →
    in chunks → the number of frames free → modes, gradients, report

Each takes a :class:`~fxtemporal.compiler.state.State` and gives another; nothing is undone in
place. What a stage needs to know of a pass, its :class:`~fxtemporal.passes.rule.Rule` says.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxtemporal.compiler.capturing import begin
from fxtemporal.compiler.chunking import chunk
from fxtemporal.compiler.finishing import finish
from fxtemporal.compiler.free_frames import free_frames
from fxtemporal.compiler.measuring import choose_forms, drop_slower
from fxtemporal.compiler.rewriting import lossy, rewrite
from fxtemporal.compiler.state import Request, State

__all__ = ["STAGES", "run"]

STAGES: tuple[Callable[[State], State], ...] = (
    lossy,
    choose_forms,
    rewrite,
    drop_slower,
    chunk,
    free_frames,
    finish,
)


def run(request: Request) -> fx.GraphModule:
    """What all stages make of a model.

    Raises:
        CaptureError: the model cannot be captured, or fails on the example inputs.
        PassError: settings that contradict each other.
        VerificationError: the model, captured and otherwise untouched, gives other numbers.
    """
    request.tick("capturing")
    state = begin(request)
    for stage in STAGES:
        state = stage(state)
    assert state.result is not None
    return state.result
