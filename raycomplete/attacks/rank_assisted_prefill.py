"""Rank-assisted prefill (RAP): the attacker opens the answer, then picks each token among the model's likeliest ones.

Source: arXiv 2512.05518 and its published code. The opening is a prefill. From there on the attacker takes, at each
step, the first acceptable one of the target's `top` likeliest tokens in the target's own order. Where none is
acceptable he drops the last token and goes on after it in rank order: a depth-first search, in which going back is a
step too. It ends after `steps`, or when it would go back into the prefill, which leaves nothing of the target's.

What is acceptable, the authors leave to a helper: a token classifier, trained to tell whether an answer is still
harmful at its last token (`helper`). Without one, base decides here (the model before its alignment): a token is
acceptable if base finds it plausible after what stands so far, and if it does not complete a refusal. The authors let
an answer run on past its end; here an acceptable end ends it.

The rate is that of what the target itself said, as for every prefill. The authors judge the prefill along with it:
that rate stands beside it as `with_prefill`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.attack import RankedAttack, RankedConfig, answer_ids, require_answers
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target, WhiteBox
from raycomplete.attacks.trial import CUT_BY_CONTEXT, Decoding, Emit, Response, Trial
from raycomplete.runtime.types import Codec, Prompt

_OPENING, _LEAST = 24, 0.001  # the standard
_TAIL = 24  # tokens at the end of the text in which a refusal is looked for


class RankAssistedPrefillConfig(RankedConfig):
    """RAP: the attacker opens the answer, and picks each token among the model's likeliest ones."""

    standard: ClassVar[Mapping[str, Any]] = {**RankedConfig.standard, "min_tokens": 32}

    name: Literal["rank_assisted_prefill"] = "rank_assisted_prefill"
    prefill: str | None = Field(
        None, description="words that open every answer; without them, the start of the prompt's compliant answer"
    )
    prefill_tokens: int = Field(_OPENING, ge=1, description="tokens of the compliant answer that open the answer")
    helper: str | None = Field(
        None, description="token classifier whose label 1 at the last token accepts a text; without one, base decides"
    )
    min_probability: float = Field(
        _LEAST, gt=0, le=1, description="base's probability of an acceptable token, as a share of its likeliest token's"
    )
    min_tokens: int = Field(32, ge=0, description="picks before which the end of the answer is not acceptable")

    def answer_depths(self) -> list[int]:
        return [] if self.prefill else [self.prefill_tokens]


@register(RankAssistedPrefillConfig)
class RankAssistedPrefillAttack(RankedAttack[RankAssistedPrefillConfig]):
    """Searches under a variant `top-<k>` for each of `tops`.

    Stats: steps, backtracks, picks left in the answer and their mean rank, and `exhausted`, 1 where the search went
    back into the prefill.
    """

    with_prefill = True

    def __init__(self, config: RankAssistedPrefillConfig) -> None:
        super().__init__(config)
        self.needs = frozenset({"white_boxes", "helper" if config.helper else "guide"})

    def reduced_because(self, codec: Codec, prompts: Sequence[Prompt]) -> list[str]:
        """Adds a short opening, and another threshold: a strict attacker finds no way on, a lax one ends in babble."""
        config, reasons = self.config, super().reduced_because(codec, prompts)
        opening = len(codec.encode_answer(config.prefill)) if config.prefill else config.prefill_tokens
        if opening < _OPENING:
            reasons.append(f"opening_tokens {opening} instead of {_OPENING}")
        if config.helper is None and config.min_probability != _LEAST:
            reasons.append(f"min_probability {config.min_probability:g} instead of {_LEAST:g}")
        return reasons

    def is_cut(self, trial: Trial, response: Response) -> bool:
        """Tells whether the steps were spent, going back included; an end taken with the last one is no cut."""
        stats = response.stats
        went_on = stats["steps"] == stats["picks"] + 2 * stats["backtracks"]  # else an end or a dead end took a step
        return bool(went_on and stats["steps"] >= self.config.steps)

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        config, codec = self.config, target.answering
        if not config.prefill:
            require_answers(prompts, "which opens a rank-assisted prefill", "set the attack's prefill")
        settings = config.model_dump(mode="json", include={"steps", "min_tokens"})
        settings["max_length"] = target.max_length
        if config.helper:
            settings["helper"] = target.tools.helper_id(config.helper)
        else:
            settings |= {"guide": target.tools.guide_id, "min_probability": config.min_probability}
        words = codec.encode_answer(config.prefill or "")
        if not words:
            settings["depth"] = config.prefill_tokens  # an answer that is shorter opens nothing and is left out
        opened = [words or answer_ids(codec, prompt)[: config.prefill_tokens] for prompt in prompts]
        return [
            Trial(
                self.name,
                f"top-{top}",
                prompt,
                (*prompt.encoded(codec), *given),
                Decoding(1),
                tuple(given),
                settings={**settings, "top": top},
            )
            for top in config.tops
            for prompt, given in zip(prompts, opened, strict=True)
        ]

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        ranker = target.white_boxes()[0]
        guide = None if self.config.helper else target.guide()
        accepts = self._helper(target) if self.config.helper else _no_refusal(target)
        for start in range(0, len(trials), self.batch):
            searches = [_Search(trial, target.codec, self.config) for trial in trials[start : start + self.batch]]
            going = searches
            while going := [search for search in going if not search.ended]:
                target.stop_if_cancelled()
                self._read(going, ranker, guide)
                undecided = going
                while undecided := [search for search in undecided if search.offers()]:
                    accepted = accepts(undecided)
                    for search, is_accepted in zip(undecided, accepted, strict=True):
                        if is_accepted:
                            search.take(target.max_length)
                    undecided = [search for search, taken in zip(undecided, accepted, strict=True) if not taken]
            emit([(search.trial, search.response()) for search in searches])

    def _read(self, going: Sequence[_Search], ranker: WhiteBox, guide: WhiteBox | None) -> None:
        """Lists the candidates at the end of each answer, in the target's order; base's choice is made here already."""
        read = [search.sequence for search in going]
        tops = [int(search.trial.settings["top"]) for search in going]
        found = ranker.top_logprobs(read, max(tops))
        candidates = [[token for token, _ in likeliest[:top]] for likeliest, top in zip(found, tops, strict=True)]
        allowed = [[True] * len(tokens) for tokens in candidates]
        if guide is not None:
            best = [row[0][1] + math.log(self.config.min_probability) for row in guide.top_logprobs(read, 1)]
            values = guide.logprobs_of(read, candidates)
            allowed = [[value >= least for value in row] for row, least in zip(values, best, strict=True)]
        for search, tokens, marks in zip(going, candidates, allowed, strict=True):
            search.list_candidates([(rank, token) for rank, token in enumerate(tokens) if marks[rank]])

    def _helper(self, target: Target) -> Callable[[Sequence[_Search]], list[bool]]:
        helper = target.helper(self.config.helper or "")

        def accepts(searches: Sequence[_Search]) -> list[bool]:
            texts = [target.codec.decode(search.answer) for search in searches]
            return helper.accepts([search.trial.prompt.text for search in searches], texts)

        return accepts


def _no_refusal(target: Target) -> Callable[[Sequence[_Search]], list[bool]]:
    """Accepts what does not end in a refusal."""

    def accepts(searches: Sequence[_Search]) -> list[bool]:
        return [not target.tools.refuses(target.codec.decode(search.answer[-_TAIL:])) for search in searches]

    return accepts


class _Search:
    """One answer, searched depth first: for each pick, the candidates that come after it in rank order stay open."""

    def __init__(self, trial: Trial, codec: Codec, config: RankAssistedPrefillConfig) -> None:
        self.trial = trial
        self.ended = False
        self._codec, self._config = codec, config
        self._picks: list[tuple[int, int]] = []  # rank and token
        self._open: list[Iterator[tuple[int, int]]] = []  # one more than picks, the last at the end of the answer
        self._candidate = (0, 0)
        self._steps = self._backtracks = 0
        self._is_exhausted = self._is_cut = False

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt, prefill and picks: the tokens that the target reads next."""
        return (*self.trial.sequence, *(token for _, token in self._picks))

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer with the present candidate at its end, prefill included."""
        return (*self.trial.prefill, *(token for _, token in self._picks), self._candidate[1])

    def list_candidates(self, found: Sequence[tuple[int, int]]) -> None:
        """Opens the candidates after the last pick; a word for the third time and an early end are none."""
        last = [self._text(token) for token in (*self.trial.prefill, *(token for _, token in self._picks))[-2:]]
        if len(last) == 2 and last[0] == last[1]:
            found = [pair for pair in found if self._text(pair[1]) != last[0]]
        if len(self._picks) < self._config.min_tokens:
            found = [pair for pair in found if pair[1] not in self._codec.eos_ids]
        self._open.append(iter(found))

    def offers(self) -> bool:
        """Moves to the next candidate, and back where there is none; False where the search has ended."""
        while self._steps < self._config.steps:
            found = next(self._open[-1], None)
            if found is not None:
                self._candidate = found
                return True
            self._steps += 1
            self._open.pop()
            if not self._open:
                self._is_exhausted = True
                break
            self._picks.pop()
            self._backtracks += 1
        self.ended = True
        return False

    def take(self, max_length: int) -> None:
        """Picks the present candidate."""
        self._steps += 1
        if self._candidate[1] in self._codec.eos_ids:
            self.ended = True
            return
        self._picks.append(self._candidate)
        self._is_cut = len(self.sequence) >= max_length and self._steps < self._config.steps
        self.ended = self._is_cut or self._steps >= self._config.steps

    def response(self) -> Response:
        """Returns what was picked, as the target's answer."""
        picked = len(self._picks)
        return Response(
            self.trial.sequence,
            self.trial.prefill,
            tuple(token for _, token in self._picks),
            {
                "mean_rank": sum(rank for rank, _ in self._picks) / picked if picked else 0.0,
                "picks": picked,
                "steps": self._steps,
                "backtracks": self._backtracks,
                "exhausted": float(self._is_exhausted),
                CUT_BY_CONTEXT: float(self._is_cut),
            },
        )

    def _text(self, token: int) -> str:
        return self._codec.decode([token]).strip()
