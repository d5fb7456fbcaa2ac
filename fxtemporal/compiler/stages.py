"""optimize as a list of stages.

::

    capture → lossy rules (if asked) → forms → exact rules, verified → only what pays →
    in chunks → the number of frames free → modes, gradients, report

Each stage takes a :class:`~fxtemporal.compiler.state.State` and returns another; nothing is undone
in place. A stage asks each pass for facts by the interface :class:`~fxtemporal.passes.rule.Rule`.
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
    """Run all stages on a model, and return the optimized module.

    Raises:
        CaptureError: the model cannot be captured, or fails on the example inputs.
        PassError: the settings contradict each other.
        VerificationError: the captured graph, before any rewrite, gives other numbers.
    """
    request.tick("capturing")
    state = begin(request)
    for stage in STAGES:
        state = stage(state)
    assert state.result is not None
    return state.result
