"""Answers that begin with an opening: both are encoded as one text, as someone would type them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from raycomplete.runtime.types import Codec


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the longest common start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def opened_answer(codec: Codec, opening: str, answer: str, depth: int | None = None) -> tuple[list[int], list[int]]:
    """Returns the tokens of an opening, such as a refusal with its turn, and the first tokens of the answer."""
    start = codec.encode_answer(opening)
    if depth == 0 or not answer:
        return start, []
    whole = codec.encode_answer(f"{opening} {answer}")
    length = num_common(start, whole)
    return whole[:length], whole[length:][:depth]
