"""Batching rules: how each op runs on all frames at once, and where its result has the samples.

Lanes of shape (N, ...) fold into one tensor of shape (N·T, ...). An op *folds* if its output on
that tensor is the lanes' outputs, folded the same way: it must treat each entry of dimension 0
independently. One table, one line an op, decides which do. An entry takes a :class:`Call` and
yields the reasons against folding it, in words.

As in JAX, a rule also says where the batch dimension goes. ``qkv.permute(2, 0, 3, 1, 4)`` moves the
samples to dimension 1, so it runs on (T, N, ...), with its dimensions shifted by one; ``[0]`` of
the result has them in dimension 0 again. Element-wise ops need no entry: they run on (T, N, ...),
where lanes broadcast with other operands as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

import torch
from torch import fx

from fxtemporal.ir.node_meta import needed_value, value_of
from fxtemporal.ir.ops import WHOLE, Attr, Op, Trait, ops_with
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.ir.values import rank, shape

__all__ = ["Batching", "Call", "How", "Origins", "batching"]

Origins: TypeAlias = Mapping[int, object]
"""``{dimension of a frame: where its entries come from}``; it always has dimension 0.

Only lanes of one origin fold together: their dimension 0 has the same size at any batch size.
"""


@dataclass(frozen=True)
class Call:
    """One op of a frame's body, and which of its inputs are lanes."""

    op: Op
    lanes: frozenset[fx.Node]
    samples: frozenset[fx.Node]
    """Nodes known to hold the size of dimension 0 of the lanes."""
    program: Program
    made: bool = False
    """True if dimension 0 of a lane may not be the sample dimension."""
    origins: Mapping[fx.Node, Origins] = field(default_factory=dict)
    """The origins of each lane; lanes that are not listed share one origin."""

    def origin(self) -> set[object]:
        """The origins of dimension 0 of all lanes."""
        return {self.origins.get(lane, _ONE)[0] for lane in self.lanes}

    def dims(self, value: Any) -> int | None:
        """The rank of an argument, 0 for a number; None for a tuple, or if it is not known."""
        return None if isinstance(value, tuple) and value else self.program.dims(value)

    def lane(self, name: str = "input") -> fx.Node | None:
        """The argument ``name`` if it is a lane, else None."""
        value = self.op.args.get(name)
        return value if isinstance(value, fx.Node) and value in self.lanes else None

    def rank(self, name: str = "input") -> int:
        node = self.lane(name)
        return (rank(node) if node is not None else None) or 0

    def entries(self, name: str) -> int | None:
        """The length of the tuple ``name``, which may be computed; None if it is not a tuple."""
        value = self.op.args[name]
        value = value_of(value) if isinstance(value, fx.Node) else value
        return len(value) if isinstance(value, tuple | list) else None

    def aligned(self, dimensions: int) -> bool:
        """True if an element-wise op with a result of that rank broadcasts nothing over samples.

        So all lanes have that rank, and all other operands a smaller one.
        """
        fixed = [self.dims(value) for value in self.op.args.values() if value not in self.lanes]
        return (
            dimensions > 0
            and all(rank(node) == dimensions for node in self.lanes)
            and all(dims is not None and dims < dimensions for dims in fixed)
        )

    def size_of_lane(self, number: fx.Node) -> int | None:
        """The value of ``number`` if it is a size of a lane, not of dimension 0; else None."""
        op = self.program.op(number)
        if op is None or op.name != "size" or op.args["dim"] == 0:
            return None
        return int(needed_value(number)) if op.args["input"] in self.lanes else None

    def only(self, *names: str) -> Iterator[str]:
        """Blockers unless exactly the arguments ``names`` are lanes."""
        expected = {self.lane(name) for name in names}
        if None in expected:
            yield "its input is the same for every frame, another argument is not"
        if not self.lanes <= expected:
            yield "an argument besides its input differs from frame to frame"


_ONE: Origins = {0: None}


class How(Enum):
    """How an op runs on frames: as (N·T, ...), (T, N, ...) or (T, ...), or on each separately."""

    FOLDED = auto()
    IN_FRONT = auto()
    BROADCAST = auto()
    """An element-wise op with the frames as dimension 0; other operands broadcast."""
    MAPPED = auto()
    """Through ``torch.vmap``."""


@dataclass(frozen=True)
class Batching:
    """How an op runs on all frames, and the ``origins`` of its result for one frame.

    ``arguments`` are the op's other arguments if the frames are a new dimension 0, so that its
    dimension 0 becomes dimension 1; None: they do not change.
    """

    call: Call
    how: How
    origins: Origins
    arguments: tuple[Any, ...] | None = None

    @property
    def origin(self) -> object:
        """The origin of dimension 0 of a frame."""
        return self.origins[0]


def batching(
    call: Call, own: object, dimensions: int, module: str, allowed: frozenset[Code] = frozenset()
) -> Batching | tuple[Reason, ...]:
    """How to run the op on all frames, or the reasons against it.

    Args:
        own: the origin of a dimension 0 that the op makes.
        dimensions: the rank of its result for one frame.
        module: the place of the call, for the reasons.
        allowed: codes of reasons to ignore.
    """
    if (arguments := _one_further(call)) is not None:
        return Batching(call, How.IN_FRONT, _moved_origins(call, own), arguments)
    reasons = list(_blockers(call, module, allowed))
    elementwise = Trait.ELEMENTWISE in call.op.traits
    origin = call.origin()
    if not reasons and not elementwise and len(origin) > 1:
        text = f"{module}: {call.op.name} joins frames of different sources"
        reasons.append(Reason(Code.UNSUPPORTED_OP, text))
    if reasons:
        return tuple(reasons)
    if _takes_samples(call):
        return Batching(call, How.IN_FRONT, {0: own})
    if elementwise and (len(origin) > 1 or not call.aligned(dimensions)):
        return Batching(call, How.BROADCAST, {0: own})
    return Batching(call, How.FOLDED, _moved_origins(call, own))


Blockers = Iterator[str]
Entry = Callable[[Call], Blockers]


def _blockers(call: Call, module: str, allowed: frozenset[Code]) -> Iterator[Reason]:
    """The reasons against running the op on frames folded into dimension 0."""
    op = call.op
    if op.random and Code.RANDOMNESS not in allowed:
        yield Reason(Code.RANDOMNESS, f"{module}: {op.name} draws random numbers for each frame")
        return
    training = op.args.get("training") if op.name == "batch_norm" else None
    training = training or (
        op.name == "instance_norm"
        and op.args.get("running_mean") is not None
        and op.args.get("use_input_stats")
    )
    if training and Code.TRAINING_BATCHNORM not in allowed:
        yield Reason(
            Code.TRAINING_BATCHNORM,
            f"{module}: in training mode it takes statistics of each frame by itself, and updates "
            "its running statistics once a frame; call model.eval() for inference",
        )
        return
    if Trait.ELEMENTWISE in op.traits:
        return
    entry = _TABLE.get(op.name)
    if entry is None:
        yield Reason(Code.UNSUPPORTED_OP, f"{module}: no batching rule for {op.name}")
        return
    for text in entry(call):
        code = Code.FIXED_BATCH if text in _FIXED else Code.UNSUPPORTED_OP
        yield Reason(code, f"{module}: {op.name}: {text}")


def _takes_samples(call: Call) -> bool:
    """Whether the op runs on single samples, (C, H, W), so that frames become its batch.

    Poolings are excluded: they treat each channel independently, so (T·C, H, W) works, even with
    no channels, where (T, 0, H, W) would be refused.
    """
    name = call.op.name
    if name in _SPATIAL and name.startswith("conv"):
        return call.rank() == _SPATIAL[name] + 1
    if name in ("layer_norm", "rms_norm"):
        return call.rank() == call.entries("normalized_shape")
    return name == "linear" and call.rank() == 1


def _one_further(call: Call) -> tuple[Any, ...] | None:
    """The op's other arguments if the frames are a new dimension 0, (T, ...).

    An op that works on dimension 0 of a lane works on dimension 1 of the stacked lanes. None if
    the op folds as it is, or cannot be shifted.
    """
    op = call.op
    if op.name not in _SHAPES or op.nodes() != (call.lane(),) or call.rank() == 0:
        return None
    arguments = [op.args[name] for name in _SHAPES[op.name]]
    touched = [d for a in arguments for d in (a if isinstance(a, tuple) else (a,))]
    if op.name == "flatten":
        touched = arguments[:1]
    if op.name == "permute" and touched[0] != 0:
        return ((0, *(dim + 1 for dim in touched)),)
    if op.name == "permute" or any(not isinstance(dim, int) or dim < 0 for dim in touched):
        return None
    if 0 not in touched:
        return None
    if op.name == "squeeze" and (shape(call.lane()) or (1,))[0] != 1:
        return None  # a batch of one would be dropped
    if op.name == "select":
        return (1, op.args["index"])
    return tuple(tuple(d + 1 for d in a) if isinstance(a, tuple) else a + 1 for a in arguments)


def _moved_origins(call: Call, own: object) -> Origins:
    """The origins of an op's result, which follow the dimensions of its input."""
    lane = call.lane()
    known = _ONE if lane is None else call.origins.get(lane, _ONE)
    alone = call.op.nodes() == (lane,) and not any(
        isinstance(a, Attr) for a in call.op.args.values()
    )
    if call.op.name == "item" or (Trait.ELEMENTWISE in call.op.traits and alone):
        return known
    if call.op.name not in _SHAPES:
        return {0: call.origin().pop()}
    after = list(_dimensions_after(call, range(call.rank())))
    moved = {after.index(dim): origin for dim, origin in known.items() if dim in after}
    return {0: own} | moved


def _dimensions_after(call: Call, dims: Sequence[int]) -> Iterator[int | None]:
    """For each dimension of a shape op's result: that of its input, or None for a new one."""
    op, args = call.op, [call.op.args.get(name) for name in _SHAPES[call.op.name]]
    given: Any = args[0]
    match op.name:
        case "permute":
            yield from given
        case "transpose":
            swapped = {args[0]: args[1], args[1]: args[0]}
            yield from (swapped.get(dim, dim) for dim in dims)
        case "unsqueeze":
            yield from (*dims[:given], None, *dims[given:])
        case "flatten":
            start, end = given, args[1] % len(dims)  # type: ignore[operator]
            yield from (*dims[:start], None if start != end else start, *dims[end + 1 :])
        case "select" | "unbind":
            yield from (dim for dim in dims if dim != given)
        case "squeeze":
            dropped = given if isinstance(given, tuple) else (given,)
            sizes = shape(call.lane()) or ()
            yield from (dim for dim in dims if dim not in dropped or sizes[dim] != 1)
        case _:
            yield from dims


_SHAPES = {
    "unsqueeze": ("dim",),
    "squeeze": ("dim",),
    "select": ("dim",),
    "unbind": ("dim",),
    "flatten": ("start_dim", "end_dim"),
    "transpose": ("dim0", "dim1"),
    "permute": ("dims",),
}
"""``{op that moves the dimensions of its input: its arguments that name dimensions}``."""

# -- the shapes of blockers ------------------------------------------------------------------------

_SIZED = "a size of its result is written out, and would be wrong for the folded batch"
_SQUEEZED = "squeeze() also drops a batch of one"
_FIXED = frozenset((_SIZED, _SQUEEZED))

_SPATIAL = {
    f"{name}{n}d": n
    for n in (1, 2, 3)
    for name in (
        "conv",
        "conv_transpose",
        "max_pool",
        "avg_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
    )
}


def _spatial(n: int) -> Entry:
    """Input (N, C, *n sizes); all other arguments are the same for all frames."""

    def entry(call: Call) -> Blockers:
        yield from call.only("input")
        if call.rank() not in (n + 2, n + 1):
            yield f"its input has {call.rank()} dimensions"

    return entry


def _at_least(dimensions: int, *names: str) -> Entry:
    """Dimension 0 is the batch if the input has at least ``dimensions`` dimensions."""

    def entry(call: Call) -> Blockers:
        yield from call.only(*(names or ("input",)))
        if call.rank((names or ("input",))[0]) < dimensions:
            yield f"its input has {call.rank()} dimensions, so dimension 0 is not a batch"

    return entry


def _not_over_samples(name: str = "dim") -> Entry:
    """Works along the dimensions ``name``, which must not include 0."""

    def entry(call: Call) -> Blockers:
        yield from call.only("input")
        dims = call.op.args.get(name)
        dims = dims if isinstance(dims, tuple) else (dims,)
        if any(not isinstance(dim, int) for dim in dims) or not dims:
            yield "it works over all dimensions, the batch among them"
        elif any(dim == 0 or dim < 0 for dim in dims):
            yield "it works over dimension 0"

    return entry


def _accumulated(call: Call) -> Blockers:
    """A running sum or extremum, not along dimension 0; its initial value must be a lane."""
    started = isinstance(call.op.args["initial"], fx.Node | Attr)
    yield from call.only("input", *(("initial",) if started else ()))
    if not isinstance(call.op.args["dim"], int) or call.op.args["dim"] == 0:
        yield "it works over dimension 0"


def _sliced(call: Call) -> Blockers:
    op = call.op
    whole = (op.args["start"], op.args["end"], op.args["step"]) == (0, None, 1)
    yield from call.only("input") if whole else _not_over_samples()(call)


def _joined(call: Call) -> Blockers:
    """cat and stack of lanes; a part that is the same for all frames is repeated for each.

    Such a part has as many samples as a frame at any batch size: cat and stack do not broadcast.
    """
    tensors = call.op.args["tensors"]
    if not isinstance(tensors, tuple) or not all(isinstance(t, fx.Node) for t in tensors):
        yield "it joins frames with a parameter"
    if call.op.args["dim"] == 0:
        yield "it works over dimension 0"


def _viewed(call: Call) -> Blockers:
    """view and reshape: the first size must be the lanes' own number of samples."""
    yield from call.only("input")
    node = call.lane()
    sizes = call.op.args["shape"]
    before = shape(node) if node is not None else None
    if before is None or not before or not isinstance(sizes, tuple) or not sizes:
        yield "its shape is not known"
        return
    first, rest = sizes[0], sizes[1:]
    if isinstance(first, fx.Node):
        if first not in call.samples:
            yield "its first size is not known to be that of the batch"
        return
    if first == -1:
        numbers = [call.size_of_lane(n) if isinstance(n, fx.Node) else n for n in rest]
        known = all(isinstance(n, int) and n >= 0 for n in numbers)
        if (
            not known
            or _product(numbers) != _product(before[1:])
            or any(n in call.samples for n in rest)
            or call.made
        ):
            yield "it moves elements between samples"
        return
    yield _SIZED


def _expanded(call: Call) -> Blockers:
    yield from call.only("input")
    sizes = call.op.args["size"]
    if not isinstance(sizes, tuple):
        yield "its size is that of another tensor"
    elif len(sizes) != call.rank():
        yield "it adds dimensions before the batch"
    elif sizes[0] != -1 and sizes[0] not in call.samples:
        yield _SIZED


def _repeated(call: Call) -> Blockers:
    yield from call.only("input")
    repeats = call.op.args.get("repeats")
    if not isinstance(repeats, tuple) or len(repeats) != call.rank() or repeats[0] != 1:
        yield "it repeats the batch"


def _flattened(call: Call) -> Blockers:
    yield from call.only("input")
    if call.op.args["start_dim"] == 0:
        yield "it flattens the batch"


def _permuted(call: Call) -> Blockers:
    yield from call.only("input")
    if call.op.args["dims"][0] != 0:
        yield "it moves dimension 0"


def _moved(*names: str) -> Entry:
    def entry(call: Call) -> Blockers:
        yield from call.only("input")
        for name in names:
            dims = call.op.args[name]
            if 0 in (dims if isinstance(dims, tuple) else (dims,)):
                yield "it moves dimension 0"

    return entry


def _squeezed(call: Call) -> Blockers:
    yield from call.only("input")
    dims = call.op.args.get("dim")
    if dims is None:
        yield _SQUEEZED
    elif 0 in (dims if isinstance(dims, tuple) else (dims,)):
        several = (shape(call.lane()) or (1,))[0] != 1
        yield _SQUEEZED if several else "it drops dimension 0"


def _indexed(call: Call) -> Blockers:
    yield from call.only("input")
    index = call.op.args["index"]
    if not index or index[0] != WHOLE:
        yield "it indexes dimension 0"
    elif any(isinstance(part, fx.Node) for part in index):
        yield "it indexes with a tensor"
    else:
        lists = [part for part in index if isinstance(part, tuple) and type(part[0]) is int]
        if lists and len(lists) + sum(type(part) is int for part in index) > 1:
            yield "several lists of indices may move dimension 0"


def _item(call: Call) -> Blockers:
    """One entry of the tuple that an op returns for each frame."""
    yield from call.only("input")


def _matrix_product(second: str) -> Entry:
    """A product of two matrices or vectors, the arguments ``input`` and ``second``."""

    def entry(call: Call) -> Blockers:
        left, right = call.op.args["input"], call.op.args[second]
        if left in call.lanes and right in call.lanes:
            if call.rank("input") < 3 or call.rank("input") != call.rank(second):
                yield "dimension 0 of its inputs is not a batch"
        elif left in call.lanes:
            if call.rank("input") < 2 or (call.dims(right) or 3) > 2:
                yield "dimension 0 of its input is not a batch"
        elif call.rank(second) < 3 or (call.dims(left) or 3) > 2:
            yield "dimension 0 of its input is not a batch"

    return entry


def _all_lanes(dimensions: int, *names: str) -> Entry:
    def entry(call: Call) -> Blockers:
        for name in names:
            if call.lane(name) is None:
                yield f"its {name} is the same for every frame"
            elif call.rank(name) < dimensions:
                yield f"its {name} has no batch dimension"

    return entry


def _attention(call: Call) -> Blockers:
    yield from _all_lanes(3, "query", "key", "value")(call)
    mask = call.op.args.get("attn_mask")
    if mask is not None and (mask in call.lanes or (call.dims(mask) or 3) > 2):
        yield "its mask has a batch dimension of its own"


def _heads(call: Call) -> Blockers:
    """nn.MultiheadAttention: (N, L, E) in, (N, L, E) and the weights (N, ...) out."""
    yield from _all_lanes(3, "query", "key", "value")(call)
    if not call.op.args["batch_first"]:
        yield "its dimension 0 is time: use batch_first=True"
    mask, padding = call.op.args["attn_mask"], call.op.args["key_padding_mask"]
    if mask is not None and (mask in call.lanes or (call.dims(mask) or 3) > 2):
        yield "its mask has a batch dimension of its own"
    if padding is not None and (padding not in call.lanes or call.dims(padding) != 2):
        yield "its padding mask is the same for every frame"


def _encoder(call: Call) -> Blockers:
    """nn.TransformerEncoder and its layer: (N, L, E)."""
    if call.lane("src") is None:
        yield "its input is the same for every frame, another argument is not"
    if not call.op.args["batch_first"]:
        yield "its dimension 0 is time: use batch_first=True"
    if call.rank("src") != 3:
        yield "its input has no batch dimension"
    mask = call.op.args.get("mask", call.op.args.get("src_mask"))
    if mask is not None and (mask in call.lanes or (call.dims(mask) or 3) > 2):
        yield "its mask has a batch dimension of its own"
    padding = call.op.args["src_key_padding_mask"]
    if padding is not None and (padding not in call.lanes or call.dims(padding) != 2):
        yield "its padding mask is the same for every frame"


def _layer_norm(call: Call) -> Blockers:
    yield from call.only("input")
    normalized = call.entries("normalized_shape")
    if normalized is None:
        yield "how many dimensions it normalizes is not known"
    elif normalized > call.rank():
        yield "its input has fewer dimensions than it normalizes"


def _padded(call: Call) -> Blockers:
    yield from call.only("input")
    pad = call.entries("pad")
    if pad is None or pad // 2 >= call.rank():
        yield "it pads dimension 0"


def _recurrent(call: Call) -> Blockers:
    yield from call.only("input")
    if not call.op.args.get("batch_first"):
        yield "its dimension 0 is time: use batch_first=True"
    if call.op.args.get("hx") is not None:
        yield "its initial state has no batch in dimension 0"
    if call.rank() != 3:
        yield "its input has no batch dimension"
    if call.op.args.get("training") and call.op.args.get("dropout"):
        yield "its dropout is active"


def _einops(call: Call) -> Blockers:
    yield from call.only("input")
    left, _, right = str(call.op.args["pattern"]).partition("->")
    first = re.match(r"\s*([A-Za-z_]\w*)\s", left + " ")
    if first is None or re.match(rf"\s*{first[1]}\s", right + " ") is None:
        yield "the first axis of its pattern is not the same on both sides"
    elif any(name == first[1] for name, _ in call.op.args.get("axes", ())):
        yield _SIZED


def _einsum(call: Call) -> Blockers:
    equation = str(call.op.args["equation"]).replace(" ", "")
    operands = call.op.args["operands"]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != len(operands) or not output:
        yield "its equation leaves out the result"
        return
    sample = output[0]
    for term, operand in zip(terms, operands, strict=True):
        if (operand in call.lanes) != (term[:1] == sample) or sample in term[1:]:
            yield "the first letter of its result is not the batch of every frame"
            return


_TABLE: Mapping[str, Entry] = {
    # convolution, pooling
    **{name: _spatial(n) for name, n in _SPATIAL.items()},
    "interpolate": _at_least(3),
    "pixel_shuffle": _at_least(4),
    "pixel_unshuffle": _at_least(4),
    "pad": _padded,
    # normalization
    "batch_norm": _at_least(2),
    "group_norm": _at_least(2),
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "instance_norm": _at_least(3),
    "local_response_norm": _at_least(3),
    "normalize": _not_over_samples(),
    # products
    "linear": _at_least(1),
    "embedding": _at_least(1),
    "matmul": _matrix_product("other"),
    "mm": _matrix_product("mat2"),
    "bmm": _all_lanes(3, "input", "mat2"),
    "einsum": _einsum,
    "prelu": _at_least(2),
    "glu": _not_over_samples(),
    "tril": _at_least(3),
    "triu": _at_least(3),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention": _heads,
    "transformer_encoder": _encoder,
    "transformer_encoder_layer": _encoder,
    **dict.fromkeys(ops_with(Trait.RECURRENT), _recurrent),
    # along dimensions
    **{
        name: _not_over_samples()
        for name in """
            softmax log_softmax sum mean amax amin max min prod var std argmax argmin norm nansum
            nanmean var_mean std_mean linalg_vector_norm logsumexp all any cumsum cumprod
            index_select select slice narrow chunk split unbind unfold sort argsort topk unflatten
        """.split()
    },
    "slice": _sliced,
    "flip": _not_over_samples("dims"),
    "roll": _not_over_samples("dims"),
    "running_maximum": _accumulated,
    "running_minimum": _accumulated,
    # shapes
    "cat": _joined,
    "stack": _joined,
    "view": _viewed,
    "reshape": _viewed,
    "flatten": _flattened,
    "expand": _expanded,
    "repeat": _repeated,
    "permute": _permuted,
    "transpose": _moved("dim0", "dim1"),
    "movedim": _moved("source", "destination"),
    "squeeze": _squeezed,
    "unsqueeze": _not_over_samples(),
    "getitem": _indexed,
    "item": _item,
    "rearrange": _einops,
    "einops_reduce": _einops,
    "einops_repeat": _einops,
}


def _product(sizes: Any) -> int:
    return int(torch.Size(sizes).numel())
