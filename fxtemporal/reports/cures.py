"""Cures: what a user can do about each reason.

A reason names the blocker at one site. Its cure, the same at every site, says what to write
instead, or that nothing needs to be done.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fxtemporal.ir.reasons import Code

__all__ = ["CURES"]

CURES: Mapping[Code, str] = MappingProxyType(
    {
        Code.SHAPES_UNKNOWN: "give example inputs, so that the shapes are known",
        Code.UNSUPPORTED_OP: "move this op out of the loop, or write it with ops that treat "
        "dimension 0 as a batch",
        Code.HOOKED_MODULE: "remove the hooks before optimizing, and read what they read from the "
        "outputs",
        Code.PARAMETRIZED_MODULE: "once trained, make the weight permanent with "
        "torch.nn.utils.parametrize.remove_parametrizations",
        Code.DIFFERENT_PARAMETERS: "if the frames are to share weights, call one module for all of "
        "them; if not, stack the weights and call torch.func.vmap",
        Code.UNEQUAL_FRAMES: "pad or resize the frames to one shape, and run the same ops on all",
        Code.RECURRENCE: "compute what does not read the state before the loop, for all frames in "
        "one call; a cell that is an nn.LSTMCell, GRUCell or RNNCell becomes one nn.LSTM, GRU or "
        "RNN",
        Code.NESTED_GRAPH: "call the model under autocast, or convert it with model.to(dtype), "
        "instead of entering autocast in its forward; move branches out of it",
        Code.TRAINING_BATCHNORM: "call model.eval() before inference; in training, "
        'TimeDistribute(allow=["training-batchnorm"]) takes the statistics over all frames',
        Code.RANDOMNESS: "call model.eval() before inference; in training, "
        'TimeDistribute(allow=["randomness"]) draws for all frames at once',
        Code.VISIBLE_WRITE: "write out of place (x = x + y for x += y), or collect the frames in a "
        "list and torch.stack them",
        Code.FIXED_BATCH: "write -1, or a size read from the tensor, for the size of the batch",
        Code.NOTHING_TO_BATCH: "nothing: the loop computes nothing; indexing or torch.stack is "
        "shorter",
        Code.DENSE_KERNEL: "measure it: on the machine that runs it, Winograd or another dense "
        "form may be faster; Factorize(flops=0.5) makes it cheaper, with a loss",
        Code.SUBCLASS: "use the layer of torch.nn itself, and put what is added into a module "
        "around it",
        Code.BATCH_STATISTICS: "build it with track_running_stats=True, or normalize by samples "
        "(GroupNorm)",
        Code.OUTPUT_SHARED: "read what comes behind instead, or nothing, if the value in between "
        "is needed",
        Code.COMPUTED_WEIGHT: "compute the weight once, and keep it as a parameter or a buffer",
        Code.OTHER_AXIS: "nothing, if the axis is meant; else put the channels into dimension 1",
        Code.MIXED_DTYPES: "convert the whole model to one dtype: model.to(torch.float32)",
        Code.RETURNS_INDICES: "leave return_indices out where the indices are not read",
        Code.NO_FLAT_WINDOW: "nothing: such a window has no cheaper exact form",
        Code.NOTHING_SAVED: "nothing: it is as cheap as its factors would be",
        Code.RANK_OUT_OF_RANGE: "ask for a rank that the kernel can have",
        Code.NOT_REQUESTED: "name the layer in Factorize(rank={...})",
        Code.SHARED_PARAMETER: "give each layer a weight of its own, if they need not be tied",
        Code.NOT_FASTER: "nothing: as it is, it is the faster one here",
        Code.NOT_MEASURED: "give it more time: Tune(seconds=...)",
        Code.MEMORY_LIMIT: "raise Tune(memory_limit=...), or use fewer frames or a smaller batch",
        Code.NOT_BITWISE: "allow rounding: exact='rounding', the default",
        Code.SPREADS_NAN: "allow it: nan='any', the default, if no frame is NaN or infinite",
        Code.WRONG_RESULT: "please report it, with the model; the result is right without it",
        Code.PASS_RAISED: "please report it, with what FXTEMPORAL_DUMP=folder writes; the result "
        "is right without it",
        Code.REWRITE_RAISED: "please report it, with the model; the result is right without it",
    }
)
"""The cure for every code of :class:`fxtemporal.ir.reasons.Code`."""
