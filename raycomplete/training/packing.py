"""Sequences side by side in one row, so that a forward pass computes almost no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_WIDTHS = 16  # steps between the longest sequence and twice as much


def pack(lengths: Sequence[int], hidden_size: int | None) -> tuple[list[tuple[int, int]], int]:
    """Places sequences in rows of the width that costs the least, from the longest sequence to twice as much.

    A wider row fits more sequences without a gap, but attention within a row costs its width squared: about as much as
    the rest of a layer where the width is 6 times the hidden size.

    Args:
        lengths: Tokens of each sequence.
        hidden_size: Of the model; None where rows must be no wider than the longest sequence.

    Returns:
        (row, first column) of each sequence, in the order given, where rows count from 0 without gaps; and the width.
    """
    longest = max(lengths, default=0)
    if hidden_size is None:
        return _best_fit(lengths, longest)
    found = (_best_fit(lengths, longest + longest * step // _WIDTHS) for step in range(_WIDTHS + 1))
    return min(found, key=lambda packed: _cost(packed[0], packed[1], hidden_size))


def _best_fit(lengths: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int]:
    """Places sequences, longest first, where the least room is left; the width returned is the widest row's."""
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row, left in enumerate(room) if left >= lengths[index]]
        if fits:
            row = min(fits, key=lambda candidate: room[candidate])
        else:
            row = len(room)
            room.append(width)
        places[index] = (row, width - room[row])
        room[row] -= lengths[index]
    return places, width - min(room, default=width)


def _cost(places: Sequence[tuple[int, int]], width: int, hidden_size: int) -> float:
    """Tokens that a forward pass computes, with attention counted as tokens."""
    rows = 1 + max((row for row, _ in places), default=-1)
    return rows * width * (1 + width / (6 * hidden_size))


def deal(items: Sequence[T], count: int) -> list[list[T]]:
    """Deals items, which come longest first, to `count` micro-batches back and forth: each has about as many tokens.

    Every worker must make the same number of forward passes, or collectives hang; so the number is fixed and the
    lengths are balanced, rather than the other way round.
    """
    groups: list[list[T]] = [[] for _ in range(count)]
    for index, item in enumerate(items):
        lap, place = divmod(index, count)
        groups[place if lap % 2 == 0 else count - 1 - place].append(item)
    return [group for group in groups if group]
