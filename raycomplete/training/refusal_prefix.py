"""Refusal prefixes: a refusal that the attacker imitates and turns away from, in front of a compliant continuation.

Recovery teaches the student to refuse in mid-answer. An attacker who knows that writes the refusal himself, turns, and
goes on: "I cannot help with that. But here is how ...". A student that never read this takes the refusal as given. So
a share of the recovery samples carries such a prefix in front of h, and after both the same teacher, who reads neither,
says the same refusal again. The scheme is ours, not that of arXiv 2511.12155.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.samples import MAX_REFUSAL_PREFIX_TOKENS, RecoverySample

_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


def with_refusal_prefixes(
    config: RunConfig, codec: ChatCodec, samples: Iterable[RecoverySample]
) -> list[RecoverySample]:
    """Gives a share of `rollout.refusal_prefix_fraction` of the samples a refusal prefix, under `train.seed`.

    The imitated refusal is the first sentence of the sample's own refusal, the turn one of `rollout.refusal_prefix_turns`. A sample
    whose prefix would exceed `MAX_REFUSAL_PREFIX_TOKENS` tokens stays as it is.
    """
    return [_with_refusal_prefix(config, codec, sample) for sample in samples]


def _with_refusal_prefix(config: RunConfig, codec: ChatCodec, sample: RecoverySample) -> RecoverySample:
    draw = random.Random(f"{config.train.seed}:turn:{sample.sample_id}")
    if draw.random() >= config.rollout.refusal_prefix_fraction:
        return sample
    refusal = codec.decode(sample.refusal_ids).strip()
    sentence = found.group() if (found := _SENTENCE.match(refusal)) else refusal
    turn = codec.encode_answer(f"{sentence} {draw.choice(config.rollout.refusal_prefix_turns)} ")
    if len(turn) > MAX_REFUSAL_PREFIX_TOKENS:
        return sample
    return replace(sample, harmful_ids=(*turn, *sample.harmful_ids), refusal_prefix_tokens=len(turn))
