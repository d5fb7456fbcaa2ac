"""A case: the text of a model, the inputs that it is called with, and how it is optimized.

Everything is text, so that a case can be printed, shrunk and replayed::

    Case(source="class Net(nn.Module): ...", build="Net().eval()",
         inputs=(Input("x", ("B", "T0", 3, 4, 4), time=1),),
         calls=(Call(batch=3, frames=(4,)),))
"""

import dataclasses
import itertools
import linecache
import random
import re
import sys
import types
from typing import Any

import numpy as np
import torch

HEADER = """\
import collections
import math
import random
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
"""
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument of the forward.

    ``sizes`` holds numbers, ``"B"`` for the batch, and ``"T0"``, ``"T1"`` for numbers of frames.
    ``values`` is an expression of ``shape``, ``layout`` an expression of the tensor ``v``.
    """

    name: str
    sizes: tuple[int | str, ...]
    time: int | None = None
    values: str = "torch.randn(shape)"
    layout: str = ""
    dtype: str = ""
    grad: bool = False

    def expression(self, batch: int, frames: tuple[int, ...]) -> str:
        """The text of a tensor of these sizes."""
        known = {"B": batch, **{f"T{i}": n for i, n in enumerate(frames)}}
        shape = ", ".join(str(known.get(size, size)) for size in self.sizes)  # type: ignore[arg-type]
        text = self.values.replace("shape", f"({shape},)")
        if " " in self.values:
            text = f"({text})"
        if self.dtype:
            text += f".to(torch.{self.dtype})"
        if self.layout:
            once = len(re.findall(r"\bv\b", self.layout)) == 1
            shown = re.sub(r"\bv\b", lambda _: text, self.layout)
            text = shown if once else f"(lambda v: {self.layout})({text})"
        return text + ".requires_grad_()" * self.grad


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of both sides: sizes, and whether gradients are compared."""

    batch: int = 2
    frames: tuple[int, ...] = (4,)
    gradients: str = ""  # "": no_grad; "parameters"; "inputs": of the inputs too
    poison: str = ""  # "nan" or "inf": in one frame of the first input
    mode: str = ""  # "train" or "eval": asked of both sides before the call
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is done with it."""

    name: str
    source: str
    build: str
    inputs: tuple[Input, ...]
    calls: tuple[Call, ...]
    example: Call = Call(seed=0)
    given: bool = True  # the example inputs are given to optimize
    audited: bool = False
    threaded: bool = False
    dtype: str = "float32"  # the default dtype while the model is built and run

    def script(self) -> str:
        """A standalone script that shows both sides."""
        call = self.calls[0] if self.calls else self.example
        frames = {"train": ".train()", "eval": ".eval()"}.get(call.mode, "")
        names = ", ".join(spec.name for spec in self.inputs)
        lines = ["", "torch.manual_seed(0)"]
        if self.dtype != "float32":
            lines.insert(1, f"torch.set_default_dtype(torch.{self.dtype})")
        lines.insert(1, self.source.rstrip())
        lines.append(f"m = {self.build}")
        given = "None"
        if self.given:
            for spec in self.inputs:
                text = spec.expression(self.example.batch, self.example.frames)
                lines.append(f"{spec.name} = {text}")
            given = f"({names},)"
        if self.audited:
            lines.append(f"fxtemporal.audit(m, {given}, progress=False)")
        lines.append(f'fast = fxtemporal.optimize(m, {given}, tune="static", progress=False)')
        if self.calls:
            for spec in self.inputs:
                lines.append(f"{spec.name} = {spec.expression(call.batch, call.frames)}")
            if call.gradients == "inputs":
                lines += [f"{s.name}.requires_grad_()" for s in self.inputs if not s.grad]
            if call.poison:
                first = self.inputs[0]
                where = ", ".join([":"] * (first.time or 0) + ["1"])
                lines.append(f'{first.name}[{where}] = float("{call.poison}")')
            if call.mode:
                lines += [f"m{frames}", f"fast{frames}"]
            args = ", ".join(f"{spec.name}.clone()" for spec in self.inputs)
            if call.gradients:
                lines += ["def gradients(out):", "    leaves = [*m.parameters(), LEAVES]"]
                lines[-1] = lines[-1].replace("LEAVES", names)
                lines += ["    out = out if isinstance(out, torch.Tensor) else out[0]"]
                lines += ["    leaves = [v for v in leaves if v.requires_grad]"]
                lines += ["    return torch.autograd.grad(out.sum(), leaves, allow_unused=True)"]
                lines += [f"print(gradients(m({args})), gradients(fast({args})))"]
            else:
                lines.append(f"print(m({args}), fast({args}))")
        text = "\n".join(lines)
        names = [(line, line.split()[-1]) for line in HEADER.splitlines()]
        used = [line for line, name in names if re.search(rf"\b{name}\b", text)]
        return "\n".join([*used, "import fxtemporal"]) + text + "\n"


class Program:
    """The source of a case, executed: one side of the comparison."""

    def __init__(self, case: Case, code: types.CodeType) -> None:
        name = f"adversary_case_{next(_NUMBERS)}"
        self.module = types.ModuleType(name)
        self.module.__file__ = code.co_filename
        sys.modules[name] = self.module
        try:
            exec(code, vars(self.module))
            seed_all(0)
            self.model = eval(case.build, vars(self.module))
        finally:
            sys.modules.pop(name, None)


def compiled(case: Case) -> types.CodeType:
    """The source as code whose lines :mod:`inspect` can find."""
    text = HEADER + case.source
    file = f"/adversary/{case.name}.py"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    return compile(text, file, "exec")


def tensors(case: Case, call: Call) -> tuple[Any, ...]:
    """The arguments of a call; the same ones every time."""
    torch.manual_seed(1000 + call.seed)
    made = []
    for spec in case.inputs:
        value = eval(spec.expression(call.batch, call.frames), {"torch": torch})
        if call.poison and not made and value.is_floating_point() and spec.time is not None:
            frames = value.size(spec.time)
            if frames and not spec.grad:
                value = value.contiguous() if "expand" in spec.layout else value
                value.select(spec.time, min(1, frames - 1)).fill_(float(call.poison))
        made.append(value)
    return tuple(made)


def seed_all(number: int) -> None:
    """Seed torch, NumPy and Python alike."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
