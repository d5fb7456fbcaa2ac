"""Runs a program on data, and records the inputs and outputs of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.ir.program import Program
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.errors import FxTemporalError, PassError
from fxtemporal.support.torch_private import pytree

__all__ = ["Data", "record", "run"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Seen = Callable[[Tensor, Tensor], None]


class Data:
    """Calibration data, as arguments of the model, checked against the example.

    Raises:
        PassError: an entry does not fit the model, or has NaN or infinite values; or there is none.
    """

    def __init__(self, entries: Iterable[Any], example: Arguments) -> None:
        self._entries = entries
        self._example = example

    def __iter__(self) -> Iterator[Arguments]:
        count = 0
        for count, entry in enumerate(self._entries, 1):
            arguments = self._arguments(entry, count - 1)
            self._check(arguments, count - 1)
            yield arguments
        if count == 0:
            raise PassError("Factorize: calibration is empty; give it example inputs")

    def counted(self) -> Iterator[tuple[str, Arguments]]:
        """Each entry with its number, ``"3 of 10"`` if the total is known."""
        try:
            of = f" of {len(self._entries)}"  # type: ignore[arg-type]
        except TypeError:
            of = ""
        for number, arguments in enumerate(self, 1):
            yield f"{number}{of}", arguments

    def _arguments(self, entry: Any, number: int) -> Arguments:
        args, kwargs = self._example
        if isinstance(entry, Tensor):
            entry = (entry,)
        if isinstance(entry, Mapping):
            return args[:0], dict(entry)
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) < len(args):
            raise PassError(
                f"Factorize: entry {number} of calibration is no input of the model: it takes "
                f"{len(args)} arguments; give a tensor, or a tuple of them"
            )
        return tuple(entry[: len(args)]), dict(kwargs)

    def _check(self, given: Arguments, number: int) -> None:
        expected, spec = pytree.tree_flatten(self._example)
        leaves, found = pytree.tree_flatten(given)
        where = f"Factorize: entry {number} of calibration"
        if found != spec:
            raise PassError(f"{where} is nested in another way than the example inputs")
        for leaf, like in zip(leaves, expected, strict=True):
            if not isinstance(like, Tensor):
                continue
            if not isinstance(leaf, Tensor):
                raise PassError(f"{where} has a {type(leaf).__name__} where a tensor belongs")
            if leaf.dim() != like.dim() or leaf.shape[1:] != like.shape[1:]:
                raise PassError(
                    f"{where} has shape {tuple(leaf.shape)}; that of the example is "
                    f"{tuple(like.shape)}, of which the first size alone may differ"
                )
            if leaf.numel() == 0:
                raise PassError(f"{where} has shape {tuple(leaf.shape)}, and so holds nothing")
            if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise PassError(f"{where} holds numbers that are not finite")


class _SeenError(Exception):
    """All watched nodes have run."""


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, watched: Mapping[fx.Node, Seen]) -> None:
        super().__init__(module, graph=graph)
        self._watched = dict(watched)

    def run_node(self, n: fx.Node) -> Any:
        seen = self._watched.pop(n, None)
        if seen is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x = args[0] if args else kwargs["input"]
        kept = x.clone() if n.op == "call_function" and kwargs.get("out") is not None else x
        result = super().run_node(n)
        seen(_batched(kept), _batched(result))
        if not self._watched:
            raise _SeenError
        return result


def _batched(x: Tensor) -> Tensor:
    return x if x.dim() == 5 else x.unsqueeze(0)


def record(program: Program, arguments: Arguments, watched: Mapping[fx.Node, Seen]) -> None:
    """Run ``program`` up to the last of ``watched``, and pass each one's input and output on.

    Raises:
        PassError: the program refuses the arguments.
    """
    args, kwargs = own_inputs(arguments)
    try:
        given = inspect.signature(program.gm.forward).bind(*args, **kwargs)
        given.apply_defaults()
        with torch.no_grad(), torch.random.fork_rng(), stand_in(program.gm) as own:
            _Recorder(own.module, program.graph, watched).run(*given.args)
    except _SeenError:
        return
    except (FxTemporalError, RuntimeError, TypeError) as error:
        raise PassError(
            f"Factorize: the model does not take the calibration data: {error}"
        ) from error


def run(program: Program, arguments: Arguments) -> Any:
    """The outputs of ``program`` for ``arguments``; its state does not change."""
    args, kwargs = own_inputs(arguments)
    with torch.no_grad(), torch.random.fork_rng(), stand_in(program.gm) as own:
        return own.module(*args, **kwargs)
