"""The graph module that ``optimize`` returns.

A :class:`torch.fx.GraphModule` forgets, when it is copied or pickled, its ``meta`` and every
parameter that its graph does not use. An optimized model must keep both: its report lives in
``meta``, and its state dict must go on loading into the original model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxtemporal.errors import SpecializationError

__all__ = ["MODE", "OptimizedModule"]

MODE = "fxtemporal_mode"
"""The key in ``meta`` of the one mode, training or not, in which the module is right."""

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


class OptimizedModule(fx.GraphModule):
    """A graph module that holds all of ``root``, and keeps it through copies and pickles."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        self._restore(_contents(root))

    def _restore(self, kept: dict[str, Any]) -> None:
        for name, value in kept.items():
            vars(self)[name] = copy.copy(value) if name in _KEPT else value

    def train(self, mode: bool = True) -> OptimizedModule:
        """Switch modes as ``nn.Module.train`` does, where the result is right in both.

        Raises:
            SpecializationError: a loop whose body holds BatchNorm or dropout was re-rolled in the
                other mode; they would see all frames at once.
        """
        if self.meta.get(MODE, mode) != mode:
            was, asked = ("training", "eval") if self.meta[MODE] else ("eval", "training")
            raise SpecializationError(
                f"a loop over frames was re-rolled in {was} mode; in {asked} mode the BatchNorm or "
                "dropout in its body would see all frames at once. Optimize the model in the mode "
                "in which it will run"
            )
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        result = super().__deepcopy__(memo)
        assert isinstance(result, OptimizedModule)
        result._restore(copy.deepcopy(_contents(self), memo))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, state = super().__reduce__()
        return _rebuild, (rebuild, state, _contents(self))


def _contents(module: nn.Module) -> dict[str, Any]:
    """What a module holds, with the tensors that are neither parameters nor buffers."""
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
