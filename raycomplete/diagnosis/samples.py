"""Responses that a diagnosis measures: compliant continuations of harmful prompts, and answers to harmless ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from raycomplete.config import PromptSource, RunConfig
from raycomplete.data.organisms import ORGANISMS
from raycomplete.data.prompts import stream_prompts
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind
from raycomplete.training.sampling import compliant_continuations

KINDS: tuple[PromptKind, ...] = ("harmful", "benign")  # the benign ones are the control


@dataclass(frozen=True, slots=True)
class DiagnosisSample:
    """One response that every model reads: at least one token, after those up to where the response starts."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def read_prompts(config: RunConfig, kind: PromptKind) -> Iterator[Prompt]:
    """Streams the prompts of one kind: those of `diagnose`, or the held-out ones of the run file."""
    settings, data = config.diagnose, config.data
    sources: Sequence[PromptSource] = getattr(settings, kind)
    if not sources and data.source in ORGANISMS:
        return iter(ORGANISMS[data.source].prompts("heldout", kind, data.seed, settings.num_prompts))
    sources = sources or getattr(data.evaluation, kind)
    if not sources:
        raise DataError(
            f"There are no {kind} prompts to diagnose.", f"Name files in diagnose.{kind} or in data.evaluation.{kind}."
        )
    return islice(stream_prompts(sources, kind, data.seed), settings.num_prompts)


def batch_samples(run: Run, kind: PromptKind, prompts: Sequence[Prompt], number: int) -> list[DiagnosisSample]:
    """Makes the responses of one batch, the same ones every time.

    Harmful prompts whose sampled continuation is not compliant, prompts that fill the context and empty responses are
    left out.
    """
    config, settings, codec = run.config, run.config.diagnose, run.models.codec
    encoded = {prompt.prompt_id: tuple(prompt.encoded(codec)) for prompt in prompts}
    needed = len(codec.encode_answer(config.rollout.affirmative_prefixes[0])) + 1
    prompts = [prompt for prompt in prompts if len(encoded[prompt.prompt_id]) + needed < config.models.max_length]
    answers = _answers(run, kind, prompts, encoded, number)
    samples = []
    for prompt in prompts:
        prompt_ids = encoded[prompt.prompt_id]
        room = min(settings.max_tokens, config.models.max_length - len(prompt_ids))
        if answer_ids := answers.get(prompt.prompt_id, ())[:room]:
            samples.append(DiagnosisSample(prompt.prompt_id, prompt_ids, answer_ids))
    return samples


def _answers(
    run: Run, kind: PromptKind, prompts: Sequence[Prompt], encoded: dict[str, tuple[int, ...]], number: int
) -> dict[str, tuple[int, ...]]:
    """Response tokens by prompt id: given ones, and base's own where none is given or `diagnose.answers` says so."""
    settings, rollout, codec = run.config.diagnose, run.config.rollout, run.models.codec
    base = run.engines.generator.with_weights(str(run.models.paths["base"]))
    # Batches of one run must not share random numbers, or their prompts would not be independent.
    digest = hashlib.sha256(f"{run.config.train.seed}:diagnose:{kind}:{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if settings.answers == "sampled":
        prompts = [replace(prompt, answer=None) for prompt in prompts]
    missing = [prompt for prompt in prompts if not prompt.answer]
    found: dict[str, tuple[int, ...]] = {}
    if missing and kind == "harmful":
        longest = rollout.model_copy(update={"max_harmful_tokens": max(settings.max_tokens, 4)})
        train = run.config.train.model_copy(update={"seed": seed})
        config = run.config.model_copy(update={"rollout": longest, "train": train})
        opening = rollout.affirmative_prefixes[0]
        written = compliant_continuations(config, codec, base, [(prompt, opening) for prompt in missing], run.judge)
        found = {prompt.prompt_id: ids for prompt, ids in zip(missing, written, strict=True) if ids}
    elif missing:
        drawn = base.generate(
            [encoded[prompt.prompt_id] for prompt in missing],
            max_tokens=settings.max_tokens,
            temperature=rollout.temperature,
            seed=seed * 2**20,
        )
        found = {prompt.prompt_id: tuple(answer) for prompt, answer in zip(missing, drawn, strict=True)}
    given = {
        prompt.prompt_id: tuple(codec.encode_answer(prompt.answer))[: settings.max_tokens]
        for prompt in prompts
        if prompt.answer
    }
    limit = run.config.models.max_length
    short = [name for name, ids in given.items() if len(ids) < settings.max_tokens and len(encoded[name] + ids) < limit]
    if short and settings.answers == "extended":
        added = base.generate([encoded[name] + given[name] for name in short], max_tokens=settings.max_tokens)
        given |= {name: given[name] + tuple(tokens) for name, tokens in zip(short, added, strict=True)}
    return found | given
