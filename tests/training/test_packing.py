"""Packing: nothing overlaps, nothing is lost, little is padded; dealing: balanced, and the same count everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raycomplete.training.packing import deal, pack

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(LENGTHS)
def test_sequences_neither_overlap_nor_leave_their_row(lengths: list[int]) -> None:
    width, taken = max(lengths), set()
    for (row, column), length in zip(pack(lengths), lengths, strict=True):
        assert column + length <= width
        cells = {(row, column + offset) for offset in range(length)}
        assert not cells & taken
        taken |= cells
    rows = {row for row, _ in taken}
    assert rows == set(range(len(rows)))


@given(LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    filled: dict[int, int] = {}
    for (row, _), length in zip(pack(lengths), lengths, strict=True):
        filled[row] = filled.get(row, 0) + length
    lowest = sorted(filled.values())[:2]
    assert len(lowest) < 2 or sum(lowest) > max(lengths)


def test_nothing_packs_into_nothing() -> None:
    assert pack([]) == []


@given(st.lists(st.integers(1, 60), min_size=8, max_size=40), st.integers(1, 8))
def test_dealing_keeps_every_item_and_balances_tokens(lengths: list[int], count: int) -> None:
    ordered = sorted(lengths, reverse=True)
    groups = deal(ordered, count)
    assert len(groups) == count
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    totals = [sum(group) for group in groups]
    assert max(totals) - min(totals) <= max(lengths)
