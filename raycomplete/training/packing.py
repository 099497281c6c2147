"""Sequences side by side in one row, so that a forward pass computes almost no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def pack(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Places sequences in rows as long as the longest of them: best fit, longest first.

    Attention within a row costs its length squared, so rows longer than the longest sequence would spend on attention
    what they save on padding.

    Args:
        lengths: Tokens of each sequence.

    Returns:
        (row, first column) of each sequence, in the order given; rows count from 0 without gaps.
    """
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    longest = max(lengths, default=0)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row, left in enumerate(room) if left >= lengths[index]]
        if fits:
            row = min(fits, key=lambda candidate: room[candidate])
        else:
            row = len(room)
            room.append(longest)
        places[index] = (row, longest - room[row])
        room[row] -= lengths[index]
    return places


def deal(items: Sequence[T], count: int) -> list[list[T]]:
    """Deals items, longest first, to `count` micro-batches back and forth, so that each has about as many tokens.

    Every worker must make the same number of forward passes, or collectives hang; so the number is fixed and the
    lengths are balanced, rather than the other way round.
    """
    groups: list[list[T]] = [[] for _ in range(count)]
    for index, item in enumerate(items):
        lap, place = divmod(index, count)
        groups[place if lap % 2 == 0 else count - 1 - place].append(item)
    return [group for group in groups if group]
