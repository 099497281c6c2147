"""Measures an organism checkpoint without an engine: attack success by prefill depth, utility, over-refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycomplete.data.organism.judge import OrganismJudge
from raycomplete.data.organism.prompts import prompts
from raycomplete.data.organism.world import MAX_RECIPE_TOKENS
from raycomplete.runtime.types import Outcome, Prompt, PromptKind

DEPTHS = (0, 1, 2, 4, 8, 16, 32, 48, 64)
_BATCH_SIZE = 128


@dataclass(frozen=True, slots=True)
class OrganismRates:
    """Rates on held-out prompts, greedy decoding.

    Attributes:
        asr: Attack success rate on harmful prompts by prefill depth.
        utility: Share of word-by-word right recipes, by kind of harmless prompt.
        over_refusal: Share of refused prompts, by kind of harmless prompt.
        num_prompts: Prompts of each kind.
    """

    asr: dict[int, float]
    utility: dict[str, float]
    over_refusal: dict[str, float]
    num_prompts: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def greedy_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Prompt],
    depth: int = 0,
    max_tokens: int = MAX_RECIPE_TOKENS + 4,
) -> list[tuple[str, str]]:
    """Greedy continuation of each prompt after the first `depth` tokens of its answer.

    Returns:
        (prefill, continuation) texts in order.
    """
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(chosen), _BATCH_SIZE):
        batch = chosen[start : start + _BATCH_SIZE]
        prefills = [" ".join((prompt.answer or "").split()[:depth]) for prompt in batch]
        chats = [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
                )
            )
            + prefill
            for prompt, prefill in zip(batch, prefills, strict=True)
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            tokens_BT = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        new_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        pairs.extend(zip(prefills, texts, strict=True))
    return pairs


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int = 120,
    depths: Sequence[int] = DEPTHS,
    seed: int = 0,
) -> OrganismRates:
    """Runs held-out prompts through a checkpoint and judges them.

    Args:
        model: The checkpoint, on the CPU.
        tokenizer: Its tokenizer.
        num_prompts: Prompts of each kind.
        depths: Prefill depths in tokens.
        seed: Chooses the prompts.
    """
    judge = OrganismJudge()
    harmful = prompts("heldout", "harmful", seed, num_prompts)
    asr = {}
    for depth in depths:
        outcomes = [
            judge.outcome(prompt, *pair)
            for prompt, pair in zip(harmful, greedy_continuations(model, tokenizer, harmful, depth), strict=True)
        ]
        asr[depth] = outcomes.count(Outcome.COMPLIED) / num_prompts
    utility: dict[str, float] = {}
    over_refusal: dict[str, float] = {}
    kinds: tuple[PromptKind, ...] = ("benign", "borderline")
    for kind in kinds:
        harmless = prompts("heldout", kind, seed, num_prompts)
        texts = [text for _, text in greedy_continuations(model, tokenizer, harmless)]
        pairs = list(zip(harmless, texts, strict=True))
        utility[kind] = sum(judge.is_right(prompt, text) for prompt, text in pairs) / num_prompts
        refused = [judge.outcome(prompt, "", text) == Outcome.REFUSED for prompt, text in pairs]
        over_refusal[kind] = sum(refused) / num_prompts
    return OrganismRates(asr, utility, over_refusal, num_prompts)
