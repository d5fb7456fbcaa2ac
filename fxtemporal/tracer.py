"""A torch.fx tracer that knows shapes.

Every proxy carries the value its node has on the example inputs: a fake tensor or a number. So
``x.size(1)`` is 10 where Python needs a number, and stays ``x.size(1)`` in the graph; the batch,
which nothing reads, stays free. Where Python does read a number (``range(t)``, ``if t > 4``,
``int(t)``) the graph gets a check of it, see :mod:`fxtemporal.specializations`::

    for t in range(x.size(1)):          size = x.size(1);  expect(size, 10, "x.size(1)", ...)
        outs.append(net(x[:, t]))       getitem = x[:, 0]; conv = net.conv(getitem); ...

What this tracer cannot follow raises :class:`torch.fx.proxy.TraceError`, and
:mod:`fxtemporal.capture` turns to ``torch.export``.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import einops
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.proxy import Attribute, Proxy, TraceError
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fxtemporal.graph import is_user_file, run_node, short_location
from fxtemporal.opaque import opaque
from fxtemporal.specializations import expect
from fxtemporal.twins import carries_hooks

__all__ = ["OpError", "RecordingTracer", "ShapeTracer", "is_leaf"]

_FACTORIES = """
    arange bartlett_window blackman_window empty eye full hamming_window hann_window linspace
    logspace normal ones rand randint randn randperm scalar_tensor tensor tril_indices triu_indices
    zeros
""".split()
_QUERIES = frozenset(
    """
    __get__ __set__ __hash__ __len__ __repr__ __format__ __dir__ __reduce_ex__ __deepcopy__ size dim
    ndimension stride numel nelement is_contiguous storage_offset element_size data_ptr get_device
    is_floating_point is_complex is_signed untyped_storage has_names
    """.split()
)
"""What tells nothing of a tensor's data."""
_READS = frozenset("item tolist __bool__ __int__ __float__ __index__ __contains__ numpy".split())
_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack")
_NUMBER = (bool, int, float)
_CUTS = frozenset(
    """
        unbind split chunk tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk
    """.split()
)
"""What gives as many pieces as the size says."""


class OpError(Exception):
    """An op raised on the example inputs: ``__cause__`` says why, ``location`` where."""

    def __init__(self, location: str | None, module_path: str, operand_ranks: str) -> None:
        super().__init__(f"{module_path or 'an op'} at {location}")
        self.location = location
        self.module_path = module_path
        self.operand_ranks = operand_ranks


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is called as it is, not traced through."""
    library = module.__module__.startswith(("torch.nn", "torch.ao.nn", "einops.layers"))
    container = isinstance(module, nn.Sequential)
    return (library and not container) or isinstance(module, ScriptModule) or carries_hooks(module)


@opaque
def structure(value: Any) -> str:
    """How lists, tuples and dicts are nested in ``value``, tensors and numbers left out."""
    return str(pytree.tree_structure(value))


@opaque
def dimensions(value: Any) -> int | None:
    """``value.dim()``, None for what is no tensor."""
    return value.dim() if isinstance(value, torch.Tensor) else None


@opaque
def given(value: Any) -> bool:
    """Whether an argument is there."""
    return value is not None


@opaque
def length(pieces: Any) -> int:
    """``len``, as a function that fx can record."""
    return len(pieces)


class ShapeProxy(Proxy):
    """A proxy with a value: ``proxy.node.meta["val"]``."""

    tracer: ShapeTracer

    @property
    def known(self) -> bool:
        return "val" in self.node.meta

    @property
    def val(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, name: str) -> Any:
        if not self.known:
            return Attribute(self, name)
        value = getattr(self.val, name)  # AttributeError as the real object would raise it
        if callable(value):
            return Attribute(self, name)
        if name == "ndim":
            return self.dim()
        if name in ("requires_grad", "grad", "grad_fn", "is_leaf"):
            raise TraceError(f"the forward reads {name}, which only a real tensor has")
        if isinstance(self.val, torch.Tensor) and self.node.op == "get_attr" and name == "shape":
            return value
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __len__(self) -> int:
        value = self.tracer.value_of(self, "len()")
        if isinstance(value, torch.Tensor):
            return self.tracer.read(self.size(0), "len()")  # type: ignore[no-any-return]
        cut = str(getattr(self.node.target, "__name__", self.node.target)) in _CUTS
        if cut or isinstance(value, torch.Size):
            self.tracer.check_length(self)
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])

    def __bool__(self) -> bool:
        return bool(self.tracer.read(self, "a branch"))

    def __index__(self) -> int:
        return int(self.tracer.read(self, "range() or an index"))

    def __int__(self) -> int:
        return int(self.tracer.read(self, "int()"))

    def __float__(self) -> float:
        return float(self.tracer.read(self, "float()"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.read(self, "round()"), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return torch.as_tensor(self.tracer.read(self, "numpy")).numpy().astype(dtype)

    def __str__(self) -> str:
        if not self.known:
            raise TraceError("str() of an input, and no example inputs were given")
        if not isinstance(self.val, torch.Tensor | list | tuple | dict):
            return str(self.tracer.read(self, "str()"))
        return repr(self)

    def __format__(self, spec: str) -> str:
        return format(self.tracer.read(self, "format()"), spec) if spec else str(self)

    def __hash__(self) -> int:
        if not self.known:
            raise TraceError("a look-up of an input, and no example inputs were given")
        if isinstance(self.val, _NUMBER):
            return hash(self.tracer.read(self, "a look-up"))
        return id(self)

    def __contains__(self, item: Any) -> bool:
        return any(item is element or bool(item == element) for element in self)


class RecordingTracer(fx.Tracer):
    """An fx tracer that also records buffers, tensor factories (``torch.zeros``) and einops.

    Unpickling a :class:`torch.fx.GraphModule` traces its code again; this is the tracer for that.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._inside_leaf = False

    def trace(  # type: ignore[override]
        self, root: nn.Module, concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        with self._patched(root):
            return super().trace(root, concrete_args)

    @contextmanager
    def _patched(self, root: nn.Module) -> Iterator[None]:
        """Replace the factories by recording ones, wherever the forwards of ``root`` see them."""
        originals = [(torch, name) for name in _FACTORIES] + [(einops, name) for name in _EINOPS]
        recorded = {
            id(getattr(owner, name)): self._recorded(getattr(owner, name))
            for owner, name in originals
        }
        with ExitStack() as stack:
            for namespace in _namespaces(root):
                for key, value in list(namespace.items()):
                    if id(value) in recorded:
                        stack.enter_context(_swap_item(namespace, key, recorded[id(value)]))
            for owner, name in originals:
                stack.enter_context(_swap(owner, name, recorded[id(getattr(owner, name))]))
            yield

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._inside_leaf or not hasattr(self, "graph"):
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return wrapper


def _write_in_place(name: str) -> None:
    """``x += 1`` writes into x where x is a tensor, as it would without the tracer."""
    in_place = getattr(operator, name)
    anew = getattr(operator, name[1:], None) or getattr(operator, name[1:] + "_")

    def method(self: ShapeProxy, other: Any) -> Any:
        if self.known and not isinstance(self.val, torch.Tensor):
            return anew(self, other)
        return self.tracer.create_proxy("call_function", in_place, (self, other), {})

    setattr(ShapeProxy, f"__{name}__", method)


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
):
    _write_in_place(_name)


class _RealTensors(TorchFunctionMode):
    """Records what a forward does to real tensors, which no proxy would notice.

    ``for p in self.parameters(): total = total + p.sum()`` reaches parameters without asking the
    module for an attribute; the sum must not become a constant of the graph.
    """

    def __init__(self, tracer: ShapeTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        real = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name = getattr(func, "__name__", "")
        if self._tracer.records(real) and name not in _QUERIES:
            if name in _READS:
                raise TraceError(f"{name}() reads the data of a parameter")
            if is_tensor_method_or_property(func):
                return self._tracer.create_proxy("call_method", name, args, kwargs)
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


class ShapeTracer(RecordingTracer):
    """Traces ``root(*args, **kwargs)``; without ``example`` no proxy has a value."""

    knows_sizes = True

    def __init__(
        self, fake_mode: FakeTensorMode | None = None, example: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.fake_mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.example = example
        self._checked: set[fx.Node] = set()
        self._ranked: set[fx.Node] = set()
        self._names: dict[int, str] = {}
        self._attributes: dict[str, ShapeProxy] = {}
        self._grad_enabled = torch.is_grad_enabled()

    # -- tracing ---------------------------------------------------------------------------------

    def trace(  # type: ignore[override]
        self, root: nn.Module, concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        tensors = [
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in tensors:
            self._names.setdefault(id(tensor), name)
        with self._answering(root), _RealTensors(self):
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        signature = inspect.signature(types.MethodType(root_fn, self.root))
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for parameter in signature.parameters.values():
            value = self._placeholder(parameter)
            match parameter.kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    positional.extend(value)
                case inspect.Parameter.VAR_KEYWORD:
                    keyword.update(value)
                case inspect.Parameter.KEYWORD_ONLY:
                    keyword[parameter.name] = value
                case _:
                    positional.append(value)
        return lambda *_: root_fn(self.root, *positional, **keyword), []

    def records(self, tensors: list[torch.Tensor]) -> bool:
        """Whether an op on these real tensors belongs into the graph."""
        return not self._inside_leaf and any(
            id(tensor) in self._names or tensor in self.tensor_attrs for tensor in tensors
        )

    def _placeholder(self, parameter: inspect.Parameter) -> Any:
        """The value that the forward gets for one of its parameters."""
        kind = parameter.kind
        stars = (kind is kind.VAR_POSITIONAL) + 2 * (kind is kind.VAR_KEYWORD)
        name = "*" * stars + parameter.name
        no_default = parameter.default is inspect.Parameter.empty
        if self.example is None:
            if name.startswith("*"):
                raise TraceError(f"{name} has no fixed number of entries without example inputs")
            proxy = self._new_placeholder(name, parameter.default)
            if not no_default:
                return self._fixed(proxy, parameter.default, "its default")
            there = self.create_proxy("call_function", given, (proxy,), {})
            self._check(there.node, True, f"given({name})", None, "it is not None")
            return proxy
        if parameter.name not in self.example:
            if name.startswith("*"):
                return () if name == "*" + parameter.name else {}
            proxy = self._new_placeholder(name, parameter.default)
            return self._fixed(proxy, parameter.default, "left at its default in the example")
        example = self.example[parameter.name]
        proxy = self._new_placeholder(name, parameter.default)
        proxy.node.meta["val"] = pytree.tree_map_only(
            torch.Tensor, lambda t: self.fake_mode.from_tensor(t, static_shapes=True), example
        )
        return self._unpacked(proxy)

    def _new_placeholder(self, name: str, default: Any) -> ShapeProxy:
        defaults = () if default is inspect.Parameter.empty else (default,)
        proxy = self.create_proxy("placeholder", name, defaults, {})
        assert isinstance(proxy, ShapeProxy)
        return proxy

    def _fixed(self, proxy: ShapeProxy, value: Any, why: str) -> Any:
        """An argument that the trace takes as a constant."""
        if value is None or isinstance(value, (*_NUMBER, str)):
            self._check(proxy.node, value, str(proxy.node.target), None, why)
            return value
        return proxy

    def _unpacked(self, proxy: ShapeProxy) -> Any:
        """Lists, tuples and dicts of inputs become the same of proxies; their layout is checked."""
        value = proxy.val
        if isinstance(value, torch.Tensor):
            self._check_rank(proxy)
            return proxy
        if isinstance(value, (*_NUMBER,)):
            return proxy
        if isinstance(value, list | tuple | dict) and type(value) in (list, tuple, dict):
            if proxy.node.op == "placeholder":
                spec = self.create_proxy("call_function", structure, (proxy,), {})
                name = str(proxy.node.target).lstrip("*")
                self._check(spec.node, structure(value), f"structure({name})", None, "its layout")
            if isinstance(value, dict):
                return {key: self._unpacked(proxy[key]) for key in value}
            return type(value)(self._unpacked(proxy[i]) for i in range(len(value)))
        return self._fixed(proxy, value, "not a tensor")

    def _check_rank(self, proxy: ShapeProxy) -> None:
        dims = self.create_proxy("call_function", dimensions, (proxy,), {})
        text = f"{expression(proxy.node)}.dim()"
        self._check(dims.node, proxy.val.dim(), text, _user_location(), "its rank")

    # -- nodes -----------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> ShapeProxy:
        return ShapeProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, torch.Tensor) and (name := self._names.get(id(a))) is not None:
            return self._attribute(name).node
        if isinstance(a, torch.Generator):
            raise TraceError("the forward makes a random generator of its own")
        if isinstance(a, dict) and type(a) is not dict:
            raise TraceError(f"a graph would turn the {type(a).__name__} into a plain dict")
        if type(a).__module__ == "numpy" and hasattr(a, "item") and getattr(a, "ndim", 1) == 0:
            return a.item()  # sizes that a library computed with numpy
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        if kind == "call_method" and target in ("dim", "ndimension"):
            return self._rank(args[0])
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind not in ("placeholder", "output"):
            self._evaluate(proxy.node)
        return proxy

    def _rank(self, proxy: ShapeProxy) -> int:
        """A rank, which squeeze() may have made depend on the sizes."""
        value = self.value_of(proxy, "dim()")
        if proxy.node.op not in ("placeholder", "get_attr") and proxy.node not in self._ranked:
            self._ranked.add(proxy.node)
            self._check_rank(proxy)
        return int(value.dim())

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() != self._grad_enabled and not self._inside_leaf:
            raise TraceError("the forward switches gradients on or off")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise TraceError("the forward runs under autocast")
        node = super().create_node(kind, *args, **kwargs)
        if (location := _user_location()) is not None:
            node.meta["location"] = location
        return node

    def _evaluate(self, node: fx.Node) -> None:
        if not all("val" in source.meta for source in node.all_input_nodes):
            return
        was, self._inside_leaf = self._inside_leaf, True
        try:
            node.meta["val"] = run_node(self.root, node, self.fake_mode)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return  # its size depends on the data
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            path = str(node.target) if node.op == "call_module" else self.scope.module_path
            ranks = ", ".join(
                str(list(source.meta["val"].shape))
                for source in node.all_input_nodes
                if isinstance(source.meta["val"], torch.Tensor) and source.op != "get_attr"
            )
            raise OpError(node.meta.get("location"), path, ranks) from error
        finally:
            self._inside_leaf = was

    # -- modules and attributes ------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        made_here = self.submodule_paths is not None and m not in self.submodule_paths
        if self._inside_leaf or made_here:  # ``self.layers[1:](x)`` makes a module of modules
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self._inside_leaf or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        return attr_val if name is None else self._attribute(name)

    def _attribute(self, name: str) -> ShapeProxy:
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    # -- what Python reads -----------------------------------------------------------------------

    def value_of(self, proxy: ShapeProxy, why: str) -> Any:
        """The value behind ``proxy``, where there is one."""
        if not proxy.known:
            raise TraceError(f"{why} needs a size that is not known here")
        return proxy.val

    def read(self, proxy: Any, why: str) -> Any:
        """A number that Python needs now: from here on the graph is right for this one alone."""
        if not isinstance(proxy, ShapeProxy):
            return proxy
        value = self.value_of(proxy, why)
        if isinstance(value, torch.Tensor):
            raise TraceError(f"{why} reads the data of {expression(proxy.node)}, not its shape")
        if isinstance(value, torch.Size) or not isinstance(value, list | tuple | dict):
            text = expression(proxy.node)
            self._check(proxy.node, value, text, _user_location(), f"{why} read it")
        return value

    def check_length(self, proxy: ShapeProxy) -> None:
        """Python went through the pieces that an op cut a tensor into: as many it must stay."""
        if any(user.target is length for user in proxy.node.users):
            return
        whole = proxy.node.args[0] if proxy.node.args else None
        checked = isinstance(whole, fx.Node) and whole.op in ("placeholder", "get_attr")
        if isinstance(proxy.val, torch.Size) and checked:
            return  # so is its rank
        count = self.create_proxy("call_function", length, (proxy,), {})
        text = f"len({expression(proxy.node)})"
        self._check(count.node, len(proxy.val), text, _user_location(), "a loop went through them")

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.read(obj, "a branch"))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        assert isinstance(obj, ShapeProxy)
        return obj.__iter__()

    def keys(self, obj: Proxy) -> Any:
        assert isinstance(obj, ShapeProxy)
        return self.value_of(obj, "keys()").keys()

    def _check(self, node: fx.Node, value: Any, text: str, location: str | None, why: str) -> None:
        if node in self._checked or node.op == "get_attr":
            return
        self._checked.add(node)
        check = self.graph.call_function(expect, (node, value, text, location, why))
        check.meta.update(val=None, location=location)

    # -- what Python does around proxies -----------------------------------------------------------

    @contextmanager
    def _answering(self, root: nn.Module) -> Iterator[None]:
        """Answer isinstance() and the like as they would for real values."""
        with ExitStack() as stack:
            is_tensor = partial(self.isinstance, kinds=torch.Tensor)
            stack.enter_context(_swap(torch, "is_tensor", is_tensor))
            stack.enter_context(_swap(torch, "finfo", self._concrete(torch.finfo)))
            stack.enter_context(_swap(torch, "iinfo", self._concrete(torch.iinfo)))
            for namespace in _namespaces(root):
                stack.enter_context(_swap_item(namespace, "isinstance", self.isinstance))
            yield

    def _concrete(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(dtype: Any) -> Any:
            if not isinstance(dtype, ShapeProxy):
                return function(dtype)
            value = self.value_of(dtype, function.__name__)
            text = expression(dtype.node)
            self._check(dtype.node, value, text, _user_location(), f"{function.__name__}() read it")
            return function(value)

        return wrapper

    def isinstance(self, value: Any, kinds: Any) -> bool:
        """isinstance() that sees through a proxy."""
        if type(value) is ShapeProxy:
            if not value.known:
                raise TraceError("isinstance() of an input, and no example inputs were given")
            is_parameter = value.node.op == "get_attr" and kinds is nn.Parameter
            return is_parameter or builtins.isinstance(value.val, kinds)
        return builtins.isinstance(value, kinds)


def expression(node: fx.Node) -> str:
    """``node`` as the user would write it: ``x.size(1)``, ``x.shape[1] // 2``."""

    def text(argument: Any) -> str:
        return expression(argument) if isinstance(argument, fx.Node) else repr(argument)

    if node.op in ("placeholder", "get_attr"):
        return str(node.target).lstrip("*")
    arguments = [text(argument) for argument in node.args]
    if node.op == "call_method" and arguments:
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        if node.target is getattr:
            return f"{arguments[0]}.{node.args[1]}"
        if name == "getitem":
            return f"{arguments[0]}[{arguments[1]}]"
        signs = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/"}
        signs |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        if name in signs and len(arguments) == 2:
            return f"({arguments[0]} {signs[name]} {arguments[1]})"
        return f"{name}({', '.join(arguments)})"
    return node.name


def _user_location() -> str | None:
    """The innermost line of the user's code, between the traced forward and here."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not ShapeTracer.trace.__code__:
        if is_user_file(frame.f_code.co_filename):
            return short_location(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def _namespaces(root: nn.Module) -> list[dict[str, Any]]:
    """The globals of the code that the forwards of ``root`` are written in."""
    found: dict[int, dict[str, Any]] = {}

    def visit(namespace: dict[str, Any]) -> None:
        if is_user_file(str(namespace.get("__file__", "")) or "?"):
            found.setdefault(id(namespace), namespace)

    for module in root.modules():
        for base in type(module).__mro__:
            forward = vars(base).get("forward")
            if isinstance(forward, types.FunctionType):
                visit(inspect.unwrap(forward).__globals__)
    for namespace in list(found.values()):
        for value in list(namespace.values()):
            if isinstance(value, types.FunctionType):
                visit(value.__globals__)
    return list(found.values())


@contextmanager
def _swap(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _swap_item(namespace: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    missing = object()
    original = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        if original is missing:
            del namespace[name]
        else:
            namespace[name] = original
