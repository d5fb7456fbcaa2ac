"""The errors that fxtemporal raises.

::

    FxTemporalError
    ├── CaptureError          the model could not be turned into a graph
    ├── PassError             a pass was given settings that it cannot follow
    ├── VerificationError     a result did not equal the original, and could not be mended
    ├── SpecializationError   a module was called at a size that its trace had fixed
    └── LoweringError         a backend could not build or load an artifact

Each message says what was tried, on what, and what to do next. A rewrite that does not apply is
never an exception: it is a :class:`fxtemporal.Remark` with its reasons.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "FxTemporalError",
    "LoweringError",
    "PassError",
    "SpecializationError",
    "VerificationError",
]


class FxTemporalError(Exception):
    """Base of every error that this package raises on purpose."""


class CaptureError(FxTemporalError):
    """The model could not be captured: the message names the line, the cause and the cure."""


class PassError(FxTemporalError):
    """A pass was asked for something it cannot do (an unknown name, a setting out of range)."""


class VerificationError(FxTemporalError):
    """The result differs from the original beyond rounding, and no rewrite could be blamed."""


class SpecializationError(FxTemporalError):
    """The module was called with a size or value other than the one its trace fixed."""


class LoweringError(FxTemporalError):
    """A backend is missing, refused the graph, or an artifact is damaged."""
