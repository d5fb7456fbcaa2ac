"""The errors that fxtemporal raises.

::

    FxTemporalError
    ├── CaptureError          the model could not be turned into a graph
    │   └── ForwardError      because it fails on the example inputs
    ├── PassError             a pass was given settings that it cannot follow
    ├── VerificationError     a result did not equal the original, and could not be repaired
    ├── GradientError         a result is asked for gradients that are not the model's
    ├── SpecializationError   a module was called at a size that its trace had fixed
    ├── LoweringError         a backend could not build or load an artifact
    └── InternalError         fxtemporal itself failed: a defect, to be reported

Each message says what was tried, on what, and what to do next. A rewrite that does not apply is
never an exception: it is a :class:`fxtemporal.Remark` with its reasons.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CaptureError",
    "ForwardError",
    "FxTemporalError",
    "GradientError",
    "InternalError",
    "LoweringError",
    "PassError",
    "SpecializationError",
    "VerificationError",
]


class FxTemporalError(Exception):
    """Base of every error that this package raises on purpose."""


class CaptureError(FxTemporalError):
    """The model could not be captured: the message names the line, the cause and the cure."""


class ForwardError(CaptureError):
    """The forward raises on the example inputs.

    ``text`` is the message it raised, ``location`` the line of the user's code, ``module_path`` the
    module that was called there, and ``shapes`` the shapes of its inputs, as far as known.
    ``call`` is that call, ``(module, args, kwargs)``, for what tries a cure on it.
    """

    def __init__(
        self,
        message: str,
        text: str = "",
        location: str | None = None,
        module_path: str = "",
        shapes: str = "",
    ) -> None:
        super().__init__(message)
        self.text = text
        self.location = location
        self.module_path = module_path
        self.shapes = shapes
        self.call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None


class PassError(FxTemporalError):
    """A pass was asked for something it cannot do (an unknown name, a setting out of range)."""


class VerificationError(FxTemporalError):
    """The result differs from the original by more than rounding, and no rewrite is the cause."""


class SpecializationError(FxTemporalError):
    """The module was called with a size or value other than the one its trace fixed.

    ``fixed`` says what is fixed: ``"x.size(1) == 16 (range() read it at model.py:12)"``.
    """

    def __init__(self, message: str, fixed: str = "") -> None:
        super().__init__(message)
        self.fixed = fixed or message


class GradientError(FxTemporalError):
    """Gradients were asked of a result whose gradients are not the model's: train the model."""


class LoweringError(FxTemporalError):
    """A backend is missing, refused the graph, or an artifact is damaged."""


class InternalError(FxTemporalError):
    """A defect of fxtemporal: ``__cause__`` is what was raised. Please report it."""
