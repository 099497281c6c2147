"""Lets a reasoning model think before it answers, within a budget of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from raycomplete.runtime.types import Codec, Generator, ResponseFrame


def thinking(generator: Generator, codec: Codec, max_thinking_tokens: int) -> Generator:
    """Returns the generator that lets a model think where its chat template has a place for it."""
    return generator if codec.frame is None else ThinkingGenerator(generator, codec.frame, max_thinking_tokens)


class ThinkingGenerator:
    """A generator that thinks first where a sequence leaves room for it (implements `Generator`)."""

    def __init__(self, generator: Generator, frame: ResponseFrame, max_thinking_tokens: int) -> None:
        self._generator, self._frame, self._budget = generator, frame, max_thinking_tokens

    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """Continues sequences; new tokens as `Generator.generate` returns them."""
        frame, room = self._frame, self._budget + len(self._frame.closing)
        may_think = [frame.may_think(sequence) for sequence in sequences]
        longest = max_tokens + room * any(may_think)
        draw = partial(self._generator.generate, temperature=temperature, top_p=top_p, top_k=top_k)
        found = draw(sequences, max_tokens=longest, seed=seed)
        closed: dict[int, list[int]] = {}
        for index, (sequence, tokens) in enumerate(zip(sequences, found, strict=True)):
            thinking, answer = frame.split(sequence, tokens)
            if len(thinking) <= room and (answer or len(tokens) < longest):
                found[index] = [*thinking, *answer[:max_tokens]]
            else:
                closed[index] = [*thinking[: self._budget], *frame.closing]
        each_alone = seed is not None and temperature > 0  # under the seed of its thought
        for batch in [[index] for index in closed] if each_alone else [list(closed)] * bool(closed):
            begun = [[*sequences[index], *closed[index]] for index in batch]
            answers = draw(begun, max_tokens=max_tokens, seed=None if seed is None else seed + batch[0])
            for index, answer_ids in zip(batch, answers, strict=True):
                found[index] = [*closed[index], *answer_ids]
        return found
