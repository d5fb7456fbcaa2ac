"""Replaces a Conv3d by a spatial and a temporal convolution of lower rank: (2+1)D. Lossy.

The R(2+1)D paper (Tran et al., arXiv 1711.11248) replaces each t×d×d convolution by a (1, d, d)
convolution into M_i channels and a (t, 1, 1) convolution out of them. Here the two factors come
from the trained kernel, by a singular value decomposition that may be weighted by data::

    before   conv   N_in → N_out, (3, 3, 3)
    after    conv.spatial   N_in → M_i,  (1, 3, 3)
             conv.temporal  M_i → N_out, (3, 1, 1)

or in the other order, if that costs less for the same error. It is off unless
``optimize(..., factorize=Factorize(...))`` asks for it, and its error is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import fx

from fxtemporal.factorization.layers import Layer, layers_of, put_in
from fxtemporal.factorization.planning import FactorizationPlan
from fxtemporal.ir.program import Program
from fxtemporal.ir.reasons import Reason
from fxtemporal.passes.rule import Rule, Site

__all__ = ["Factorize2Plus1d"]


class Factorize2Plus1d(Rule[Layer]):
    """Conv3d → (1, kH, kW) and (kT, 1, 1), as planned."""

    name = "factorize-2plus1d"
    exact = False

    def __init__(self, plan: FactorizationPlan) -> None:
        self.plan = plan

    def candidates(self, program: Program) -> Iterable[Layer]:
        return layers_of(program)

    def site(self, program: Program, candidate: Layer) -> Site:
        where = program.location(candidate.nodes[0])
        return Site(self.name, candidate.name, candidate.path or candidate.name, where)

    def preconditions(self, program: Program, candidate: Layer) -> Iterator[Reason]:
        yield from self.plan.layers[candidate.name].reasons

    def detail(self, program: Program, candidate: Layer) -> Mapping[str, Any]:
        return self.plan.layers[candidate.name].detail

    def nodes(self, program: Program, candidate: Layer) -> Iterable[fx.Node]:
        return candidate.nodes

    def what(self, program: Program, candidate: Layer) -> str:
        return "Conv3d" + (f" with a {candidate.kernel} kernel" if candidate.geometry else "")

    def becomes(self, program: Program, candidate: Layer) -> str:
        factors = self.plan.layers[candidate.name].factors
        return "" if factors is None else "a spatial and a temporal convolution of lower rank"

    def rewrite(self, program: Program, candidate: Layer) -> Mapping[str, Any]:
        planned = self.plan.layers[candidate.name]
        if planned.factors is None:
            raise ValueError(planned.error)
        put_in(program, candidate, planned.factors)
        return planned.detail
