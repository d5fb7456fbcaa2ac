"""A compiler for the time axis of PyTorch models.

::

    import fxtemporal

    fast = fxtemporal.optimize(model, (clip,))     # an nn.Module: use it like the model
    print(fxtemporal.report(fast))                 # what was done, what was not, and why
"""

import warnings

with warnings.catch_warnings():  # torch warns where NumPy is not installed; nothing here needs it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from fxtemporal.api import audit, optimize, refresh, report
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
    LoweringError,
    PassError,
    SpecializationError,
    VerificationError,
)
from fxtemporal.tuning.settings import Tune
from fxtemporal.verification.comparison import Comparison

__version__ = "0.1.0"

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
    "refresh",
    "report",
]
