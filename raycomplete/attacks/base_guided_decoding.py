"""Base-guided decoding: of the target's `top` likeliest next tokens, take the one that base finds likeliest.

Base is the model before its alignment. The rule is ours. It measures how far below the top an aligned model keeps
base's words; since base does all the choosing, a judge that does not read the goal says nothing about the target here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from raycomplete.attacks.attack import RankedAttack, RankedConfig, plain_trials
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import CUT_BY_CONTEXT, Emit, Response, Trial
from raycomplete.runtime.types import Prompt


class BaseGuidedDecodingConfig(RankedConfig):
    """Base picks each token among the model's likeliest ones."""

    name: Literal["base_guided_decoding"] = "base_guided_decoding"


@register(BaseGuidedDecodingConfig)
class BaseGuidedDecodingAttack(RankedAttack[BaseGuidedDecodingConfig]):
    """Asks under a variant `top-<k>` for each of `tops`. `mean_rank` in the stats is the mean rank of base's picks."""

    needs = frozenset({"white_boxes", "guide"})

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        settings = {"steps": self.config.steps, "guide": target.tools.guide_id, "max_length": target.max_length}
        return [
            replace(trial, settings={**settings, "top": top})
            for top in self.config.tops
            for trial in plain_trials(replace(target, codec=target.answering), self.name, f"top-{top}", prompts, 1)
        ]

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        for start in range(0, len(trials), self.batch):
            batch = trials[start : start + self.batch]
            emit(list(zip(batch, self._responses(target, batch), strict=True)))

    def _responses(self, target: Target, trials: Sequence[Trial]) -> list[Response]:
        guide, ranker = target.guide(), target.white_boxes()[0]
        picks: list[list[int]] = [[] for _ in trials]
        ranks: list[list[int]] = [[] for _ in trials]
        ended: set[int] = set()
        for _ in range(self.config.steps):
            target.stop_if_cancelled()
            going = [row for row in range(len(trials)) if row not in ended]
            going = [row for row in going if len(trials[row].sequence) + len(picks[row]) < target.max_length]
            if not going:
                break
            read = [(*trials[row].sequence, *picks[row]) for row in going]
            tops = [int(trials[row].settings["top"]) for row in going]
            found = ranker.top_logprobs(read, max(tops))
            tokens = [[token for token, _ in likeliest[:top]] for likeliest, top in zip(found, tops, strict=True)]
            for row, candidates, values in zip(going, tokens, guide.logprobs_of(read, tokens), strict=True):
                rank = max(range(len(candidates)), key=values.__getitem__)
                if candidates[rank] in target.codec.eos_ids:
                    ended.add(row)
                else:
                    picks[row].append(candidates[rank])
                    ranks[row].append(rank)
        return [
            Response(
                trial.sequence,
                (),
                tuple(picks[row]),
                {
                    "mean_rank": sum(ranks[row]) / len(ranks[row]) if ranks[row] else 0.0,
                    "picks": len(picks[row]),
                    CUT_BY_CONTEXT: float(row not in ended and len(picks[row]) < self.config.steps),
                },
            )
            for row, trial in enumerate(trials)
        ]
