"""Turned prefixes: a refusal that the attacker imitates and turns away from, in front of a compliant continuation.

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
from raycomplete.data.samples import LONGEST_TURN, RecoverySample

_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


def with_turns(config: RunConfig, codec: ChatCodec, samples: Iterable[RecoverySample]) -> list[RecoverySample]:
    """Gives a share of `rollout.turn_fraction` of the samples a turned prefix, under `train.seed`.

    The imitated refusal is the first sentence of the sample's own refusal, the turn one of `rollout.turns`. A sample
    whose prefix would exceed `LONGEST_TURN` tokens stays as it is.
    """
    return [_with_turn(config, codec, sample) for sample in samples]


def _with_turn(config: RunConfig, codec: ChatCodec, sample: RecoverySample) -> RecoverySample:
    draw = random.Random(f"{config.train.seed}:turn:{sample.sample_id}")
    if draw.random() >= config.rollout.turn_fraction:
        return sample
    refusal = codec.decode(sample.refusal_ids).strip()
    sentence = found.group() if (found := _SENTENCE.match(refusal)) else refusal
    turn = codec.encode_answer(f"{sentence} {draw.choice(config.rollout.turns)} ")
    if len(turn) > LONGEST_TURN:
        return sample
    return replace(sample, harmful_ids=(*turn, *sample.harmful_ids), turn_tokens=len(turn))
