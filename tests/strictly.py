"""``optimize`` whose results raise an error at a call that a guard refuses."""

from __future__ import annotations

import functools

import fxtemporal

__all__ = ["strictly"]

strictly = functools.partial(fxtemporal.optimize, otherwise="error")
