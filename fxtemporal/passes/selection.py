"""Finds passes by the names that users write: ``"time-distribute{allow=randomness}"``.

Braces hold the options of the pass, separated by spaces; commas separate the values of an option::

    passes_of(["time-distribute{allow=randomness,training-batchnorm}"])
    → (TimeDistribute(allow=("randomness", "training-batchnorm")),)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fxtemporal.passes import DEFAULT_PASSES
from fxtemporal.passes.rule import Rule
from fxtemporal.support.errors import PassError

__all__ = ["passes_of"]

_SPELLING = re.compile(r"(?P<name>[^{}]*)(\{(?P<options>[^{}]*)\})?")


def passes_of(chosen: Sequence[str | Rule[Any]] | None) -> tuple[Rule[Any], ...]:
    """The passes that ``chosen`` names, in its order; all exact ones for None.

    Raises:
        PassError: no pass has that name, or the pass has no such option.
    """
    if chosen is None:
        return DEFAULT_PASSES
    if isinstance(chosen, str):
        raise PassError(f"passes must be a list of names: write passes=[{chosen!r}]")
    return tuple(entry if isinstance(entry, Rule) else _named(entry) for entry in chosen)


def _named(entry: object) -> Rule[Any]:
    named = {rule.name: rule for rule in DEFAULT_PASSES}
    spelled = _SPELLING.fullmatch(entry) if isinstance(entry, str) else None
    if spelled is None or spelled["name"] not in named:
        raise PassError(f"no pass is called {entry!r}; there are {', '.join(named)}")
    rule = named[spelled["name"]]
    if spelled["options"] is None:
        return rule
    options = {}
    for option in spelled["options"].split():
        name, equals, values = option.partition("=")
        if not equals or name not in rule.options:
            known = f"its options are {', '.join(rule.options)}" if rule.options else "it has none"
            raise PassError(f"{entry!r}: {rule.name} has no option {option!r}; {known}")
        options[name] = tuple(values.split(","))
    try:
        return type(rule)(**options)
    except PassError as error:
        raise PassError(f"{entry!r}: {error}") from error
