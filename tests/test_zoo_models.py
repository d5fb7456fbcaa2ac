"""Models that other packages define: each goes in, gives its own numbers, and is left as it is.

``pip install -e ".[zoo]"`` and ``pytest -m long tests/test_zoo_models.py`` run all of them.
"""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.zoo.case import ZooCase
from benchmarks.zoo.outcome import PACKAGES, cases, outcome_of

QUICK = frozenset(
    """
    mc3_18 MViTv1 SwinTransformer3d raft_small SqueezeNetFramesMean
    AutoencoderKLWan.encode AutoencoderKLCosmos.decode UNet3DConditionModel WanTransformer3DModel
    VivitModel ViTModel FramesThenLSTM(ResNetModel)
    DynUNet SegResNet ResNet18StackedLSTM FPNFlattenedMasks
    """.split()
)
"""Models of the normal profile, where their package is installed."""


def of_installed_packages() -> list[ZooCase]:
    return [
        case
        for package in PACKAGES
        if importlib.util.find_spec(package) is not None
        for case in cases(package)
    ]


def as_parameter(case: ZooCase) -> object:
    marks = [] if case.name in QUICK else [pytest.mark.long]
    return pytest.param(case, id=f"{case.package}-{case.name}", marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [as_parameter(case) for case in of_installed_packages()])
def test_a_model_that_nobody_here_wrote(case: ZooCase) -> None:
    outcome = outcome_of(case)
    assert not outcome.problem
    assert not outcome.wrong
    assert outcome.captured in ("whole", "parts")
    assert outcome.example is not None
    assert not outcome.failed
