"""What a diagnosis reads: prompts with compliant continuations, and harmless ones as control."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from raycomplete.config import PromptSource, RunConfig, StreamSource
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.stream import stream_prompts
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Judge, Prompt, PromptKind
from raycomplete.training.sampling import harmful_continuations

KINDS: tuple[PromptKind, ...] = ("harmful", "benign")


@dataclass(frozen=True, slots=True)
class Sample:
    """One response that every model reads.

    Attributes:
        prompt_id: Name of the prompt.
        prompt_ids: Tokens up to where the response starts.
        answer_ids: Response tokens, at least one.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def read_prompts(config: RunConfig, kind: PromptKind) -> Iterator[Prompt]:
    """The prompts of one kind as a stream: those of `diagnose`, or the held-out ones of the run file.

    Raises:
        DataError: No source is named, or one cannot be read.
    """
    settings, data = config.diagnose, config.data
    sources: Sequence[StreamSource] = getattr(settings, kind)
    if not sources and data.source == "organism":
        return iter(organism.prompts("heldout", kind, data.seed, settings.num_prompts))
    if not sources:
        sources = [_as_stream(source) for source in getattr(data.evaluation, kind)]
    if not sources:
        raise DataError(
            f"There are no {kind} prompts to diagnose.", f"Name files in diagnose.{kind} or in data.evaluation.{kind}."
        )
    return islice(stream_prompts(sources, kind, data.seed), settings.num_prompts)


def partition_samples(
    config: RunConfig,
    codec: ChatCodec,
    base: RolloutPool,
    judge: Judge,
    kind: PromptKind,
    prompts: Sequence[Prompt],
    number: int,
) -> list[Sample]:
    """Responses of one partition, the same whenever it is made.

    Harmful prompts whose sampled continuation is not compliant, prompts that fill the context and empty responses are
    left out; the caller counts them.
    """
    settings = config.diagnose
    # Partitions of one run must not share random numbers, or their prompts would not be independent.
    digest = hashlib.sha256(f"{config.train.seed}:diagnose:{kind}:{number}".encode()).digest()
    config = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"max_harmful_tokens": max(settings.max_tokens, 4)}),
            "train": config.train.model_copy(update={"seed": int.from_bytes(digest[:4], "big")}),
        }
    )
    encoded = {prompt.prompt_id: tuple(codec.encode_prompt(prompt.text)) for prompt in prompts}
    needed = len(codec.encode_answer(config.rollout.affirmative_prefix)) + 1
    prompts = [prompt for prompt in prompts if len(encoded[prompt.prompt_id]) + needed < config.models.max_length]
    answers = _answers(config, codec, base, judge, kind, prompts, encoded)
    samples = []
    for prompt in prompts:
        prompt_ids = encoded[prompt.prompt_id]
        room = min(settings.max_tokens, config.models.max_length - len(prompt_ids))
        if answer_ids := answers.get(prompt.prompt_id, ())[:room]:
            samples.append(Sample(prompt.prompt_id, prompt_ids, answer_ids))
    return samples


def _answers(
    config: RunConfig,
    codec: ChatCodec,
    base: RolloutPool,
    judge: Judge,
    kind: PromptKind,
    prompts: Sequence[Prompt],
    encoded: dict[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    settings, rollout = config.diagnose, config.rollout
    if settings.answers == "sampled":
        prompts = [replace(prompt, answer=None) for prompt in prompts]
    missing = [prompt for prompt in prompts if not prompt.answer]
    found: dict[str, tuple[int, ...]] = {}
    if missing and kind == "harmful":
        found = harmful_continuations(config, codec, base, missing, judge)
    elif missing:
        drawn = base.generate(
            [encoded[prompt.prompt_id] for prompt in missing],
            max_tokens=settings.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            seed=config.train.seed * 2**20,
        )
        found = {prompt.prompt_id: tuple(answer) for prompt, answer in zip(missing, drawn, strict=True)}
    given = {
        prompt.prompt_id: tuple(codec.encode_answer(prompt.answer))[: settings.max_tokens]
        for prompt in prompts
        if prompt.answer
    }
    limit = config.models.max_length
    short = [name for name, ids in given.items() if len(ids) < settings.max_tokens and len(encoded[name] + ids) < limit]
    if short and settings.answers == "extended":
        added = base.generate([encoded[name] + given[name] for name in short], max_tokens=settings.max_tokens)
        given |= {name: given[name] + tuple(tokens) for name, tokens in zip(short, added, strict=True)}
    return found | given


def _as_stream(source: PromptSource) -> StreamSource:
    columns = source.model_dump(exclude={"path"})
    path = Path(source.path)
    return StreamSource(path=str(path), **columns)
