"""Loops that go wrong easily, sorted by what is awkward in them.

Each is a forward; ``@case(...)`` says which layers it has, which inputs it is traced on, and what
must become of it.
"""

from . import bodies, how_loops_meet, shared_operands, which_frames, writes
from .case import Case

CASES: tuple[Case, ...] = (
    *which_frames.CASES,
    *how_loops_meet.CASES,
    *bodies.CASES,
    *shared_operands.CASES,
    *writes.CASES,
)
