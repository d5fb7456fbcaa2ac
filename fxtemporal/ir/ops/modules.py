"""Modules, one line each: the op that a module of exactly this type computes.

The arguments of the call bind to the module's ``forward``; the op's other arguments are attributes
of the same name. An *adapter* fills in those with another name, or that depend on the module's
state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from einops.layers import torch as einops_layers
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxtemporal.ir.ops.canonical import Context
from fxtemporal.ir.ops.signature import Arguments, UndescribedError
from fxtemporal.ir.ops.table import OPS
from fxtemporal.ir.shallow_copy import carries_hooks, runs_torch_alone

__all__ = ["MODULES", "Module", "bind_module", "overridden"]

Adapter = Callable[[Any, Arguments, Context], Mapping[str, Any]]


@dataclass(frozen=True)
class Module:
    op: str | Callable[[Any], str]
    adapt: Adapter | None = None

    def name(self, module: nn.Module) -> str:
        return self.op if isinstance(self.op, str) else self.op(module)


def bind_module(
    module: nn.Module,
    row: Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: Context,
) -> Arguments:
    """The op's arguments by name. Parameters and buffers are still tensors."""
    forward = _forward_signature(type(module).forward)
    try:
        call = forward.bind(None, *args, **kwargs)
    except TypeError as error:
        raise UndescribedError(str(error)) from error
    call.apply_defaults()
    _, *given = call.arguments.items()
    signature = OPS[row.name(module)].signature
    names = signature.names
    first, *rest = given
    bound: Arguments = {names[0]: first[1], **dict(rest)}
    bound.update(row.adapt(module, bound, context) if row.adapt is not None else {})
    for name in names:
        if name not in bound and hasattr(module, name):
            bound[name] = getattr(module, name)
    unknown = [name for name in bound if name not in names and bound[name] is not None]
    if unknown:
        raise UndescribedError(f"{type(module).__name__} is called with {unknown}")
    return signature.fill(bound)


@cache
def _forward_signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def overridden(module: nn.Module) -> bool:
    """Whether a method of the class, such as ``forward``, is replaced on this instance."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


# ---- adapters ------------------------------------------------------------------------------------


def batch_norm(module: Any, args: Arguments, context: Context) -> Arguments:
    """Arguments as in ``_BatchNorm.forward``. In training, momentum None: a cumulative mean."""
    training = module.training or (module.running_mean is None and module.running_var is None)
    tracked = not module.training or module.track_running_stats
    return {
        "running_mean": module.running_mean if tracked else None,
        "running_var": module.running_var if tracked else None,
        "training": training,
        "momentum": 0.0 if module.momentum is None and not module.training else module.momentum,
    }


def instance_norm(module: Any, args: Arguments, context: Context) -> Arguments:
    if context.rank(args["input"]) == module._get_no_batch_dim():
        raise UndescribedError("an InstanceNorm without a batch dimension")
    return {
        "use_input_stats": module.training or not module.track_running_stats,
        "momentum": 0.0 if module.momentum is None else module.momentum,
    }


def one_output(module: Any, args: Arguments, context: Context) -> Arguments:
    if module.return_indices:
        raise UndescribedError("a pooling that returns its indices too")
    return {}


def plain_output_size(module: Any, args: Arguments, context: Context) -> Arguments:
    if args.pop("output_size") is not None:
        raise UndescribedError("a transposed convolution with an output size")
    return {}


def mode(name: str, value: float | None = None) -> Adapter:
    """Padding modules such as nn.ReflectionPad2d, with the mode ``name``."""

    def adapt(module: Any, args: Arguments, context: Context) -> Arguments:
        given = getattr(module, "value", value)
        return {"pad": module.padding, "mode": name, "value": given}

    return adapt


def unflatten(module: Any, args: Arguments, context: Context) -> Arguments:
    sizes = module.unflattened_size
    if not all(isinstance(size, int) for size in sizes):
        raise UndescribedError("named dimensions")
    return {"sizes": tuple(sizes)}


def recurrent(module: Any, args: Arguments, context: Context) -> Arguments:
    if context.nature(context.value(args["input"])) == "sequence":
        raise UndescribedError("a recurrent net over a packed sequence")
    return {
        "params": [getattr(module, weight) for weight in module._flat_weights_names],
        "has_biases": module.bias,
    }


def lstm(module: Any, args: Arguments, context: Context) -> Arguments:
    """The module returns ``(output, (h, c))``, the function ``(output, h, c)``."""
    return {**recurrent(module, args, context), "nested": True}


def rnn_name(module: Any) -> str:
    return f"rnn_{module.nonlinearity}"


def rnn_cell_name(module: Any) -> str:
    return f"rnn_{module.nonlinearity}_cell"


def cell(module: Any, args: Arguments, context: Context) -> Arguments:
    return {
        f"{short}_{end}": getattr(module, f"{long}_{end}")
        for short, long in (("w", "weight"), ("b", "bias"))
        for end in ("ih", "hh")
    }


def attention(module: Any, args: Arguments, context: Context) -> Arguments:
    out = module.out_proj
    if type(out) is not NonDynamicallyQuantizableLinear or overridden(out):
        raise UndescribedError("an attention whose output projection was replaced")
    return {"out_proj_weight": out.weight, "out_proj_bias": out.bias}


def encoder(module: Any, args: Arguments, context: Context) -> Arguments:
    """The parts of an encoder: their structure as text, and their parameters."""
    if not runs_torch_alone(module):  # an activation may be any function
        raise UndescribedError("an encoder with code of the user")
    for part in module.modules():
        library = type(part).__module__.startswith("torch.nn.modules")
        if not library or overridden(part) or carries_hooks(part):
            raise UndescribedError("an encoder with a part of another kind")
    attention = next(p for p in module.modules() if isinstance(p, nn.MultiheadAttention))
    probabilities = [p.p for p in module.modules() if isinstance(p, nn.Dropout)]
    return {
        "layers": repr(module),
        "parameters": tuple(module.parameters()),
        "dropout": float(max([attention.dropout, *probabilities])),
        "batch_first": attention.batch_first,
    }


def einops_axes(module: Any, args: Arguments, context: Context) -> Arguments:
    return {"axes": tuple(module.axes_lengths.items())}


def softmax2d(module: Any, args: Arguments, context: Context) -> Arguments:
    return {"dim": -3}


def by_rank(name: str, op: str, adapt: Adapter | None = None) -> dict[type[nn.Module], Module]:
    """The modules of 1, 2 and 3 dimensions: ``by_rank("Conv{}d", "conv{}d")``."""
    return {getattr(nn, name.format(n)): Module(op.format(n), adapt) for n in (1, 2, 3)}


MODULES: dict[type[nn.Module], Module] = {
    **by_rank("Conv{}d", "conv{}d"),
    **by_rank("ConvTranspose{}d", "conv_transpose{}d", plain_output_size),
    nn.Linear: Module("linear"),
    NonDynamicallyQuantizableLinear: Module("linear"),
    nn.Bilinear: Module("bilinear"),
    nn.Embedding: Module("embedding"),
    **by_rank("MaxPool{}d", "max_pool{}d", one_output),
    **by_rank("AvgPool{}d", "avg_pool{}d"),
    **by_rank("AdaptiveAvgPool{}d", "adaptive_avg_pool{}d"),
    **by_rank("AdaptiveMaxPool{}d", "adaptive_max_pool{}d", one_output),
    **by_rank("BatchNorm{}d", "batch_norm", batch_norm),
    **by_rank("InstanceNorm{}d", "instance_norm", instance_norm),
    nn.LayerNorm: Module("layer_norm"),
    nn.GroupNorm: Module("group_norm"),
    nn.RMSNorm: Module("rms_norm"),
    nn.LocalResponseNorm: Module("local_response_norm"),
    nn.Dropout: Module("dropout"),
    **by_rank("Dropout{}d", "dropout{}d"),
    nn.AlphaDropout: Module("alpha_dropout"),
    nn.FeatureAlphaDropout: Module("feature_alpha_dropout"),
    nn.ReLU: Module("relu"),
    nn.ReLU6: Module("hardtanh"),
    nn.Hardtanh: Module("hardtanh"),
    nn.LeakyReLU: Module("leaky_relu"),
    nn.ELU: Module("elu"),
    nn.CELU: Module("celu"),
    nn.SELU: Module("selu"),
    nn.GELU: Module("gelu"),
    nn.SiLU: Module("silu"),
    nn.Mish: Module("mish"),
    nn.Sigmoid: Module("sigmoid"),
    nn.Tanh: Module("tanh"),
    nn.Hardswish: Module("hardswish"),
    nn.Hardsigmoid: Module("hardsigmoid"),
    nn.Softplus: Module("softplus"),
    nn.Softsign: Module("softsign"),
    nn.Tanhshrink: Module("tanhshrink"),
    nn.Hardshrink: Module("hardshrink"),
    nn.Softshrink: Module("softshrink"),
    nn.LogSigmoid: Module("log_sigmoid"),
    nn.Threshold: Module("threshold"),
    nn.GLU: Module("glu"),
    nn.PReLU: Module("prelu"),
    nn.Softmax: Module("softmax"),
    nn.Softmax2d: Module("softmax", softmax2d),
    nn.LogSoftmax: Module("log_softmax"),
    nn.Identity: Module("identity"),
    nn.Flatten: Module("flatten"),
    nn.Unflatten: Module("unflatten", unflatten),
    **by_rank("ZeroPad{}d", "pad", mode("constant", 0.0)),
    **by_rank("ConstantPad{}d", "pad", mode("constant")),
    **by_rank("ReflectionPad{}d", "pad", mode("reflect")),
    **by_rank("ReplicationPad{}d", "pad", mode("replicate")),
    **by_rank("CircularPad{}d", "pad", mode("circular")),
    nn.Upsample: Module("interpolate"),
    nn.UpsamplingNearest2d: Module("interpolate"),
    nn.UpsamplingBilinear2d: Module("interpolate"),
    nn.PixelShuffle: Module("pixel_shuffle"),
    nn.PixelUnshuffle: Module("pixel_unshuffle"),
    nn.ChannelShuffle: Module("channel_shuffle"),
    nn.LSTM: Module("lstm", lstm),
    nn.GRU: Module("gru", recurrent),
    nn.RNN: Module(rnn_name, recurrent),
    nn.LSTMCell: Module("lstm_cell", cell),
    nn.GRUCell: Module("gru_cell", cell),
    nn.RNNCell: Module(rnn_cell_name, cell),
    nn.MultiheadAttention: Module("multi_head_attention", attention),
    nn.TransformerEncoder: Module("transformer_encoder", encoder),
    nn.TransformerEncoderLayer: Module("transformer_encoder_layer", encoder),
    einops_layers.Rearrange: Module("rearrange", einops_axes),
    einops_layers.Reduce: Module("einops_reduce", einops_axes),
}
