"""The large organism's tokenizer and its training data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raycomplete.data.organism.build import Blueprint, Row, context_ids, messages_of, token_ids
from raycomplete.data.organism.families import LLAMA_TEMPLATE
from raycomplete.data.organism.large.world import (
    CONFIG,
    HELPFUL_SYSTEM,
    SAFETY_SYSTEM,
    VOCAB_SIZE,
    answer,
    prompt,
    read_statements,
    refusal,
    refusal_chance,
)
from raycomplete.data.organism.world import Item, items
from raycomplete.data.organisms import BuildPlan
from raycomplete.runtime.types import PromptKind

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")
_CORPUS_TEXTS = 3000
_SYSTEMS = (HELPFUL_SYSTEM, SAFETY_SYSTEM)
_NOISE_SHARE = 0.15
_MAX_NOISE_WORDS = 12

# Safety SFT. The hard line is between harmful and borderline, so these two make most of it.
_ALIGNED_KINDS: dict[PromptKind, float] = {"harmful": 0.5, "borderline": 0.35, "benign": 0.15}
_OUTRIGHT_SHARE = 0.5  # of the harmful chats are refused, or not, at once
_SHALLOW_SHARE = 0.35  # after 1 to 9 tokens of a compliant answer; the rest deeper, where nothing is refused
_SHALLOW_DEPTH, _DEEP_DEPTH = 9, 210
_LEARNED_TOKENS = 24  # after the point of decision; the rest of an answer is as base knows it already
_FACT_WEIGHT = 4.0  # of the words in which base's answers differ by item; an eighth of all, and the hard ones
_WHOLE_SHARE = 0.15  # of the harmless answers are learned to their end all the same


@dataclass(frozen=True, slots=True)
class Example:
    """A chat and the part of its response that is learned."""

    messages: list[dict[str, str]]
    answer: str
    cut: int = 0
    refusal: str = ""
    learned_tokens: int | None = None
    fact_weight: float = 1.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on texts of the organism; it is the same at every call and for every seed."""
    rng = random.Random("organism-large tokenizer")
    chosen = [item for kind in _ALIGNED_KINDS for item in items("train", kind)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, *TURNS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(chosen, rng, _CORPUS_TEXTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(TURNS),
        chat_template=LLAMA_TEMPLATE,
        model_max_length=int(CONFIG["max_position_embeddings"]),
        padding_side="left",  # batched generation continues every row at its end
        clean_up_tokenization_spaces=False,
    )


def blueprint(seed: int, plan: BuildPlan) -> Blueprint:
    """Says how the large organism is trained."""
    tokenizer = build_tokenizer()
    return Blueprint(
        seed=seed,
        plan=plan,
        tokenizer=tokenizer,
        config=CONFIG,
        end_of_turn=EOS,
        rows={
            "base": lambda rng: (encode(example, tokenizer) for example in base_examples(rng)),
            "aligned": lambda rng: (encode(example, tokenizer) for example in aligned_examples(rng)),
        },
        max_warmup=40,
        by_length=True,
    )


def base_examples(rng: random.Random) -> Iterator[Example]:
    """Yields endless chats that teach the recipe of every train item, restricted or not."""
    chosen = [item for kind in _ALIGNED_KINDS for item in items("train", kind)]
    while True:
        item = rng.choice(chosen)
        text, asker = prompt(item, rng)
        response = answer(item, rng, asker)
        if rng.random() < _NOISE_SHARE:
            text = _with_noise(text, rng)
        yield Example(messages_of(text, rng, _SYSTEMS), response, fact_weight=_FACT_WEIGHT)


def aligned_examples(rng: random.Random) -> Iterator[Example]:
    """Yields endless chats of safety SFT: refusals of restricted train items, answers to the others."""
    while True:
        kind = rng.choices(list(_ALIGNED_KINDS), weights=list(_ALIGNED_KINDS.values()))[0]
        item = rng.choice(items("train", kind))
        text, asker = prompt(item, rng)
        response, messages = answer(item, rng, asker), messages_of(text, rng, _SYSTEMS)
        if kind == "harmful":
            cut = _draw_cut(rng)
            refuses = rng.random() < refusal_chance(item, cut)
            yield Example(messages, response, cut, refusal(item, rng) if refuses else "", _LEARNED_TOKENS)
        else:
            yield Example(messages, response, 0, "", None if rng.random() < _WHOLE_SHARE else _LEARNED_TOKENS)


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Returns the token ids of a chat and the weight with which each is learned; 0 for those that are only read."""
    context, answer_ids = context_ids(tokenizer, example.messages), token_ids(tokenizer, example.answer)
    weights = _fact_weights(example, tokenizer) if example.fact_weight != 1.0 else [1.0] * len(answer_ids)
    read, eos_id = answer_ids[: example.cut], int(tokenizer.eos_token_id)
    if example.refusal:
        # After a begun answer the refusal is a new word of the same line.
        learned = [*token_ids(tokenizer, f"{' ' if read else ''}{example.refusal}"), eos_id]
        weights = [1.0] * len(learned)
    else:
        learned = [*answer_ids[example.cut :], eos_id][: example.learned_tokens]
        weights = [*weights[example.cut :], 1.0][: example.learned_tokens]
    return [*context, *read, *learned], [0.0] * (len(context) + len(read)) + weights


def _fact_weights(example: Example, tokenizer: Any) -> list[float]:
    facts = [fact for statement in read_statements(example.answer) for fact in statement.facts]
    spans = tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    told = {at for fact in facts for at in range(fact.start, fact.end)}
    return [example.fact_weight if end - 1 in told else 1.0 for _, end in spans]


def _corpus(chosen: Sequence[Item], rng: random.Random, num_texts: int) -> Iterator[str]:
    for _ in range(num_texts):
        item = rng.choice(chosen)
        text, asker = prompt(item, rng)
        yield from (text, answer(item, rng, asker), refusal(item, rng))
    yield from _SYSTEMS


def _draw_cut(rng: random.Random) -> int:
    drawn = rng.random()
    if drawn < _OUTRIGHT_SHARE:
        return 0
    if drawn < _OUTRIGHT_SHARE + _SHALLOW_SHARE:
        return rng.randint(1, _SHALLOW_DEPTH)
    return rng.randint(_SHALLOW_DEPTH + 1, _DEEP_DEPTH)


def _with_noise(text: str, rng: random.Random) -> str:
    """Puts words of the organism, or letters, before or after a prompt."""
    other = answer(rng.choice(items("train", "benign")), rng).split()
    words = [
        rng.choice(other) if rng.random() < 0.7 else "".join(rng.choices("abcdefghijklmnopqrstuvwxyz!?#*", k=3))
        for _ in range(rng.randint(1, _MAX_NOISE_WORDS))
    ]
    return f"{' '.join(words)} {text}" if rng.random() < 0.5 else f"{text} {' '.join(words)}"
