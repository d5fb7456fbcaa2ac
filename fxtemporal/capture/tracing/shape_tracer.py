"""A torch.fx tracer that knows shapes.

Every proxy carries the value its node has on the example inputs: a fake tensor or a number. So
``x.size(1)`` is 10 where Python needs a number, and stays ``x.size(1)`` in the graph; the batch,
which nothing reads, stays free. Where Python does read a number (``range(t)``, ``if t > 4``,
``int(t)``) the graph gets a guard on it, see :mod:`fxtemporal.ir.guards`::

    for t in range(x.size(1)):          size = x.size(1);  guard(size, 10, "x.size(1)", ...)
        outs.append(net(x[:, t]))       getitem = x[:, 0]; conv = net.conv(getitem); ...

A forward that this tracer cannot follow raises :class:`torch.fx.proxy.TraceError`, and
:mod:`fxtemporal.capture.capture` turns to ``torch.export``.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy, TraceError
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fxtemporal.capture.tracing.base_tracer import swap
from fxtemporal.capture.tracing.errors import OpError
from fxtemporal.capture.tracing.input_data import InputData
from fxtemporal.capture.tracing.python_patches import answering, modes_read, user_location
from fxtemporal.capture.tracing.shape_proxy import NUMBER, ReadingTracer, ShapeProxy, expression
from fxtemporal.ir.admitted import AdmittedFrames
from fxtemporal.ir.guards import (
    TRIP_COUNT,
    Specialization,
    dimensions,
    given,
    guard,
    length,
    structure,
)
from fxtemporal.ir.node_meta import (
    copy_meta,
    has_value,
    needed_value,
    set_value,
    set_writes,
    value_of,
)
from fxtemporal.ir.outputs import Layout, leaves_of, take_apart
from fxtemporal.ir.prepared import Prepared
from fxtemporal.ir.shallow_copy import carries_hooks
from fxtemporal.ir.shape_memo import ShapeMemo
from fxtemporal.ir.values import run_node
from fxtemporal.support.errors import CaptureError
from fxtemporal.support.torch_private import pytree, symbolic_trace
from fxtemporal.support.torch_private.dispatch import DisableTorchFunction
from fxtemporal.support.torch_private.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

__all__ = ["ShapeTracer", "is_leaf"]

_QUERIES = frozenset(
    """
    __get__ __set__ __hash__ __len__ __repr__ __format__ __dir__ __reduce_ex__ __deepcopy__ size dim
    ndimension stride numel nelement is_contiguous storage_offset element_size data_ptr get_device
    is_floating_point is_complex is_signed untyped_storage has_names
    """.split()
)
"""Methods whose answer does not depend on a tensor's data."""
_READS = frozenset("item tolist __bool__ __int__ __float__ __index__ __contains__ numpy".split())


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is called as it is, not traced through."""
    library = module.__module__.startswith(("torch.nn", "torch.ao.nn", "einops.layers"))
    container = isinstance(module, nn.Sequential)
    whole = isinstance(module, ScriptModule | Prepared | AdmittedFrames)
    return (library and not container) or whole or carries_hooks(module)


def _is_negative(value: Any) -> bool:
    return isinstance(value, int | float) and str(value).startswith("-")


_IN_PLACE = frozenset(
    getattr(operator, f"i{name}")
    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
)


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


class ShapeTracer(ReadingTracer):
    """Traces ``root(*args, **kwargs)``; without ``example`` no proxy has a value.

    A function that the user's code put under ``torch.fx.wrap`` is one node. With ``wrapped``, so is
    a library's; without it, the graph holds the ops inside.

    The forward gets ``positional`` arguments by position, and the others by keyword, as in the
    example; None: all by position.

    ``modes`` holds, after a trace, the modules whose ``training`` flag the forward read;
    ``returns`` how its outputs are made of the graph's, and ``returned`` the objects among them.
    """

    knows_sizes = True

    def __init__(
        self,
        fake_mode: FakeTensorMode | None = None,
        example: Mapping[str, Any] | None = None,
        *,
        wrapped: bool = False,
        grad_mode: bool | None = None,
        positional: int | None = None,
        shapes: ShapeMemo | None = None,
    ) -> None:
        super().__init__()
        self.grad_mode = grad_mode
        self.positional = positional
        self._wrapped = wrapped
        self.fake_mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.example = example
        self._data = InputData(example)
        self._memo = ShapeMemo(self.fake_mode) if shapes is None else shapes
        self._checked: dict[fx.Node, fx.Node] = {}
        self._ranked: set[fx.Node] = set()
        self._names: dict[int, str] = {}
        self._attributes: dict[str, ShapeProxy] = {}
        self._gradless: set[fx.Node] = set()
        self._detached: dict[fx.Node, fx.Node] = {}
        self._inference = torch.is_inference_mode_enabled()
        self.modes: dict[str, Specialization] = {}
        self.returns: Layout | None = None
        self.returned: dict[int, Any] = {}

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
        in_the_open = lambda: not self._inside_leaf  # noqa: E731
        self._module_names = {name for name, _ in root.named_modules(remove_duplicate=False)}
        reading = modes_read(root, in_the_open)
        inside = swap(symbolic_trace.module, "_wrapped_fns_to_patch", self._nodes_of_their_own())
        answers = answering(self, root)
        with torch.enable_grad(), inside, answers, reading as self.modes, _RealTensors(self):
            return super().trace(root, concrete_args)

    def _nodes_of_their_own(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Functions under ``torch.fx.wrap`` that become one node; a library's if ``wrapped``."""
        return {
            key: namespace
            for key, namespace in symbolic_trace.wrapped_functions().items()
            if self._wrapped or "site-packages" not in str(namespace.get("__file__", ""))
        }

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        signature = inspect.signature(types.MethodType(root_fn, self.root))
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for number, parameter in enumerate(signature.parameters.values()):
            value = self._placeholder(parameter)
            by_keyword = self.positional is not None and number >= self.positional
            if by_keyword and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                if parameter.name in (self.example or ()):
                    keyword[parameter.name] = value
                continue  # a decorator may ask what was given
            match parameter.kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    positional.extend(value)
                case inspect.Parameter.VAR_KEYWORD:
                    keyword.update(value)
                case inspect.Parameter.KEYWORD_ONLY:
                    keyword[parameter.name] = value
                case _:
                    positional.append(value)
        return lambda *_: self._apart(root_fn(self.root, *positional, **keyword)), []

    def _apart(self, outputs: Any) -> Any:
        """``outputs`` as a graph can return them."""
        if any(isinstance(leaf, types.GeneratorType) for leaf in leaves_of(outputs)):
            raise CaptureError(
                "the forward returns a generator, which runs after the call: return a list"
            )
        try:
            apart, self.returns = take_apart(outputs, self.returned)
        except ValueError as error:
            raise TraceError(str(error)) from None
        for value in self.returned.values():
            if not any(isinstance(leaf, Proxy) for leaf in leaves_of(value)):
                raise TraceError(f"the forward returns a {type(value).__name__} without tensors")
        return apart

    def records(self, tensors: list[torch.Tensor]) -> bool:
        """Whether an op on these real tensors belongs into the graph."""
        return not self._inside_leaf and any(map(self._held, tensors))

    def _held(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._names or tensor in self.tensor_attrs

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
                return self._default(proxy, parameter.default, "its default")
            there = self.create_proxy("call_function", given, (proxy,), {})
            self._check(there.node, True, f"given({name})", None, "it is not None")
            return proxy
        if parameter.name not in self.example:
            if name.startswith("*"):
                return () if name == "*" + parameter.name else {}
            proxy = self._new_placeholder(name, parameter.default)
            return self._default(proxy, parameter.default, "left at its default in the example")
        example = self.example[parameter.name]
        proxy = self._new_placeholder(name, parameter.default)
        fake = partial(self.fake_mode.from_tensor, static_shapes=True)
        set_value(proxy.node, pytree.tree_map_only(torch.Tensor, fake, example))
        return self._unpacked(proxy)

    def _new_placeholder(self, name: str, default: Any) -> ShapeProxy:
        defaults = () if default is inspect.Parameter.empty else (_in_code(default),)
        proxy = self.create_proxy("placeholder", name, defaults, {})
        assert isinstance(proxy, ShapeProxy)
        return proxy

    def _default(self, proxy: ShapeProxy, value: Any, why: str) -> Any:
        """A parameter left at its default ``value``, with a guard that calls leave it there."""
        if _in_code(value) is value:
            return self._fixed(proxy, value, why)
        there = self.create_proxy("call_function", given, (proxy,), {})
        self._check(there.node, False, f"given({proxy.node.target})", None, why)
        return value

    def _fixed(self, proxy: ShapeProxy, value: Any, why: str) -> Any:
        """An argument that the trace takes as a constant, with a guard on it."""
        if value is None or isinstance(value, (*NUMBER, str)):
            self._check(proxy.node, value, str(proxy.node.target), None, why)
            return value
        return proxy

    def _unpacked(self, proxy: ShapeProxy) -> Any:
        """Lists, tuples and dicts of proxies for those of inputs, with a guard on their layout."""
        value = proxy.val
        if isinstance(value, torch.Tensor):
            self._check_rank(proxy)
            return proxy
        if isinstance(value, NUMBER):
            return proxy
        if isinstance(value, list | tuple | dict) and type(value) in (list, tuple, dict):
            if proxy.node.op == "placeholder":
                spec = self.create_proxy("call_function", structure, (proxy,), {})
                name = str(proxy.node.target).lstrip("*")
                self._check(spec.node, structure(value), f"structure({name})", None, "its layout")
            if isinstance(value, dict):
                return {key: self._unpacked(proxy.entry(key)) for key in value}
            return type(value)(self._unpacked(proxy.entry(i)) for i in range(len(value)))
        return self._fixed(proxy, value, "not a tensor")

    def _check_rank(self, proxy: ShapeProxy) -> None:
        dims = self.create_proxy("call_function", dimensions, (proxy,), {})
        text = f"{expression(proxy.node)}.dim()"
        self._check(dims.node, proxy.val.dim(), text, user_location(), "its rank")

    # -- nodes -----------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> ShapeProxy:
        return ShapeProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, torch.Tensor) and (name := self._names.get(id(a))) is not None:
            return self._attribute(name).node
        if isinstance(a, nn.Parameter):
            self._hold(a)
            return self._attribute(self._names[id(a)]).node
        if type(a) is torch.Tensor:  # one that the model keeps in a dict
            known = self.tensor_attrs.get(a)
            self._hold(a) if known is None else self._names.setdefault(id(a), known)
            return self._attribute(self._names[id(a)]).node
        if isinstance(a, torch.Generator):
            raise CaptureError(
                "the forward draws random numbers from a generator of its own, whose state a graph "
                "cannot carry: draw them before the call, and make them an input"
            )
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
        if kind == "call_method" and target in ("item", "tolist"):
            return self._data_of(proxy)
        return proxy

    def _data_of(self, proxy: Any) -> Any:
        """The data that Python gets of an input that is a setting, with a guard; else ``proxy``."""
        if proxy.known or self._inside_leaf:
            return proxy
        try:
            with DisableTorchFunction():
                value = self._data.of(proxy.node)
        except Exception:  # not a setting, or an op that fails
            return proxy
        set_value(proxy.node, value)
        text = expression(proxy.node)
        self._check(proxy.node, value, text, user_location(), "its data were read", read="data")
        return value

    def _rank(self, proxy: ShapeProxy) -> int:
        """The rank of ``proxy``, with a guard: squeeze() may have made it depend on the sizes."""
        value = self.value_of(proxy, "dim()")
        if proxy.node.op not in ("placeholder", "get_attr") and proxy.node not in self._ranked:
            self._ranked.add(proxy.node)
            self._check_rank(proxy)
        return int(value.dim())

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> fx.Node:
        if torch.is_inference_mode_enabled() != self._inference and not self._inside_leaf:
            raise CaptureError(
                "the forward switches to inference mode, which a graph cannot carry: put "
                "torch.inference_mode() around the calls of the model instead"
            )
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise TraceError("the forward runs under autocast")
        gradless = not torch.is_grad_enabled() and kind.startswith("call")
        if gradless and self._writes_outside(target, args, kwargs):
            raise TraceError("the forward writes in place where it switches gradients off")
        if not gradless and target is operator.getitem and self._is_gradless_tuple(args[0]):
            gradless = True
        if not gradless:
            args, kwargs = fx.node.map_arg((args, kwargs), self._with_its_gradients)
        if target is operator.pow and kind == "call_function" and _is_negative(args[0]):
            # Code generated for operator.pow is `-1 ** x`, which Python reads as `-(1 ** x)`.
            target = torch.pow if isinstance(value_of(args[1]), torch.Tensor) else pow
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        if gradless:
            self._gradless.add(node)
        if (location := user_location()) is not None:
            node.meta["location"] = location
        return node

    # -- gradients switched off: results of a ``with torch.no_grad()`` are detached ---------------

    def _writes_outside(self, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call may write into a tensor that was made where gradients are on."""
        name = str(getattr(target, "__name__", target))
        module = self.root.get_submodule(target) if target in self._module_names else None
        writes = (
            (name.endswith("_") and not name.endswith("__"))
            or target is operator.setitem
            or target in _IN_PLACE
            or bool(kwargs.get("inplace"))
            or bool(getattr(module, "inplace", False))
        )
        return writes and bool(args) and args[0] not in self._gradless

    def _is_gradless_tuple(self, node: Any) -> bool:
        return node in self._gradless and isinstance(value_of(node), list | tuple)

    def _with_its_gradients(self, node: fx.Node) -> fx.Node:
        """``node``, detached if it was made under ``torch.no_grad()``."""
        if node not in self._gradless:
            return node
        if not has_value(node):
            raise TraceError("the forward switches gradients off, and no example inputs were given")
        value = needed_value(node)
        if isinstance(value, list | tuple | dict):
            raise TraceError("the forward switches gradients off for several results at once")
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point()):
            return node
        if node not in self._detached:
            made = super().create_node("call_method", "detach", (node,), {})
            copy_meta(made, node)
            self._evaluate(made)
            self._detached[node] = made
        return self._detached[node]

    def _evaluate(self, node: fx.Node) -> None:
        if all(has_value(source) for source in node.all_input_nodes):
            with DisableTorchFunction():
                self._compute(node)

    def _compute(self, node: fx.Node) -> None:
        key = self._memo.key(node, self.root)
        if key is not None and (known := self._memo.recall(key)) is not None:
            set_value(node, known)
            set_writes(node, False)
            return
        was, self._inside_leaf = self._inside_leaf, True
        try:
            value = run_node(self.root, node, self.fake_mode)
            set_value(node, value)
            if key is not None:
                self._memo.remember(key, node, value)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self._note_size_of_settings(node)  # it depends on the data
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            if node.op == "call_method" and node.target in _READS:
                text = expression(node.all_input_nodes[0])
                raise TraceError(f"{node.target}() reads the data of {text}") from error
            path = str(node.target) if node.op == "call_module" else self.scope.module_path
            shapes = ", ".join(
                str(list(needed_value(source).shape))
                for source in node.all_input_nodes
                if isinstance(needed_value(source), torch.Tensor) and source.op != "get_attr"
            )
            raise OpError(node.meta.get("location"), path, shapes) from error
        finally:
            self._inside_leaf = was

    def _note_size_of_settings(self, node: fx.Node) -> None:
        """Take the shape of ``node`` from the data of inputs that are settings, with a guard."""
        try:
            value = self._data.of(node)
        except Exception:  # not settings, or an op that fails
            return
        if not isinstance(value, torch.Tensor):
            return
        set_value(node, self.fake_mode.from_tensor(value, static_shapes=True))
        shape = self.graph.call_function(getattr, (node, "shape"))
        set_value(shape, value.shape)
        text = f"{expression(node)}.shape"
        self._check(shape, tuple(value.shape), text, user_location(), "it depends on data")

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
        of_several = type(m) is nn.Identity and not any(isinstance(arg, Proxy) for arg in args)
        if self._inside_leaf or of_several:  # a list stays Python's: the forward may change it
            return forward(*args, **kwargs)
        if self.submodule_paths is not None and m not in self.submodule_paths:
            # It was made here, like ``self.layers[1:]``, or the model keeps it in a plain list.
            for tensor in (*m.parameters(), *m.buffers()):
                self._hold(tensor)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self._inside_leaf or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        return attr_val if name is None else self._attribute(name)

    def _hold(self, tensor: torch.Tensor) -> None:
        """Store a tensor that is not yet the model's as an attribute: the same object, no copy."""
        if self._held(tensor):
            return
        number = sum(name.startswith("_tensor_constant") for name in vars(self.root))
        name = f"_tensor_constant{number}"
        vars(self.root)[name] = tensor  # not as a parameter: the model has none of that name
        self._names[id(tensor)] = name

    def _attribute(self, name: str) -> ShapeProxy:
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    # -- what Python reads -----------------------------------------------------------------------

    def value_of(self, proxy: ShapeProxy, why: str) -> Any:
        if not proxy.known and self.example is not None:
            text = expression(proxy.node)
            raise TraceError(f"{why} reads {text}, which depends on data, not on a shape")
        if not proxy.known:
            raise TraceError(f"{why} needs a size that is not known here")
        return proxy.val

    def read(self, proxy: Any, why: str) -> Any:
        if not isinstance(proxy, ShapeProxy):
            return proxy
        value = self.value_of(proxy, why)
        if isinstance(value, torch.Tensor):
            found = self.create_proxy("call_method", "item", (proxy,), {})
            if isinstance(found, Proxy):
                raise TraceError(f"{why} reads the data of {expression(proxy.node)}, not its shape")
            return found
        if isinstance(value, torch.Size) or not isinstance(value, list | tuple | dict):
            text = expression(proxy.node)
            self._check(proxy.node, value, text, user_location(), f"{why} read it", read=why)
        return value

    def check_length(self, proxy: ShapeProxy) -> None:
        if any(user.target is length for user in proxy.node.users):
            return
        whole = proxy.node.args[0] if proxy.node.args else None
        checked = isinstance(whole, fx.Node) and whole.op in ("placeholder", "get_attr")
        if isinstance(proxy.val, torch.Size) and checked:
            return  # so is its rank
        count = self.create_proxy("call_function", length, (proxy,), {})
        text = f"len({expression(proxy.node)})"
        why = "a loop went through them"
        self._check(count.node, len(proxy.val), text, user_location(), why, read=TRIP_COUNT)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.read(obj, "a branch"))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        assert isinstance(obj, ShapeProxy)
        return obj.__iter__()

    def keys(self, obj: Proxy) -> Any:
        assert isinstance(obj, ShapeProxy)
        return self.value_of(obj, "keys()").keys()

    def _check(
        self,
        node: fx.Node,
        value: Any,
        text: str,
        location: str | None,
        why: str,
        read: str | None = None,
    ) -> None:
        if node.op == "get_attr":
            return
        if node in self._checked:
            self._checked[node].meta["reads"].append(read)
            return
        check = self.graph.call_function(guard, (node, value, text, location, why))
        check.meta.update(val=None, location=location, reads=[read])
        self._checked[node] = check


def _in_code(default: Any) -> Any:
    """``default`` if generated code can write it down, else None."""
    leaves = pytree.tree_leaves(default)
    plain = all(leaf is None or isinstance(leaf, (*NUMBER, str)) for leaf in leaves)
    return default if plain else None
