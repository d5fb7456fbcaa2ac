"""A compiler for the time axis of PyTorch models.

::

    import fxtemporal

    fast = fxtemporal.optimize(model, (clip,))     # an nn.Module: use it like the model
    print(fxtemporal.report(fast))                 # what was done, what was not, and why

Names are imported when first used: importing torch takes seconds.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxtemporal.api import audit, optimize, optimize_in_place, refresh, report
    from fxtemporal.factorization.settings import Factorize
    from fxtemporal.ir.freeze import Memory
    from fxtemporal.ir.guards import Specialization
    from fxtemporal.ir.reasons import Code, Reason
    from fxtemporal.lowering.lower import Artifact, load, lower
    from fxtemporal.mistakes import Finding, Mistake
    from fxtemporal.nn.convert import convert_to_2plus1d, from_torchvision_r2plus1d
    from fxtemporal.passes.rule import Remark
    from fxtemporal.reports.report import Report
    from fxtemporal.support.errors import (
        CaptureError,
        ForwardError,
        FxTemporalError,
        GradientError,
        InternalError,
        LoweringError,
        PassError,
        SpecializationError,
        VerificationError,
    )
    from fxtemporal.tuning.settings import Tune
    from fxtemporal.verification.comparison import Comparison

__version__ = "0.1.0"

_HOMES = {
    "api": "audit optimize optimize_in_place refresh report",
    "factorization.settings": "Factorize",
    "ir.freeze": "Memory",
    "ir.guards": "Specialization",
    "ir.reasons": "Code Reason",
    "lowering.lower": "Artifact load lower",
    "mistakes": "Finding Mistake",
    "nn.convert": "convert_to_2plus1d from_torchvision_r2plus1d",
    "passes.rule": "Remark",
    "reports.report": "Report",
    "support.errors": """
        CaptureError ForwardError FxTemporalError GradientError InternalError
        LoweringError PassError SpecializationError VerificationError
    """,
    "tuning.settings": "Tune",
    "verification.comparison": "Comparison",
}
"""The module of each public name."""

_MODULES = ("functional", "nn", "passes")
_PLACES = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Artifact",
    "CaptureError",
    "Code",
    "Comparison",
    "Factorize",
    "Finding",
    "ForwardError",
    "FxTemporalError",
    "GradientError",
    "InternalError",
    "LoweringError",
    "Memory",
    "Mistake",
    "PassError",
    "Reason",
    "Remark",
    "Report",
    "Specialization",
    "SpecializationError",
    "Tune",
    "VerificationError",
    "__version__",
    "audit",
    "convert_to_2plus1d",
    "from_torchvision_r2plus1d",
    "load",
    "lower",
    "optimize",
    "optimize_in_place",
    "refresh",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fxtemporal.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'fxtemporal' has no attribute {name!r}")
    with warnings.catch_warnings():  # torch warns if NumPy is not installed; it is not needed
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        importlib.import_module("torch")
    value = getattr(importlib.import_module(f"fxtemporal.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
