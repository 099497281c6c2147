"""Chats of the fine-tuning attack as training samples."""

from __future__ import annotations

from typing import Any

from raycomplete.pipeline.attack_finetune import _samples


class Words:
    """A codec of one token a word."""

    eos_id = 0

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        return [1] * len(text.split())

    def encode_answer(self, text: str) -> list[int]:
        return [2] * len(text.split())


def test_no_sample_is_longer_than_the_context() -> None:
    chats = [(None, "one two", "a b"), (None, "one two", "a b c d e f"), (None, "one two three four five six", "a b c")]
    codec: Any = Words()
    samples = _samples(codec, chats, 5)
    assert [sample.sample_id for sample in samples] == ["chat-0", "chat-1"]
    assert [sample.answer_ids for sample in samples] == [(2, 2, 0), (2, 2, 2)], "what is cut does not end"
