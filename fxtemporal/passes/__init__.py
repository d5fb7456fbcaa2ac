"""The rewrites, one per file, and their building blocks: :class:`Rule` and :class:`Site`.

The order in ``DEFAULT_PASSES`` is the order in which they run::

    from fxtemporal.passes import Code, Program, Reason, Rule, Site     to write a pass
    optimize(model, (x,), passes=[TimeDistribute(), MyPass()])          to run it
"""

from __future__ import annotations

from typing import Any

from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.passes.conv3d_forms import Conv3dForms
from fxtemporal.passes.fold_batchnorm import FoldBatchNorm
from fxtemporal.passes.loop_distribution import LoopDistribution
from fxtemporal.passes.merge_convolutions import MergeConvolutions
from fxtemporal.passes.overlapping_windows import OverlappingWindows
from fxtemporal.passes.pool3d_forms import Pool3dForms
from fxtemporal.passes.recurrent_cells import RecurrentCells
from fxtemporal.passes.rule import Remark, Rule, Site
from fxtemporal.passes.split_concat import SplitConcat
from fxtemporal.passes.time_distribute import TimeDistribute

__all__ = [
    "DEFAULT_PASSES",
    "PORTABLE_PASSES",
    "Code",
    "Conv3dForms",
    "FoldBatchNorm",
    "LoopDistribution",
    "MergeConvolutions",
    "OverlappingWindows",
    "Pool3dForms",
    "Program",
    "Reason",
    "RecurrentCells",
    "Remark",
    "Rule",
    "Site",
    "SplitConcat",
    "TimeDistribute",
]

DEFAULT_PASSES: tuple[Rule[Any], ...] = (
    SplitConcat(),  # before TimeDistribute, which batches the half that is split off
    TimeDistribute(),  # before the forms: T copies of a Conv3d become one
    RecurrentCells(),
    TimeDistribute(),  # again: for ops that read the states of a cell step by step
    LoopDistribution(),  # after the recurrences are as short as they can be
    OverlappingWindows(),  # after TimeDistribute, which makes loops over clips visible to it
    FoldBatchNorm(),
    MergeConvolutions(),  # after the BatchNorms between the branches are folded
    Conv3dForms(),
    Pool3dForms(),
)

PORTABLE_PASSES: tuple[Rule[Any], ...] = tuple(
    rule
    for rule in DEFAULT_PASSES
    if not isinstance(rule, MergeConvolutions | Conv3dForms | Pool3dForms)
)
"""The passes that reduce work on any engine, for an engine that cannot be measured here. The
fastest form of a convolution or a pooling depends on the engine, and is left to it."""
