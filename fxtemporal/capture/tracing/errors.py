"""Why a forward could not be traced."""

from __future__ import annotations

from torch.fx.proxy import TraceError

__all__ = ["GradientModeError", "OpError", "StatefulError"]


class OpError(Exception):
    """An op raised on the example inputs: ``__cause__`` says why, ``location`` where."""

    def __init__(self, location: str | None, module_path: str, operand_shapes: str) -> None:
        super().__init__(f"{module_path or 'an op'} at {location}")
        self.location = location
        self.module_path = module_path
        self.operand_shapes = operand_shapes


class StatefulError(Exception):
    """The forward leaves a state behind; ``exportable`` if torch.export can carry it."""

    def __init__(self, text: str, *, exportable: bool = False) -> None:
        super().__init__(text)
        self.exportable = exportable


class GradientModeError(TraceError):
    """The forward asks whether gradients are recorded: a graph is right for one answer only.

    ``answerable``: a trace for each answer shows whether it makes a difference.
    """

    def __init__(self, text: str, *, answerable: bool = False) -> None:
        super().__init__(text)
        self.answerable = answerable
