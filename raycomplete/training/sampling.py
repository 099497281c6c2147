"""Turns prompts into training samples: the aligned model's answers, its refusals, and harmful continuations."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import KINDS, Models, Prompts
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.start import Engines
from raycomplete.evaluation.judges import default_judge
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError, WorkError
from raycomplete.runtime.types import Judge, ModelRole, Outcome, Prompt
from raycomplete.training.refusal_prefix import with_refusal_prefixes

_PROFILE_PROMPTS = 32


def make_samples(config: RunConfig, models: Models, prompts: Prompts, engines: Engines, console: Console) -> SampleSet:
    """Samples everything that training needs, under `train.seed`.

    Raises:
        WorkError: The aligned model refuses nothing, or no harmful continuation came out: there is nothing to recover.
    """
    judge = default_judge(config.data.source)
    aligned = engines.generator.with_weights(str(models.paths["aligned"]))
    everything = [prompt for kind in KINDS for prompt in prompts.train[kind]]
    harmful = list(prompts.train["harmful"])
    with console.stage(f"Answers of the aligned model to {len(everything)} training prompts"):
        draws = range(config.rollout.answers_per_prompt)
        drawn = [_answers(config, models.codec, aligned, everything, draw) for draw in draws]
        anchor = [
            AnchorSample(f"{prompt.prompt_id}#{draw}", prompt_ids, answer, prompt.kind)
            for draw, answers in enumerate(drawn)
            for prompt, (prompt_ids, answer) in zip(everything, answers, strict=True)
            if answer
        ]
    with console.stage(f"Refusals of the aligned model to {len(harmful)} harmful prompts"):
        refusals = _refusals(config, models.codec, aligned, harmful, anchor, judge)
    source: ModelRole = config.rollout.harmful_from
    with console.stage(f"Compliant continuations of {source}"):
        generator = engines.generator.with_weights(str(models.paths[source]))
        continuations = harmful_continuations(config, models.codec, generator, harmful, judge)
    recovery = [
        RecoverySample(f"{prompt_id}#{draw}", tuple(models.codec.encode_prompt(text)), context, h, refusal)
        for prompt_id, text in ((prompt.prompt_id, prompt.text) for prompt in harmful)
        if (h := continuations.get(prompt_id)) is not None
        for draw, (context, refusal) in enumerate(refusals.get(prompt_id, []))
    ]
    console.note(
        f"{len(anchor)} anchor samples, {len(recovery)} recovery samples; of {len(harmful)} harmful prompts "
        f"{len(refusals)} are refused by aligned and {len(continuations)} have a compliant continuation"
    )
    if not recovery:
        raise WorkError(
            f"Of {len(harmful)} harmful prompts the aligned model refuses {len(refusals)} and {len(continuations)} "
            "have a compliant continuation, so nothing can be recovered.",
            "Use prompts that the aligned model refuses, or set rollout.safety_prompt or rollout.affirmative_prefix; "
            "then run again with --overwrite.",
        )
    profile = [
        AnchorSample(
            prompt.prompt_id,
            tuple(models.codec.encode_prompt(prompt.text)),
            tuple(models.codec.encode_answer(prompt.answer or ""))[: config.rollout.max_harmful_tokens],
        )
        for prompt in prompts.evaluation["harmful"][:_PROFILE_PROMPTS]
        if prompt.answer
    ]
    recovery = with_refusal_prefixes(config, models.codec, recovery)
    samples = SampleSet(tuple(anchor), tuple(recovery), tuple(sample for sample in profile if sample.answer_ids))
    return hold_back(config, prompts, samples) if config.train.validation.every else samples


def hold_back(config: RunConfig, prompts: Prompts, samples: SampleSet) -> SampleSet:
    """Takes the samples of some training prompts of each kind out of training: they tell when to stop."""
    held: set[str] = set()
    recoverable = {sample.sample_id.rsplit("#", 1)[0] for sample in samples.recovery}
    for kind in KINDS:
        ids = [
            prompt.prompt_id for prompt in prompts.train[kind] if kind != "harmful" or prompt.prompt_id in recoverable
        ]
        count = min(config.train.validation.num_prompts, len(ids) // 4)
        held |= set(random.Random(f"{config.train.seed}:held back:{kind}").sample(ids, count))

    def is_held(sample: AnchorSample | RecoverySample) -> bool:
        return sample.sample_id.rsplit("#", 1)[0] in held

    if not any(is_held(sample) for sample in samples.recovery) or not any(is_held(sample) for sample in samples.anchor):
        raise DataError(
            f"Too few training prompts ({len(recoverable)} harmful ones with a recovery sample) to hold a quarter "
            "back for validation.",
            "Give more prompts, or set train.validation.every to 0.",
        )
    return replace(
        samples,
        anchor=tuple(sample for sample in samples.anchor if not is_held(sample)),
        recovery=tuple(sample for sample in samples.recovery if not is_held(sample)),
        held_back_anchor=tuple(sample for sample in samples.anchor if is_held(sample)),
        held_back_recovery=tuple(sample for sample in samples.recovery if is_held(sample)),
    )


def harmful_continuations(
    config: RunConfig, codec: ChatCodec, generator: RolloutPool, prompts: Sequence[Prompt], judge: Judge
) -> dict[str, tuple[int, ...]]:
    """h by prompt id: what a model writes under an affirmative prefill, where the judge calls it compliance."""
    rollout = config.rollout
    prefix = codec.encode_answer(rollout.affirmative_prefix)
    sequences = [[*codec.encode_prompt(prompt.text), *prefix] for prompt in prompts]
    answers = generator.generate(
        sequences,
        max_tokens=max(rollout.max_harmful_tokens - len(prefix), 1),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        seed=_seed(config, "harmful"),
    )
    found = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        outcome = judge.outcome(prompt, rollout.affirmative_prefix, codec.decode(answer))
        if outcome is Outcome.COMPLIED:
            found[prompt.prompt_id] = tuple(prefix + answer)
    return found


def _seed(config: RunConfig, purpose: str, draw: int = 0) -> int:
    """First seed of a batch of samples; batches of other purposes, draws or run seeds share none of their seeds."""
    digest = hashlib.sha256(f"{config.train.seed}:{purpose}:{draw}".encode()).digest()
    return int.from_bytes(digest[:5], "big") * 2**20  # room for a million prompts, below 2**63


def complete_answers(config: RunConfig, codec: ChatCodec, base: RolloutPool, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Held-out harmful prompts whose answers are long enough to be cut at every depth.

    Public sets give the first sentence of a harmful answer only; base writes on from there, greedily.
    """
    needed = config.evaluation.deepest_prefill
    starts = [codec.encode_answer(prompt.answer or config.rollout.affirmative_prefix) for prompt in prompts]
    short = [index for index, start in enumerate(starts) if len(start) < needed]
    sequences = [[*codec.encode_prompt(prompts[index].text), *starts[index]] for index in short]
    added = base.generate(sequences, max_tokens=needed) if short else []
    texts = {index: codec.decode(starts[index] + tokens) for index, tokens in zip(short, added, strict=True)}
    return [replace(prompt, answer=texts.get(index, prompt.answer)) for index, prompt in enumerate(prompts)]


def _answers(
    config: RunConfig, codec: ChatCodec, generator: RolloutPool, prompts: Sequence[Prompt], draw: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt ids, answer ids) of one draw; an answer that ended by itself ends with end-of-response."""
    prompt_ids = [codec.encode_prompt(prompt.text) for prompt in prompts]
    seed = _seed(config, "anchor", draw)
    return _generate(config, codec, generator, prompt_ids, config.rollout.max_anchor_tokens, seed)


def _generate(
    config: RunConfig,
    codec: ChatCodec,
    generator: RolloutPool,
    prompt_ids: Sequence[list[int]],
    max_tokens: int,
    seed: int,
    temperature: float | None = None,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    answers = generator.generate_finished(
        prompt_ids,
        max_tokens=max_tokens,
        temperature=config.rollout.temperature if temperature is None else temperature,
        top_p=config.rollout.top_p,
        seed=seed,
    )
    return [
        (tuple(ids), tuple(tokens) + ((codec.eos_id,) if finished else ()))
        for ids, (tokens, finished) in zip(prompt_ids, answers, strict=True)
    ]


def _refusals(
    config: RunConfig,
    codec: ChatCodec,
    aligned: RolloutPool,
    prompts: Sequence[Prompt],
    anchor: Sequence[AnchorSample],
    judge: Judge,
) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """(teacher's prompt ids, refusal ids) by prompt id.

    First the answers drawn for the anchor; for prompts without a refusal among them the greedy answer; and last, where
    the run file gives the teacher a safety prompt, the greedy answer under it.
    """
    limit = config.rollout.max_refusal_tokens
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def keep(prompt: Prompt, context: tuple[int, ...], answer: tuple[int, ...]) -> None:
        if judge.outcome(prompt, "", codec.decode(answer)) is Outcome.REFUSED:
            found.setdefault(prompt.prompt_id, []).append((context, answer[:limit]))

    for sample in anchor:
        prompt = by_id.get(sample.sample_id.rsplit("#", 1)[0])
        if prompt is not None:
            keep(prompt, sample.prompt_ids, sample.answer_ids)
    # At temperature 0 the anchor answers are the greedy ones already.
    systems: list[str | None] = [None] if config.rollout.temperature > 0 else []
    systems += [config.rollout.safety_prompt] if config.rollout.safety_prompt else []
    for system in systems:
        missing = [prompt for prompt in prompts if prompt.prompt_id not in found]
        contexts = [codec.encode_prompt(prompt.text, system) for prompt in missing]
        answers = _generate(config, codec, aligned, contexts, limit, 0, temperature=0.0)
        for prompt, (context, answer) in zip(missing, answers, strict=True):
            keep(prompt, context, answer)
    return found
