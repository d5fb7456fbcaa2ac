"""The ops, one line each: the canonical signature, and the functions that it describes.

A :class:`Row` describes its name, and the names in ``also``, in every namespace of ``spaces``:
``torch.add``, ``torch.nn.functional.relu``, ``Tensor.add``, ``Tensor.add_``, ``torch.relu_``,
``torch.ops.aten.add.*`` and ``torch.ops.aten.add_.*``. A :class:`Spelling` has another signature
than its row, or means another op. Annotations name kinds (see ``canonical.KINDS``). Arguments that
only a spelling has (``inplace``, ``cudnn_enabled``, ``_stacklevel``, ...) are dropped if they have
their default; ``inplace`` becomes the flag.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

import einops as einops_package
import torch
from torch.nn import functional as F

from fxtemporal.ir.guards import dimensions, length
from fxtemporal.ir.ops import canonical as form
from fxtemporal.ir.ops.canonical import Fix, Lower
from fxtemporal.ir.ops.indexing import index_tensor
from fxtemporal.ir.ops.op import Trait
from fxtemporal.ir.ops.signature import Arguments, Signature, parse
from fxtemporal.ir.running import running_maximum, running_minimum
from fxtemporal.support.torch_private.operators import NN, VF

__all__ = [
    "ATEN",
    "FUNCTIONS",
    "METHODS",
    "OPS",
    "ROWS",
    "SPELLINGS",
    "Row",
    "Spelling",
    "ops_with",
]

Callables = tuple[Callable[..., Any], ...]
Random = Callable[[Arguments], bool]

EVERYWHERE = "torch F Tensor aten"


@dataclass(frozen=True)
class Row:
    text: str
    also: str = ""
    spaces: str = EVERYWHERE
    functions: Callables = ()
    writing: Callables = ()
    """Operators that write their first argument: ``+=``."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    fix: Fix | None = None
    random: Random | None = None
    owns: bool = False
    """Whether its result never shares memory, however it is called: see ``_OWNING``."""
    traits: str = ""
    """The names of its traits (:class:`Trait`)."""

    @cached_property
    def signature(self) -> Signature:
        return parse(self.text)

    @property
    def name(self) -> str:
        return self.signature.name

    @cached_property
    def has(self) -> Trait:
        """The traits of the op."""
        return reduce(operator.or_, (Trait[t.upper()] for t in self.traits.split()), Trait(0))


@dataclass(frozen=True)
class Spelling:
    """Another way to call ``op``: ``text`` is the signature of ``names`` and ``functions``."""

    op: str
    text: str
    names: str = ""
    spaces: str = EVERYWHERE
    functions: Callables = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    lower: Lower | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    writes: bool = False

    @cached_property
    def signature(self) -> Signature:
        return parse(self.text)


def elementwise(*rows: Row) -> tuple[Row, ...]:
    return tuple(replace(row, traits=f"elementwise {row.traits}") for row in rows)


def always(args: Arguments) -> bool:
    return True


def dropping(args: Arguments) -> bool:
    return bool(args["training"] is not False and args["p"] != 0)


def dropping_between_layers(args: Arguments) -> bool:
    return bool(args["training"]) and args["dropout"] != 0 and args["num_layers"] != 1


def dropping_attention(args: Arguments) -> bool:
    return bool(args["dropout_p"] != 0)


def dropping_heads(args: Arguments) -> bool:
    return bool(args["training"]) and args["dropout"] != 0


DROPOUT = "p: float=0.5, training: bool=True, inplace: bool=False"


def convolutions(n: int) -> tuple[Row, ...]:
    sizes = f"stride: n{n}=1, padding: pad{n}=0"
    out = f"output_padding: n{n}=0, groups=1, dilation: n{n}=1"
    pool = f"input, kernel_size: n{n}, stride: stride{n}=None, padding: n{n}=0"
    batch = "" if n == 1 else ", divisor_override=None"
    traits = "spatial keeps_layout" if n == 3 else "spatial"
    rows = (
        Row(
            f"conv{n}d(input, weight, bias=None, {sizes}, dilation: n{n}=1, groups=1, "
            "padding_mode='zeros')"
        ),
        Row(f"conv_transpose{n}d(input, weight, bias=None, {sizes}, {out})"),
        Row(
            f"max_pool{n}d({pool}, dilation: n{n}=1, ceil_mode: bool=False)",
            functions=(getattr(F, f"_max_pool{n}d"),),
        ),
        Row(f"avg_pool{n}d({pool}, ceil_mode: bool=False, count_include_pad: bool=True{batch})"),
        Row(f"adaptive_avg_pool{n}d(input, output_size: n{n})"),
        # torch's and ATen's return the indices too
        Row(
            f"adaptive_max_pool{n}d(input, output_size: n{n})",
            spaces="F",
            functions=(getattr(F, f"_adaptive_max_pool{n}d"),),
        ),
    )
    return tuple(replace(row, traits=traits) for row in rows)


UNARY = (
    "acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 "
    "floor frac isfinite isinf isnan lgamma log log10 log1p log2 logical_not rad2deg "
    "reciprocal rsqrt sgn sigmoid sign signbit sin sinc sinh softsign sqrt square tan tanh "
    "tanhshrink trunc"
)
ACTIVATIONS = "relu selu silu mish hardswish hardsigmoid"
BINARY = "atan2 fmod copysign hypot nextafter xlogy gcd lcm floor_divide remainder"

_OWNING: tuple[Row, ...] = (
    # Layers
    *(row for n in (1, 2, 3) for row in convolutions(n)),
    Row("linear(input, weight, bias=None)", traits="dense"),
    Row("bilinear(input, input2, weight, bias=None)", renamed={"input1": "input"}),
    Row(
        "embedding(input, weight, padding_idx=None, max_norm=None, norm_type: float=2.0, "
        "scale_grad_by_freq: bool=False, sparse: bool=False)",
        spaces="F aten",
        renamed={"indices": "input"},
        fix=form.embedding,
    traits="dense"),
    Row(
        "batch_norm(input, running_mean, running_var, weight=None, bias=None, "
        "training: bool=False, momentum: float=0.1, eps: float=1e-5)",
        spaces="F aten",
    traits="normalizes keeps_layout"),
    Row(
        "instance_norm(input, running_mean=None, running_var=None, weight=None, bias=None, "
        "use_input_stats: bool=True, momentum: float=0.1, eps: float=1e-5)",
        spaces="F aten",
    traits="normalizes keeps_layout"),
    Row("layer_norm(input, normalized_shape: tuple, weight=None, bias=None, eps: float=1e-5)",
        traits="normalizes makes_contiguous"),
    Row("group_norm(input, num_groups, weight=None, bias=None, eps: float=1e-5)",
        traits="normalizes keeps_layout"),
    Row("rms_norm(input, normalized_shape: tuple, weight=None, eps: float=None)",
        traits="normalizes"),
    Row(
        "local_response_norm(input, size, alpha: float=1e-4, beta: float=0.75, k: float=1.0)",
        spaces="F",
    ),
    Row("normalize(input, p: float=2.0, dim: dim=1, eps: float=1e-12)", spaces="F"),
    # Element by element
    *elementwise(
        *(Row(f"{name}(input)") for name in UNARY.split()),
        *(Row(f"{name}(input, inplace: bool=False)") for name in ACTIVATIONS.split()),
        Row("neg(input)", also="negative", functions=(operator.neg,)),
        Row("abs(input)", also="absolute", functions=(operator.abs, builtins.abs)),
        Row("bitwise_not(input)", functions=(operator.invert,)),
        Row("round(input, *, decimals=0)"),
        Row("log_sigmoid(input)", also="logsigmoid"),
        Row("hardtanh(input, min_val: float=-1.0, max_val: float=1.0, inplace: bool=False)"),
        Row("leaky_relu(input, negative_slope: float=0.01, inplace: bool=False)"),
        Row("elu(input, alpha: float=1.0, inplace: bool=False)"),
        Row("celu(input, alpha: float=1.0, inplace: bool=False)"),
        Row("gelu(input, *, approximate='none')"),
        Row("softplus(input, beta: float=1.0, threshold: float=20.0)"),
        Row("hardshrink(input, lambd: float=0.5)"),
        Row("softshrink(input, lambd: float=0.5)"),
        Row("threshold(input, threshold: float, value: float, inplace: bool=False)"),
        Row("clamp(input, min=None, max=None)", also="clip"),
        Row("nan_to_num(input, nan: float=None, posinf: float=None, neginf: float=None)"),
        Row("pow(input, exponent)", functions=(operator.pow,), writing=(operator.ipow,)),
        Row(
            "add(input, other, *, alpha=1)",
            functions=(operator.add,),
            writing=(operator.iadd,),
            fix=form.addition,
        ),
        Row(
            "sub(input, other, *, alpha=1)",
            also="subtract",
            functions=(operator.sub,),
            writing=(operator.isub,),
            fix=form.unit_alpha,
        ),
        Row(
            "mul(input, other)",
            also="multiply",
            functions=(operator.mul,),
            writing=(operator.imul,),
            fix=form.commute,
        ),
        Row(
            "div(input, other, *, rounding_mode=None)",
            also="divide true_divide",
            functions=(operator.truediv,),
            writing=(operator.itruediv,),
        ),
        *(Row(f"{name}(input, other)") for name in BINARY.split()),
        *(
            Row(f"{name}(input, other)", fix=form.commute)
            for name in ("maximum", "minimum", "fmax", "fmin")
        ),
        *(
            Row(f"logical_{name}(input, other)", fix=form.commute)
            for name in ("and", "or", "xor")
        ),
        *(
            Row(f"{name}(input, other)", also=also, functions=(function,), fix=fix)
            for name, also, function, fix in (
                ("eq", "", operator.eq, form.commute),
                ("ne", "not_equal", operator.ne, form.commute),
                ("lt", "less", operator.lt, form.no_sequences),
                ("le", "less_equal", operator.le, form.no_sequences),
                ("gt", "greater", operator.gt, form.no_sequences),
                ("ge", "greater_equal", operator.ge, form.no_sequences),
            )
        ),
        *(
            Row(f"bitwise_{name}(input, other)", functions=(function,), writing=(writing,), fix=fix)
            for name, function, writing, fix in (
                ("and", operator.and_, operator.iand, form.commute),
                ("or", operator.or_, operator.ior, form.commute),
                ("xor", operator.xor, operator.ixor, form.commute),
                ("left_shift", operator.lshift, operator.ilshift, None),
                ("right_shift", operator.rshift, operator.irshift, None),
            )
        ),
        Row("where(condition, input, other)", spaces="torch aten"),
        Row("masked_fill(input, mask, value)"),
        Row("lerp(input, end, weight)"),
        Row("addcmul(input, tensor1, tensor2, *, value=1)"),
        Row("addcdiv(input, tensor1, tensor2, *, value=1)"),
    ),
    # Almost element by element
    Row("glu(input, dim: dim=-1)"),
    Row("prelu(input, weight)"),
    Row("tril(input, diagonal=0)"),
    Row("triu(input, diagonal=0)"),
    Row("copy(input, src)", spaces="Tensor aten"),
    # Over dimensions
    Row("softmax(input, dim: dim, dtype=None)", spaces="torch Tensor aten", fix=form.known_dim,
        traits="makes_contiguous"),
    Row("log_softmax(input, dim: dim, dtype=None)", spaces="torch Tensor aten", fix=form.known_dim,
        traits="makes_contiguous"),
    *(
        Row(f"{name}(input, dim: reduced=None, keepdim: bool=False, *, dtype=None)")
        for name in ("sum", "mean", "prod", "nansum", "nanmean")
    ),
    *(
        Row(f"{name}(input, dim: reduced=None, keepdim: bool=False)")
        for name in ("amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "all", "any")
    ),
    *(
        Row(
            f"{name}(input, dim: reduced=None, *, correction=None, keepdim: bool=False)",
            spaces="",
        )
        for name in ("var", "std", "var_mean", "std_mean")
    ),
    *(
        Row(f"{function.__name__}(input, dim: dim, initial=None)", spaces="",
            functions=(function,))
        for function in (running_maximum, running_minimum)
    ),
    Row("norm(input, p='fro', dim: reduced=None, keepdim: bool=False, dtype=None)", spaces="torch "
        "Tensor"),
    Row(
        "linalg_vector_norm(input, ord: float=2.0, dim: reduced=None, keepdim: bool=False, *, "
        "dtype=None)",
        functions=(torch.linalg.vector_norm,),
    ),
    *(Row(f"{name}(input, dim: dim, *, dtype=None)") for name in ("cumsum", "cumprod")),
    Row("topk(input, k, dim: dim=-1, largest: bool=True, sorted: bool=True)"),
    Row("sort(input, dim: dim=-1, descending: bool=False, stable: bool=False)"),
    Row("argsort(input, dim: dim=-1, descending: bool=False, stable: bool=False)"),
    # Products
    Row("matmul(input, other)", functions=(operator.matmul,), traits="dense"),
    Row("bmm(input, mat2)", traits="dense"),
    Row("mm(input, mat2)", traits="dense"),
    Row("mv(input, vec)"),
    Row("dot(input, tensor)"),
    Row("addmm(input, mat1, mat2, *, beta=1, alpha=1)", traits="dense"),
    Row("baddbmm(input, batch1, batch2, *, beta=1, alpha=1)"),
    Row(
        "scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p: float=0.0, "
        "is_causal: bool=False, scale: float=None, enable_gqa: bool=False)",
        spaces="F aten",
        random=dropping_attention,
    ),
    # Parts
    Row("index_select(input, dim: dim, index)", traits="cuts"),
    Row("gather(input, dim: dim, index, *, sparse_grad: bool=False)"),
    Row("stack(tensors, dim: new_dim=0)", traits="moves"),
    Row("cat(tensors, dim: dim=0)", also="concat concatenate", traits="moves keeps_layout"),
    # Shapes
    Row("repeat(input, *repeats: flat)"),
    Row("repeat_interleave(input, repeats, dim: dim=None, *, output_size=None)"),
    Row("tile(input, *dims: flat)"),
    Row("flip(input, *dims: dim_set)"),
    Row("roll(input, shifts: tuple, dims: dims=())"),
    Row("pad(input, pad: flat, mode='constant', value: float=None)", fix=form.pad,
        traits="keeps_layout"),
    Row(
        "interpolate(input, size=None, scale_factor=None, mode='nearest', align_corners=None, "
        "recompute_scale_factor=None, antialias: bool=False)",
        spaces="F",
        fix=form.interpolate,
    traits="makes_contiguous"),
    # Memory
    Row("clone(input, *, memory_format: memory_format=None)", traits="elementwise moves passes_on"),
    # Facts about a tensor
    Row("size(input, dim: dim)", spaces="", traits="fact dense"),
    Row("shape(input)", spaces="", traits="fact"),
    Row("numel(input)", also="nelement", spaces="torch Tensor aten", traits="fact counts"),
    Row("length(input)", spaces="", functions=(length,), traits="fact counts"),
    Row("dim(input)", also="ndimension", spaces="Tensor aten", functions=(dimensions,),
        traits="fact"),
    Row("dtype(input)", spaces="", traits="fact"),
    Row("device(input)", spaces="", traits="fact"),
    # Recurrent nets and attention
    *(
        Row(
            f"{name}(input, hx, params, has_biases: bool, num_layers, dropout: float, "
            f"training: bool, bidirectional: bool, batch_first: bool{nested})",
            spaces="torch aten",
            fix=form.recurrent,
            random=dropping_between_layers,
            traits="recurrent",
        )
        for name, nested in (
            ("lstm", ", nested: bool=False"),
            ("gru", ""),
            ("rnn_tanh", ""),
            ("rnn_relu", ""),
        )
    ),
    *(
        Row(f"{name}(input, hx, w_ih, w_hh, b_ih=None, b_hh=None)", spaces="torch aten")
        for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    ),
    Row(
        "multi_head_attention(query, key, value, key_padding_mask=None, need_weights: bool=True, "
        "attn_mask=None, average_attn_weights: bool=True, is_causal: bool=False, *, embed_dim, "
        "num_heads, in_proj_weight, in_proj_bias, q_proj_weight, k_proj_weight, v_proj_weight, "
        "out_proj_weight, out_proj_bias, bias_k, bias_v, add_zero_attn: bool, dropout: float, "
        "training: bool, batch_first: bool)",
        spaces="",
        random=dropping_heads,
    ),
    # Creation
    *(
        Row(f"{name}(*size: flat, dtype=None, device=None)", spaces="torch aten", fix=form.device,
            random=random)
        for name, random in (
            *((name, None) for name in ("zeros", "ones", "empty")),
            ("rand", always),
            ("randn", always),
        )
    ),
    *(
        Row(f"new_{name}(input, *size: flat, dtype=None, device=None)", spaces="Tensor aten",
            fix=form.device)
        for name in ("zeros", "ones", "empty")
    ),
    Row("full(size: flat, fill_value, *, dtype=None, device=None)", fix=form.device,
        spaces="torch aten"),
    Row("new_full(input, size: flat, fill_value, *, dtype=None, device=None)", fix=form.device,
        spaces="Tensor aten"),
    Row("arange(start, end=None, step=1, *, dtype=None, device=None)", spaces="", fix=form.device),
    *(
        Row(f"{name}_like(input, *, dtype=None, device=None, memory_format: memory_format=None)",
            spaces="torch aten", fix=form.device, random=random)
        for name, random in (
            *((name, None) for name in ("zeros", "ones", "empty")),
            ("rand", always),
            ("randn", always),
        )
    ),
    Row("full_like(input, fill_value, *, dtype=None, device=None, "
        "memory_format: memory_format=None)", spaces="torch aten", fix=form.device),
    Row("bernoulli(input, p=None)", random=always),
    Row("multinomial(input, num_samples, replacement: bool=False)", random=always),
    Row("normal(input, mean: float=0.0, std: float=1.0)", spaces="Tensor aten", random=always),
    Row("uniform(input, from_=0.0, to=1.0)", spaces="Tensor", random=always),
)  # fmt: skip
"""Ops whose result never shares memory with an input, whatever their arguments."""

_SHARING: tuple[Row, ...] = (
    # Layers
    Row(f"dropout(input, {DROPOUT})", random=dropping, traits="elementwise passes_on"),
    *(
        Row(f"dropout{n}d(input, {DROPOUT})", spaces="F", random=dropping,
            traits="elementwise passes_on per_channel")
        for n in (1, 2, 3)
    ),
    *(
        Row(f"{name}(input, p: float=0.5, training: bool=False, inplace: bool=False)",
            random=dropping, traits="elementwise passes_on")
        for name in ("alpha_dropout", "feature_alpha_dropout")
    ),
    Row("feature_dropout(input, p: float, training: bool)", spaces="", random=dropping,
        traits="elementwise passes_on per_channel"),
    # Element-wise
    Row("positive(input)", functions=(operator.pos,), traits="elementwise"),
    # Products
    Row("einsum(equation: unspaced, operands: flat)", spaces="aten",
        renamed={"tensors": "operands"}),
    # Parts
    Row("select(input, dim: dim, index)", traits="moves same_memory cuts restrides"),
    Row("slice(input, dim: dim=0, start=None, end: end=None, step=1)", spaces="aten",
        fix=form.slice_start, traits="moves same_memory cuts restrides"),
    Row("narrow(input, dim: dim, start, length)", spaces="", traits="restrides"),
    Row("getitem(input, index)", spaces="", traits="moves cuts restrides"),
    Row("item(input, index)", spaces="", traits="moves restrides"),
    Row("unbind(input, dim: dim=0)", traits="moves same_memory cuts restrides"),
    Row(
        "split(input, sizes, dim: dim=0)",
        also="split_with_sizes",
        renamed={
            "tensor": "input",
            **dict.fromkeys(("split_size", "split_sizes", "split_size_or_sections"), "sizes"),
        },
    traits="moves same_memory cuts restrides"),
    Row("chunk(input, chunks, dim: dim=0)", traits="moves same_memory cuts restrides"),
    # Shapes
    Row("view(input, *shape: flat)", spaces="aten", renamed={"size": "shape"},
        traits="moves moves_axes same_memory writes_sizes"),
    Row("reshape(input, *shape: flat)", traits="moves moves_axes writes_sizes"),
    Row("view_as(input, other)"),
    Row("reshape_as(input, other)"),
    Row("flatten(input, start_dim: dim=0, end_dim: dim=-1)",
        traits="moves moves_axes same_memory dense"),
    Row("unflatten(input, dim: dim, sizes: flat)",
        traits="moves moves_axes same_memory writes_sizes"),
    Row("unfold(input, dim: dim, size, step)", spaces="Tensor aten", renamed={"dimension": "dim"},
        traits="moves"),
    Row("permute(input, *dims: dims)", traits="moves moves_axes same_memory restrides"),
    Row("movedim(input, source: dims, destination: dims)", also="moveaxis", fix=form.moved_dims,
        traits="moves moves_axes same_memory restrides"),
    Row("transpose(input, dim0: dim, dim1: dim)", also="swapaxes swapdims", fix=form.swapped_dims,
        renamed={"axis0": "dim0", "axis1": "dim1"},
            traits="moves moves_axes same_memory restrides"),
    Row("squeeze(input, dim: dim_set=None)", traits="moves moves_axes same_memory restrides"),
    Row("unsqueeze(input, dim: new_dim)", traits="moves moves_axes same_memory restrides"),
    Row("expand(input, *size: flat)", traits="moves same_memory restrides writes_sizes"),
    Row("expand_as(input, other)"),
    Row("broadcast_to(input, size: flat)"),
    Row("pixel_shuffle(input, upscale_factor)", traits="picks_layouts"),
    Row("pixel_unshuffle(input, downscale_factor)", traits="picks_layouts"),
    Row("channel_shuffle(input, groups)"),
    # Memory
    Row("identity(input)", spaces="", traits="elementwise moves same_memory passes_on"),
    Row("contiguous(input, *, memory_format: memory_format=0)",
        traits="elementwise moves moves_axes passes_on reformats dense"),
    Row("detach(input)", traits="elementwise moves same_memory restrides"),
    Row(
        "to(input, *, dtype=None, device=None, other=None, copy: bool=False, "
        "non_blocking: bool=False, memory_format: memory_format=None)",
        spaces="",
    traits="elementwise moves reformats"),
    # Recurrent nets and attention
    *(
        Row(
            f"{name}(src, {mask}=None, src_key_padding_mask=None, is_causal=None, *, layers, "
            "parameters, training: bool, dropout: float, batch_first: bool)",
            spaces="",
            random=dropping_heads,
        )
        for name, mask in (
            ("transformer_encoder", "mask"),
            ("transformer_encoder_layer", "src_mask"),
        )
    ),
    # einops
    Row("rearrange(input, pattern, axes)", spaces="", fix=form.einops, traits="moves moves_axes"),
    Row("einops_repeat(input, pattern, axes)", spaces="", fix=form.einops),
    Row("einops_reduce(input, pattern, reduction, axes)", spaces="", fix=form.einops),
)  # fmt: skip
"""Views, and ops that may return their input itself: dropout in eval mode, ``+x``, ``to``.

Some do so on one device only, or for one pattern: ``einsum("ij->ji", x)``.
"""

ROWS: tuple[Row, ...] = (*(replace(row, owns=True) for row in _OWNING), *_SHARING)

_UNBIASED = "input, dim=None, unbiased=None, keepdim=False, *, correction=None"
_NORM = "running_mean, running_var"

SPELLINGS: tuple[Spelling, ...] = (
    *(
        Spelling(name, f"{name}(input, dim=None, _stacklevel=3, dtype=None)", name, "F")
        for name in ("softmax", "log_softmax")
    ),
    Spelling("embedding", "embedding(weight, input, padding_idx=-1, scale_grad_by_freq=False, "
             "sparse=False)", "embedding", "torch"),
    Spelling("batch_norm", f"batch_norm(input, weight, bias, {_NORM}, training, momentum, eps, "
             "cudnn_enabled)", "batch_norm", "torch"),
    Spelling("instance_norm", f"instance_norm(input, weight, bias, {_NORM}, use_input_stats, "
             "momentum, eps, cudnn_enabled)", "instance_norm", "torch"),
    Spelling("hardtanh", "relu6(input, inplace=False)", "relu6",
             preset={"min_val": 0.0, "max_val": 6.0}),
    Spelling("feature_dropout", "feature_dropout(input, p, training)", "feature_dropout",
             "torch aten", lower=form.feature_dropout),
    Spelling("", "convolution(input, weight, bias, stride, padding, dilation, transposed, "
             "output_padding, groups)", "convolution", "torch aten", lower=form.convolution),
    *(
        Spelling(name, f"{name}(input, dim=None, keepdim=False, other=None)", name,
                 lower=form.extremum(name, f"{name}imum"))
        for name in ("max", "min")
    ),
    *(
        Spelling(name, f"{name}({_UNBIASED})", name, lower=form.variance(name))
        for name in ("var", "std", "var_mean", "std_mean")
    ),
    Spelling("clamp", "clamp_min(input, min)", "clamp_min"),
    Spelling("clamp", "clamp_max(input, max)", "clamp_max"),
    Spelling("sub", "rsub(input, other, *, alpha=1)", "rsub", "torch aten",
             lower=form.reversed_subtraction),
    Spelling("floor_divide", "floordiv(input, other)", functions=(operator.floordiv,)),
    Spelling("floor_divide", "ifloordiv(input, other)", functions=(operator.ifloordiv,),
             writes=True),
    Spelling("remainder", "mod(input, other)", functions=(operator.mod,)),
    Spelling("remainder", "imod(input, other)", functions=(operator.imod,), writes=True),
    Spelling("where", "where(input, condition, other)", "where", "Tensor"),
    Spelling("softmax", "softmax2d(input)", preset={"dim": -3}),
    Spelling("einsum", "einsum(equation, *operands)", "einsum", "torch", lower=form.einsum),
    Spelling("getitem", "index(input, indices)", "index", "aten", lower=index_tensor),
    Spelling("narrow", "narrow(input, dim: dim, start, length)", "narrow", lower=form.narrow),
    Spelling("view", "view(input, *shape)", "view", "Tensor", lower=form.view,
             renamed={"size": "shape"}),
    Spelling("transpose", "t(input)", "t", lower=form.matrix_transpose),
    Spelling("size", "size(input, dim=None)", "size sym_size", "Tensor aten",
             lower=form.whole_size),
    # Another dtype or device
    Spelling("to", "to(input, *spec, dtype=None, device=None, other=None, non_blocking=False, "
             "copy=False, memory_format=None)", "to", lower=form.to),
    Spelling("to", "_to_copy(input, *, dtype=None, device=None, non_blocking=False, "
             "memory_format=None)", "_to_copy", "aten", preset={"copy": True}),
    Spelling("to", "type_as(input, other)", "type_as"),
    *(
        Spelling("to", f"{name}(input, *, memory_format=None)", name, "Tensor",
                 preset={"dtype": dtype})
        for name, dtype in (
            ("float", torch.float32), ("double", torch.float64), ("half", torch.float16),
            ("bfloat16", torch.bfloat16), ("long", torch.int64), ("int", torch.int32),
            ("bool", torch.bool),
        )
    ),
    Spelling("to", "cpu(input, *, memory_format=None)", "cpu", "Tensor",
             preset={"device": torch.device("cpu")}),
    # Padding and resizing in ATen
    Spelling("pad", "constant_pad_nd(input, pad, value=0)", "constant_pad_nd", "torch aten"),
    *(
        Spelling("pad", f"{mode}_pad(input, pad)", " ".join(f"{aten}{n}d" for n in (1, 2, 3)),
                 "aten", renamed={"padding": "pad"}, preset={"mode": mode})
        for mode, aten in (("reflect", "reflection_pad"), ("replicate", "replication_pad"))
    ),
    *(
        Spelling("interpolate", f"{name}(input, size, {corners}scale_factor)", name, "aten",
                 renamed={"output_size": "size", "scale_factors": "scale_factor"},
                 preset={"mode": mode})
        for name, mode, corners in (
            *((f"upsample_nearest{n}d", "nearest", "") for n in (1, 2, 3)),
            *((f"_upsample_nearest_exact{n}d", "nearest-exact", "") for n in (1, 2, 3)),
            ("upsample_linear1d", "linear", "align_corners, "),
            ("upsample_bilinear2d", "bilinear", "align_corners, "),
            ("upsample_trilinear3d", "trilinear", "align_corners, "),
            ("upsample_bicubic2d", "bicubic", "align_corners, "),
        )
    ),
    # einops
    Spelling("rearrange", "rearrange(input, pattern, **axes)",
             functions=(einops_package.rearrange,), renamed={"tensor": "input"}),
    Spelling("einops_repeat", "repeat(input, pattern, **axes)",
             functions=(einops_package.repeat,), renamed={"tensor": "input"}),
    Spelling("einops_reduce", "reduce(input, pattern, reduction, **axes)",
             functions=(einops_package.reduce,), renamed={"tensor": "input"},
             lower=form.einops_reduce),
    # Creation
    Spelling("arange", "arange(start, end=None, step=1, *, dtype=None, device=None)", "arange",
             "torch aten", lower=form.arange),
)  # fmt: skip


def _functions() -> dict[Any, Spelling]:
    """``{function: its spelling}`` for every callable that an fx graph may call."""
    found: dict[Any, Spelling] = {}
    for spelling in (*_row_spellings(), *SPELLINGS):
        for function in spelling.functions:
            found[function] = spelling
        for name in spelling.names.split():
            for space in spelling.spaces.split():
                for owner in OWNERS.get(space, ()):
                    if callable(named := getattr(owner, name, None)):
                        found[named] = spelling
    return found


def _named(space: str) -> dict[str, Spelling]:
    """``{name: its spelling}`` for methods or ATen packets."""
    return {
        name: spelling
        for spelling in (*_row_spellings(), *SPELLINGS)
        if space in spelling.spaces.split()
        for name in spelling.names.split()
        if space == "aten" or hasattr(torch.Tensor, name)
    }


def _row_spellings() -> list[Spelling]:
    """The spellings of the rows: each name, and the name with ``_`` appended, which writes."""
    found = []
    for row in ROWS:
        names = f"{row.name} {row.also}"
        writing = " ".join(f"{name}_" for name in names.split())
        for spelled, functions, writes in (
            (names, row.functions, False),
            (writing, row.writing, True),
        ):
            found.append(
                Spelling(
                    op=row.name,
                    text=row.text,
                    names=spelled,
                    spaces=row.spaces,
                    functions=functions,
                    renamed=row.renamed,
                    writes=writes,
                )
            )
    return found


OWNERS: dict[str, tuple[Any, ...]] = {
    "torch": (torch, VF),
    "F": (F, NN),
    "Tensor": (torch.Tensor,),
}

FUNCTIONS: dict[Any, Spelling] = _functions()
METHODS: dict[str, Spelling] = _named("Tensor")
ATEN: dict[str, Spelling] = _named("aten")
OPS: dict[str, Row] = {row.name: row for row in ROWS}


def ops_with(trait: Trait) -> frozenset[str]:
    """The names of the ops that have ``trait``."""
    return frozenset(row.name for row in ROWS if trait in row.has)
