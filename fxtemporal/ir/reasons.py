"""Reasons why a site was left as it was: a stable code for scripts, and a sentence."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import fx

from fxtemporal.ir.ops import blocked
from fxtemporal.ir.program import Program
from fxtemporal.ir.shallow_copy import carries_hooks

__all__ = ["Code", "Reason", "blocked_module"]


class Code(enum.StrEnum):
    """Why a site was left as it was. The value is the stable name that reports carry."""

    # The program
    SHAPES_UNKNOWN = "shapes-unknown"
    """The rewrite needs sizes, and no example inputs were given."""
    UNSUPPORTED_OP = "unsupported-op"
    """An op has no batching rule, so frames cannot share one call of it."""
    NESTED_GRAPH = "nested-graph"
    """It is in a graph within the graph (autocast, torch.cond), which passes do not change."""
    HOOKED_MODULE = "hooked-module"
    """A module carries hooks, which must still be called as before."""
    PARAMETRIZED_MODULE = "parametrized-module"
    """A weight is computed by torch.nn.utils.parametrize at every call."""

    # Loops over frames
    DIFFERENT_PARAMETERS = "different-parameters"
    """Each frame has its own module or weight."""
    UNEQUAL_FRAMES = "unequal-frames"
    """The frames differ in shape, or the ops differ from frame to frame."""
    RECURRENCE = "recurrence"
    """A frame reads a state that the frame before it wrote."""
    TRAINING_BATCHNORM = "training-batchnorm"
    """A normalization in training mode takes its statistics from what it is given at each call."""
    RANDOMNESS = "randomness"
    """An op draws random numbers a frame at a time (dropout in training mode)."""
    VISIBLE_WRITE = "visible-write"
    """An in-place op writes memory that something else reads."""
    FIXED_BATCH = "fixed-batch"
    """A view has a constant size that folding frames into the batch would change."""
    NOTHING_TO_BATCH = "nothing-to-batch"
    """The loop only moves data: there is no computation to share."""

    # Conv3d
    DENSE_KERNEL = "dense-kernel"
    """The kernel reaches over time and space: no cheaper exact form is known for it."""
    SUBCLASS = "subclass"
    """A subclass of a layer of torch.nn, or a layer whose forward was replaced."""

    # Layers next to a convolution
    BATCH_STATISTICS = "batch-statistics"
    """A normalization keeps no running statistics: it takes those of each batch."""
    OUTPUT_SHARED = "output-shared"
    """Something else reads the value between the two, so that it must still be computed."""
    COMPUTED_WEIGHT = "computed-weight"
    """A weight is computed in the forward: nothing can be prepared from it once."""
    OTHER_AXIS = "other-axis"
    """The normalization is along another axis than the channels of the convolution."""
    MIXED_DTYPES = "mixed-dtypes"
    """The two compute in different dtypes."""
    RETURNS_INDICES = "returns-indices"
    """A pooling returns the indices of its maxima, which another form would number differently."""
    NO_FLAT_WINDOW = "no-flat-window"
    """A pooling window reaches over time and space: no cheaper exact form is known for it."""

    # Factorization
    NOTHING_SAVED = "nothing-saved"
    """The factors would cost as much as the layer they replace."""
    RANK_OUT_OF_RANGE = "rank-out-of-range"
    """The rank asked for is above the rank that the kernel can have."""
    NOT_REQUESTED = "not-requested"
    """Ranks were given by name, and not for this layer."""
    SHARED_PARAMETER = "shared-parameter"
    """The weight is used elsewhere too, so it cannot be replaced by factors."""

    # After the rewrite
    NOT_FASTER = "not-faster"
    """It was measured, and it did not pay."""
    NOT_MEASURED = "not-measured"
    """The time for measuring ended before its turn."""
    MEMORY_LIMIT = "memory-limit"
    """A call would hold more memory at its peak than the limit that was given."""
    NOT_BITWISE = "not-bitwise"
    """``exact="bitwise"`` was asked for, and the rewrite rounds differently from the model."""
    SPREADS_NAN = "spreads-nan"
    """``nan="confined"`` was asked for, and the rewrite gives NaN where the model does not."""
    WRONG_RESULT = "wrong-result"
    """Verification found other numbers than the original's; the rewrite was undone."""
    PASS_RAISED = "pass-raised"
    """The pass itself raised an error where it looked at the site; it was left out."""
    REWRITE_RAISED = "rewrite-raised"
    """The rewritten graph raised an error; the rewrite was undone."""


@dataclass(frozen=True)
class Reason:
    """One blocker: a stable code, and a sentence about this site."""

    code: Code
    text: str
    location: str | None = None
    """``file:line`` of the blocker, if it is not the site's own line."""

    def to_dict(self) -> dict[str, str]:
        place = {} if self.location is None else {"location": self.location}
        return {"code": str(self.code), "text": self.text, **place}


_BLOCKED = {
    "hooked": (Code.HOOKED_MODULE, "carries hooks, which must go on running at each call"),
    "parametrized": (Code.PARAMETRIZED_MODULE, "computes its weight anew at every call"),
    "subclass": (Code.SUBCLASS, "is not exactly a layer of torch.nn"),
}


def blocked_module(program: Program, node: fx.Node) -> Reason | None:
    """Why the module that ``node`` calls may differ from its library class; None if it does not."""
    if node.op != "call_module":
        return None
    module = program.gm.get_submodule(str(node.target))
    kind = blocked(node, program.gm) or ("hooked" if carries_hooks(module) else None)
    if kind is None:
        return None
    code, text = _BLOCKED[kind]
    return Reason(code, f"{node.target} ({type(module).__name__}) {text}")
