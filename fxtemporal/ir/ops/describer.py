"""Describes a graph node as an :class:`~fxtemporal.ir.ops.Op`. Only this reads ``node.target``."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from fxtemporal.ir.node_meta import value_of
from fxtemporal.ir.ops import indexing
from fxtemporal.ir.ops.canonical import KINDS, Nature
from fxtemporal.ir.ops.modules import MODULES, bind_module, overridden
from fxtemporal.ir.ops.op import Attr, Op
from fxtemporal.ir.ops.signature import IGNORED, Arguments, UndescribedError, bind_schema
from fxtemporal.ir.ops.table import ATEN, FUNCTIONS, METHODS, OPS, Spelling
from fxtemporal.support.torch_private.fake_tensors import FakeTensor
from fxtemporal.support.torch_private.operators import OpOverload

__all__ = ["Blocker", "Describer", "blocked", "describe"]

Blocker = Literal["hooked", "parametrized", "subclass"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

SEQUENCES = frozenset(
    {
        "split",
        "chunk",
        "unbind",
        "shape",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "lstm_cell",
        "multi_head_attention",
        "topk",
        "sort",
        "var_mean",
        "std_mean",
    }
)
SCALARS = frozenset({"size", "dim", "numel", "dtype", "device"})
ARITHMETIC = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "floor_divide",
        "remainder",
        "pow",
        "neg",
        "positive",
        "abs",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_not",
        "bitwise_left_shift",
        "bitwise_right_shift",
    }
)
DEPTH = 4
"""How many producers to follow if no ``meta["val"]`` says what a node is."""


def describe(node: fx.Node, root: nn.Module) -> Op | None:
    """``Describer(root)(node)``: for many nodes, keep the describer."""
    return Describer(root)(node)


def blocked(node: fx.Node, root: nn.Module) -> Blocker | None:
    """Why the module that a node calls is not described although its type is known.

    ``"hooked"``: it carries hooks. ``"parametrized"``: a weight is computed at every call.
    ``"subclass"``: it inherits from a known type, or a method is replaced on the instance.
    """
    if node.op != "call_module":
        return None
    module = _module(node, root)
    if module is None or not isinstance(module, tuple(MODULES)):
        return None
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "hooked"
    out = getattr(module, "out_proj", None) if isinstance(module, nn.MultiheadAttention) else None
    if is_parametrized(module) or (out is not None and is_parametrized(out)):
        return "parametrized"
    if type(module) not in MODULES or overridden(module):
        return "subclass"
    if out is not None and type(out) is not NonDynamicallyQuantizableLinear:
        return "subclass"
    return None


def _module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    try:
        return root.get_submodule(str(node.target))
    except AttributeError:
        return None


class Describer:
    """Describes the nodes of graphs over one root module.

    It holds a table of the root's parameters, and rebuilds it if a tensor is missing or has another
    name by now.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._names: dict[int, tuple[torch.Tensor, str | None]] = {}
        self._depth = 0
        self._producers: dict[tuple[fx.Node, int], tuple[Op | None, Nature | None]] = {}

    def __call__(self, node: fx.Node) -> Op | None:
        """The op that a node computes; None if it is not known."""
        if self._depth == 0:
            self._producers.clear()  # the graph may have changed since
        try:
            return self._describe(node)
        except UndescribedError:
            return None

    def _describe(self, node: fx.Node) -> Op:
        if node.op == "call_module":
            return self._module(node)
        if node.op == "call_method":
            if self.nature(self.value(node.args[0])) == "sequence":
                raise UndescribedError("a method of a tuple")
            return self._spelled(METHODS.get(str(node.target)), node)
        if node.op != "call_function":
            raise UndescribedError(f"{node.op} is no op")
        if node.target is operator.getitem:
            return self._finish(*indexing.getitem(node.args[0], node.args[1], self))
        if node.target is getattr:
            return self._finish(*indexing.attribute(node.args[0], node.args[1], self))
        if isinstance(node.target, OpOverload):
            namespace, _, name = node.target._schema.name.partition("::")
            return self._spelled(ATEN.get(name) if namespace == "aten" else None, node)
        return self._spelled(FUNCTIONS.get(node.target), node)

    def _module(self, node: fx.Node) -> Op:
        module = _module(node, self.root)
        row = None if module is None else MODULES.get(type(module))
        if module is None or row is None or blocked(node, self.root) is not None:
            raise UndescribedError(f"the module {node.target}")
        args = bind_module(module, row, node.args, node.kwargs, self)
        return self._finish(row.name(module), self._values(args))

    def _spelled(self, spelling: Spelling | None, node: fx.Node) -> Op:
        if spelling is None:
            raise UndescribedError(str(node.target))
        signature = spelling.signature
        if isinstance(node.target, OpOverload):
            names = signature.names
            bound = bind_schema(node.target, node.args, node.kwargs, spelling.renamed, names)
            args = signature.fill(bound)
        else:
            args = signature.bind(node.args, node.kwargs, spelling.renamed)
        args = self._values(args) | dict(spelling.preset)
        name = spelling.op
        if spelling.lower is not None:
            name, args = spelling.lower(args, self)
        return self._finish(name, args, writes=spelling.writes)

    def _finish(self, name: str, given: Mapping[str, Any], writes: bool = False) -> Op:
        """The op with every argument in its canonical form, in the order of its signature."""
        row = OPS[name]
        signature = row.signature
        args = {**signature.fill(given), **given}
        for argument, kind in signature.kinds.items():
            args[argument] = KINDS[kind](args[argument], args, self)
        if row.fix is not None:
            row.fix(args, self)
        inplace = args.pop("inplace", False)
        if not isinstance(inplace, bool):
            raise UndescribedError("inplace is no constant")
        if writes and self.nature(args.get("input")) != "scalar":
            inplace = True
        for argument in [argument for argument in args if argument not in signature.names]:
            ignored = argument in IGNORED or argument.startswith("_")
            if not ignored and args[argument] is not None:
                raise UndescribedError(f"{name} is called with {argument}")
            del args[argument]
        random = row.random is not None and row.random(args)
        return Op(name, args, inplace, random, row.owns and not inplace, row.has)

    # ---- values ----------------------------------------------------------------------------------

    def _values(self, args: Mapping[str, Any]) -> Arguments:
        return {name: self.value(raw) for name, raw in args.items()}

    def value(self, raw: Any) -> Any:
        """A raw argument as a plain hashable value: lists become tuples, parameters Attrs."""
        if raw is None or isinstance(raw, bool | str | Attr):
            return raw
        if isinstance(raw, fx.Node):
            tensor = self._attribute(str(raw.target)) if raw.op == "get_attr" else None
            return raw if tensor is None else Attr(self._name(tensor) or str(raw.target))
        if isinstance(raw, list | tuple):
            return tuple(self.value(item) for item in raw)
        if isinstance(raw, slice):
            return "slice", *(self.value(end) for end in (raw.start, raw.stop, raw.step))
        if isinstance(raw, dict):
            return tuple((key, self.value(item)) for key, item in raw.items())
        if isinstance(raw, torch.Tensor):
            return self._constant(raw)
        if isinstance(raw, numbers.Integral):
            return int(raw)
        if isinstance(raw, numbers.Real):
            return float(raw)
        if isinstance(raw, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise UndescribedError("a symbolic size that is no node")
        if type(raw).__hash__ is None:
            raise UndescribedError(f"an argument of type {type(raw).__name__}")
        return raw

    def _constant(self, tensor: torch.Tensor) -> Any:
        name = self._name(tensor)
        if name is not None:
            return Attr(name)
        if tensor.dim() == 0 and not isinstance(tensor, FakeTensor) and not tensor.is_meta:
            return tensor.item()
        raise UndescribedError("a tensor that is no parameter of the root")

    def _attribute(self, path: str) -> torch.Tensor | None:
        """The tensor at ``path``; None if it is computed (a parametrization) or missing."""
        prefix, _, leaf = path.rpartition(".")
        try:
            owner = self.root.get_submodule(prefix)
        except AttributeError:
            return None
        stored = vars(owner)
        for place in (stored["_parameters"], stored["_buffers"], stored):
            if isinstance(place.get(leaf), torch.Tensor):
                tensor: torch.Tensor = place[leaf]
                return tensor
        return None

    def _name(self, tensor: torch.Tensor) -> str | None:
        known, name = self._names.get(id(tensor), (None, None))
        moved = name is not None and self._attribute(name) is not tensor
        if known is not tensor or moved:
            self._names = self._table()
            _, name = self._names.setdefault(id(tensor), (tensor, None))
        return name

    def _table(self) -> dict[int, tuple[torch.Tensor, str | None]]:
        """``{id: (tensor, name)}``; the name is None if it is neither a parameter nor a buffer."""
        names = {key: entry for key, entry in self._names.items() if entry[1] is None}
        for name, tensor in (
            *self.root.named_parameters(remove_duplicate=False),
            *self.root.named_buffers(remove_duplicate=False),
        ):
            if names.setdefault(id(tensor), (tensor, name))[1] is None:
                names[id(tensor)] = tensor, name
        return names

    # ---- facts about a value ---------------------------------------------------------------------

    def val(self, node: fx.Node) -> Any:
        return value_of(node)

    def rank(self, value: Any) -> int | None:
        if isinstance(value, tuple):
            return self.rank(value[0]) if value else None
        if isinstance(value, Attr):
            tensor = self._attribute(value.name)
            return None if tensor is None else tensor.dim()
        if not isinstance(value, fx.Node):
            return None
        val = self.val(value)
        if isinstance(val, list | tuple) and val:
            val = val[0]
        if isinstance(val, torch.Tensor):
            return val.dim()
        shape = getattr(value.meta.get("tensor_meta"), "shape", None)
        return None if shape is None else len(shape)

    def length(self, value: Any) -> int | None:
        if isinstance(value, tuple):
            return len(value)
        val = self.val(value) if isinstance(value, fx.Node) else None
        return len(val) if isinstance(val, list | tuple) else None

    def describe(self, node: fx.Node) -> Op | None:
        """The op of a producer, a few steps up at most."""
        return self._producer(node)[0]

    def _producer(self, node: fx.Node) -> tuple[Op | None, Nature | None]:
        """The op of ``node`` and its nature; cached for one call, since nodes share producers."""
        key = node, self._depth
        if self._depth >= DEPTH:
            return None, None
        if key not in self._producers:
            self._depth += 1
            try:
                op = self(node)
                self._producers[key] = op, None if op is None else self._result(op)
            finally:
                self._depth -= 1
        return self._producers[key]

    def nature(self, value: Any) -> Nature | None:
        if isinstance(value, Attr):
            return "tensor"
        if isinstance(value, tuple):
            return "sequence"
        if not isinstance(value, fx.Node):
            return None if value is None else "scalar"
        val = self.val(value)
        if isinstance(val, torch.Tensor):
            return "tensor"
        if isinstance(val, list | tuple):
            return "sequence"
        if val is not None:
            return None if isinstance(val, dict) else "scalar"
        op, nature = self._producer(value)
        if op is None and value.type is torch.Tensor:
            return "tensor"
        return nature

    def _result(self, op: Op) -> Nature | None:
        """The nature of an op's result, if no ``meta["val"]`` tells it."""
        if op.name in SEQUENCES or (op.name in ("max", "min") and op.args["dim"] is not None):
            return "sequence"
        if op.name in SCALARS:
            return "scalar"
        if op.name in ARITHMETIC:
            natures = {self.nature(value) for value in op.args.values() if value is not None}
            if "tensor" in natures:
                return "tensor"
            return "scalar" if natures == {"scalar"} else None
        if op.name == "item":
            return self._item(op)
        return "tensor"

    def _item(self, op: Op) -> Nature | None:
        source, index = op.args["input"], op.args["index"]
        if not isinstance(index, int):
            return "sequence" if isinstance(index, tuple) else None
        producer = self.describe(source) if isinstance(source, fx.Node) else None
        if producer is None:
            return None
        if producer.name == "item":
            return "scalar" if self._part_of_shape(producer) else None
        return "sequence" if producer.args.get("nested") and index == 1 else "tensor"

    def _part_of_shape(self, op: Op) -> bool:
        source = op.args["input"]
        whole = self.describe(source) if isinstance(source, fx.Node) else None
        return whole is not None and whole.name == "shape"
