"""Union-find against sets that are merged by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxtemporal.support.disjoint_sets import DisjointSets

PAIRS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)))


@given(PAIRS)
def test_united_items_are_in_one_group(pairs: list[tuple[int, int]]) -> None:
    sets: DisjointSets[int] = DisjointSets()
    expected = {n: {n} for n in range(13)}
    for one, other in pairs:
        root = sets.find(other)
        sets.unite(one, other)
        assert sets.find(one) == sets.find(other) == root
        merged = expected[one] | expected[other]
        expected.update(dict.fromkeys(merged, merged))
    assert sets.groups(range(13)) == [
        sorted(group) for n, group in expected.items() if n == min(group)
    ]
