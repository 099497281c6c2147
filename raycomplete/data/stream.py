"""Streams prompts from large inputs row by row; nothing is held but 8 bytes a prompt, which tell repeats."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence

from raycomplete.config import PromptSource
from raycomplete.data.prompts import source_prompts
from raycomplete.runtime.types import Prompt, PromptKind


def stream_prompts(sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0) -> Iterator[Prompt]:
    """Yields the prompts of several sources one after the other, repeats dropped (same text, first wins)."""
    seen: set[bytes] = set()
    for source in sources:
        for prompt in _limited(source_prompts(source, kind), source, seed):
            digest = hashlib.blake2b(prompt.transcript.encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                yield prompt


def content_key(prompts: Sequence[Prompt]) -> str:
    """Returns a hash that names the content of a batch: ids, texts, answers, and conversations."""
    content = json.dumps([[prompt.prompt_id, prompt.text, prompt.answer, *prompt.context] for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _limited(prompts: Iterator[Prompt], source: PromptSource, seed: int) -> Iterator[Prompt]:
    """Yields at most `limit` prompts, each with the same chance, in the order of the source (reservoir sampling)."""
    if source.limit is None:
        yield from prompts
        return
    draw = random.Random(f"{seed}:{source.path}")
    kept: list[tuple[int, Prompt]] = []
    for index, prompt in enumerate(prompts):
        if index < source.limit:
            kept.append((index, prompt))
        elif (place := draw.randrange(index + 1)) < source.limit:
            kept[place] = (index, prompt)
    yield from (prompt for _, prompt in sorted(kept, key=lambda item: item[0]))
