"""Prepared weights: values derived from parameters, computed once instead of at every call.

A BatchNorm folded into the convolution before it, concatenated kernels, the taps of a fast
algorithm: each is a pure function of parameters and buffers, the *sources*. In a graph it is a call
of a :class:`Prepared` module on the sources::

    weight = self.conv.weight                         (C_out, C, kT, kH, kW)
    mean = self.norm.running_mean                     (C_out,)
    folded = self._prepared_0(weight, mean, ...)      computed at the first call, then kept
    y = F.conv3d(x, folded[0], folded[1])

The parameters do not change: the state dict has the original's names and tensors. The kept value is
not a buffer (``named_buffers`` would list it, and ``.to(dtype)`` would round it a second time). It
is not copied, saved or moved with the module, but computed again.

It is also computed again if a source is another tensor, has other memory, or was written: by an
optimizer, ``load_state_dict``, ``.to(...)``, ``.data = ...``. Writes that PyTorch does not count
(``weight.data[3] = 9``, NumPy) are found on the CPU: by a sample of the entries at each call, and
by a checksum of all entries at the first calls, after a switch between training and eval, and then
as often as 0.5 % of the time allows. On other devices call :func:`fxtemporal.refresh` after such a
write.

Nothing is kept while a source needs a gradient, nor under ``torch.compile``, ``torch.export``,
``torch.jit.trace``, ``torch.func``, fake tensors and the like: there the function becomes part of
the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxtemporal.ir.ops import Attr
from fxtemporal.ir.program import Program
from fxtemporal.ir.watching import Schedule
from fxtemporal.support.torch_private.dispatch import is_dispatched
from fxtemporal.support.torch_private.transforms import in_forward_mode, in_transform

__all__ = ["Prepared", "derivation", "is_prepared", "origin", "prepare"]

_SMALL = 1024
"""Up to this many entries are all compared; of more, about ``_SAMPLE``."""
_SAMPLE = 64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""``{bytes of an entry: integer dtype of that size}``."""


class Prepared(nn.Module):
    """``function(*sources, **options)``, kept until a source changes.

    Args:
        function: pure, defined at the top of a module (it is pickled by name), and a
            :func:`~fxtemporal.ir.leaf.leaf_function`. It returns a tensor or a tuple of tensors
            that share no memory with the sources.
        keep: ``keep(value, **options)`` changes the value before it is kept, to a layout that this
            machine reads faster. In a graph it is not used.
        **options: plain values, passed to ``function`` by name.
    """

    _derived = ("_kept",)

    def __init__(
        self,
        function: Callable[..., Any],
        keep: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.function = function
        self.keep = keep
        self.options = options
        self._kept: _Kept | None = None

    def forward(self, *sources: Tensor | None) -> Any:
        """The value for these sources; a source may be None."""
        if torch.compiler.is_compiling() or _belongs_in_graph(sources):
            return self.function(*sources, **self.options)
        kept = self._kept  # read once: another thread may replace it
        if kept is not None and kept.holds_for(sources):
            return kept.value
        marks, samples = tuple(map(_Mark.of, sources)), _samples(sources)
        with torch.inference_mode(False), torch.no_grad(), _full_precision(sources):
            value = self.function(*sources, **self.options)
            if self.keep is not None:
                value = self.keep(value, **self.options)
        if any(source is not None and source.is_cuda for source in sources):
            torch.cuda.current_stream().synchronize()
        self._kept = _Kept(marks, samples, _Checksums.of(sources), value)
        return value

    def forget(self) -> None:
        """Drop the kept value, so that the next call computes it again."""
        self._kept = None

    def train(self, mode: bool = True) -> Prepared:
        """Switch the mode, and check the sources at the next call: they may have been written."""
        if (kept := self._kept) is not None:
            kept.checksums.schedule = Schedule()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Prepared:
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{getattr(self.function, '__name__', self.function)}{options}"


@dataclass(frozen=True)
class _Mark:
    """Fingerprint that recognizes a source at a later call.

    ``alias`` keeps its memory alive, so that no other tensor can get the same address.
    """

    alias: Tensor | None
    version: int = 0

    @classmethod
    def of(cls, source: Tensor | None) -> _Mark:
        return cls(None) if source is None else cls(source.detach(), source._version)

    def is_of(self, source: Tensor | None) -> bool:
        alias = self.alias
        if source is None or alias is None:
            return source is alias
        return (
            source._version == self.version
            and source.data_ptr() == alias.data_ptr()
            and source.dtype == alias.dtype
            and source.shape == alias.shape
            and source.stride() == alias.stride()
        )


@dataclass(frozen=True)
class _Sample:
    """Views of some entries of the sources, all of one dtype, and the values they had."""

    views: tuple[Tensor, ...]
    held: Tensor

    def still_holds(self) -> bool:
        return torch.equal(torch.cat(self.views), self.held)


@dataclass
class _Checksums:
    """Views of all entries of the sources as integers, and their sums.

    A change of one entry changes a sum.
    """

    views: tuple[Tensor, ...]
    held: tuple[int, ...]
    schedule: Schedule

    @classmethod
    def of(cls, sources: Sequence[Tensor | None]) -> _Checksums:
        views = tuple(
            source.detach().view(_INTEGERS[source.element_size()])
            for source in sources
            if source is not None
            and source.device.type == "cpu"
            and source.numel() > _SMALL
            and source.element_size() in _INTEGERS
        )
        return cls(views, tuple(map(_sum, views)), Schedule())

    def still_hold(self) -> bool:
        return not self.views or self.schedule.due(
            lambda: all(
                _sum(view) == held for view, held in zip(self.views, self.held, strict=True)
            )
        )


def _sum(view: Tensor) -> int:
    return int(view.sum(dtype=view.dtype))  # it may wrap around, and still detects a change


@dataclass(frozen=True)
class _Kept:
    marks: tuple[_Mark, ...]
    samples: tuple[_Sample, ...]
    checksums: _Checksums
    value: Any

    def holds_for(self, sources: Sequence[Tensor | None]) -> bool:
        return (
            len(sources) == len(self.marks)
            and all(map(_Mark.is_of, self.marks, sources))
            and all(sample.still_holds() for sample in self.samples)
            and self.checksums.still_hold()
        )


def _samples(sources: Sequence[Tensor | None]) -> tuple[_Sample, ...]:
    """The samples to compare at each call, to find writes that PyTorch does not count; CPU only."""
    views: dict[torch.dtype, list[Tensor]] = {}
    for source in sources:
        if source is not None and source.device.type == "cpu":
            views.setdefault(source.dtype, []).append(_entries(source.detach()))
    return tuple(_Sample(tuple(v), torch.cat(v)) for v in views.values())


def _entries(tensor: Tensor) -> Tensor:
    """A view of the memory of ``tensor``: all of it if small, else evenly spaced entries."""
    there = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    count = min(tensor.numel(), there)
    step = 1 if count <= _SMALL else count // _SAMPLE
    return tensor.as_strided((-(-count // step),), (step,))


def _belongs_in_graph(sources: Sequence[Any]) -> bool:
    """Whether the value must be computed in this call: it is being recorded, or differentiated."""
    given = [source for source in sources if source is not None]
    if (
        any(type(source) not in (Tensor, nn.Parameter) for source in given)
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or is_dispatched()
        or in_transform()
        or in_forward_mode()
    ):
        return True
    if torch.is_grad_enabled() and any(source.requires_grad for source in given):
        return True
    if any(source.is_meta or source.is_inference() for source in given):
        return True
    on_gpu = any(source.is_cuda for source in given)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _full_precision(sources: Sequence[Tensor | None]) -> Any:
    """Switch autocast off: it may not be on at the next call."""
    kind = next((source.device.type for source in sources if source is not None), "cpu")
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def prepare(
    program: Program,
    function: Callable[..., Any],
    sources: Sequence[fx.Node | None],
    keep: Callable[..., Any] | None = None,
    **options: Any,
) -> fx.Node:
    """Insert a node for the prepared value ``function(*sources, **options)``, and return it.

    ``sources`` are ``get_attr`` nodes, or prepared values; ``keep`` is that of :class:`Prepared`,
    and must be the same for all calls with one function. Nodes of the same value share one module,
    so that it is computed and kept once.
    """
    graph = program.graph
    path = next(
        (
            str(node.target)
            for node in graph.nodes
            if is_prepared(program, node)
            and _same(program.gm.get_submodule(str(node.target)), function, options)
            and [derivation(s) for s in node.args] == [derivation(s) for s in sources]
        ),
        None,
    )
    if path is None:
        number = 0
        while hasattr(program.gm, f"_prepared_{number}"):
            number += 1
        path = f"_prepared_{number}"
        program.gm.add_module(path, Prepared(function, keep, **options))
    return graph.call_module(path, tuple(sources))


def is_prepared(program: Program, node: fx.Node) -> bool:
    """Whether ``node`` is a prepared value."""
    if node.op != "call_module":
        return False
    return isinstance(program.gm.get_submodule(str(node.target)), Prepared)


def origin(program: Program, value: Any) -> str | None:
    """The name of the parameter that ``value`` is, or whose prepared value it is; else None."""
    if isinstance(value, Attr):
        return value.name
    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            return str(value.target)
        if value.target is not operator.getitem and not is_prepared(program, value):
            return None
        value = value.args[0]
    return None


def derivation(value: Any) -> Any:
    """A key that is equal for values that are the same parameter, or prepared in the same way."""
    if isinstance(value, Attr):
        return value.name
    if not isinstance(value, fx.Node):
        return value
    if value.op == "get_attr":
        return str(value.target)
    return (value.target, *(derivation(argument) for argument in value.args))


def _same(module: nn.Module, function: Callable[..., Any], options: dict[str, Any]) -> bool:
    assert isinstance(module, Prepared)
    return module.function is function and module.options == options
