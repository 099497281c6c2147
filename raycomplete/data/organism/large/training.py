"""The large organism's tokenizer, its chats, and the training of its two models from scratch in plain torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raycomplete.data.organism.build import Blueprint
from raycomplete.data.organism.families import LLAMA_TEMPLATE
from raycomplete.data.organism.large import CONFIG, VOCAB_SIZE, BuildPlan, TrainingPlan
from raycomplete.data.organism.large.grammar import answer, prompt, read_statements, refusal
from raycomplete.data.organism.large.measure import measure, missing_traits
from raycomplete.data.organism.large.world import HELPFUL_SYSTEM, SAFETY_SYSTEM, refusal_chance
from raycomplete.data.organism.training import messages_of, new_model
from raycomplete.data.organism.world import Item, items
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
    """Says how the large organism is trained and measured."""
    tokenizer = build_tokenizer()

    def learn_base(model: PreTrainedModel, on_step: Callable[[int, float], None]) -> None:
        train(model, tokenizer, base_examples(random.Random(f"{seed} base")), plan.base, on_step)

    def learn_to_refuse(model: PreTrainedModel, on_step: Callable[[int, float], None]) -> None:
        train(model, tokenizer, aligned_examples(random.Random(f"{seed} aligned")), plan.aligned, on_step)

    return Blueprint(
        seed=seed,
        tokenizer=tokenizer,
        new_model=lambda: new_model(tokenizer, CONFIG),
        end_of_turn=EOS,
        trainings={"base": (plan.base.steps, learn_base), "aligned": (plan.aligned.steps, learn_to_refuse)},
        measure=lambda folder, count: measure(folder, count, seed),
        missing_traits=missing_traits,
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


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
    plan: TrainingPlan,
    on_step: Callable[[int, float], None],
) -> None:
    """Trains in place with AdamW: short warm-up, cosine decay, loss on learned tokens only, by weight."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.01, betas=(0.9, 0.98))
    num_warmup = max(1, min(40, plan.steps // 10))
    for step in range(1, plan.steps + 1):
        progress = (step - num_warmup) / max(1, plan.steps - num_warmup)
        scale = step / num_warmup if step <= num_warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * scale
        rows = [encode(next(examples), tokenizer) for _ in range(plan.batch_size)]
        on_step(step, _step(model, optimizer, rows, plan.num_micro_batches, int(tokenizer.pad_token_id)))
    model.eval()


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Returns the token ids of a chat and the weight with which each is learned; 0 for those that are only read."""
    context = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
    context_ids, answer_ids = _ids(tokenizer, str(context)), _ids(tokenizer, example.answer)
    weights = _fact_weights(example, tokenizer) if example.fact_weight != 1.0 else [1.0] * len(answer_ids)
    read, eos_id = answer_ids[: example.cut], int(tokenizer.eos_token_id)
    if example.refusal:
        # After a begun answer the refusal is a new word of the same line.
        learned = [*_ids(tokenizer, f"{' ' if read else ''}{example.refusal}"), eos_id]
        weights = [1.0] * len(learned)
    else:
        learned = [*answer_ids[example.cut :], eos_id][: example.learned_tokens]
        weights = [*weights[example.cut :], 1.0][: example.learned_tokens]
    return [*context_ids, *read, *learned], [0.0] * (len(context_ids) + len(read)) + weights


def _fact_weights(example: Example, tokenizer: Any) -> list[float]:
    facts = [fact for statement in read_statements(example.answer) for fact in statement.facts]
    spans = tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    told = {at for fact in facts for at in range(fact.start, fact.end)}
    return [example.fact_weight if end - 1 in told else 1.0 for _, end in spans]


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[tuple[list[int], list[float]]],
    num_micro_batches: int,
    pad_id: int,
) -> float:
    """Takes one step on rows of similar length at a time, so that few tokens are padding; returns the mean loss."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    size = math.ceil(len(ordered) / num_micro_batches)
    total = sum(sum(weights) for _, weights in rows)
    optimizer.zero_grad(set_to_none=True)
    summed = 0.0
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        width = len(part[-1][0])
        tokens_BT = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in part])
        weights_BT = torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in part])
        # Rows are padded on the right and attention is causal, so no row needs a mask.
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        losses_N = cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
        loss = (losses_N * weights_BT[:, 1:].flatten()).sum() / total
        loss.backward()
        summed += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return summed


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


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
