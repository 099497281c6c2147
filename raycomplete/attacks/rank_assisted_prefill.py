"""Rank-assisted prefill (RAP): at each step the attacker picks among the model's likeliest tokens.

An attacker who sees the likeliest tokens need not take the first: an aligned model that opens with a refusal still
ranks the words of an answer not far below. Here the picking is done without people and without a list of words, and the
rule is ours: of the target's `top` likeliest next tokens take the one that base (the model before its alignment)
finds likeliest. What comes out is made of the target's own candidates only, so it is judged as its response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.attack import MAX_STEPS, Attack, AttackConfig, plain_trials
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target, WhiteBox
from raycomplete.attacks.trial import CUT_BY_CONTEXT, Emit, Response, Trial
from raycomplete.runtime.types import Prompt

_BATCH = 64


class RankAssistedPrefillConfig(AttackConfig):
    """RAP: the attacker picks each token among the model's likeliest ones."""

    standard: ClassVar[Mapping[str, Any]] = {"steps": 256, "top": 20}

    name: Literal["rank_assisted_prefill"] = "rank_assisted_prefill"
    steps: int = Field(256, ge=1, le=MAX_STEPS, description="tokens that the attacker picks")
    top: int = Field(20, ge=1, description="the model's likeliest tokens that may be picked")


@register(RankAssistedPrefillConfig)
class RankAssistedPrefillAttack(Attack[RankAssistedPrefillConfig]):
    """Picks by rank. `mean_rank` in a response's stats is the distance of the picks from the model's own choice."""

    needs = frozenset({"white_boxes", "guide"})

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        settings = {"top": self.config.top, "steps": self.config.steps, "guide": target.tools.guide_id}
        return [replace(trial, settings=settings) for trial in plain_trials(target, self.name, self.name, prompts, 1)]

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        guide, ranker = target.guide(), target.white_boxes()[0]
        for start in range(0, len(trials), _BATCH):
            batch = trials[start : start + _BATCH]
            emit(list(zip(batch, self._responses(target, ranker, guide, batch), strict=True)))

    def _responses(self, target: Target, ranker: WhiteBox, guide: WhiteBox, trials: Sequence[Trial]) -> list[Response]:
        sequences = [list(trial.sequence) for trial in trials]
        ended = [False] * len(trials)
        ranks: list[list[int]] = [[] for _ in trials]
        for _ in range(self.config.steps):
            target.stop_if_cancelled()
            rows = [row for row, sequence in enumerate(sequences) if len(sequence) < target.max_length]
            if all(ended[row] for row in rows):
                break
            read = [sequences[row] for row in rows]
            candidates = [[token for token, _ in found] for found in ranker.top_logprobs(read, self.config.top)]
            favor = guide.logprobs_of(read, candidates)
            for row, tokens, values in zip(rows, candidates, favor, strict=True):
                rank = max(range(len(tokens)), key=values.__getitem__)
                sequences[row].append(tokens[rank])  # ended rows go on unheard, so that caches keep their shape
                ended[row] = ended[row] or tokens[rank] in target.codec.eos_ids
                if not ended[row]:
                    ranks[row].append(rank)
        return [
            Response(
                trial.sequence,
                (),
                tuple(sequence[len(trial.sequence) : len(trial.sequence) + len(picked)]),
                {
                    "mean_rank": sum(picked) / len(picked) if picked else 0.0,
                    "picks": len(picked),
                    CUT_BY_CONTEXT: float(not has_ended and len(picked) < self.config.steps),
                },
            )
            for trial, sequence, picked, has_ended in zip(trials, sequences, ranks, ended, strict=True)
        ]
