"""A program while it is written: every statement is tried on real tensors, and kept if it runs.

So a generator needs no rules of shapes: it proposes text, and :meth:`Draft.say` says whether that
ran. What a forward does outside and inside its loop goes to different parts of the text.
"""

import random
import textwrap
from typing import Any

import torch
from torch import nn

from .case import HEADER


class Draft:
    """The parts of a program, and the values that its names have in the second frame."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.parts: dict[str, list[str]] = {
            name: [] for name in ("prelude", "init", "before", "body", "after", "outside")
        }
        self.scope: dict[str, Any] = {}
        exec(HEADER, self.scope)
        self.scope["self"] = nn.Module()
        self._number = 0
        self.features: list[str] = []

    def name(self, stem: str) -> str:
        """A name that is not taken yet."""
        self._number += 1
        return f"{stem}{self._number}"

    def say(self, part: str, text: str) -> bool:
        """Add a statement to a part if it runs; so far, so good."""
        text = textwrap.dedent(text).strip("\n")
        try:
            with torch.no_grad():
                exec(text, self.scope)
        except Exception:
            return False
        self.parts[part] += text.splitlines()
        return True

    def write(self, part: str, text: str) -> None:
        """Add a statement that cannot be tried."""
        self.parts[part] += textwrap.dedent(text).strip("\n").splitlines()

    def get(self, name: str) -> Any:
        """The value of a name, in the frame that statements are tried on."""
        return self.scope.get(name)

    def chance(self, share: float) -> bool:
        """True so often."""
        return self.rng.random() < share

    def fits(self, name: str, most: int = 4096) -> bool:
        """Whether a name holds a float tensor of moderate size that is mostly finite."""
        value = self.get(name)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return False
        if value.layout != torch.strided or not 0 < value.numel() <= most:
            return False
        try:
            with torch.no_grad():
                finite = bool(value.isfinite().double().mean() > 0.5)
                return finite and float(value.abs().max()) < 1e6
        except RuntimeError:  # a view that may no longer be looked at
            return False
