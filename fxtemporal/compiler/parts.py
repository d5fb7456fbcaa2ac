"""A model that cannot be captured whole, optimized in parts.

The model runs once on the example, and the inputs of its submodules are noted. The largest ones
that can be captured are optimized, each as a model of its own; between them the user's Python runs
as it is. The result is a twin of the model: the same class, names and hooks over the same tensors.
In it the forward of each such submodule runs what was made of it::

    Captioner                          its forward samples words: it stays
    ├── encoder: FrameEncoder          a region: its loop over frames is one call
    └── decoder: Decoder               cannot be captured either
        ├── attend: Attend             a region
        └── word: LSTMCell             a layer of torch, with nothing to do
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from fxtemporal.analysis.cost import Block, Structure
from fxtemporal.capture.methods import method_of
from fxtemporal.capture.tracing.python_patches import user_location
from fxtemporal.compiler.finishing import META
from fxtemporal.compiler.stages import run
from fxtemporal.compiler.state import Example, Request
from fxtemporal.ir.in_place import put_in_place
from fxtemporal.ir.reasons import Code, Reason
from fxtemporal.ir.shallow_copy import twin
from fxtemporal.ir.shared_state import seed
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.passes.rule import Remark
from fxtemporal.reports.data import Region
from fxtemporal.reports.report import Report
from fxtemporal.support.errors import FxTemporalError
from fxtemporal.support.quiet import quiet
from fxtemporal.verification.bisect import culprits
from fxtemporal.verification.comparison import Comparison
from fxtemporal.verification.verifier import Verifier

__all__ = ["in_parts", "report_of"]

_MOST = 100
"""Submodules that are tried."""
_ALIKE = 3
"""Submodules of one class that cannot be captured, before others of it are not tried any more."""
_REPORT = "_fxtemporal_report"
_NEEDS_WORK = (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d)
"""Layers of torch that passes look at when they are alone."""


@dataclass(frozen=True)
class _Part:
    """What was made of the submodule at ``path``, from the module ``source``."""

    path: str
    result: fx.GraphModule
    source: nn.Module
    location: str | None
    """The line of the user's code that calls it."""

    @property
    def report(self) -> Report:
        found: Report = self.result.meta[META]
        return found


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, and the line of the user's code that makes it."""

    example: Example
    location: str | None


def in_parts(request: Request, why: FxTemporalError) -> nn.Module | None:
    """The model of ``request`` in parts, since it cannot be captured whole for the reason ``why``.

    None if no submodule can be captured either, or the model does not run on the example.
    """
    model = request.model
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        return None
    if request.example is None or request.freeze or request.promises.bitwise or request.is_lossy:
        return None
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return None
    result = twin(model)
    parts = list(_parts(result, request))
    if not parts:
        return None
    kept = [part for part in parts if part.report.by_status("applied")]
    comparison, wrong = _compared(request, model, kept)
    kept = [part for part in kept if part.path not in wrong]
    _assemble(result, kept)
    vars(result)[_REPORT] = _report(request, why, parts, kept, comparison)
    return result


def report_of(model: nn.Module) -> Report | None:
    """The report of a model that was optimized in parts, or of a copy of it."""
    found = vars(model).get(_REPORT) if isinstance(model, nn.Module) else None
    return found if isinstance(found, Report) else None


def _parts(model: nn.Module, request: Request) -> Iterator[_Part]:
    """The largest submodules of ``model`` that can be captured, optimized."""
    request.tick("capturing in parts")
    assert request.example is not None
    failures: Counter[type] = Counter()
    tried: list[str] = []
    seen: set[nn.Module] = set()
    level = list(_children("", model))
    while level:
        first: dict[nn.Module, str] = {}  # a shared module has several names
        for path, module in level:
            first.setdefault(module, path)
        level = [(path, module) for module, path in first.items() if module not in seen]
        seen.update(first)
        calls = _first_calls(model, request.example, [path for path, _ in level])
        if calls is None:
            return
        below: list[tuple[str, nn.Module]] = []
        for path, module in level:
            if path not in calls or failures[type(module)] >= _ALIKE:
                below += _children(path, module)
            elif _has_work(module) and len(tried) < _MOST:
                tried.append(path)
                part = _optimized(path, module, calls[path], request)
                if part is not None:
                    yield part
                else:
                    failures[type(module)] += 1
                    below += _children(path, module)
        level = below


def _children(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield f"{path}.{name}" if path else name, child


def _has_work(module: nn.Module) -> bool:
    """Whether a pass may find something in ``module``: not in most single layers of torch."""
    library = type(module).__module__.startswith("torch.nn.modules.")
    return not library or isinstance(module, _NEEDS_WORK) or any(module.children())


def _first_calls(
    model: nn.Module, example: Example, paths: Sequence[str]
) -> Mapping[str, _Call] | None:
    """The first call of each submodule; None if the model fails.

    Submodules whose attributes are set by code outside of their calls are left out: a graph would
    hold the values of one call.
    """
    found: dict[str, _Call] = {}
    active: list[str] = []
    set_outside: set[str] = set()

    def enter(path: str, args: Any, kwargs: Any) -> None:
        active.append(path)
        if path not in found:
            found[path] = _Call(own_inputs((args, kwargs)), user_location())

    def leave(*_: Any) -> None:
        active.pop()

    def note_write(path: str) -> None:
        around = {known for known in paths if f"{path}.".startswith(f"{known}.")}
        set_outside.update(around.difference(active))

    args, kwargs = own_inputs(example)
    with stand_in(model) as other, torch.no_grad(), quiet():
        for path in paths:
            part = other.module.get_submodule(path)
            if isinstance(part, ScriptModule):
                continue  # takes no hooks, and cannot be traced
            part.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: enter(path, args, kwargs),
                with_kwargs=True,
            )
            part.register_forward_hook(leave, always_call=True)
        for path, module in other.module.named_modules():
            if path and not _watches_writes(module, partial(note_write, path)):
                note_write(path)
        seed(0)
        try:
            other.module(*args, **kwargs)
        except Exception:  # a model may fail in any way
            return None
    return {path: call for path, call in found.items() if path not in set_outside}


def _watches_writes(module: nn.Module, note: Callable[[], None]) -> bool:
    """Call ``note`` whenever an attribute of ``module`` is set; False if that cannot be watched."""
    kind: Any = type(module)
    if isinstance(module, ScriptModule):
        return True  # its forward is no Python

    def put(self: Any, name: str, value: Any) -> None:
        note()
        kind.__setattr__(self, name, value)

    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    try:
        module.__class__ = type(kind.__name__, (kind,), {"__setattr__": put, **about})
    except TypeError:  # a class with another layout
        return False
    return True


def _optimized(path: str, module: nn.Module, call: _Call, request: Request) -> _Part | None:
    source = method_of(module, "forward")
    try:
        result = run(replace(request, model=source, example=call.example, is_part=True))
        return _Part(path, result, source, call.location)
    except FxTemporalError:
        return None


def _assemble(model: nn.Module, parts: Sequence[_Part]) -> nn.Module:
    """``model`` with the forwards of its submodules replaced by what was made of them."""
    for part in parts:
        put_in_place(model.get_submodule(part.path), "forward", part.result, part.source)
    return model


class _Candidate(nn.Module):
    """The model and its parts for the verifier, which runs a copy of all that is in here."""

    def __init__(self, model: nn.Module, parts: Sequence[_Part]) -> None:
        super().__init__()
        self.model = twin(model)
        self.paths = [part.path for part in parts]
        self.results = nn.ModuleList(part.result for part in parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for path, result in zip(self.paths, self.results, strict=True):
            put_in_place(self.model.get_submodule(path), "forward", result, result)
        return self.model(*args, **kwargs)


def _compared(
    request: Request, model: nn.Module, parts: Sequence[_Part]
) -> tuple[Comparison | None, frozenset[str]]:
    """The comparison with the model, and the paths of parts that change its numbers."""
    if not request.verify or not parts:
        return None, frozenset()
    request.tick("verifying the parts together")
    assert request.example is not None
    verifier = Verifier(model, request.example)

    def compare(some: Sequence[_Part]) -> Comparison:
        return verifier.compare(_Candidate(model, some))

    if not compare(()).equal:
        return None, frozenset()  # the model draws numbers, or counts: it differs from itself
    wrong = culprits(parts, lambda some: compare(some).equal)
    return compare([part for part in parts if part not in wrong]), frozenset(
        part.path for part in wrong
    )


def _report(
    request: Request,
    why: FxTemporalError,
    parts: Sequence[_Part],
    kept: Sequence[_Part],
    comparison: Comparison | None,
) -> Report:
    reports = [(part.path, part.report) for part in parts]
    return Report(
        mode="optimize",
        remarks=tuple(
            _within(part, remark, part in kept) for part in parts for remark in part.report.remarks
        ),
        specializations=tuple(
            replace(fixed, expression=f"{path}: {fixed.expression}")
            for path, report in reports
            for fixed in report.specializations
        ),
        comparison=comparison,
        structure=_structure(parts, kept),
        frontend="parts",
        note=str(why),
        settings=request.settings(),
        regions=tuple(
            Region(
                part.path,
                type(part.source).__name__,
                part.report.frontend,
                len(part.report.by_status("applied")) if part in kept else 0,
            )
            for part in parts
        ),
    )


def _structure(parts: Sequence[_Part], kept: Sequence[_Part]) -> Structure | None:
    """The costs of all parts, one call of each; None if they are not known."""
    before: list[Block] = []
    after: list[Block] = []
    for part in parts:
        known = part.report.structure
        if known is None:
            return None
        for blocks, found in (
            (before, known.before),
            (after, known.after if part in kept else known.before),
        ):
            blocks += [
                replace(block, module=f"{part.path}.{block.module}".rstrip(".")) for block in found
            ]
    return Structure(tuple(before), tuple(after))


def _within(part: _Part, remark: Remark, kept: bool) -> Remark:
    """``remark`` as one of the whole model; a rewrite that was not kept failed."""
    layer = type(part.source).__module__.startswith(
        "torch.nn."
    )  # it is the site, and no part of it
    target = part.path if layer else f"{part.path}.{remark.target}"
    remark = replace(remark, target=target, location=remark.location or part.location)
    if kept or remark.status != "applied":
        return remark
    text = "within the whole model this part gave other numbers than by itself"
    return replace(remark, status="failed", reasons=(Reason(Code.WRONG_RESULT, text),))
