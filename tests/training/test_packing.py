"""Packing: nothing overlaps, nothing is lost, little is padded; dealing: balanced, and the same count everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raycomplete.training.batches import pack
from raycomplete.training.step_plan import deal

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
HIDDEN_SIZES = st.sampled_from([None, 1, 8, 64, 4096])


@given(LENGTHS, HIDDEN_SIZES)
def test_sequences_neither_overlap_nor_leave_their_row(lengths: list[int], hidden_size: int | None) -> None:
    places, width = pack(lengths, hidden_size)
    taken: set[tuple[int, int]] = set()
    for (row, column), length in zip(places, lengths, strict=True):
        cells = {(row, column + offset) for offset in range(length)}
        assert not cells & taken
        taken |= cells
    assert {row for row, _ in taken} == set(range(1 + max(row for row, _ in taken)))
    assert max(column for _, column in taken) == width - 1 < 2 * max(lengths)


def test_rows_are_as_wide_as_pays() -> None:
    # Two rows of 11 tokens; as wide as the longest sequence only, 7 and 4 would not fit into one.
    assert pack([10, 7, 4], None)[1] == 10
    assert pack([10, 7, 4], 1000) == ([(0, 0), (1, 0), (1, 7)], 11)
    # Attention over 12 tokens costs as much as the rest of a layer at a hidden size of 2: still two rows, not one.
    assert pack([10, 10], 2) == ([(0, 0), (1, 0)], 10)


@given(st.lists(st.integers(1, 60), min_size=8, max_size=40), st.integers(1, 8))
def test_dealing_keeps_every_item_and_balances_tokens(lengths: list[int], count: int) -> None:
    ordered = sorted(lengths, reverse=True)
    groups = deal(ordered, count)
    assert len(groups) == count
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    totals = [sum(group) for group in groups]
    assert max(totals) - min(totals) <= max(lengths)
