"""Finds the fastest form of each Conv3d by timing on the device.

A site's legal forms are timed against each other, in alternation, on a random input of its shape
and the layer's own weight, in both memory layouts; the times are kept on disk
(:mod:`fxtemporal.tuning.cache`). The layout is then chosen for each region of the graph
(:mod:`fxtemporal.analysis.layout_regions`), by the sum of its sites' best times in that layout and
of the copies at its edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from fxtemporal.analysis.layout_regions import LayoutRegion, layout_regions
from fxtemporal.functional import temporal_rank
from fxtemporal.ir.node_meta import needed_value
from fxtemporal.ir.program import Program
from fxtemporal.passes.conv3d_choice import (
    CONTIGUOUS,
    LAST,
    UNCHANGED,
    FormChoice,
    FormChoices,
    ToChoose,
)
from fxtemporal.support.clock import Deadline
from fxtemporal.tuning.races import Races

__all__ = ["FormChooser"]


_FINALISTS = 3
_CLOSE = 1.25
"""Layouts slower than the best by this factor, by summed times, are not timed on the network."""


class FormChooser:
    """Times forms that are not in the cache, for half of the available time.

    Sites that are not measured in that time keep the layer itself.
    """

    def __init__(
        self,
        program: Program,
        sites: Sequence[ToChoose],
        races: Races,
        tick: Callable[[str], None],
    ) -> None:
        self._sites = {site.node: site for site in sites}
        self._races, self._cache = races, races.cache
        self._target, self._margin = races.tune.target, races.tune.margin
        self._deadline = Deadline(races.tune.seconds / 2)
        self._tick = tick
        self._regions = layout_regions(program)

    def variants(self) -> dict[str, FormChoices]:
        """Choices for all sites, for a race of the whole network to decide: each region in its own
        fastest layout by summed times, and all regions in one layout."""
        best: dict[str, FormChoice] = {}
        total = dict.fromkeys((CONTIGUOUS, LAST), 0.0)
        layouts = (CONTIGUOUS, LAST) if self._target == "eager" else (CONTIGUOUS,)
        whole: dict[str, dict[str, FormChoice]] = {layout: {} for layout in layouts}
        for site in self._slowest_first():
            for layout in layouts:
                self._times(site, layout)
        for region in self._regions:
            chosen = {layout: self._chosen(region, layout) for layout in whole}
            cost = {
                layout: sum(choice.after for choice in chosen[layout].values())
                + self._copies(region, layout)
                for layout in whole
            }
            best |= chosen[min(cost, key=lambda layout: cost[layout])]
            for layout in whole:
                total[layout] += cost[layout]
            for layout in whole:
                whole[layout] |= chosen[layout]
        self._cache.save()
        least = min(total[layout] for layout in whole)
        close = {layout: whole[layout] for layout in whole if total[layout] < _CLOSE * least}
        found = {"by region": best, **close}
        return {
            name: choices
            for place, (name, choices) in enumerate(found.items())
            if choices not in list(found.values())[:place]
        }

    def _chosen(self, region: LayoutRegion, layout: str) -> dict[str, FormChoice]:
        """The fastest form of each site; the layer itself if none is faster by the margin."""
        found = {}
        for node in region.nodes:
            site = self._sites.get(node)
            if site is None:
                continue
            times = self._times(site, layout)
            as_it_was = self._times(site, CONTIGUOUS).get("conv3d", 0.0)
            own = UNCHANGED[layout]
            if layout == LAST:
                times.pop("conv3d", None)  # it converts its weight at every call
            form = min(times, key=lambda name: times[name], default=own)
            if times and times[form] > times[own] * (1 - self._margin):
                form = own
            found[site.key] = FormChoice(form, layout, as_it_was, times.get(form, as_it_was))
        return found

    def _slowest_first(self) -> list[ToChoose]:
        """The sites, the most expensive first, since the time for measuring may run out."""

        def size(site: ToChoose) -> int:
            return -int(site.weight.numel()) * int(needed_value(site.node).numel())

        return sorted(self._sites.values(), key=size)

    def _times(self, site: ToChoose, layout: str) -> dict[str, float]:
        """Milliseconds of each form; {} if the time is over.

        Other engines than eager mode take long to compile a form: they only time the forms that are
        fastest in eager mode.
        """
        eager = self._measured(site, layout, "eager", site.forms)
        if self._target == "eager":
            return eager
        fastest = sorted(eager, key=lambda form: eager[form])[:_FINALISTS]
        return self._measured(site, layout, self._target, fastest)

    def _measured(
        self, site: ToChoose, layout: str, target: str, forms: Iterable[str]
    ) -> dict[str, float]:
        """Milliseconds of each form, from the cache or measured now."""
        key = f"{site.described(layout)} {target}"
        names = {self._name(site, form): form for form in ("conv3d", *forms)}
        known = self._cache.get(key)
        missing = [form for name, form in names.items() if name not in known]
        if missing and not self._deadline.over:
            self._tick(f"measuring forms of {site.key}")
            wanted = dict.fromkeys(("conv3d", *missing))
            measured = self._races.form_times(site, wanted, layout, target)
            self._cache.put(key, {self._name(site, form): ms for form, ms in measured.items()})
            known = self._cache.get(key)
        return {form: known[name] for name, form in names.items() if name in known}

    @staticmethod
    def _name(site: ToChoose, form: str) -> str:
        """The form's name in the cache; with the rank for the low-rank form, whose time it sets."""
        if form != "conv3d_low_rank":
            return form
        return f"{form} of rank {temporal_rank(site.weight)}"

    def _copies(self, region: LayoutRegion, layout: str) -> float:
        """Milliseconds of the copies at the edges of a region in channels_last_3d."""
        if layout == CONTIGUOUS:
            return 0.0
        total = 0.0
        for node in (*region.entering, *region.leaving):
            value = needed_value(node)
            if min(value.shape[1], value[0, 0].numel()) > 1:
                total += self._copy(value)
        return total

    def _copy(self, like: Tensor) -> float:
        key = f"copy {tuple(like.shape)} {str(like.dtype).removeprefix('torch.')}"
        known = self._cache.get(key)
        if LAST not in known and not self._deadline.over:
            self._cache.put(key, {LAST: self._races.copy_time(like)})
        return self._cache.get(key).get(LAST, 0.0)
