"""Calls of torch's own ops as text, found in the op database that torch tests itself with.

For a tensor of a given shape, an op is tried with the arguments of its samples::

    calls("clamp", (2, 3, 4, 4))  ->  ["torch.clamp({x}, min=0.1)", "{x}.clamp_(max=2)", ...]

Tensors among a sample's arguments become tensors of the frame's shape or of their own.
"""

import functools
import inspect
import random
import sys
import types
import unittest
import warnings
from typing import Any

import torch

_SAMPLES = 12
# Nothing that says nothing (uninitialized memory), runs long, or is not of floats.
_LEFT = ("empty", "_segment", "jiterator", "to_sparse", "sparse", "resize_", "geqrf", "ormqr")
_LEFT += ("linalg.", "cdist", "ctc_loss", "svd", "lu", "cholesky", "pinverse", "qr", "fractional")
_LEFT += ("polygamma", "grid_sampler", "logspace", "lobpcg", "multi_head", "cauchy", "uniform")
_LEFT += ("geometric", "exponential", "normal_", "log_normal", "randint", "bernoulli", "igamma")
# Of NaN these give one number in a vector of 8 and another in the rest.
_LEFT += ("_polynomial",)
_LEFT += ("data_ptr", "rand", "multinomial", "new_", "item", "set_", "tril_ind", "triu_ind")


@functools.cache
def database() -> dict[str, Any]:
    """The op database by name, without what gives no usable call."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:  # torch's test suite needs it; the op database does not
            stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db

    return {
        f"{info.name}/{info.variant_test_name}": info
        for info in op_db
        if torch.float32 in info.dtypes and not any(word in info.name for word in _LEFT)
    }


@functools.cache
def _forms(name: str) -> tuple[str, ...]:
    """Templates of calls, with ``{x}`` for the tensor."""
    info = database()[name]
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for index, sample in enumerate(info.sample_inputs("cpu", torch.float32)):
                if index >= 4 * _SAMPLES:
                    break
                found += _written(info, sample)
        except Exception:
            found = found or []
    random.setstate(random_state)
    torch.set_rng_state(torch_state)
    return tuple(dict.fromkeys(found))[: 6 * _SAMPLES]


def _written(info: Any, sample: Any) -> list[str]:
    if isinstance(sample.input, torch.Tensor):
        first = "{x}"
    elif isinstance(sample.input, list | tuple) and sample.input:
        first = "[" + ", ".join(["{x}"] * min(len(sample.input), 2)) + "]"
    else:
        return []
    rest = [_text(value) for value in sample.args]
    rest += [f"{key}={_text(value)}" for key, value in sample.kwargs.items() if key != "out"]
    if any("?" in text for text in rest):
        return []
    arguments = ", ".join(rest)
    both = f"{first}, {arguments}" if arguments else first
    found = []
    if info.name.startswith("__"):
        found.append(f"{{x}}.{info.name}({arguments})")
    elif _path(info.name) is not None:
        found.append(f"torch.{info.name}({both})")
    if first == "{x}":
        if info.method_variant is not None and hasattr(torch.Tensor, info.name):
            found.append(f"{{x}}.{info.name}({arguments})")
        if info.inplace_variant is not None and hasattr(torch.Tensor, info.name + "_"):
            found.append(f"{{x}}.{info.name}_({arguments})")
    if info.name.startswith("nn.functional.") and "inplace" in _parameters(info.name):
        found.append(f"torch.{info.name}({both}{', inplace=True' * ('inplace' not in both)})")
    return found


def _path(name: str) -> Any:
    value: Any = torch
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


@functools.cache
def _parameters(name: str) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(_path(name)).parameters)
    except (TypeError, ValueError):
        return ()


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return "{other}" if value.dim() else f"torch.tensor({float(value):.3g})"
        return "?"
    if isinstance(value, bool | int | str) or value is None:
        return repr(value)
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) < 1e6 else "?"
    if isinstance(value, torch.dtype | torch.memory_format):
        return str(value)
    if isinstance(value, list | tuple):
        inner = ", ".join(_text(part) for part in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
    if isinstance(value, slice):
        return f"slice({value.start}, {value.stop}, {value.step})"
    return "?"


def pick(rng: random.Random, x: str, others: list[str]) -> str:
    """A call of a random op on the variable ``x``; it may not fit its shape."""
    names = _names()
    for _ in range(20):
        forms = _forms(rng.choice(names))
        if forms:
            form = rng.choice(forms)
            other = rng.choice(others)
            return form.replace("{x}", x).replace("{other}", other)
    return f"torch.relu({x})"


@functools.cache
def _names() -> list[str]:
    return sorted(database())
