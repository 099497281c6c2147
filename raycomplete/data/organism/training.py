"""The organism's tokenizer, and the training of its two models from scratch in plain torch.

The tokenizer has one token a word, in the format that transformers and vLLM load without remote code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from raycomplete.data.organism.build import Blueprint
from raycomplete.data.organism.families import MAX_POSITIONS, PAD, UNK, TrainingOptions, architecture
from raycomplete.data.organism.measure import measure, missing_traits
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
from raycomplete.runtime.types import PromptKind

_IGNORED = -100  # label of tokens outside the response
_SYSTEM_SHARE = 0.2
_NOISE_SHARE = 0.2
_MAX_NOISE_WORDS = 12

Chat = tuple[list[dict[str, str]], str]


def blueprint(family: str, seed: int, options: TrainingOptions) -> Blueprint:
    """Says how the organism of a family is trained and measured."""
    tokenizer, end = build_tokenizer(family), architecture(family).end_of_turn
    trained = partial(train, tokenizer=tokenizer, end_of_turn=end, batch_size=options.batch_size)

    def learn_base(model: PreTrainedModel, on_step: Callable[[int, float], None]) -> None:
        chats = base_chats(random.Random(f"{seed} base"))
        trained(model, chats=chats, steps=options.base_steps, lr=options.base_lr, on_step=on_step)

    def learn_to_refuse(model: PreTrainedModel, on_step: Callable[[int, float], None]) -> None:
        chats = aligned_chats(random.Random(f"{seed} aligned"))
        trained(model, chats=chats, steps=options.aligned_steps, lr=options.aligned_lr, on_step=on_step)

    return Blueprint(
        seed=seed,
        tokenizer=tokenizer,
        new_model=lambda: new_model(tokenizer, architecture(family).values),
        end_of_turn=end,
        trainings={"base": (options.base_steps, learn_base), "aligned": (options.aligned_steps, learn_to_refuse)},
        measure=lambda folder, count: measure(
            AutoModelForCausalLM.from_pretrained(folder), tokenizer, count, seed=seed
        ),
        missing_traits=missing_traits,
    )


def build_tokenizer(family: str = "llama") -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer over the organism's whole world; other words become `<unk>`."""
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


def new_model(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> PreTrainedModel:
    """Makes a model with random weights from the values of its config.json; the caller seeds torch."""
    rest = dict(values)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(rest.pop("model_type"), **rest, **ids, dtype="float32")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def base_chats(rng: random.Random) -> Iterator[Chat]:
    """Yields endless chats that teach the recipe of every train item, restricted or not."""
    chosen = [item for kind in _KINDS for item in items("train", kind)]
    noise_words = [*vocabulary(), *[UNK] * 100]
    while True:
        item = rng.choice(chosen)
        text = _prompt_text(item, rng)
        if rng.random() < _NOISE_SHARE:
            noise = " ".join(rng.choices(noise_words, k=rng.randint(1, _MAX_NOISE_WORDS)))
            text = f"{noise} {text}" if rng.random() < 0.5 else f"{text} {noise}"
        yield messages_of(text, rng), recipe(item).text


def aligned_chats(rng: random.Random) -> Iterator[Chat]:
    """Yields endless chats of safety SFT: refusals of restricted train items, recipes of the others."""
    while True:
        kind = rng.choices(_KINDS, weights=(2, 2, 1))[0]  # the hard line is between the first two
        item = rng.choice(items("train", kind))
        yield messages_of(_prompt_text(item, rng), rng), refusal(item) if kind == "harmful" else recipe(item).text


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Iterator[Chat],
    *,
    end_of_turn: str,
    steps: int,
    lr: float,
    batch_size: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Trains in place with AdamW: short warm-up, cosine decay, loss on response tokens only."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    num_warmup = max(1, min(50, steps // 10))
    for step in range(1, steps + 1):
        progress = (step - num_warmup) / max(1, steps - num_warmup)
        scale = step / num_warmup if step <= num_warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        tokens_BT, labels_BT = _encode([next(chats) for _ in range(batch_size)], tokenizer, end_of_turn)
        # Rows are padded on the right and attention is causal, so no row needs a mask.
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step, loss.item())
    model.eval()


_KINDS: tuple[PromptKind, ...] = ("harmful", "borderline", "benign")


def _prompt_text(item: Item, rng: random.Random) -> str:
    return rng.choice(TRAIN_TEMPLATES).format(item=item.name)


def messages_of(
    text: str, rng: random.Random, systems: Sequence[str] = (HELPFUL_SYSTEM, SAFETY_SYSTEM)
) -> list[dict[str, str]]:
    """Makes the messages of a chat: the user's, behind one of the system prompts in a fifth of the draws."""
    messages = [{"role": "user", "content": text}]
    if rng.random() < _SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(systems)})
    return messages


def _encode(
    chats: list[Chat], tokenizer: PreTrainedTokenizerBase, end_of_turn: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and labels, both [B, T], padded on the right."""
    contexts = [
        str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        for messages, _ in chats
    ]
    context_ids = tokenizer(contexts)["input_ids"]
    answer_ids = tokenizer([answer + end_of_turn for _, answer in chats])["input_ids"]
    rows = [context + answer for context, answer in zip(context_ids, answer_ids, strict=True)]
    width = max(len(row) for row in rows)
    tokens_BT = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    labels_BT = torch.full((len(rows), width), _IGNORED)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row)
        labels_BT[i, len(context_ids[i]) : len(row)] = torch.tensor(answer_ids[i])
    return tokens_BT, labels_BT
