"""Capture with torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from fxtemporal.capture.exported_guards import check_exported_sizes, holds_on_example
from fxtemporal.capture.failures import reason_of, refusal
from fxtemporal.capture.from_graph import from_graph_module
from fxtemporal.capture.small_sizes import refuse_small_sizes
from fxtemporal.capture.tracing.errors import StatefulError
from fxtemporal.capture.tracing.module_state import refuse_unseen, settle_export
from fxtemporal.capture.tracing.python_patches import (
    gradient_questions,
    modes_read,
    refusing_long_lists,
)
from fxtemporal.ir.program import Program
from fxtemporal.ir.shallow_copy import twin
from fxtemporal.ir.shared_state import RandomStates
from fxtemporal.ir.stand_in import StandIn, stand_in
from fxtemporal.support.errors import CaptureError, ForwardError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree
from fxtemporal.support.torch_private.fake_tensors import is_fake
from fxtemporal.support.torch_private.transforms import is_wrapped

__all__ = ["from_export", "from_exported"]


def from_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: Sequence[tuple[str, str]]
) -> Program:
    """Capture with torch.export, with every dimension free that the model allows to be free.

    ``why`` has the attempts before it, each with the reason why it failed.
    """
    wide_args, wide_kwargs = pytree.tree_map_only(torch.Tensor, _two_samples, (args, kwargs))
    attempts = [
        (wide_args, wide_kwargs, _free(model, wide_args, wide_kwargs)),
        (args, kwargs, _free(model, args, kwargs)),
        (args, kwargs, None),
    ]
    errors = []
    for a, k, dynamic in attempts:
        try:
            with stand_in(model, share_parameters=True, watched=True) as other:
                states = RandomStates()
                with (
                    quiet(),
                    refusing_long_lists(),
                    modes_read(other.module) as modes,
                    gradient_questions() as asked,
                ):
                    exported = torch.export.export(
                        other.module, a, k, dynamic_shapes=dynamic, strict=False
                    )
                settle_export(model, other, states, (args, kwargs))
            refuse_unseen(model, exported, (args, kwargs))
        except StatefulError as error:
            raise CaptureError(f"{error}: make it an input and an output, or a buffer") from error
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises its own tree, and the model's errors
            errors.append(error)
            continue
        _refuse_frozen_parameters(exported, other.module)
        try:
            program = from_exported(exported, args, kwargs)
        except ForwardError as error:  # a guard in the graph, of the inputs that it was made from
            errors.append(error)
            continue
        if not holds_on_example(program):  # a batch of one, and torch.export was shown two
            errors.append(CaptureError("a guard that does not hold on the example inputs"))
            continue
        program.frontend, program.note = "export", why[-1][1]
        program.doubt = asked[0] if asked else None
        _share_tensors(program.gm, model, other)
        _hold_modules(program.gm, model)
        program.modes = modes
        refuse_small_sizes(program, exported, model, (args, kwargs))
        return program
    tried = [*why, *(("torch.export", reason_of(error)) for error in errors)]
    raise refusal(model, (args, kwargs), tried) from errors[-1]


def _refuse_frozen_parameters(exported: ExportedProgram, model: nn.Module) -> None:
    """Refuse constants that are weights, generators, or tensors without data.

    torch.export makes weights constants if the forward does not reach them through ``self``.
    """
    weights = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())} - {0}
    for name, value in exported.constants.items():
        if isinstance(value, torch.Generator):
            raise CaptureError(
                "the forward draws random numbers from a generator of its own, whose state a graph "
                "cannot carry: draw them before the call, and make them an input"
            )
        if name in exported.graph_signature.buffers or not isinstance(value, torch.Tensor):
            continue
        if is_wrapped(value) or is_fake(value):
            raise CaptureError(
                "torch.export left a tensor without data in the graph, for a function transform "
                "(torch.func) in the forward: optimize the part of the model around it"
            )
        if value.data_ptr() in weights:
            raise CaptureError(
                "the forward uses a parameter that it does not reach through self (a closure, a "
                "method of another module): torch.export would make it a constant. Define the "
                "forward in the class"
            )


def _two_samples(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with a batch of two if it has one: torch.export makes a size of 1 a constant."""
    if tensor.dim() == 0 or tensor.shape[0] != 1:
        return tensor
    return tensor.repeat(2, *[1] * (tensor.dim() - 1))


def _free(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``dynamic_shapes`` that let torch.export leave every dimension free that it can."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    free: dict[str, Any] = pytree.tree_map(_free_dimensions, dict(bound))
    return free


def _free_dimensions(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: Dim.AUTO for dim, size in enumerate(value.shape) if size != 1}


def _hold_modules(gm: fx.GraphModule, model: nn.Module) -> None:
    """Give ``gm`` the modules and modes of ``model``: torch.export keeps those with tensors."""
    known = dict(gm.named_modules())
    for module in known.values():
        module.training = model.training
    for path, module in twin(model).named_modules():
        if path in known:
            known[path].training = module.training
            continue
        above, _, name = path.rpartition(".")
        if above in known and name not in vars(known[above]):
            known[above]._modules[name] = module  # what lies below comes with it


def _share_tensors(gm: fx.GraphModule, model: nn.Module, other: StandIn) -> None:
    """Replace the tensors of torch.export and of the stand-in by the model's own."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for kind in ("_parameters", "_buffers"):
        for path, module in gm.named_modules(remove_duplicate=False):
            for name in getattr(module, kind):
                full = f"{path}.{name}" if path else name
                if full in tensors:
                    getattr(module, kind)[name] = tensors[full]
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    vars(module)[name] = other.original(value)


def from_exported(
    exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    gm = exported.module()
    assert isinstance(gm, fx.GraphModule)
    for hooks in (  # its checks of the input follow as nodes of the graph
        gm._forward_pre_hooks,
        gm._forward_pre_hooks_with_kwargs,
        gm._forward_hooks,
        gm._forward_hooks_with_kwargs,
        gm._forward_hooks_always_called,
    ):
        hooks.clear()
    program = from_graph_module(gm, (args, kwargs) if args or kwargs else None)
    check_exported_sizes(program, exported)
    program.refresh()
    return program
