"""The columns of the op table, held to what torch itself says of the ops that have a schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxtemporal.ir.ops import Op, Trait, ops_with
from fxtemporal.ir.ops.table import ATEN, ROWS

BY_NAME = {row.name: row for row in ROWS}
CHANCE = {name for name in ops_with(Trait.PASSES_ON) if "dropout" in name}
COPIES = {"clone", "contiguous", "detach", "identity", "positive", "to"}
"""Element by element too, though torch does not tag a copy so."""


UNTAGGED = {"floor_divide", "hardswish", "log_sigmoid"}
"""Torch has no tag for these, for no reason that can be told."""


def overloads(name: str) -> Iterator[Any]:
    """The overloads of ``torch.ops.aten.name`` that make a tensor and write none."""
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        schema = getattr(packet, overload)._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if not writes and [str(r.type) for r in schema.returns] == ["Tensor"]:
            yield getattr(packet, overload)


def spelled(op: str) -> list[Any]:
    names = [name for name, spelling in ATEN.items() if spelling.op == op and spelling.text]
    return [o for name in names if not name.endswith("_") for o in overloads(name)]


def test_what_works_on_each_element_is_pointwise_for_torch() -> None:
    untagged = {
        name
        for name in ops_with(Trait.ELEMENTWISE) - CHANCE - COPIES
        if (found := spelled(name)) and not any(torch.Tag.pointwise in o.tags for o in found)
    }
    assert untagged == UNTAGGED


def test_what_is_pointwise_for_torch_has_the_trait() -> None:

    missing = {
        row.name
        for row in ROWS
        if Trait.ELEMENTWISE not in row.has
        and any(torch.Tag.pointwise in overload.tags for overload in spelled(row.name))
    }
    assert missing == {"max", "min"}  # of two tensors, which is maximum here


@pytest.mark.parametrize("name", sorted(ops_with(Trait.SAME_MEMORY)))
def test_what_gives_the_memory_of_its_input_is_a_view_for_torch(name: str) -> None:
    found = spelled(name)
    views = [o for o in found if any(r.alias_info is not None for r in o._schema.returns)]
    assert views or not found or name in ("flatten", "unflatten", "movedim")
    assert not BY_NAME[name].owns


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_traits_do_not_contradict_each_other(row: Any) -> None:
    has = row.has
    assert not (Trait.SAME_MEMORY in has and row.owns)
    assert not (Trait.FACT in has and has & (Trait.ELEMENTWISE | Trait.MOVES))
    assert Trait.COUNTS not in has or Trait.FACT in has
    assert not (Trait.RECURRENT in has and has & ~Trait.RECURRENT)
    assert Trait.PER_CHANNEL not in has or row.random is not None
    assert Trait.MOVES_AXES not in has or Trait.MOVES in has


def test_what_is_not_known_has_no_trait() -> None:
    assert not Op("unheard_of", {}).traits
    assert not type(ROWS[0])("unheard_of(input)").has
    with pytest.raises(KeyError):
        _ = type(ROWS[0])("relu(input)", traits="fast").has
