"""The rewrites, one a file. Their order here is the order in which they run."""

from __future__ import annotations

from typing import Any

from fxtemporal.passes.conv3d_forms import Conv3dForms
from fxtemporal.passes.recurrent_cells import RecurrentCells
from fxtemporal.passes.time_distribute import TimeDistribute
from fxtemporal.rules import Rule

__all__ = ["DEFAULT_PASSES"]

DEFAULT_PASSES: tuple[Rule[Any], ...] = (
    TimeDistribute(),  # first: T copies of a Conv3d become one
    RecurrentCells(),
    TimeDistribute(),  # again: what reads the states of a cell step by step
    Conv3dForms(),
)
