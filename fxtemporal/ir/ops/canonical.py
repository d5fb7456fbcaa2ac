"""One form for each argument: ``stride=2`` and ``stride=(2, 2, 2)`` become the same value.

``KINDS`` holds the forms that a signature can name. If an argument depends on others, a *fix* then
rewrites the bound arguments in place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import fx

from fxtemporal.ir.ops.op import Attr, Op
from fxtemporal.ir.ops.signature import Arguments, UndescribedError

__all__ = ["KINDS", "Context", "Fix", "Lower", "Nature"]

Nature = Literal["tensor", "sequence", "scalar"]


class Context(Protocol):
    """The questions that a canonical form may ask about the graph."""

    def rank(self, value: Any) -> int | None:
        """The number of dimensions of a tensor, or of the first one of a tuple."""

    def nature(self, value: Any) -> Nature | None:
        """Whether it is a tensor, a tuple or list, or a plain value; None when not known."""

    def length(self, value: Any) -> int | None:
        """The number of items of a tuple or list."""

    def val(self, node: fx.Node) -> Any:
        """``meta["val"]``, or None."""

    def value(self, raw: Any) -> Any:
        """A raw argument of a node as an argument of an op."""

    def describe(self, node: fx.Node) -> Op | None:
        """The op of another node."""


Fix = Callable[[Arguments, Context], None]
Lower = Callable[[Arguments, Context], tuple[str, Arguments]]
Kind = Callable[[Any, Arguments, Context], Any]


# ---- the kinds of arguments ----------------------------------------------------------------------


def base_rank(args: Arguments, context: Context) -> int | None:
    """The rank that dims count in: that of ``input``, or of the first of ``tensors``."""
    return context.rank(args["input"] if "input" in args else args.get("tensors"))


def normal_dim(dim: Any, rank: int | None) -> Any:
    if isinstance(dim, str):
        raise UndescribedError("named dimensions")
    if isinstance(dim, fx.Node):
        raise UndescribedError("a dimension that is computed from sizes")
    return dim + rank if isinstance(dim, int) and dim < 0 and rank is not None else dim


def flat(value: Any, args: Arguments, context: Context) -> Any:
    """``view(b, -1)`` and ``view((b, -1))``, ``permute(0, 1)`` and ``permute((0, 1))``."""
    if isinstance(value, int) or (isinstance(value, fx.Node) and not is_sequence(value, context)):
        return (value,)
    if isinstance(value, tuple) and len(value) == 1:
        only = value[0]
        if isinstance(only, tuple) or is_sequence(only, context):
            return only
    return value


def is_sequence(value: Any, context: Context) -> bool:
    return isinstance(value, fx.Node) and context.nature(value) == "sequence"


def dim(value: Any, args: Arguments, context: Context) -> Any:
    return normal_dim(value, base_rank(args, context))


def new_dim(value: Any, args: Arguments, context: Context) -> Any:
    rank = base_rank(args, context)
    return normal_dim(value, None if rank is None else rank + 1)


def dims(value: Any, args: Arguments, context: Context) -> Any:
    """Dimensions whose order matters: permute, roll, movedim."""
    value = flat(value, args, context)
    if not isinstance(value, tuple):
        return normal_dim(value, None)
    rank = base_rank(args, context)
    return tuple(normal_dim(item, rank) for item in value)


def dim_set(value: Any, args: Arguments, context: Context) -> Any:
    """Dimensions in any order, sorted: flip, squeeze."""
    value = dims(value, args, context)
    if isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        return tuple(sorted(value))
    return value


def reduced(value: Any, args: Arguments, context: Context) -> Any:
    """The dims that a reduction removes; None for all of them, which ``()`` means too."""
    return None if value == () else dim_set(value, args, context)


def repeated(count: int) -> Kind:
    """One number for each dimension of space (and time)."""

    def repeat(value: Any, args: Arguments, context: Context) -> Any:
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return (value,) * count
        if isinstance(value, tuple) and len(value) == 1:
            return value * count
        if isinstance(value, fx.Node) and context.nature(value) == "scalar":
            return (value,) * count
        return value

    return repeat


def padding(count: int) -> Kind:
    """As :func:`repeated`; ``"valid"`` is no padding; ``"same"`` stays a string."""
    repeat = repeated(count)

    def pad(value: Any, args: Arguments, context: Context) -> Any:
        return (0,) * count if value == "valid" else repeat(value, args, context)

    return pad


def stride(count: int) -> Kind:
    """The stride of a pooling is its kernel size unless given."""
    repeat = repeated(count)

    def or_kernel(value: Any, args: Arguments, context: Context) -> Any:
        return repeat(args["kernel_size"] if value in (None, ()) else value, args, context)

    return or_kernel


def as_float(value: Any, args: Arguments, context: Context) -> Any:
    return float(value) if isinstance(value, int | float) else value


def as_bool(value: Any, args: Arguments, context: Context) -> Any:
    return bool(value) if isinstance(value, int) else value


def as_tuple(value: Any, args: Arguments, context: Context) -> Any:
    return (value,) if isinstance(value, int) else value


def unspaced(value: Any, args: Arguments, context: Context) -> Any:
    if not isinstance(value, str):
        raise UndescribedError("an equation that is no string")
    return value.replace(" ", "")


def memory_format(value: Any, args: Arguments, context: Context) -> Any:
    """A memory format: ATen's defaults write 0 for contiguous, and None for "preserve"."""
    if value is None:
        return torch.preserve_format
    return torch.contiguous_format if isinstance(value, int) else value


def bound(value: Any, args: Arguments, context: Context) -> Any:
    """The end of a slice; None: the end of the dimension."""
    return None if isinstance(value, int) and value >= sys.maxsize else value


KINDS: dict[str, Kind] = {
    "dim": dim,
    "new_dim": new_dim,
    "dims": dims,
    "dim_set": dim_set,
    "reduced": reduced,
    "flat": flat,
    "float": as_float,
    "bool": as_bool,
    "tuple": as_tuple,
    "unspaced": unspaced,
    "memory_format": memory_format,
    "end": bound,
    **{f"n{n}": repeated(n) for n in (1, 2, 3)},
    **{f"pad{n}": padding(n) for n in (1, 2, 3)},
    **{f"stride{n}": stride(n) for n in (1, 2, 3)},
}


# ---- fixes: arguments that depend on each other --------------------------------------------------


def no_sequences(args: Arguments, context: Context) -> None:
    """``x.shape[:2] + (c,)`` joins tuples; ``x.shape == y.shape`` compares them."""
    if "sequence" in (context.nature(args["input"]), context.nature(args["other"])):
        raise UndescribedError("an operator between tuples")


def commute(args: Arguments, context: Context) -> None:
    """``1 + x`` becomes ``x + 1``: the scalar is the second operand."""
    no_sequences(args, context)
    tensor_first = isinstance(args["input"], fx.Node | Attr)
    if not tensor_first and isinstance(args["other"], fx.Node | Attr):
        args["input"], args["other"] = args["other"], args["input"]


def unit_alpha(args: Arguments, context: Context) -> None:
    no_sequences(args, context)
    if isinstance(args["alpha"], int | float) and args["alpha"] == 1:
        args["alpha"] = 1


def addition(args: Arguments, context: Context) -> None:
    unit_alpha(args, context)
    if args["alpha"] == 1:
        commute(args, context)


def swapped_dims(args: Arguments, context: Context) -> None:
    pair = args["dim0"], args["dim1"]
    if all(isinstance(item, int) for item in pair):
        args["dim0"], args["dim1"] = sorted(pair)


def known_dim(args: Arguments, context: Context) -> None:
    if args["dim"] is None:
        raise UndescribedError("a softmax over a dimension that depends on the rank")


def slice_start(args: Arguments, context: Context) -> None:
    args["start"] = 0 if args["start"] is None else args["start"]
    args["step"] = 1 if args["step"] is None else args["step"]


def embedding(args: Arguments, context: Context) -> None:
    if args["max_norm"] is not None:
        raise UndescribedError("an embedding that renormalizes its weight in place")
    if args["padding_idx"] == -1:
        args["padding_idx"] = None


def pad(args: Arguments, context: Context) -> None:
    if args["mode"] == "constant":
        args["value"] = args["value"] or 0.0
    elif args["value"] is not None:
        args["value"] = None if args["value"] == 0 else args["value"]


def interpolate(args: Arguments, context: Context) -> None:
    rank = base_rank(args, context)
    if rank is not None:
        for name in ("size", "scale_factor"):
            value = args[name]
            scalar = isinstance(value, int | float) or (
                isinstance(value, fx.Node) and context.nature(value) == "scalar"
            )
            args[name] = (value,) * (rank - 2) if scalar else value
    if isinstance(args["scale_factor"], tuple):
        args["scale_factor"] = tuple(as_float(item, args, context) for item in args["scale_factor"])
    if args["size"] == ():
        args["size"] = None
    if args["mode"] in ("linear", "bilinear", "bicubic", "trilinear"):
        args["align_corners"] = bool(args["align_corners"])
    args["recompute_scale_factor"] = bool(args["recompute_scale_factor"])


def moved_dims(args: Arguments, context: Context) -> None:
    if len(args["source"]) != len(args["destination"]):
        raise UndescribedError("movedim of unequal lengths")


def device(args: Arguments, context: Context) -> None:
    if isinstance(args["device"], str):
        args["device"] = torch.device(args["device"])


def einops(args: Arguments, context: Context) -> None:
    """``"b  c->(b c)"`` becomes ``"b c -> (b c)"``; the sizes are sorted by name."""
    if not isinstance(args["pattern"], str):
        raise UndescribedError("a pattern that is no string")
    spaced = args["pattern"].replace("->", " -> ").replace("(", " ( ").replace(")", " ) ")
    text = " ".join(spaced.replace("...", " ... ").split())
    args["pattern"] = text.replace("( ", "(").replace(" )", ")")
    args["axes"] = tuple(sorted(args["axes"], key=lambda axis: str(axis[0])))


def recurrent(args: Arguments, context: Context) -> None:
    """Refuse the overloads for packed sequences, whose arguments have another order."""
    if not isinstance(args["has_biases"], bool) or not isinstance(args["params"], tuple):
        raise UndescribedError("a recurrent net over a packed sequence")


# ---- lowerings: one spelling, several ops --------------------------------------------------------


def extremum(name: str, pairwise: str) -> Lower:
    """``x.max()``, ``x.max(1)`` and ``torch.max(x, y)``."""

    def lower(args: Arguments, context: Context) -> tuple[str, Arguments]:
        other = args.pop("other")
        if isinstance(args["dim"], fx.Node | Attr):
            nature = context.nature(args["dim"])
            if nature is None:
                raise UndescribedError(f"{name} of something unknown")
            if nature == "tensor":
                other = args["dim"]
        if other is not None:
            return pairwise, {"input": args["input"], "other": other}
        return name, args

    return lower


def variance(name: str) -> Lower:
    """``x.var(False)``, ``x.var(1, False)`` and ``x.var(1, correction=0)``."""

    def lower(args: Arguments, context: Context) -> tuple[str, Arguments]:
        unbiased = args.pop("unbiased")
        if isinstance(args["dim"], bool):
            args["dim"], unbiased = None, args["dim"]
        if args["correction"] is None:
            args["correction"] = 0 if unbiased is False else 1
        if isinstance(args["correction"], float) and args["correction"].is_integer():
            args["correction"] = int(args["correction"])
        return name, args

    return lower


def reversed_subtraction(args: Arguments, context: Context) -> tuple[str, Arguments]:
    if isinstance(args["alpha"], int | float) and args["alpha"] == 1:
        return "sub", {"input": args["other"], "other": args["input"]}
    raise UndescribedError("rsub with alpha")


def narrow(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """A slice, if its end is a constant; a start below zero counts from the end."""
    start, length = args["start"], args["length"]
    if not (isinstance(start, int) and isinstance(length, int)):
        return "narrow", args
    end = None if start < 0 and start + length == 0 else start + length
    return "slice", {"input": args["input"], "dim": args["dim"], "start": start, "end": end}


def convolution(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """``aten.convolution`` serves every rank, and the transposed ones too."""
    rank = context.rank(args["weight"]) or context.rank(args["input"])
    count = len(args["stride"]) if rank is None else rank - 2
    transposed, output_padding = args.pop("transposed"), args.pop("output_padding")
    if transposed:
        return f"conv_transpose{count}d", {**args, "output_padding": output_padding}
    return f"conv{count}d", args


def feature_dropout(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """ATen's one op for dropout1d, dropout2d and dropout3d: the rank tells which."""
    rank = context.rank(args["input"])
    return f"dropout{rank - 2}d" if rank in (3, 4, 5) else "feature_dropout", args


def whole_size(args: Arguments, context: Context) -> tuple[str, Arguments]:
    return ("shape", {"input": args["input"]}) if args["dim"] is None else ("size", args)


def view(args: Arguments, context: Context) -> tuple[str, Arguments]:
    (first, *_) = args["shape"] or (None,)
    if isinstance(first, torch.dtype):
        raise UndescribedError("a view as another dtype")
    if isinstance(first, fx.Node) and (op := context.describe(first)) and op.name == "dtype":
        raise UndescribedError("a view as another dtype")
    return "view", args


def einsum(args: Arguments, context: Context) -> tuple[str, Arguments]:
    return "einsum", {**args, "operands": flat(args["operands"], args, context)}


def matrix_transpose(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """``x.t()`` and ``x.T``: one dimension stays as it is, two change places."""
    if context.rank(args["input"]) != 2:
        raise UndescribedError("a transposition of unknown rank")
    return "transpose", {"input": args["input"], "dim0": 0, "dim1": 1}


def to(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """``x.to(dtype)``, ``x.to(device, dtype)``, ``x.to(other)``, followed by two flags."""
    bound = {name: args[name] for name in ("input", "dtype", "device", "other", "memory_format")}
    flags = []
    for item in args["spec"]:
        if isinstance(item, bool):
            flags.append(item)
        elif item is not None:
            name = converted_to(item, context)
            if bound[name] is not None:
                raise UndescribedError("to with one argument twice")
            bound[name] = item
    for name, flag in zip(("non_blocking", "copy"), flags, strict=False):
        args[name] = flag
    if isinstance(bound["device"], str | int):
        bound["device"] = torch.device(bound["device"])
    return "to", {**bound, "copy": args["copy"], "non_blocking": args["non_blocking"]}


def converted_to(item: Any, context: Context) -> str:
    if isinstance(item, torch.dtype):
        return "dtype"
    if isinstance(item, str | int | torch.device):
        return "device"
    if context.nature(item) == "tensor":
        return "other"
    if isinstance(item, fx.Node):
        val, op = context.val(item), context.describe(item)
        if isinstance(val, torch.dtype) or (op is not None and op.name == "dtype"):
            return "dtype"
        if isinstance(val, torch.device) or (op is not None and op.name == "device"):
            return "device"
    raise UndescribedError("to something unknown")


def einops_reduce(args: Arguments, context: Context) -> tuple[str, Arguments]:
    """``einops.rearrange`` and ``einops.repeat`` call ``reduce``, which a trace may record."""
    moved = {"rearrange": "rearrange", "repeat": "einops_repeat"}.get(str(args["reduction"]))
    if moved is None:
        return "einops_reduce", args
    return moved, {name: value for name, value in args.items() if name != "reduction"}


def arange(args: Arguments, context: Context) -> tuple[str, Arguments]:
    if args["end"] is None:
        args["start"], args["end"] = 0, args["start"]
    return "arange", args
