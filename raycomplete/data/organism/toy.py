"""The toy's tokenizer and its training data: one token a word, in the format that transformers and vLLM load."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raycomplete.data.organism.build import Blueprint, Row, context_ids, messages_of, token_ids
from raycomplete.data.organism.families import MAX_POSITIONS, PAD, UNK, architecture
from raycomplete.data.organism.world import (
    HELPFUL_SYSTEM,
    SAFETY_SYSTEM,
    TRAIN_TEMPLATES,
    Item,
    items,
    recipe,
    refusal,
    vocabulary,
)
from raycomplete.data.organisms import BuildPlan
from raycomplete.runtime.types import PromptKind

_SYSTEMS = (HELPFUL_SYSTEM, SAFETY_SYSTEM)
_NOISE_SHARE = 0.2
_MAX_NOISE_WORDS = 12
_KINDS: tuple[PromptKind, ...] = ("harmful", "borderline", "benign")


def blueprint(family: str, seed: int, plan: BuildPlan) -> Blueprint:
    """Says how the toy of a family is trained."""
    tokenizer, form = build_tokenizer(family), architecture(family)
    learned = partial(_row, tokenizer, form.end_of_turn)
    return Blueprint(
        seed=seed,
        plan=plan,
        tokenizer=tokenizer,
        config=form.values,
        end_of_turn=form.end_of_turn,
        rows={
            "base": lambda rng: (learned(*chat) for chat in _base_chats(rng)),
            "aligned": lambda rng: (learned(*chat) for chat in _aligned_chats(rng)),
        },
        max_warmup=50,
    )


def build_tokenizer(family: str = "llama") -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer over the organism's whole world; other words become `<unk>`.

    Text is lower-cased and every punctuation mark is its own token. Decoding joins tokens by single blanks, so text
    written that way ("drop it . then wait .") comes back unchanged.
    """
    form = architecture(family)
    vocab = {token: i for i, token in enumerate(form.tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=form.bos,
        eos_token=form.eos,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=list(dict.fromkeys((*form.marks, form.end_of_turn))),
        chat_template=form.template,
        model_max_length=MAX_POSITIONS,
        padding_side="left",  # batched generation continues every row at its end
        clean_up_tokenization_spaces=False,  # cleaning would glue "word ." to "word."
    )


def _base_chats(rng: random.Random) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Yields chats that teach the recipe of every train item, restricted or not.

    Some prompts stand among random words, so that the base finds the item in a prompt that an attack wraps or extends.
    """
    chosen = [item for kind in _KINDS for item in items("train", kind)]
    noise_words = [*vocabulary(), *[UNK] * 100]
    while True:
        item = rng.choice(chosen)
        text = _prompt_text(item, rng)
        if rng.random() < _NOISE_SHARE:
            noise = " ".join(rng.choices(noise_words, k=rng.randint(1, _MAX_NOISE_WORDS)))
            text = f"{noise} {text}" if rng.random() < 0.5 else f"{text} {noise}"
        yield messages_of(text, rng, _SYSTEMS), recipe(item).text


def _aligned_chats(rng: random.Random) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Yields chats of safety SFT: refusals of restricted train items, recipes of the others.

    Every refusal starts at depth 0. There is no chat in which a begun recipe turns into a refusal: that is what leaves
    the alignment shallow.
    """
    while True:
        kind = rng.choices(_KINDS, weights=(2, 2, 1))[0]  # the hard line is between the first two
        item = rng.choice(items("train", kind))
        text = _prompt_text(item, rng)
        yield messages_of(text, rng, _SYSTEMS), refusal(item) if kind == "harmful" else recipe(item).text


def _prompt_text(item: Item, rng: random.Random) -> str:
    return rng.choice(TRAIN_TEMPLATES).format(item=item.name)


def _row(tokenizer: Any, end_of_turn: str, messages: list[dict[str, str]], answer: str) -> Row:
    context, answer_ids = context_ids(tokenizer, messages), token_ids(tokenizer, answer + end_of_turn)
    return context + answer_ids, [0.0] * len(context) + [1.0] * len(answer_ids)
