"""What becomes of one model of the zoo: ``python -m benchmarks.zoo.outcome PACKAGE NAME``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fxtemporal
from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase
from fxtemporal.verification.inputs import resized

__all__ = ["PACKAGES", "Outcome", "cases", "outcome_of"]

PACKAGES = (
    "diffusers",
    "transformers",
    "timm",
    "monai",
    "pytorchvideo",
    "segmentation_models_pytorch",
    "torchvision",
)


@dataclasses.dataclass
class Outcome:
    """What optimize did with a model.

    ``captured`` is ``"whole"``, ``"parts"`` or ``"no"``; ``regions`` are the parts. The errors are
    relative to the largest number of each output, in units of float32's last place at the example,
    at another batch and at another number of frames: None where the original refuses such inputs.
    ``seconds`` are those of optimize, ``forward`` those of one call. ``problem`` is the error of a
    model that did not go in, ``wrong`` what is not as in the model.
    """

    package: str
    name: str
    captured: str = "no"
    frontend: str = ""
    regions: int = 0
    applied: int = 0
    missed: int = 0
    failed: int = 0
    seconds: float = 0.0
    audit_seconds: float = 0.0
    forward: float = 0.0
    example: float | None = None
    batch: float | None = None
    frames: float | None = None
    refused: int = 0
    problem: str = ""
    wrong: str = ""


def cases(package: str) -> tuple[ZooCase, ...]:
    """The models of one package."""
    found: tuple[ZooCase, ...] = importlib.import_module(f"benchmarks.zoo.{package}_models").CASES
    return found


def outcome_of(case: ZooCase) -> Outcome:
    """Build the model, optimize it, and compare."""
    with contextlib.suppress(ImportError):
        torchvision_models()  # several packages import it
    outcome = Outcome(case.package, case.name)
    torch.manual_seed(0)
    built = case.build()
    reference = copy.deepcopy(built.model)
    kwargs = dict(built.kwargs or {})
    state = {name: value.clone() for name, value in built.model.state_dict().items()}
    with torch.no_grad():
        _call(reference, case, built.args, kwargs)
        start = time.perf_counter()
        _call(reference, case, built.args, kwargs)
        outcome.forward = time.perf_counter() - start
    given = _copied((built.args, kwargs))
    start = time.perf_counter()
    try:
        fast = fxtemporal.optimize(
            built.model, *given, method=case.method, tune="static", progress=False
        )
    except fxtemporal.FxTemporalError as error:
        fault = isinstance(error, fxtemporal.InternalError)
        outcome.problem = f"fault: {_short(error)}" if fault else _short(error)
    except Exception as error:  # a fault of fxtemporal
        outcome.problem = f"fault: {_short(error)}"
        traceback.print_exc()
    outcome.seconds = time.perf_counter() - start
    start = time.perf_counter()
    try:
        fxtemporal.audit(built.model, *_copied((built.args, kwargs)), method=case.method)
    except fxtemporal.FxTemporalError as error:
        if isinstance(error, fxtemporal.InternalError):
            outcome.wrong = f"audit: {_short(error)}"
    except Exception as error:
        outcome.wrong = f"audit: {_short(error)}"
    outcome.audit_seconds = time.perf_counter() - start
    _look(outcome, state, built.model)
    if not outcome.problem:
        _described(outcome, fast)
        _compared(outcome, case, reference, fast, built, kwargs)
    return outcome


def _described(outcome: Outcome, fast: nn.Module) -> None:
    report = fxtemporal.report(fast)
    outcome.captured = "parts" if report.frontend == "parts" else "whole"
    outcome.frontend = report.frontend
    outcome.regions = len(getattr(report, "regions", ())) or 1
    for status in ("applied", "missed", "failed"):
        setattr(outcome, status, len(report.by_status(status)))


def _look(outcome: Outcome, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Note a change of the model."""
    now = model.state_dict()
    if list(now) != list(state) or not all(torch.equal(now[k], v) for k, v in state.items()):
        outcome.wrong = "the model was changed"


def _compared(
    outcome: Outcome,
    case: ZooCase,
    reference: nn.Module,
    fast: nn.Module,
    built: Built,
    kwargs: dict[str, Any],
) -> None:
    """Compare at the example, at another batch, and at another number of frames."""
    example = (built.args, kwargs)
    longest = max(_leaves(example), key=Tensor.dim)
    tries: list[tuple[str, Any]] = [("example", example)]
    for name, dim in (("batch", case.batch), ("frames", case.frames)):
        if dim is not None and dim < longest.dim():
            size = longest.shape[dim]
            tries.append((name, resized(example, {dim: (size, size + 1)})))
    for name, inputs in tries:
        try:
            with torch.no_grad():
                expected = _call(reference, case, *_copied(inputs))
        except Exception:  # of inputs that the model does not take
            continue
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            try:
                actual = fast(*_copied(inputs)[0], **_copied(inputs)[1])
            except Exception as error:
                outcome.wrong = f"{name}: {_short(error)}"
                continue
        outcome.refused += any("right only where" in str(entry.message) for entry in caught)
        setattr(outcome, name, _error(outcome, name, actual, expected))


def _error(outcome: Outcome, name: str, actual: Any, expected: Any) -> float:
    mine, theirs = list(_leaves(actual)), list(_leaves(expected))
    if type(actual) is not type(expected) or len(mine) != len(theirs):
        outcome.wrong = f"{name}: gave {type(actual).__name__} of {len(mine)} tensors"
        return float("inf")
    worst = 0.0
    for one, other in zip(mine, theirs, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            outcome.wrong = f"{name}: gave {tuple(one.shape)} {one.dtype}"
            return float("inf")
        if one.numel() and other.is_floating_point():
            largest = float(other.abs().nan_to_num().max()) or 1.0
            worst = max(worst, float((one - other).abs().nan_to_num().max()) / largest)
        elif not torch.equal(one, other):
            outcome.wrong = f"{name}: other whole numbers"
    if worst > 1e-3:
        outcome.wrong = f"{name}: relative error {worst:.1e}"
    return worst


def _call(model: nn.Module, case: ZooCase, args: Any, kwargs: Any) -> Any:
    called: Callable[..., Any] = getattr(model, case.method) if case.method else model
    return called(*args, **kwargs)


def _copied(inputs: Any) -> Any:
    return copy.deepcopy(inputs)


def _leaves(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in a value, those in the attributes of objects too."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry, seen)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry, seen)
    elif hasattr(value, "__dict__") and id(value) not in seen:
        seen.add(id(value))
        yield from _leaves(vars(value), seen)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


if __name__ == "__main__":
    _package, _name = sys.argv[1:]
    (_case,) = (case for case in cases(_package) if case.name == _name)
    print(json.dumps(dataclasses.asdict(outcome_of(_case))))
