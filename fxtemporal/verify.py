"""Does the result compute what the original computes?

Both run on the example inputs, and on fresh inputs at every other size that is free: another
batch, another number of frames. The yardstick is the original in float64: the result may be as
far from it as rounding explains, and the original's own distance stands beside it. Where the
original cannot run in float64, the two are compared with each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxtemporal.errors import SpecializationError
from fxtemporal.quiet import quiet
from fxtemporal.shared_state import seed
from fxtemporal.stand_in import own_inputs, stand_in

__all__ = ["Comparison", "Sample", "Tolerance", "Verifier", "culprits", "resized"]

Example = tuple[tuple[Any, ...], dict[str, Any]]

_POISONED = "the example with "
_PIECE = 2**22
_LOW = (torch.bfloat16, torch.float16)
_MANY, _RUN = 2**18, 16
"""Fresh values of an input of so many entries are drawn in runs: one by one takes longer than a
forward."""
_CHEAP_SECONDS = 0.2
"""A model that runs within this also runs in float64 on the fresh inputs, beside the example."""


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the float64 reference, relative to the largest value.

    ``times`` the original's own error, and never less than ``ulps`` units in the last place of the
    dtype. ``alone`` is the same for two results of which neither is the better one.
    """

    times: float = 4.0
    ulps: float = 16.0
    alone: float = 128.0

    def bound(self, dtype: torch.dtype, original_error: float | None) -> float:
        eps = torch.finfo(dtype).eps
        if original_error is None:
            return (self.alone * 32 if dtype == torch.float64 else self.alone) * eps
        return max(self.times * original_error, self.ulps * eps)


@dataclass(frozen=True)
class Sample:
    """One comparison: on what inputs, and how far apart.

    Errors are relative to the largest absolute value of the reference. ``original_error`` is the
    original's own error against float64, None where float64 was not to be had.
    """

    inputs: str
    max_abs_error: float
    relative_error: float
    original_error: float | None
    bound: float
    problem: str | None = None
    asked: Literal["bits", "nan"] | None = field(default=None, repr=False)
    """What more was asked for than numbers that are equal up to rounding, where that failed."""

    @property
    def equal(self) -> bool:
        return self.problem is None and self.relative_error <= self.bound


@dataclass(frozen=True)
class Comparison:
    """The result beside the original, on every set of inputs that was tried."""

    samples: tuple[Sample, ...]
    exact: bool = True

    @property
    def equal(self) -> bool:
        return all(sample.equal for sample in self.samples)

    @property
    def max_abs_error(self) -> float:
        return max((sample.max_abs_error for sample in self.samples), default=0.0)

    @property
    def relative_error(self) -> float:
        return max((sample.relative_error for sample in self.samples), default=0.0)

    @property
    def original_error(self) -> float | None:
        errors = [s.original_error for s in self.samples if s.original_error is not None]
        return max(errors, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "equal": self.equal if self.exact else None,
            "exact": self.exact,
            "max_abs_error": _finite(self.max_abs_error),
            "relative_error": _finite(self.relative_error),
            "original_error": self.original_error,
            "samples": [
                {n: _finite(value) for n, value in vars(sample).items() if n != "asked"}
                for sample in self.samples
            ],
        }


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error without bound is null there."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Verifier:
    """Compares candidates with one original; what the original computes is computed once."""

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
        self._given = {t.dtype for t in held if _is_float(t)}
        start = time.perf_counter()
        outputs = self._outcome(original, example)
        self._cheap = time.perf_counter() - start < _CHEAP_SECONDS
        reference = self._reference(original, example, outputs)
        self._example = _Run("the example inputs", example, outputs, reference)
        self._finest = min(
            (torch.finfo(t.dtype).eps for t in _tensors(outputs) if _is_float(t)), default=0.0
        )
        self._fresh = dict(_fresh_inputs(example)) | (dict(_poisoned(example)) if confined else {})
        self._runs: dict[str, _Run | None] = {}
        self._noises: dict[str, list[float]] = {}

    def compare(
        self, candidate: nn.Module, *, exact: bool = True, example_only: bool = False
    ) -> Comparison:
        """Run ``candidate`` on all inputs, or on the example alone.

        ``exact`` False marks a result that is meant to differ: its errors are only reported.
        """
        with quiet():  # a graph that fails prints its code
            samples = [self._compared(self._example, candidate)]
            for name, inputs in () if example_only else self._fresh.items():
                if self._cheap and self._run(name) is None:
                    continue
                try:
                    outputs, error = self._outcome(candidate, inputs), None
                except SpecializationError:
                    continue  # this size is not free, and the module says so
                except Exception as raised:  # a rewritten graph may fail in any way
                    outputs, error = None, raised
                if (run := self._run(name)) is not None:
                    samples.append(self._compared(run, candidate, outputs, error))
            return Comparison(tuple(samples), exact)

    @property
    def cheap(self) -> bool:
        """Whether the model runs in no time, so that more can be tried on it."""
        return self._cheap

    @property
    def outputs_with_gradients(self) -> tuple[int, ...]:
        """The original's outputs, by number, that have gradients where these are switched off."""
        outputs, args, kwargs, _ = self._example.outputs
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        with contextlib.suppress(RuntimeError):  # a view that was written where they are off
            return tuple(
                number
                for number, leaf in enumerate(pytree.tree_leaves(outputs))
                if not self._gradients and getattr(leaf, "grad_fn", None) and id(leaf) not in given
            )
        return ()

    @property
    def outputs(self) -> list[Any]:
        """The leaves of what the original gave on the example inputs."""
        return pytree.tree_leaves(self._example.outputs[0])

    def _run(self, name: str) -> _Run | None:
        """The original on fresh inputs, once it is needed; None where it does not take them."""
        if name not in self._runs:
            inputs, run = self._fresh[name], None
            with contextlib.suppress(Exception):  # in any way that a model may
                run = _Run(name, inputs, self._outcome(self._original, inputs), None)
            self._runs[name] = run
        return self._runs[name]

    def _with_reference(self, run: _Run) -> _Run:
        """The same run in float64 beside it, where there is the time for that."""
        if not self._cheap or run.reference is not None or run is self._example:
            return run
        reference = self._reference(self._original, run.inputs, run.outputs)
        self._runs[run.name] = wide = dataclasses.replace(run, reference=reference)
        return wide

    def _compared(
        self, run: _Run, candidate: nn.Module, outputs: Any = None, error: Exception | None = None
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

    def _next_to(self, run: _Run, outputs: Any) -> Sample:
        """The comparison with the original alone: so near to it, no reference can tell more.

        Half of what is always allowed, so that the original's own error has room beside it.
        """
        if any(t.dtype in _LOW for t in _tensors(run.outputs) if isinstance(t, torch.Tensor)):
            return _failed(run.name, "half precision hides errors")
        sample = self._sample(run, outputs)
        return dataclasses.replace(
            sample, bound=min(sample.bound, self._tolerance.ulps / 2 * self._finest)
        )

    def at(self, candidate: nn.Module, inputs: Example, name: str) -> Sample | None:
        """The comparison on ``inputs``; None where the original does not take them, or both refuse.

        What the original refuses as specialized, the candidate has to refuse too: nobody can say
        what its numbers would be.
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
        return self._sample(_Run(name, inputs, outputs, None), result)

    def _in_float64(self, run: _Run, candidate: nn.Module) -> Sample | None:
        """The comparison in float64, where the rounding of half precision would hide errors.

        None where that is not needed, or the candidate does not run so.
        """
        leaves = [leaf for leaf in _tensors(run.outputs) if isinstance(leaf, torch.Tensor)]
        if run.reference is None or not any(leaf.dtype in _LOW for leaf in leaves):
            return None
        wide = self._reference(candidate, run.inputs, run.outputs)
        if wide is None:
            return None
        sample = self._sample(_Run(run.name, run.inputs, run.reference, None, wide=True), wide)
        return None if sample.equal else sample

    def _outcome(self, model: nn.Module, inputs: Example, *, double: bool = False) -> Any:
        """All that a call leaves: the outputs, the inputs, in training mode the buffers.

        A stand-in is called, so that what the forward writes stays there; ``double``: in float64.
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
        """The same in float64; None where the model cannot run so, or is in float64 itself."""
        floats = [t for t in _tensors(outcome) if isinstance(t, torch.Tensor)]
        if not any(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in floats):
            return None
        try:
            wide = self._outcome(model, inputs, double=True)
        except Exception:  # a model may insist on its dtype in any way
            return None
        return (
            wide
            if list(map(_shape, _tensors(wide))) == list(map(_shape, _tensors(outcome)))
            else None
        )

    def _sample(self, run: _Run, outputs: Any) -> Sample:
        mine, theirs = _tensors(outputs), _tensors(run.outputs)
        if pytree.tree_structure(outputs) != pytree.tree_structure(run.outputs):
            return _failed(run.name, "its outputs are nested in another way")
        if len(mine) != len(theirs):
            return _failed(run.name, f"gave {len(mine)} tensors, not {len(theirs)}")
        best = [None] * len(theirs) if run.reference is None else _tensors(run.reference)
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

    def _noise(self, run: _Run) -> list[float]:
        """How far each output of the original moves with the last bits of all that it is given.

        Relative to its largest value. Where an output is next to nothing beside what it was
        computed from, the difference of two means, that is far more than rounding it once.
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
                for one, two in zip(_tensors(moved), _tensors(run.outputs), strict=True):
                    error, largest = _distance(one, two) if _is_float(two) else (0.0, 1.0)
                    noises.append(error / (largest or 1.0))
            self._noises[run.name] = noises
        return self._noises[run.name]

    def _tensor(
        self, run: _Run, result: Any, original: Any, reference: torch.Tensor | None
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
            error, largest = _distance(result, original)
            bits = "its bits differ from the model's"
            return Sample(name, error, error / (largest or 1.0), None, 0.0, bits, "bits")
        if not original.dtype.is_floating_point:
            problem = None if torch.equal(result, original) else "integers differ"
            return Sample(name, 0.0, 0.0, None, 0.0, problem)
        if name.startswith(_POISONED):
            fine = original.isfinite()
            if not bool(result[fine].isfinite().all()):
                spread = "gave NaN or Inf where the model gives a number"
                return Sample(name, infinite, infinite, None, 0.0, spread, "nan")
            result, original = result[fine], original[fine]
            reference = None if reference is None else reference[fine]
        coarsest = original.dtype if run.wide else self._coarsest(original.dtype)
        own = None
        if reference is not None:
            error, largest = _distance(original, reference)
            own = error / (largest or 1.0)
            if not own <= torch.finfo(coarsest).eps ** 0.5:
                own, reference = None, None  # the model does something else in float64
        error, largest = _distance(result, original if reference is None else reference)
        scale = largest or 1.0
        dtype = original.dtype if own is not None else coarsest
        return Sample(name, error, error / scale, own, self._tolerance.bound(dtype, own))

    def _coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which an output of ``dtype`` may have been computed, with the most error."""
        coarsest: torch.dtype = max((dtype, *self._given), key=lambda one: torch.finfo(one).eps)
        return coarsest


@dataclass(frozen=True)
class _Run:
    name: str
    inputs: Example
    outputs: Any
    reference: Any
    wide: bool = False


def _failed(name: str, problem: str) -> Sample:
    return Sample(name, float("inf"), float("inf"), None, 0.0, problem)


def _shaken(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``tensor`` with other last bits."""
    if not tensor.dtype.is_floating_point:
        return tensor
    noise = torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor.device)
    moved = tensor.detach().double() * (1 + torch.finfo(tensor.dtype).eps * noise)
    return moved.to(tensor.dtype).requires_grad_(tensor.requires_grad)  # a forward may ask


def _same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits; any NaN is NaN."""
    if not theirs.dtype.is_floating_point:
        return torch.equal(mine, theirs)
    alike = (mine == theirs) & (mine.signbit() == theirs.signbit())
    return bool((alike | (mine.isnan() & theirs.isnan())).all())


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _distance(value: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest absolute difference, largest finite absolute value); NaN equals NaN.

    Piece by piece: a float64 copy of a large output need not fit into memory.
    """
    error = largest = 0.0
    if value.numel() == 0:
        return error, largest
    flat, flat_reference = value.detach().flatten(), reference.detach().flatten()
    for start in range(0, value.numel(), _PIECE):
        mine = flat[start : start + _PIECE].double()
        theirs = flat_reference[start : start + _PIECE].to(mine.device).double()
        difference = (mine - theirs).abs_()
        furthest = float(difference.max())
        if not math.isfinite(furthest):
            same = (mine == theirs) | (mine.isnan() & theirs.isnan())
            furthest = float(difference.nan_to_num(nan=math.inf).masked_fill(same, 0.0).max())
            theirs = theirs.masked_fill(~theirs.isfinite(), 0.0)
        error = max(error, furthest)
        largest = max(largest, float(theirs.abs().max()))
    return error, largest


def _tensors(outputs: Any) -> list[Any]:
    """The leaves, those of dataclasses included."""
    leaves = []
    for leaf in pytree.tree_leaves(outputs):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += _tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def _shape(leaf: Any) -> torch.Size | None:
    return leaf.shape if isinstance(leaf, torch.Tensor) else None


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype.is_floating_point else tensor


def _fresh_inputs(example: Example) -> Iterator[tuple[str, Example]]:
    """Inputs of other sizes: another batch, one more entry in dimension 1 or 2."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, torch.Tensor) and t.dim()]
    if not tensors:
        return
    batch = tensors[0].shape[0]
    other = 3 if batch == 2 else 2
    tries = [(f"a batch of {other}", {0: (batch, other)})]
    longest = max(tensors, key=torch.Tensor.dim)
    small = {0: (batch, 1)} if batch > 2 else {}
    for dim in (1, 2) if longest.dim() >= 3 else ():
        size = longest.shape[dim]
        tries.append((f"{size + 1} entries in dimension {dim}", {**small, dim: (size, size + 1)}))
    generator = torch.Generator().manual_seed(0)
    for name, change in tries:
        yield name, resized(example, change, generator)
        (dim,) = set(change) - {0} or {0}
        flat = [t for t in tensors if t.dim() == 2 and dim == 1 and t.shape[1] == change[1][0]]
        if flat and longest.dim() >= 3:  # a mask (B, T)
            yield f"{name}, masks too", resized(example, change, generator, least_rank=2)


def _poisoned(example: Example) -> Iterator[tuple[str, Example]]:
    """The example with a frame of NaN, or of Inf, in its longest inputs."""
    tensors = [t for t in pytree.tree_leaves(example) if _is_float(t)]
    rank = max((t.dim() for t in tensors), default=0)
    for what, dim in ((float("nan"), 1), (float("nan"), 2), (float("inf"), 2)):
        if not any(t.dim() == rank >= 3 and t.shape[dim] > 1 for t in tensors):
            continue

        def poison(tensor: torch.Tensor, what: float = what, dim: int = dim) -> torch.Tensor:
            if not _is_float(tensor) or tensor.dim() != rank or tensor.shape[dim] < 2:
                return tensor
            index = torch.tensor([tensor.shape[dim] // 2], device=tensor.device)
            return tensor.index_fill(dim, index, what)

        text = f"{_POISONED}{what} at entry {{}} of dimension {dim}"
        middle = next(t.shape[dim] // 2 for t in tensors if t.dim() == rank)
        yield text.format(middle), pytree.tree_map_only(torch.Tensor, poison, example)


def resized(
    example: Example,
    change: dict[int, tuple[int, int]],
    generator: torch.Generator | None = None,
    *,
    least_rank: int = 3,
) -> Example:
    """Inputs like ``example`` of other sizes; ``change`` gives them by dimension as (old, new).

    Dimension 0 changes everywhere, another one in tensors of ``least_rank`` dimensions.
    """
    generator = generator or torch.Generator().manual_seed(0)
    draw = partial(_fresh, change=change, generator=generator, least_rank=least_rank)
    changed: Example = pytree.tree_map_only(torch.Tensor, draw, example)
    return changed


def _fresh(
    like: torch.Tensor,
    change: dict[int, tuple[int, int]],
    generator: torch.Generator,
    least_rank: int,
) -> torch.Tensor:
    """New values drawn from those of ``like``; ``change`` gives sizes as (old, new)."""
    sizes = list(like.shape)
    for dim, (old, new) in change.items():
        if (dim == 0 or like.dim() >= least_rank) and dim < like.dim() and sizes[dim] == old:
            sizes[dim] = new
    count = int(torch.Size(sizes).numel())
    if like.numel() == 0 or count == 0:
        return like.new_zeros(sizes)
    flat = like.detach().flatten()
    run = 1 if flat.numel() < _MANY else _RUN
    runs = flat[: flat.numel() // run * run].view(-1, run)
    picks = torch.randint(len(runs), (-(-count // run),), generator=generator).to(like.device)
    return runs.index_select(0, picks).flatten()[:count].reshape(sizes)


T = TypeVar("T")


def culprits(items: Sequence[T], passes: Callable[[Sequence[T]], bool]) -> list[T]:
    """The items without which ``passes``, found by bisecting: log2(n) tries an item found.

    ``passes(())`` is taken to be true.
    """
    found: list[T] = []
    remaining = list(items)
    while remaining and not passes(remaining):
        low, high = 0, len(remaining)  # the first `low` pass, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if passes(remaining[:middle]):
                low = middle
            else:
                high = middle
        found.append(remaining.pop(low))
    return found
