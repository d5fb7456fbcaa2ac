"""The graph module that ``optimize`` returns.

When a :class:`torch.fx.GraphModule` is copied or pickled, it loses its ``meta`` and every parameter
that its graph does not use. An optimized model must keep both: its report is in ``meta``, and its
state dict must still load into the original model.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.ir.guards import Specialization
from fxtemporal.ir.otherwise import Otherwise
from fxtemporal.ir.outputs import Layout, put_together, take_apart
from fxtemporal.ir.watching import Watch, warn_of_late_hooks
from fxtemporal.support.errors import GradientError, SpecializationError
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.operators import HigherOrderOperator
from fxtemporal.support.torch_private.transforms import enters_transforms, leaving_transforms

__all__ = ["OptimizedModule"]

_MODES = "fxtemporal_modes"
_GRADIENTS = "fxtemporal_gradients"
_OUTPUTS = "fxtemporal_outputs"
_SWITCHED = "fxtemporal_switched_gradients"
_CONTENTS = ("_modules", "_parameters", "_buffers")
_KEPT = (
    *_CONTENTS,
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "training",
    "meta",
)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, source: Any, why: str) -> torch.Tensor:
        ctx.why = why
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise GradientError(
            f"this result gives the model's numbers, but not its gradients: {ctx.why}. Train the "
            "model itself, and use the result under torch.no_grad()"
        )


class OptimizedModule(fx.GraphModule):
    """A graph module with all tensors of ``root``, which it keeps when it is copied or pickled."""

    _derived = ("_watch", "_watched", "_otherwise")  # a stand-in does not copy them

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        class_name: str = "GraphModule",
        *,
        later: bool = False,
    ) -> None:
        vars(self)["_later"] = later
        super().__init__(root, graph, class_name)
        del vars(self)["_later"]
        self._restore(_contents(root))

    def _restore(self, kept: dict[str, Any]) -> None:
        for name, value in kept.items():
            vars(self)[name] = copy.copy(value) if name in _KEPT else value
        self._watch_modes()

    def get_submodule(self, target: str) -> nn.Module:
        """As in ``nn.Module``, but quick: passes ask for the module of every node, often."""
        module: nn.Module | None = self
        for name in target.split("."):
            table = vars(module).get("_modules")
            module = table.get(name) if isinstance(table, dict) else None
            if module is None:
                return super().get_submodule(target)
        assert module is not None
        return module

    def hold_modes(self, modes: Mapping[str, Specialization]) -> None:
        """Refuse a call unless the modules at these paths are in the given training mode."""
        self.meta[_MODES] = dict(modes)
        self._watch_modes()

    @property
    def held_modes(self) -> Mapping[str, Specialization]:
        """``{module path: the training mode that it must have}``."""
        held: Mapping[str, Specialization] = self.meta.get(_MODES, {})
        return held

    def return_as(self, layout: Layout | None) -> None:
        """Make the outputs of the graph into the objects that the model returns."""
        if layout is not None:
            self.meta[_OUTPUTS] = vars(self)["_outputs"] = layout

    @property
    def returns(self) -> Layout | None:
        """How the outputs are made of those of the graph; None if they are the same."""
        layout: Layout | None = self.meta.get(_OUTPUTS)
        return layout

    def _watch_modes(self) -> None:
        held = self.held_modes
        watched = [(self.get_submodule(path), fixed) for path, fixed in held.items()]
        vars(self)["_held_modes"] = watched
        vars(self)["_outputs"] = self.meta.get(_OUTPUTS)
        entering = any(enters_transforms(node.target) for node in self.graph.nodes)
        vars(self)["_enters_transforms"] = entering

    def watch(self, model: nn.Module, captured: fx.Graph) -> None:
        """Take over tensors that ``model`` replaces, and warn of hooks that would not be called.

        ``captured`` is the graph before the rewrites. A copied or pickled module does not watch.
        """
        vars(self)["_watch"] = Watch(model, self, captured)
        warn_of_late_hooks(self, captured)

    def keep_watched(self, model: nn.Module) -> None:
        """Keep ``model`` alive, which is watched, and which nothing else holds."""
        vars(self)["_watched"] = model

    def refuse_gradients(self, why: str, outputs: Collection[int] = ()) -> None:
        """Make every backward raise: the gradients of this graph are not the model's.

        ``outputs`` are the numbers of the outputs that depend on the model's parameters.
        """
        self.meta[_GRADIENTS] = why, frozenset(outputs)

    def refuse_gradients_when_off(self, outputs: Collection[int]) -> None:
        """Make a backward from these outputs raise: the model switches gradients on for them."""
        why = "the forward switches gradients on (torch.enable_grad), which a graph does not hold"
        self.meta[_SWITCHED] = why, frozenset(outputs)

    def run_otherwise(self, otherwise: Otherwise) -> None:
        """Run ``otherwise`` at calls that a guard refuses. A pickled module raises the error."""
        vars(self)["_otherwise"] = otherwise

    @property
    def refused(self) -> dict[str, int]:
        """How many calls each guard has refused, where that raises no error."""
        otherwise = vars(self).get("_otherwise")
        return {} if otherwise is None else otherwise.refused

    def recompile(self) -> Any:
        """Make the forward again from the graph, with what it does where a guard refuses."""
        if vars(self).get("_later"):
            return self.recompile_later()
        code = super().recompile()
        kind: Any = type(self)
        kind.forward = _refusable(kind.forward)
        return code

    def recompile_later(self) -> None:
        """Make the forward from the graph when it is next asked for: rewrites change it often."""
        vars(self).pop("_code", None)
        kind: Any = type(self)
        kind.forward = _FromGraph(self)

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        self._make_code()
        return super().code

    def __str__(self) -> str:
        self._make_code()
        return super().__str__()

    def _make_code(self) -> None:
        if "_code" not in vars(self):
            self.recompile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = vars(self).get("_watch")
        if watch is not None and not torch.compiler.is_compiling():
            watch.look()
        if vars(self).get("_enters_transforms"):
            with leaving_transforms():
                outputs = super().__call__(*args, **kwargs)
        else:
            outputs = super().__call__(*args, **kwargs)
        on = torch.is_grad_enabled()
        refused = self.meta.get(_GRADIENTS if on else _SWITCHED)
        if _ran_otherwise(self) or refused is None:
            return outputs
        return self._without_gradients(outputs, (args, kwargs) if on else (), *refused)

    @torch.enable_grad()
    def _without_gradients(
        self, outputs: Any, inputs: Any, why: str, of_parameters: Collection[int]
    ) -> Any:
        """``outputs``; a backward raises through those that would have gradients in the model."""
        given = next(filter(_requires_grad, pytree.tree_leaves(inputs)), None)
        source = (
            given if given is not None else next(filter(_requires_grad, self.parameters()), None)
        )
        numbers = itertools.count()

        def refused(leaf: Any) -> Any:
            number = next(numbers)
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                return leaf
            asked = given is not None or (source is not None and number in of_parameters)
            if asked or leaf.requires_grad:
                return _Refused.apply(leaf, source, why)  # type: ignore[no-untyped-call]
            return leaf

        apart, layout = take_apart(outputs)
        return put_together(pytree.tree_map(refused, apart), layout)

    def train(self, mode: bool = True) -> OptimizedModule:
        """Switch the mode as ``nn.Module.train`` does, if the result is right in that mode.

        Raises:
            SpecializationError: the result is right in one mode only: the forward read
                ``self.training``, or a loop whose body holds BatchNorm or dropout was re-rolled.
        """
        for _, fixed in vars(self).get("_held_modes", ()):
            if fixed.value != mode and not fixed.sets and vars(self).get("_otherwise") is None:
                raise SpecializationError(_other_mode(fixed), str(fixed))
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        result = super().__deepcopy__(memo)
        assert isinstance(result, OptimizedModule)
        result._restore(copy.deepcopy(_contents(self), memo))
        if (otherwise := vars(self).get("_otherwise")) is not None:
            result.run_otherwise(copy.deepcopy(otherwise, memo))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        for node in self.graph.nodes:
            if isinstance(node.target, HigherOrderOperator):
                raise pickle.PicklingError(
                    f"this graph calls {node.target}, which fx cannot build again from a pickle: "
                    "save the module with torch.export.save(torch.export.export(module, inputs))"
                )
        self._make_code()
        living = {name: vars(self).pop(name) for name in self._derived if name in vars(self)}
        try:  # a pickled module does not watch a model, and has none to run
            rebuild, state = super().__reduce__()
        finally:
            vars(self).update(living)
        return _rebuild, (rebuild, state, _contents(self))


class _FromGraph:
    """A forward that is not made yet."""

    def __init__(self, module: OptimizedModule) -> None:
        self._module = weakref.ref(module)

    def __get__(self, module: OptimizedModule | None, kind: type) -> Any:
        module = self._module() if module is None else module
        assert module is not None
        module.recompile()
        return module.forward


_refused_calls = threading.local()
"""``module``: the module of this thread whose last call ran something else."""


def _refusable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, which runs something else where a guard refuses, if the module has that."""

    @functools.wraps(forward)
    def refusable(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        try:
            for module, fixed in vars(self).get("_held_modes", ()):
                if module.training != fixed.value:
                    if not fixed.sets:
                        raise SpecializationError(_other_mode(fixed), str(fixed))
                    module.training = fixed.value  # as the model's forward does
            outputs = forward(self, *args, **kwargs)
            made = vars(self).get("_outputs")
            return outputs if made is None else put_together(outputs, made)
        except SpecializationError as error:
            otherwise = vars(self).get("_otherwise")
            if otherwise is None:
                raise
            refusal = error
        outputs = otherwise(self, refusal, args, kwargs)
        _refused_calls.module = weakref.ref(self)
        return outputs

    return refusable


def _ran_otherwise(module: OptimizedModule) -> bool:
    """Whether the last call of ``module`` ran something else, so that its gradients are right."""
    if vars(module).get("_otherwise") is None:
        return False
    last = getattr(_refused_calls, "module", None)
    _refused_calls.module = None
    return last is not None and last() is module


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _other_mode(fixed: Specialization) -> str:
    mode = "training" if fixed.value else "eval"
    return (
        f"this module was captured in {mode} mode, where {fixed}, and is right in that mode alone. "
        "Call fxtemporal.optimize on the model in the mode in which it will run."
    )


def _contents(module: nn.Module) -> dict[str, Any]:
    """The contents of a module, tensors that are neither parameters nor buffers included."""
    return {
        name: value
        for name, value in vars(module).items()
        if name in _KEPT or isinstance(value, torch.Tensor)
    }


def _rebuild(
    rebuild: Callable[..., fx.GraphModule], state: tuple[Any, ...], kept: dict[str, Any]
) -> OptimizedModule:
    plain = rebuild(*state)
    result = OptimizedModule(plain, plain.graph, type(plain).__name__)
    result._restore(kept)
    return result
