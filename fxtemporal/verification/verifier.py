"""Compares the outputs of a result with those of the original.

Both run on the example inputs, and on fresh inputs at every other size that is free: another
batch, another number of frames. The reference is the original in float64: the result's error may be
as large as rounding explains, judged by the original's own error. If the original cannot run in
float64, the two are compared with each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxtemporal.ir.outputs import leaves_of
from fxtemporal.ir.shared_state import seed
from fxtemporal.ir.stand_in import own_inputs, stand_in
from fxtemporal.support.clock import timed
from fxtemporal.support.errors import SpecializationError
from fxtemporal.support.quiet import quiet
from fxtemporal.support.torch_private import pytree
from fxtemporal.verification.comparison import Comparison, Sample, Tolerance, distance
from fxtemporal.verification.gradients import other_gradients
from fxtemporal.verification.inputs import (
    POISONED,
    Example,
    FreshInputs,
    fresh_inputs,
    is_float,
    poisoned,
)

__all__ = ["Verifier"]


_LOW = (torch.bfloat16, torch.float16)
_CHEAP_SECONDS = 0.2
"""A model that runs within this time is also run in float64 on fresh inputs, not only on the
example."""


class Verifier:
    """Compares candidates with one original, whose outputs are computed once."""

    def __init__(
        self,
        original: nn.Module,
        example: Example,
        tolerance: Tolerance | None = None,
        *,
        gradients: bool = False,
        bitwise: bool = False,
        confined: bool = False,
    ) -> None:
        self._bitwise = bitwise
        self._original = original
        self._gradients = gradients
        self._training = any(module.training for module in original.modules())
        self._tolerance = tolerance or Tolerance()
        held = (*original.parameters(), *original.buffers(), *pytree.tree_leaves(example))
        self._given = {t.dtype for t in held if is_float(t)}
        outputs, seconds = timed(partial(self._outcome, original, example))
        self._cheap = seconds < _CHEAP_SECONDS
        reference = self._reference(original, example, outputs)
        self._example = _Expected("the example inputs", example, outputs, reference)
        self._finest = min(
            (torch.finfo(t.dtype).eps for t in leaves_of(outputs) if is_float(t)), default=0.0
        )
        self._fresh = [
            *fresh_inputs(example, together=not self._cheap),
            *(poisoned(example) if confined else ()),
        ]
        self._runs: dict[str, _Expected | None] = {}
        self._noises: dict[str, list[float]] = {}

    def compare(
        self, candidate: nn.Module, *, exact: bool = True, example_only: bool = False
    ) -> Comparison:
        """Run ``candidate`` on all inputs, or on the example alone.

        ``exact`` False marks a result that is meant to differ: its errors are only reported.
        """
        with quiet():  # a graph that fails prints its code
            samples = [self._compared(self._example, candidate)]
            changed: list[frozenset[int]] = []
            for fresh in () if example_only else self._fresh:
                covered = bool(fresh.dims) and any(fresh.dims < dims for dims in changed)
                if covered or (self._cheap and self._run(fresh) is None):
                    continue
                try:
                    outputs, error = self._outcome(candidate, fresh.inputs), None
                except SpecializationError:
                    continue  # this size is not free, and the module says so
                except Exception as raised:  # a rewritten graph may fail in any way
                    outputs, error = None, raised
                if (run := self._run(fresh)) is not None:
                    samples.append(self._compared(run, candidate, outputs, error))
                    changed.append(fresh.dims)
            return Comparison(tuple(samples), exact)

    @property
    def cheap(self) -> bool:
        """Whether the model runs fast enough to try more inputs."""
        return self._cheap

    @property
    def outputs_with_gradients(self) -> tuple[int, ...]:
        """The numbers of the outputs that have gradients although the caller switched these off."""
        outputs, args, kwargs, _ = self._example.outputs
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        with contextlib.suppress(RuntimeError):  # a view that was written with gradients off
            return tuple(
                number
                for number, leaf in enumerate(leaves_of(outputs))
                if not self._gradients and getattr(leaf, "grad_fn", None) and id(leaf) not in given
            )
        return ()

    @property
    def outputs(self) -> list[Any]:
        """The leaves of the original's outputs on the example inputs."""
        return leaves_of(self._example.outputs[0])

    def _run(self, fresh: FreshInputs) -> _Expected | None:
        """The original's run on fresh inputs, made when first needed; None if it refuses them."""
        if fresh.name not in self._runs:
            run = None
            with contextlib.suppress(Exception):  # in any way that a model may
                outcome = self._outcome(self._original, fresh.inputs)
                run = _Expected(fresh.name, fresh.inputs, outcome, None)
            self._runs[fresh.name] = run
        return self._runs[fresh.name]

    def _with_reference(self, run: _Expected) -> _Expected:
        """``run`` with a float64 reference, if the model is cheap."""
        if not self._cheap or run.reference is not None or run is self._example:
            return run
        reference = self._reference(self._original, run.inputs, run.outputs)
        self._runs[run.name] = wide = dataclasses.replace(run, reference=reference)
        return wide

    def _compared(
        self,
        run: _Expected,
        candidate: nn.Module,
        outputs: Any = None,
        error: Exception | None = None,
    ) -> Sample:
        if outputs is None and error is None:
            try:
                outputs = self._outcome(candidate, run.inputs)
            except Exception as raised:  # a rewritten graph may fail in any way
                error = raised
        if error is not None:
            text = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return _failed(run.name, text)
        if run.reference is None and (sample := self._next_to(run, outputs)).equal:
            return sample
        run = self._with_reference(run)
        sample = self._sample(run, outputs)
        wide = self._in_float64(run, candidate) if sample.equal else None
        return sample if wide is None else wide

    def _next_to(self, run: _Expected, outputs: Any) -> Sample:
        """The comparison with the original only. If it is close enough, no reference is needed.

        The bound is half of what is always allowed, to leave room for the original's own error.
        """
        if any(t.dtype in _LOW for t in leaves_of(run.outputs) if isinstance(t, torch.Tensor)):
            return _failed(run.name, "half precision hides errors")
        sample = self._sample(run, outputs)
        return dataclasses.replace(
            sample, bound=min(sample.bound, self._tolerance.ulps / 2 * self._finest)
        )

    def at(self, candidate: nn.Module, inputs: Example, name: str) -> Sample | None:
        """The comparison on ``inputs``; None if the original does not take them, or both refuse.

        Inputs that the original refuses as specialized, the candidate must refuse too: there are no
        numbers to compare with.
        """
        refused = False
        try:
            outputs = self._outcome(self._original, inputs)
        except SpecializationError:
            refused = True
        except Exception:  # in any way that a model may
            return None
        try:
            result = self._outcome(candidate, inputs)
        except SpecializationError:
            return None
        except Exception as raised:  # a rewritten graph may fail in any way
            return _failed(name, f"raised {type(raised).__name__}")
        if refused:
            return _failed(name, "gave numbers where the model is specialized")
        return self._sample(_Expected(name, inputs, outputs, None), result)

    def other_gradients(self, candidate: nn.Module, inputs: Example) -> str | None:
        """A text that names a gradient of ``candidate`` that is not the original's, or None."""
        return other_gradients(self._original, candidate, inputs, thorough=False)

    def _in_float64(self, run: _Expected, candidate: nn.Module) -> Sample | None:
        """A failed comparison in float64, for outputs whose half-precision rounding hides errors.

        None if it passes, is not needed, or the candidate does not run in float64.
        """
        leaves = [leaf for leaf in leaves_of(run.outputs) if isinstance(leaf, torch.Tensor)]
        if run.reference is None or not any(leaf.dtype in _LOW for leaf in leaves):
            return None
        wide = self._reference(candidate, run.inputs, run.outputs)
        if wide is None:
            return None
        sample = self._sample(_Expected(run.name, run.inputs, run.reference, None, wide=True), wide)
        return None if sample.equal else sample

    def _outcome(self, model: nn.Module, inputs: Example, *, double: bool = False) -> Any:
        """All results of a call: the outputs, the inputs after it, in training mode the buffers.

        A stand-in is called, so that the forward writes only into it; ``double``: in float64.
        """
        if double:
            inputs = pytree.tree_map_only(torch.Tensor, _double, inputs)
        args, kwargs = own_inputs(inputs)
        with stand_in(model) as other, torch.set_grad_enabled(self._gradients), quiet():
            module = other.module.double() if double else other.module
            seed(0)
            outputs = module(*args, **kwargs)
            buffers = dict(module.named_buffers()) if self._training else {}
            return outputs, args, kwargs, buffers

    def _reference(self, model: nn.Module, inputs: Example, outcome: Any) -> Any:
        """``outcome`` in float64; None if the model cannot run in it, or is in float64 itself."""
        floats = [t for t in leaves_of(outcome) if isinstance(t, torch.Tensor)]
        if not any(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in floats):
            return None
        try:
            wide = self._outcome(model, inputs, double=True)
        except Exception:  # a model may insist on its dtype in any way
            return None
        return (
            wide
            if list(map(_shape, leaves_of(wide))) == list(map(_shape, leaves_of(outcome)))
            else None
        )

    def _sample(self, run: _Expected, outputs: Any) -> Sample:
        mine, theirs = leaves_of(outputs), leaves_of(run.outputs)
        if pytree.tree_structure(outputs) != pytree.tree_structure(run.outputs):
            return _failed(run.name, "its outputs are nested in another way")
        if len(mine) != len(theirs):
            return _failed(run.name, f"gave {len(mine)} tensors, not {len(theirs)}")
        best = [None] * len(theirs) if run.reference is None else leaves_of(run.reference)
        worst = Sample(run.name, 0.0, 0.0, 0.0 if run.reference is not None else None, 0.0)
        for number, (result, original) in enumerate(zip(mine, theirs, strict=True)):
            sample = self._tensor(run, result, original, best[number])
            if not sample.equal and sample.problem is None and not run.wide:
                noise = self._noise(run)
                least = self._tolerance.times * noise[number] if number < len(noise) else 0.0
                sample = dataclasses.replace(sample, bound=max(sample.bound, least))
            if not sample.equal:
                return sample
            if sample.relative_error >= worst.relative_error:
                worst = sample
        return worst

    def _noise(self, run: _Expected) -> list[float]:
        """How far each output of the original moves if the last bits of all its inputs change.

        Relative to the output's largest value. If an output is tiny compared with its operands,
        such as the difference of two means, that is far more than rounding it once.
        """
        if run.name not in self._noises:
            noises: list[float] = []
            shaken = partial(_shaken, generator=torch.Generator().manual_seed(0))
            args, kwargs = pytree.tree_map_only(torch.Tensor, shaken, own_inputs(run.inputs))
            with stand_in(self._original) as other, quiet(), contextlib.suppress(Exception):
                with torch.no_grad():
                    for tensor in (*other.module.parameters(), *other.module.buffers()):
                        tensor.copy_(shaken(tensor))
                moved = self._outcome(other.module, (args, kwargs))
                for one, two in zip(leaves_of(moved), leaves_of(run.outputs), strict=True):
                    error, largest = distance(one, two) if is_float(two) else (0.0, 1.0)
                    noises.append(error / (largest or 1.0))
            self._noises[run.name] = noises
        return self._noises[run.name]

    def _tensor(
        self, run: _Expected, result: Any, original: Any, reference: torch.Tensor | None
    ) -> Sample:
        name = run.name
        infinite = float("inf")
        if not isinstance(result, torch.Tensor) or not isinstance(original, torch.Tensor):
            same = type(result) is type(original) and repr(result) == repr(original)
            problem = None if same else f"gave {result!r}, not {original!r}"
            return Sample(name, 0.0, 0.0, None, 0.0, problem)
        if result.shape != original.shape or result.dtype != original.dtype:
            problem = (
                f"gave {tuple(result.shape)} of {result.dtype}, "
                f"not {tuple(original.shape)} of {original.dtype}"
            )
            return Sample(name, infinite, infinite, None, 0.0, problem)
        if original.dtype.is_complex:
            mine = torch.view_as_real(result.resolve_conj())
            return self._tensor(run, mine, torch.view_as_real(original.resolve_conj()), None)
        if self._bitwise and not _same_bits(result, original):
            error, largest = distance(result, original)
            bits = "its bits differ from the model's"
            return Sample(name, error, error / (largest or 1.0), None, 0.0, bits, "bits")
        if not original.dtype.is_floating_point:
            problem = None if torch.equal(result, original) else "integers differ"
            return Sample(name, 0.0, 0.0, None, 0.0, problem)
        if name.startswith(POISONED):
            fine = original.isfinite()
            if not bool(result[fine].isfinite().all()):
                spread = "gave NaN or Inf where the model gives a number"
                return Sample(name, infinite, infinite, None, 0.0, spread, "nan")
            result, original = result[fine], original[fine]
            reference = None if reference is None else reference[fine]
        coarsest = original.dtype if run.wide else self._coarsest(original.dtype)
        own = None
        if reference is not None:
            error, largest = distance(original, reference)
            own = error / (largest or 1.0)
            if not own <= torch.finfo(coarsest).eps ** 0.5:
                own, reference = None, None  # the model does something else in float64
        error, largest = distance(result, original if reference is None else reference)
        scale = largest or 1.0
        dtype = original.dtype if own is not None else coarsest
        return Sample(name, error, error / scale, own, self._tolerance.bound(dtype, own))

    def _coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The coarsest dtype in which an output of ``dtype`` may have been computed."""
        coarsest: torch.dtype = max((dtype, *self._given), key=lambda one: torch.finfo(one).eps)
        return coarsest


@dataclass(frozen=True)
class _Expected:
    name: str
    inputs: Example
    outputs: Any
    reference: Any
    wide: bool = False


def _failed(name: str, problem: str) -> Sample:
    return Sample(name, float("inf"), float("inf"), None, 0.0, problem)


def _shaken(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``tensor`` with its last bits changed at random."""
    if not tensor.dtype.is_floating_point:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    noise = torch.randn(tensor.shape, dtype=wide, generator=generator).to(tensor.device)
    still = tensor.detach().to(wide)
    moved = torch.addcmul(still, still, noise, value=torch.finfo(tensor.dtype).eps)
    return moved.to(tensor.dtype).requires_grad_(tensor.requires_grad)  # a forward may ask


def _same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits; any NaN equals any NaN."""
    if not theirs.dtype.is_floating_point:
        return torch.equal(mine, theirs)
    alike = (mine == theirs) & (mine.signbit() == theirs.signbit())
    return bool((alike | (mine.isnan() & theirs.isnan())).all())


def _shape(leaf: Any) -> torch.Size | None:
    return leaf.shape if isinstance(leaf, torch.Tensor) else None


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype.is_floating_point else tensor
