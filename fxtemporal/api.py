"""The functions that users call: optimize, optimize_in_place, audit, report and refresh."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import fx, nn
from tqdm import tqdm

from fxtemporal.analysis.cost import Costs, Structure
from fxtemporal.capture.arguments import Model, check_arguments, example_of
from fxtemporal.capture.capture import capture
from fxtemporal.capture.methods import method_of, owner_of
from fxtemporal.compiler.finishing import META
from fxtemporal.compiler.parts import in_parts, report_of
from fxtemporal.compiler.promises import Exact, Layout, Nan, Promises
from fxtemporal.compiler.stages import run
from fxtemporal.compiler.state import Example, Request
from fxtemporal.factorization.settings import Factorize
from fxtemporal.ir.in_place import put_in_place
from fxtemporal.ir.module import OptimizedModule
from fxtemporal.ir.otherwise import Otherwise
from fxtemporal.ir.prepared import Prepared
from fxtemporal.ir.raised import owning_defects
from fxtemporal.mistakes import failing, find, telling_cure
from fxtemporal.passes.dump import Dump
from fxtemporal.passes.pipeline import run_rules
from fxtemporal.passes.rule import Rule
from fxtemporal.passes.selection import passes_of
from fxtemporal.reports.report import Report
from fxtemporal.support.errors import (
    CaptureError,
    ForwardError,
    FxTemporalError,
    PassError,
    VerificationError,
)
from fxtemporal.tuning.settings import Tune

__all__ = ["audit", "optimize", "optimize_in_place", "refresh", "report"]


@owning_defects("optimize")
def optimize(
    model: Model | Callable[..., Any],
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    passes: Sequence[str | Rule[Any]] | None = None,
    factorize: Factorize | None = None,
    tune: Tune | Literal["measure", "static"] | None = None,
    verify: bool = True,
    freeze: bool = False,
    frames: tuple[int, int] | None = None,
    exact: Exact = "rounding",
    nan: Nan = "any",
    layout: Layout = "same",
    otherwise: Literal["original", "error", "recapture"] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """``model`` with its frame loops re-rolled and its Conv3d layers in cheaper exact forms.

    The result computes the same numbers, shares the model's parameters, and is an ``nn.Module``
    that replaces the model. The model itself is not changed.

    Args:
        model: an ``nn.Module``, a ``torch.fx.GraphModule`` or a ``torch.export.ExportedProgram``;
            or a method of a model, ``vae.decode``: the result is called as the method is.
        example_inputs: the forward's arguments, e.g. one clip (B, T, C, H, W). Without them only
            rewrites that need no shapes are done, and nothing is measured or verified.
        example_kwargs: the forward's keyword arguments.
        method: the name of the method to optimize in place of the forward: ``"decode"``.
        passes: names of passes, or passes, in the order to run them; default: all exact passes.
            Lossy ones run first: ``"time-distribute{allow=training-batchnorm}"``, the same as
            ``TimeDistribute(allow=["training-batchnorm"])``, also re-rolls loops in which a
            normalization is in training mode; its docstring says what that changes.
        factorize: settings of the lossy (2+1)D factorization, :class:`fxtemporal.Factorize`;
            default: no factorization.
        tune: ``"measure"`` keeps rewrites that measure faster (the default with example inputs);
            ``"static"`` times nothing; a :class:`fxtemporal.Tune` sets how to measure, and how
            much memory a call may hold.
        verify: compare the result with the original, and undo rewrites that change the numbers.
        freeze: replace parameters by the values derived from them (a folded BatchNorm), and drop
            tensors that nothing reads any more. For a result that will only be run: its state dict
            changes. By default both are kept, and ``report(result).memory`` has the cost.
        frames: range of numbers of frames to admit now: ``(1, 64)``. Each one takes a trace of the
            model. Other numbers are traced at their first call, and refused if the forward does
            something else there. In an artifact the number of frames is free only within the
            admitted numbers around the example's.
        exact: ``"bitwise"`` keeps only rewrites that give the model's numbers bit for bit on this
            machine, on all inputs compared, those with NaN and infinite frames included. By default
            a rewrite may round differently, by about as much as the model differs from float64.
        nan: ``"confined"`` uses no form that spreads NaN or infinite values to frames that the
            model computes without them; such forms have ``spreads_nan`` in the report.
        layout: ``"any"`` leaves outputs in the memory layout that the last op gave them. By default
            they have the layout of the model's outputs, so that a ``.view()`` of them still works.
        otherwise: what the result does at a call that its guards refuse, such as another number of
            frames that the forward reads. ``"original"``, the default, runs the model's forward and
            warns once; ``"recapture"`` optimizes the model for such calls too, and keeps up to 8
            results; ``"error"`` raises :class:`fxtemporal.SpecializationError`. It is decided
            before anything is computed that others see; where that cannot be, and in a pickle, it
            is an error. With ``freeze`` or a lossy pass the default is ``"error"``.
        progress: show a progress bar; default: on a terminal only.

    Returns:
        A ``torch.fx.GraphModule``; ``fxtemporal.report(result)`` says what was done and why. If the
        model cannot be captured whole, an ``nn.Module`` of its own class in which the submodules
        that can are optimized (:mod:`fxtemporal.compiler.parts`).

    Raises:
        CaptureError: neither the model nor any of its submodules can be captured, or it fails on
            the example inputs.
        PassError: an unknown pass or setting.
        VerificationError: the captured graph, before any rewrite, gives other numbers.
    """
    called = _called(model, method)
    check_arguments(called, example_inputs, example_kwargs)
    promises = Promises(exact, nan, layout)
    example = example_of(called, example_inputs, example_kwargs)
    if promises.bitwise and (example is None or not verify):
        raise PassError("exact='bitwise' needs example inputs and verify=True to compare bits on")
    rules = passes_of(passes)
    tuning = _tuning(tune, example)
    with _progress(progress) as tick:
        request = Request(
            model=called,
            example=example,
            rules=rules,
            factorize=factorize,
            tune=tuning,
            verify=verify and example is not None,
            freeze=freeze,
            frames=frames,
            promises=promises,
            tick=tick,
        )
        request = replace(request, otherwise=_otherwise(request, otherwise))
        try:
            result = run(request)
            if called is not model and isinstance(result, OptimizedModule):
                result.keep_watched(called)
            return result
        except ForwardError:
            raise
        except (CaptureError, VerificationError) as error:
            parts = in_parts(request, error)
            if parts is None:
                raise
            return parts


def optimize_in_place(
    model: nn.Module | Callable[..., Any],
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    **settings: Any,
) -> nn.Module:
    """Optimize a method of ``model``, and put the result in the method's place.

    For a model that other code calls, such as the parts of a pipeline::

        fxtemporal.optimize_in_place(pipe.vae.decode, (latents,))
        pipe(prompt)                                # its calls of pipe.vae.decode run the result
        del pipe.vae.decode                         # the method is back

    The model keeps its class, its state dict and its hooks. It is the model's attribute that
    changes, so other names of the same object see the result too.

    Args:
        model: the model, or a method of it, ``pipe.vae.decode``.
        method: the name of the method; default: the method given, or the forward.
        settings: those of :func:`optimize`.

    Returns:
        The result, for :func:`report`.

    Raises:
        CaptureError, PassError, VerificationError: as :func:`optimize` does; nothing is changed.
    """
    owner, named = owner_of(model)
    name = named or method or "forward"
    view = method_of(owner, name)
    if named is not None and method is not None:
        raise PassError(f"give {type(owner).__name__}.{named} or method={method!r}, not both")
    result = optimize(view, example_inputs, example_kwargs, **settings)
    put_in_place(owner, name, result, view)
    return result


@owning_defects("audit")
def audit(
    model: Model | Callable[..., Any],
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    passes: Sequence[str | Rule[Any]] | None = None,
    measure: bool = False,
    progress: bool | None = None,
) -> Report:
    """Report what :func:`optimize` would do to ``model``, the gain, and the reasons against more.

    Without ``measure`` nothing is run: FLOPs are counted on the captured graph, and the gain of a
    rewrite is predicted (:mod:`fxtemporal.analysis.cost`). In the result, a remark's status
    ``"applied"`` means that the rewrite is legal here, and was faster if it was measured. Common
    mistakes are reported too (:mod:`fxtemporal.mistakes`): if the forward fails because of one,
    the report says so, with ``stopped`` set.

    Args:
        method: the name of the method to audit in place of the forward.
        measure: optimize a copy, and report the measured gain of each rewrite on this device.

    The other arguments are those of :func:`optimize`.

    Raises:
        CaptureError: the model cannot be captured, or fails on the example inputs in another way.
        PassError: an unknown pass, or ``measure`` without example inputs.
    """
    called = _called(model, method)
    check_arguments(called, example_inputs, example_kwargs)
    rules = passes_of(passes)
    example = example_of(called, example_inputs, example_kwargs)
    if measure and example is None:
        raise PassError("measure=True needs example inputs")
    try:
        with telling_cure():
            program = capture(called, example_inputs, example_kwargs)
    except ForwardError as error:
        mistake = failing(error)
        if mistake is None:
            raise
        return Report(mode="audit", remarks=(), findings=(mistake,), stopped=str(error))
    except CaptureError as error:
        request = Request(called, example, rules, tune=Tune() if measure else None, verify=measure)
        parts = in_parts(request, error)
        if parts is None:
            raise
        return replace(report(parts), mode="audit")
    findings = find(program)
    if measure:
        with _progress(progress) as tick:
            asked = {"rules": rules, "tune": Tune(), "verify": True, "tick": tick}
            fast = run(Request(called, example, captured=program, **asked))
        return replace(report(fast), mode="audit", findings=findings)
    costs = None if example is None else Costs()
    dump = Dump(called)
    dump("captured", program)
    outcome = run_rules(program, rules, costs=costs, dump=dump)
    structure = None
    if costs is not None:
        structure = Structure(costs.blocks(program), costs.blocks(outcome.program))
    return Report(
        mode="audit",
        remarks=tuple(remark for _, remark in outcome.remarks),
        specializations=program.specializations,
        frontend=program.frontend,
        note=program.note,
        findings=findings,
        structure=structure,
    )


def report(gm: nn.Module) -> Report:
    """The report of a module that :func:`optimize` returned, or of a copy of it.

    Raises:
        FxTemporalError: ``gm`` did not come from :func:`optimize`.
    """
    if (parts := report_of(gm)) is not None:
        return parts
    found = getattr(gm, "meta", {}).get(META) if isinstance(gm, fx.GraphModule) else None
    if not isinstance(found, Report):
        raise FxTemporalError(
            f"this {type(gm).__name__} carries no report: give what fxtemporal.optimize returned"
        )
    refused = gm.refused if isinstance(gm, OptimizedModule) else {}
    return replace(found, refused=refused)


def refresh(module: nn.Module) -> None:
    """Make the next call of ``module`` compute its prepared weights again.

    ``module`` is a result of :func:`optimize`, or contains one. Prepared weights, such as folded
    ones, are updated automatically after every write that PyTorch counts; other writes are found on
    the CPU by checks (:mod:`fxtemporal.ir.prepared`). Call this after a write that PyTorch does not
    count, on another device, or if the very next call must see it::

        model.conv.weight.data[3] = 0.0        on a GPU, or through NumPy in a tight loop
        fxtemporal.refresh(fast)
    """
    for part in module.modules():
        if isinstance(part, Prepared):
            part.forget()


def _called(model: Any, method: str | None) -> Any:
    """What is called: a model, or a method of one as a model."""
    owner, name = owner_of(model)
    if name is not None and method is not None:
        raise PassError(f"give {type(owner).__name__}.{name} or method={method!r}, not both")
    name = name or method
    return owner if name is None else method_of(owner, name)


def _otherwise(request: Request, asked: str | None) -> Callable[..., Otherwise] | None:
    """Makes what a result runs where its guards refuse a call; None for an error."""
    if asked not in (None, "original", "error", "recapture"):
        raise PassError(f"otherwise must be 'original', 'error' or 'recapture', not {asked!r}")
    if asked == "error" or (asked is None and (request.freeze or request.is_lossy)):
        return None

    def again(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
        quietly = replace(request, tick=lambda stage: None)
        return run(replace(quietly, model=model, example=(args, kwargs)))

    return partial(Otherwise, recapture=again if asked == "recapture" else None)


def _tuning(tune: Tune | str | None, example: Example | None) -> Tune | None:
    if isinstance(tune, Tune):
        if example is None:
            raise PassError("tune: measuring needs example inputs; give them, or tune='static'")
        return tune
    if tune not in (None, "measure", "static"):
        raise PassError(f"tune must be 'measure', 'static' or a fxtemporal.Tune, not {tune!r}")
    if tune == "measure" and example is None:
        raise PassError("tune='measure' needs example inputs; give them, or tune='static'")
    return None if tune == "static" or example is None else Tune()


@contextmanager
def _progress(shown: bool | None) -> Iterator[Any]:
    """A progress bar that names the stage; by default on a terminal only."""
    disable = None if shown is None else not shown
    with tqdm(desc="optimize", unit="step", disable=disable, file=sys.stderr, leave=False) as bar:

        def tick(stage: str) -> None:
            bar.update()
            bar.set_description_str(stage)  # draws it now: a stage may take long

        yield tick
