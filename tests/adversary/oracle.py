"""The verdict of one case: the original, run eagerly, says what is right.

``judge(case)`` builds fresh copies of the model from the case's text, optimizes one, and runs it
beside an untouched one on the case's calls, in step, so that state that a call leaves is compared
too. The kinds of verdict:

- ``equal``: all that was compared agrees.
- ``refused``: optimize raised an error of fxtemporal; ``aspect`` is its type.
- ``wrong``: a result, a gradient, an input written in place, a buffer or a layout differs.
- ``crash``: another exception, where the original works.
- ``changed``: the user's model or the interpreter is not as it was before optimize or audit.
- ``lost``: Python state that the original's calls leave (a counter, a log) and the result's do not,
  where no number that was compared depends on it; no fault, but worth counting.
- ``skipped``: the original itself raises, or gives something else each time.
"""

import dataclasses
import re
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import fxtemporal

from . import comparing, state, uneven
from .case import HEADER, Call, Case, Program, compiled, seed_all, tensors

FAULTS = ("wrong", "crash", "changed")
_TINY = 1e-12
"""A relative error in float64 that a long sum may have."""
_SIGN = re.compile("signbit|copysign")
# Errors this many times the original's own are beyond rounding.
_OWN = 8.0
# The same, where the original's result is hardly more than its own error: the norm of a constant.
_NOTHING = 64.0
# Ops that make the largest number of Inf.
_LARGEST = frozenset(("nextafter", "nan_to_num"))
# A relative error that float64 need not confirm, if noise in the inputs does not explain it.
_GROSS = 1e-2
# The share of entries that may lie at a pole in half precision.
_POLES = 0.01


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a case. ``call`` is the index of the call, None for optimize and audit."""

    kind: str
    aspect: str = ""
    detail: str = ""
    call: int | None = None
    notes: tuple[str, ...] = ()
    off: float = float("inf")  # the largest error, where numbers differ

    @property
    def key(self) -> tuple[str, str]:
        """What a shrunk case must keep."""
        return self.kind, self.aspect


class _Fault(Exception):  # noqa: N818
    def __init__(
        self,
        kind: str,
        aspect: str,
        detail: str,
        call: int | None = None,
        off: float = float("inf"),
    ) -> None:
        super().__init__(detail)
        self.verdict = Verdict(kind, aspect, detail, call, off=off)


@dataclasses.dataclass
class _Result:
    """One run of one side."""

    out: Any = None
    error: BaseException | None = None
    inputs: tuple[Any, ...] = ()
    gradients: dict[str, torch.Tensor | None] = dataclasses.field(default_factory=dict)


def judge(case: Case, optimize: Callable[..., nn.Module] = fxtemporal.optimize) -> Verdict:
    """The verdict of a case: what ``optimize`` makes of its model, beside the model."""
    with _quiet(case.dtype):
        try:
            code = compiled(case)
            return _Judge(case, code, optimize).verdict()
        except _Fault as fault:
            return fault.verdict


def run_alone(case: Case) -> None:
    """The calls of the original, without a result beside it."""
    with _quiet(case.dtype):
        original = Program(case, compiled(case))
        for call in case.calls:
            _run(original.model, tensors(case, call), call, holder=original.model)


@contextmanager
def _quiet(dtype: str) -> Iterator[None]:
    before, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_grad_enabled(grad)


class _Judge:
    def __init__(
        self, case: Case, code: types.CodeType, optimize: Callable[..., nn.Module]
    ) -> None:
        self.case, self.code, self.optimize = case, code, optimize
        self.notes: list[str] = []
        self.minor: _Fault | None = None  # reported where nothing worse is found
        self.scale = 1.0  # of the gradients of a call, whose cotangents are about 1

    def verdict(self) -> Verdict:
        case = self.case
        try:
            probe = Program(case, self.code)
        except Exception as error:
            return Verdict("skipped", "build", f"{type(error).__name__}: {error}")
        before, args = state.snapshot(probe.model), tensors(case, case.example)
        seed_all(7)
        around = state.world()
        first = _run(probe.model, args, case.example, seed=None)
        if first.error is not None:
            return Verdict("skipped", "original raises", _line(first.error))
        self.random = any("random" in s for s in state.world_differences(around, state.world()))
        self.stateful = bool(state.differences(before, state.snapshot(probe.model)))
        seed_all(7)
        other = _run(
            Program(case, self.code).model, tensors(case, case.example), case.example, seed=7
        )
        seed_all(7)
        first = _run(
            Program(case, self.code).model, tensors(case, case.example), case.example, seed=7
        )
        if other.error or comparing.form(first.out, other.out, strides=True):
            return Verdict("skipped", "not deterministic")
        for a, b in zip(
            comparing.tensors_in(first.out), comparing.tensors_in(other.out), strict=True
        ):
            if not state.same(a.detach(), b.detach()):
                return Verdict("skipped", "not deterministic")
        if case.audited:
            self._audit()
        given = Program(case, self.code)
        fast = self._optimize(given)
        if not isinstance(fast, Verdict):
            self._compare(given, fast)
        if self.minor is not None:
            raise self.minor
        if isinstance(fast, Verdict):
            return fast
        return Verdict("equal", notes=tuple(sorted(set(self.notes))))

    def _audit(self) -> None:
        given = Program(self.case, self.code)
        with self._unchanged(given, "audit") as args:
            try:
                fxtemporal.audit(given.model, args, progress=False)
            except fxtemporal.FxTemporalError as error:
                if _is_defect(error):
                    raise _crash("audit", error.__cause__ or error) from error
                self.notes.append(f"audit: {type(error).__name__}")
            except Exception as error:
                raise _crash("audit", error) from error

    def _optimize(self, given: Program) -> "nn.Module | Verdict":
        with self._unchanged(given, "optimize") as args, self._served():
            try:
                fast = self.optimize(given.model, args, tune="static", progress=False)
            except fxtemporal.FxTemporalError as error:
                if _is_defect(error):
                    raise _crash("optimize", error.__cause__ or error) from error
                kind = "crash" if "please report" in str(error) else "refused"
                refusal = Verdict(kind, type(error).__name__, str(error)[:300])
            except Exception as error:
                raise _crash("optimize", error) from error
            else:
                return fast
        return refusal

    @contextmanager
    def _unchanged(self, given: Program, what: str) -> Iterator[tuple[Any, ...] | None]:
        """Gives the example inputs, and checks that all is as it was once the block is done."""
        args = tensors(self.case, self.case.example) if self.case.given else None
        names = {name for name in vars(given.module) if not name.startswith("__")}
        names -= _HEADER_NAMES
        held = {"model": given.model, "args": args}
        held["globals"] = {name: vars(given.module)[name] for name in sorted(names)}
        kept = dict(vars(given.module))
        before = state.snapshot(held, "")
        seed_all(11)
        around = state.world()
        yield args
        lines = state.world_differences(around, state.world())
        now = vars(given.module)
        moved = [n for n in {**kept, **now} if now.get(n, self) is not kept.get(n, self)]
        lines += [f"{n} in the user's module" for n in moved if not n.startswith("__")]
        for aspect, found in (
            ("interpreter", lines),
            ("model", state.differences(before, state.snapshot(held, ""))),
        ):
            text = f"{what} left behind: " + "; ".join(found[:4])
            if found and all("new version" in line for line in found):
                self.minor = _Fault("changed", _kind_of_change(aspect, found), text)
            elif found:
                raise _Fault("changed", _kind_of_change(aspect, found), text)

    @contextmanager
    def _served(self) -> Iterator[None]:
        """Another thread runs another model meanwhile; it must never notice."""
        if not self.case.threaded:
            yield
            return
        seed_all(5)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).eval()
        clip = torch.randn(2, 3, 4, 4)
        with torch.no_grad():
            want = model(clip)
        stop, odd = threading.Event(), []

        def serve() -> None:
            while not stop.is_set() and not odd:
                try:
                    with torch.no_grad():
                        got = model(clip)
                        zeros = torch.zeros(2)
                    if type(got) is not torch.Tensor or comparing.beyond_rounding(want, got):
                        odd.append(f"returned a {type(got).__name__} that is not the result")
                    if type(zeros) is not torch.Tensor:
                        odd.append(f"torch.zeros returned a {type(zeros).__name__}")
                except Exception as error:
                    odd.append(_line(error))

        thread = threading.Thread(target=serve)
        seed_all(11)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if odd:
            raise _Fault("changed", "another thread", f"another thread, meanwhile: {odd[0]}")

    def _compare(self, given: Program, fast: nn.Module) -> None:
        case = self.case
        original = Program(case, self.code)
        done: list[Call] = []
        for index, call in enumerate(case.calls):
            if self.random and (call.batch, call.frames) != (
                case.example.batch,
                case.example.frames,
            ):
                continue
            if call.poison and _SIGN.search(case.source):
                continue  # what the sign of a NaN is, no op promises
            sides = (original.model, fast)
            if call.mode and not self._moded(index, call, sides):
                break
            before = state.snapshot(original.model)
            want = _run(original.model, tensors(case, call), call, holder=original.model)
            got = _run(fast, tensors(case, call), call, holder=given.model)
            done.append(call)
            if want.error is not None:
                if got.error is None:
                    self.notes.append(f"lenient: {_line(want.error)[:80]}")
                if self.stateful or state.differences(before, state.snapshot(original.model)):
                    self.notes.append("the original failed on the way, and keeps what it wrote")
                    break
                continue
            if got.error is not None:
                if not isinstance(got.error, fxtemporal.FxTemporalError):
                    if self._fails_nearby(done, type(got.error)):
                        self.notes.append("the original fails too, if the last bits change")
                        break
                    raise _crash("call", got.error, index, call)
                self.notes.append(f"call: {type(got.error).__name__}")
                if self.stateful or state.differences(before, state.snapshot(original.model)):
                    break  # what the original keeps of a call that was refused, nobody has
                continue
            self._agree(index, call, done, want, got)
            self._states(index, original.model, fast)
        if self.stateful and not self.notes:
            lost = _effects(original.model, given.model)
            if lost:
                raise _Fault("lost", "effect", "after the calls, " + "; ".join(lost[:3]))

    def _moded(self, index: int, call: Call, sides: tuple[nn.Module, nn.Module]) -> bool:
        sides[0].train(call.mode == "train")
        try:
            sides[1].train(call.mode == "train")
        except fxtemporal.FxTemporalError as error:
            self.notes.append(f"{call.mode}(): {type(error).__name__}")
            return False
        except Exception as error:
            raise _crash(f"{call.mode}()", error, index, call) from error
        return True

    def _agree(self, index: int, call: Call, done: list[Call], want: _Result, got: _Result) -> None:
        like = (call.batch, call.frames) == (self.case.example.batch, self.case.example.frames)
        like &= self.case.given or all(v.is_contiguous() for v in comparing.tensors_in(want.inputs))
        odd = comparing.form(want.out, got.out, strides=like)
        values = [*comparing.tensors_in(want.out), *want.gradients.values()]
        with torch.no_grad():
            finite = all(v.isfinite().all() for v in values if v is not None)
        poison = call.poison if finite else _poison_of(call, done)
        if odd:
            fault = _Fault("wrong", odd[0], f"{_sizes(call)}: {odd[1]}", index)
            if odd[0] != "layout":
                raise fault
            if not self._lies_by_mode(call, done, want.out):
                self.minor = fault
        for aspect, ours, theirs in (
            ("values", want.out, got.out),
            ("inputs", want.inputs, got.inputs),
        ):
            a, b = comparing.tensors_in(ours), comparing.tensors_in(theirs)
            for place in range(0 if self._untold_values(poison) else len(a)):
                self._numbers(index, call, done, aspect, (aspect, place), a[place], b[place])
        spoilt = poison and not any(map(_any_finite, comparing.tensors_in(want.out)))
        spoilt = spoilt or self._untold_values(poison)
        spoilt = spoilt or (poison and self._uses(uneven.GRADIENTS))
        self.scale = max([1.0, *map(_largest, want.gradients.values())])
        for name in () if spoilt or self._untold_gradients() else want.gradients:
            ours, theirs = want.gradients[name], got.gradients.get(name)
            if (ours is None) != (theirs is None):
                have = ["None" if value is None else "there" for value in (ours, theirs)]
                text = f"{_sizes(call)}: the gradient of {name} is {have[0]} in the original, "
                text += f"{have[1]} in the result"
                raise _Fault("wrong", "gradient", text, index)
            if ours is not None:
                if poison:  # a tap that meets padding alone is 0 to one kernel, NaN to another
                    theirs = torch.where(~ours.isfinite() & theirs.isfinite(), ours, theirs)
                where = ("gradients", name)
                self._numbers(index, call, done, "gradient", where, ours, theirs)

    def _lies_by_mode(self, call: Call, done: list[Call], out: Any) -> bool:
        """Whether the original's outputs lie otherwise without gradients, as MaxPool1d's do."""
        model = Program(self.case, self.code).model
        for before in done:
            if before.mode:
                model.train(before.mode == "train")
        plain = dataclasses.replace(call, gradients="")
        other = _run(model, tensors(self.case, call), plain, holder=model)
        return bool(call.gradients) and _form_of(other.out) != _form_of(out)

    def _uses(self, names: frozenset[str]) -> bool:
        """Whether one of these functions stands in the source, as such or as a module."""
        return any(re.search(rf"\b{name}\b", self.case.source, re.IGNORECASE) for name in names)

    def _untold_values(self, poison: str) -> bool:
        """A convolution in half precision carries NaN to the next pixel, as its kernel reads two at
        once (oneDNN in torch 2.13); some activations answer by where an entry lies; and some ops
        make the largest number of Inf, beside which a sum keeps what its order leaves."""
        low = self.case.dtype in ("bfloat16", "float16") and "Conv" in self.case.source
        largest = poison == "inf" and self._uses(_LARGEST)
        return bool(poison) and (low or largest or self._uses(uneven.VALUES))

    def _untold_gradients(self) -> bool:
        """torch's conv3d in bfloat16 reads memory that nobody wrote, for the gradient of a weight
        that has more taps than the clip has frames (2.13, on a CPU)."""
        return self.case.dtype == "bfloat16" and "Conv3d" in self.case.source

    def _numbers(
        self, index: int, call: Call, done: list[Call], aspect: str, where: Any, a: Any, b: Any
    ) -> None:
        # torch's own kernels give Inf or NaN for Inf, as their vectors and their remainders go
        odd = comparing.beyond_rounding(a, b, loosely=_poison_of(call, done) == "inf")
        if odd is None or self._explained(done, where, a, b, aspect):
            return
        measured = comparing.error(a, b)
        off = measured[0] if measured else float("inf")
        raise _Fault("wrong", aspect, f"{_sizes(call)}: {where[0]} {where[1]} {odd}", index, off)

    def _explained(self, done: list[Call], where: Any, a: Any, b: Any, aspect: str) -> bool:
        """Whether rounding explains a difference: in float64 it would be gone or far smaller."""
        measured = comparing.error(a, b)
        off = measured[0] if measured else float("inf")
        scale = self.scale if aspect == "gradient" else measured[1] if measured else 0.0
        if off <= comparing.FREE * comparing.rounding(a.dtype) * scale:
            return True
        case = dataclasses.replace(self.case, calls=tuple(done), audited=False, threaded=False)
        own = self._own_error(case, where, a, double=True)
        if own is not None and off <= _OWN * own:
            return True
        if own is not None and own > 0.01 * scale and off <= _NOTHING * own:
            return True
        if self.case.dtype == "float64":
            return off <= max(_OWN * self._noise(case, where, a), _TINY * scale)
        confirmed = judge(dataclasses.replace(case, dtype="float64"), self.optimize)
        if confirmed.key == ("wrong", aspect) and not confirmed.off < 1e-4 * off:
            return False
        if off <= _GROSS * scale and not self._low(a):
            return True
        if measured is None and self._low(a) and _few_poles(a, b):
            return True
        return off <= _OWN * self._noise(case, where, a)

    @staticmethod
    def _low(a: torch.Tensor) -> bool:
        return a.dtype in (torch.bfloat16, torch.float16)

    def _noise(self, case: Case, where: Any, a: torch.Tensor) -> float:
        seeds = range(1, 13) if self._low(a) else (1, 2, 3)  # where an order of few values turns
        found = [self._own_error(case, where, a, noise=seed) for seed in seeds]
        return max((value for value in found if value is not None), default=0.0)

    def _fails_nearby(self, done: list[Call], kind: type[BaseException]) -> bool:
        """Whether the original raises such an error too, with noise in what it is given.

        How many numbers are zero depends on rounding, and so does the size of ``argwhere``.
        """
        case = dataclasses.replace(self.case, calls=tuple(done), audited=False, threaded=False)
        return any(
            isinstance(self._shaken_run(case, noise=seed).error, kind) for seed in range(1, 25)
        )

    def _shaken_run(self, case: Case, *, double: bool = False, noise: int = 0) -> _Result:
        """The last call of a new original, in float64 or with noise in all that it is given."""
        # made in the case's own dtype: random numbers of another are other numbers
        model = Program(case, self.code).model
        model = model.double() if double else model
        if noise:
            _shake([*model.parameters(), *model.buffers()], noise)
        for call in case.calls:
            torch.set_default_dtype(getattr(torch, case.dtype))
            args = tensors(case, call)
            if double:
                torch.set_default_dtype(torch.float64)
                args = tuple(_widened(value) for value in args)
            if noise:
                args = tuple(_shaken(value, noise) for value in args)
            if call.mode:
                model.train(call.mode == "train")
            result = _run(model, args, call, holder=model)
        return result

    def _own_error(
        self, case: Case, where: Any, a: torch.Tensor, *, double: bool = False, noise: int = 0
    ) -> float | None:
        """How far the original is from itself in float64, or with noise in what it is given."""
        with _quiet(case.dtype):
            try:
                result = self._shaken_run(case, double=double, noise=noise)
            except Exception:
                return None
        if result.error is not None:
            return None
        if where[0] == "gradients":
            other = result.gradients.get(where[1])
        else:
            held = comparing.tensors_in(result.out if where[0] == "values" else result.inputs)
            other = held[where[1]] if where[1] < len(held) else None
        if other is None or other.shape != a.shape:
            return None
        measured = comparing.error(a, other)
        return measured[0] if measured else float("inf")

    def _states(self, index: int, original: nn.Module, fast: nn.Module) -> None:
        """What the state dict holds after a call: running statistics, counters, weights."""
        ours, theirs = original.state_dict(), fast.state_dict()
        for name, a in ours.items():
            b = theirs.get(name)
            if b is None or not isinstance(a, torch.Tensor) or a.shape != b.shape:
                raise _Fault("wrong", "state dict", f"{name} is not in the result's", index)
            measured = comparing.error(a, b)
            # the mean of what was normalized before is made of rounding errors
            tiny = 1e-5 if name.endswith("running_mean") else 1e-6
            if measured is None or measured[0] > 1e-3 * measured[1] + tiny:
                rounding = 4 * comparing.rounding(a.dtype)  # of numbers of about 1
                if self._low(a) and measured and measured[0] < 0.05 * measured[1] + rounding:
                    continue
                raise _Fault("wrong", "state", f"after the call {name} differs", index)


def _run(
    model: Any,
    args: tuple[Any, ...],
    call: Call,
    *,
    seed: int | None = 7,
    holder: nn.Module | None = None,
) -> _Result:
    """Run one side; gradients are taken for the parameters of ``holder``."""
    if seed is not None:
        seed_all(seed + 100 * call.seed)
    result = _Result()
    leaves = {f"input {i}": v for i, v in enumerate(args) if v.is_floating_point()}
    if call.gradients == "inputs":
        for value in leaves.values():
            value.requires_grad_()
    parameters = dict(holder.named_parameters()) if holder is not None else {}
    try:
        if not call.gradients:
            with torch.no_grad():
                result.out = model(*args)
        else:
            for value in parameters.values():
                value.grad = None
            result.out = model(*args)
            leaves = {name: v for name, v in leaves.items() if v.is_leaf and v.requires_grad}
            outs = [v for v in comparing.tensors_in(result.out) if v.requires_grad]
            torch.manual_seed(31)
            given = [_cotangent(value) for value in outs]
            if outs:
                torch.autograd.backward(outs, given)
            for name, value in {**leaves, **parameters}.items():
                result.gradients[name] = None if value.grad is None else value.grad.clone()
                value.grad = None
    except Exception as error:
        result.error = error
    result.inputs = args
    return result


def _form_of(out: Any) -> list[tuple[int, ...]]:
    return [value.stride() for value in comparing.tensors_in(out)]


def _any_finite(value: torch.Tensor) -> bool:
    with torch.no_grad():  # of a view that the forward wrote, gradients cannot be asked
        return bool(value.isfinite().any())


def _largest(gradient: torch.Tensor | None) -> float:
    if gradient is None or not gradient.numel():
        return 0.0
    return float(gradient.detach().abs().nan_to_num(posinf=0.0).max())


def _cotangent(value: torch.Tensor) -> torch.Tensor:
    if value.dtype.is_complex:
        return torch.randn(value.shape, dtype=torch.complex128).to(value.dtype)
    return torch.randn(value.shape, dtype=torch.float64).to(value.dtype)


def _widened(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _shaken(value: torch.Tensor, seed: int) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    wide = value.detach().clone()
    _shake([wide], seed)
    return wide.requires_grad_(value.requires_grad)


def _shake(values: list[torch.Tensor], seed: int) -> None:
    """Multiply by 1 plus noise of a unit of rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in values:
            if value.is_floating_point() and not is_lazy(value) and value.numel():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                wide = value.double() * (1 + comparing.rounding(value.dtype) * noise)
                value.copy_(wide)


def _effects(original: nn.Module, given: nn.Module) -> list[str]:
    """Python state that the original's calls leave and the result's do not."""
    ours, theirs = state.snapshot(original), state.snapshot(given)
    lines = []
    for path, a in ours.items():
        b = theirs.get(path)
        if "_hooks" in path:  # their numbers are counted in the whole process
            continue
        if b is None:
            lines.append(f"{path} is missing")
        elif a.kind == "container" and a.facts[1] != b.facts[1]:
            lines.append(f"{path} holds {str(b.facts[1])[:40]}, not {str(a.facts[1])[:40]}")
        elif a.kind == "plain" and isinstance(a.value, int | str) and a.facts != b.facts:
            lines.append(f"{path} is {b.facts[1]}, not {a.facts[1]}")
        elif a.copy is not None and b.copy is not None and path.count("_parameters") == 0:
            measured = comparing.error(a.copy, b.copy) if a.copy.shape == b.copy.shape else None
            near = max(1e-2, 16 * comparing.rounding(a.copy.dtype))  # it adds up over the calls
            if measured is None or measured[0] > near * (measured[1] + 1e-6):
                lines.append(f"{path} differs")
    return sorted(lines)


def _is_defect(error: fxtemporal.FxTemporalError) -> bool:
    """Whether something raised that nothing expected, here or in the model's code."""
    return isinstance(error, fxtemporal.InternalError) or type(error) is fxtemporal.FxTemporalError


def _crash(
    what: str, error: BaseException, index: int | None = None, call: Call | None = None
) -> _Fault:
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "/fxtemporal/" in frame.filename]
    place = inner[-1].filename.rsplit("/fxtemporal/", 1)[1] + ":" + inner[-1].name if inner else ""
    sizes = f" at {_sizes(call)}" if call else ""
    text = f"{what}{sizes}: {_line(error)}" + f" in {place}" * bool(place)
    return _Fault("crash", f"{what}: {type(error).__name__} in {place or 'torch'}", text, index)


def _kind_of_change(aspect: str, lines: list[str]) -> str:
    if aspect == "interpreter":
        return re.sub(r"[^a-zA-Z.' ]", "", lines[0])
    if all(line.startswith("['globals']") for line in lines):
        aspect = "globals"
    ends = ("other values", "new version", "another object", "is gone", "is new")
    for end in ends:
        if any(end in line for line in lines):
            return f"{aspect}: {end}"
    return f"{aspect}: facts"


def _few_poles(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of half precision are alike but for Inf in very few entries.

    There a value and its neighbour lie at a pole, as 1.5 and 1.501 for ``mvlgamma``.
    """
    odd = a.isfinite() != b.isfinite()
    if odd.sum() > max(1, _POLES * odd.numel()) or a.isnan().any() != b.isnan().any():
        return False
    return comparing.beyond_rounding(a[~odd], b[~odd]) is None


def _poison_of(call: Call, done: list[Call]) -> str:
    """What poisons a call: its own inputs, or an earlier call whose the model's state keeps."""
    return call.poison or next((before.poison for before in reversed(done) if before.poison), "")


def _sizes(call: Call) -> str:
    text = f"B={call.batch}, T={', '.join(map(str, call.frames))}"
    return text + f", {call.poison}" * bool(call.poison) + f", {call.mode}()" * bool(call.mode)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :200
    ]


_HEADER_NAMES = set()
_space: dict[str, Any] = {}
exec(HEADER, _space)
_HEADER_NAMES.update(_space)
