"""A guard that admits several numbers of frames: see :class:`AdmittedFrames`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fxtemporal.support.errors import SpecializationError
from fxtemporal.support.torch_private.dispatch import is_dispatched, is_intercepted
from fxtemporal.support.torch_private.operators import check
from fxtemporal.support.torch_private.transforms import in_transform

__all__ = ["AdmittedFrames"]


class AdmittedFrames(nn.Module):
    """A guard on the number of frames T: the forward was traced at it, and gave the same graph.

    A re-rolled loop runs for any T, but the forward may do something else at another T: ``if
    t >= 40``, a table by t, ``mem[-40:]``. So a T is admitted once the forward was traced at it and
    gave the same graph: at a few T when the model is optimized, at others at their first call,
    which then takes as long as a trace. In a graph it stands after the inputs::

        size = x.size(1)
        _frames_0 = self._frames_0(size)      T, and sizes of other inputs that must equal it

    Args:
        expression: the size as the user writes it, ``"x.size(1)"``.
        counts: the admitted numbers.
        same_graph: traces the forward at another number, and returns whether the graph is the same.
            It is not pickled: a loaded result runs at ``counts`` only.
    """

    _is_impure = True  # dead-code elimination must not drop it
    _derived = ("_same_graph",)  # a stand-in needs none

    def __init__(
        self,
        expression: str,
        counts: Iterable[int],
        same_graph: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__()
        self.expression = expression
        self.counts = frozenset(counts)
        self.example = max(self.counts)
        self._same_graph = same_graph
        self._refused: frozenset[int] = frozenset()

    def forward(self, frames: Any, *others: Any) -> None:
        """Raise :class:`SpecializationError` unless ``frames`` is admitted, and ``others`` equal.

        Raises:
            SpecializationError: the forward does something else at this T, or the inputs that had
                the same T in the trace have different ones.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return  # sizes are tensors there, and a check cannot be recorded
        for other in others:
            if other != frames:
                raise SpecializationError(
                    f"this module was traced where other inputs have as many entries as "
                    f"{self.expression}; it was called with {frames} and {other}. Call "
                    "fxtemporal.optimize again with example inputs of this kind.",
                    f"other inputs have as many entries as {self.expression}",
                )
        if type(frames) is int and frames in self.counts:
            return
        if type(frames) is not int:
            self._bound(frames)
        elif not self.admit(frames):
            raise SpecializationError(
                f"this module is right where {self.expression} is {self._said()}: at {frames} the "
                "forward gave another graph, or could not be traced again. Call "
                "fxtemporal.optimize with example inputs of this size.",
                f"{self.expression} is a number of frames at which the forward gives this graph",
            )

    def admit(self, frames: int) -> bool:
        """Whether the module is right at this number of frames. The answer is remembered."""
        if frames in self.counts:
            return True
        if frames in self._refused or self._same_graph is None:
            return False
        if torch.compiler.is_compiling() or not _may_trace():
            return False
        if self._same_graph(frames):
            self.counts |= {frames}
            return True
        self._refused |= {frames}
        return False

    def admit_around(self) -> None:
        """Try every number up to twice the example's: the range that an artifact leaves free."""
        for frames in range(1, 2 * self.example + 1):
            self.admit(frames)

    def _bound(self, frames: Any) -> None:
        """Limit an export's symbolic size to the admitted numbers around its example value."""
        low = high = int(frames.node.hint)
        while low - 1 in self.counts:
            low -= 1
        while high + 1 in self.counts:
            high += 1
        if low == high:
            int(frames)  # fixes the size to this number
        else:
            check(frames >= low)
            check(frames <= high)

    def _said(self) -> str:
        return ", ".join(map(str, sorted(self.counts)))

    def __deepcopy__(self, memo: dict[int, Any]) -> AdmittedFrames:
        copy = AdmittedFrames(self.expression, self.counts, self._same_graph)
        copy.example = self.example
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_same_graph": None}


def _may_trace() -> bool:
    """Whether the model can be traced here: not inside a transform or another trace."""
    return not (in_transform() or is_dispatched() or is_intercepted())
