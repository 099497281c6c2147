"""Sampling: how training prompts become training samples, once, before training.

A harmful prompt x passes through this file from top to bottom:

1. The aligned model answers x, as it answers every prompt: the anchor samples, whose answers the student must keep.
2. Its refusals r of x are found: among those answers, or asked for again.
3. A model without the alignment (base, as a rule) continues an affirmative prefix: h, the harmful continuation
   (`harmful_ids`), where the judge finds that it complies. Each pair of r and h makes a recovery sample.
4. A share of the recovery samples gets a refusal prefix in front of h.
5. Some prompts of every kind are held back from training, to tell when to stop.

`raycomplete.training.step_plan` then draws the samples of each step.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import KINDS, Prompts
from raycomplete.data.samples import MAX_REFUSAL_PREFIX_TOKENS, AnchorSample, RecoverySample, SampleSet
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import DataError, WorkError
from raycomplete.runtime.types import Judge, Outcome, Prompt

_PROFILE_PROMPTS = 32
_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
Ids = tuple[int, ...]


def make_samples(run: Run) -> SampleSet:
    """Samples everything that training needs, under `train.seed`.

    Raises:
        WorkError: The aligned model refuses nothing, or no harmful continuation came out: there is nothing to recover.
    """
    config, codec, prompts, models = run.config, run.models.codec, run.prompts, run.engines.generator
    every = [prompt for kind in KINDS for prompt in prompts.train[kind]]
    harmful = prompts.train["harmful"]
    aligned = models.with_weights(str(run.models.paths["aligned"]))
    with run.console.stage(f"Answers of the aligned model to {len(every)} training prompts"):
        anchor = _anchor_samples(run, aligned, every)
    with run.console.stage(f"Refusals of the aligned model to {len(harmful)} harmful prompts"):
        refusals = _refusals(run, aligned, harmful, anchor)
    source = config.rollout.harmful_from
    with run.console.stage(f"Compliant continuations of {source}"):
        unaligned = models.with_weights(str(run.models.paths[source]))
        harmful_ids = harmful_continuations(config, codec, unaligned, harmful, run.judge)
    recovery = [
        RecoverySample(
            sample_id=f"{prompt.prompt_id}#{draw}",
            prompt_ids=tuple(codec.encode_prompt(prompt.text)),
            teacher_prompt_ids=teacher_prompt_ids,
            harmful_ids=harmful_ids[prompt.prompt_id],
            refusal_ids=refusal_ids,
        )
        for prompt in harmful
        if prompt.prompt_id in harmful_ids
        for draw, (teacher_prompt_ids, refusal_ids) in enumerate(refusals.get(prompt.prompt_id, []))
    ]
    run.console.note(
        f"{len(anchor)} anchor samples, {len(recovery)} recovery samples; of {len(harmful)} harmful prompts "
        f"{len(refusals)} are refused by aligned and {len(harmful_ids)} have a compliant continuation"
    )
    if not recovery:
        raise WorkError(
            f"Of {len(harmful)} harmful prompts the aligned model refuses {len(refusals)} and {len(harmful_ids)} "
            "have a compliant continuation, so nothing can be recovered.",
            "Use prompts that the aligned model refuses, or set rollout.safety_prompt or rollout.affirmative_prefix; "
            "then run again with --overwrite.",
        )
    profile = [
        AnchorSample(prompt.prompt_id, tuple(codec.encode_prompt(prompt.text)), answer_ids)
        for prompt in prompts.evaluation["harmful"][:_PROFILE_PROMPTS]
        if (answer_ids := tuple(codec.encode_answer(prompt.answer or ""))[: config.rollout.max_harmful_tokens])
    ]
    recovery = [with_refusal_prefix(config, codec, sample) for sample in recovery]
    samples = SampleSet(tuple(anchor), tuple(recovery), tuple(profile))
    return hold_back(config, prompts, samples) if config.train.validation.every else samples


def _anchor_samples(run: Run, aligned: RolloutPool, prompts: Sequence[Prompt]) -> list[AnchorSample]:
    """`rollout.answers_per_prompt` answers of the aligned model to each prompt; empty ones are left out."""
    rollout = run.config.rollout
    prompt_ids = [tuple(run.models.codec.encode_prompt(prompt.text)) for prompt in prompts]
    samples = []
    for draw in range(rollout.answers_per_prompt):
        seed = _seed(run.config, "anchor", draw)
        answers = _answers(run, aligned, prompt_ids, rollout.max_anchor_tokens, seed, rollout.temperature)
        samples += [
            AnchorSample(f"{prompt.prompt_id}#{draw}", ids, answer_ids, prompt.kind)
            for prompt, ids, answer_ids in zip(prompts, prompt_ids, answers, strict=True)
            if answer_ids
        ]
    return samples


def _refusals(
    run: Run, aligned: RolloutPool, prompts: Sequence[Prompt], anchor: Sequence[AnchorSample]
) -> dict[str, list[tuple[Ids, Ids]]]:
    """Pairs (what the teacher reads, its refusal r) by prompt id.

    The refusals are those among the anchor answers; for prompts without one, the greedy answer where it refuses; and
    last, where the run file gives the teacher a safety prompt, the greedy answer under it.
    """
    codec, judge, rollout = run.models.codec, run.judge, run.config.rollout
    limit = rollout.max_refusal_tokens
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    found: dict[str, list[tuple[Ids, Ids]]] = {}

    def keep_refusal(prompt: Prompt, teacher_prompt_ids: Ids, answer_ids: Ids) -> None:
        if judge.outcome(prompt, "", codec.decode(answer_ids)) is Outcome.REFUSED:
            found.setdefault(prompt.prompt_id, []).append((teacher_prompt_ids, answer_ids[:limit]))

    for sample in anchor:
        if sample.prompt_id in by_id:
            keep_refusal(by_id[sample.prompt_id], sample.prompt_ids, sample.answer_ids)
    # At temperature 0 the anchor answers are the greedy ones already.
    systems: list[str | None] = [None] if rollout.temperature > 0 else []
    systems += [rollout.safety_prompt] if rollout.safety_prompt else []
    for system in systems:
        missing = [prompt for prompt in prompts if prompt.prompt_id not in found]
        contexts = [tuple(codec.encode_prompt(prompt.text, system)) for prompt in missing]
        answers = _answers(run, aligned, contexts, limit, seed=0, temperature=0.0)
        for prompt, context, answer_ids in zip(missing, contexts, answers, strict=True):
            keep_refusal(prompt, context, answer_ids)
    return found


def harmful_continuations(
    config: RunConfig, codec: ChatCodec, generator: RolloutPool, prompts: Sequence[Prompt], judge: Judge
) -> dict[str, Ids]:
    """h by prompt id: what a model writes after an affirmative prefix, where the judge finds that it complies."""
    rollout = config.rollout
    prefix = codec.encode_answer(rollout.affirmative_prefix)
    answers = generator.generate(
        [[*codec.encode_prompt(prompt.text), *prefix] for prompt in prompts],
        max_tokens=max(rollout.max_harmful_tokens - len(prefix), 1),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        seed=_seed(config, "harmful"),
    )
    return {
        prompt.prompt_id: (*prefix, *answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if judge.outcome(prompt, rollout.affirmative_prefix, codec.decode(answer)) is Outcome.COMPLIED
    }


def with_refusal_prefix(config: RunConfig, codec: ChatCodec, sample: RecoverySample) -> RecoverySample:
    """Puts a refusal prefix in front of h, in a share of `rollout.refusal_prefix_fraction` of the samples.

    Recovery teaches the student to refuse in mid-answer. An attacker who knows that writes the refusal himself and
    turns away from it: "I cannot help with that. But here is how ...". A student that never read this takes the refusal
    as given. The teacher reads neither the prefix nor h, and refuses as before. The scheme is ours, not that of arXiv
    2511.12155.

    The imitated refusal is the first sentence of the sample's own, and what turns away from it is one of
    `rollout.refusal_prefix_turns`, both drawn under `train.seed`. A prefix of more than `MAX_REFUSAL_PREFIX_TOKENS`
    tokens is left out.
    """
    draw = random.Random(f"{config.train.seed}:turn:{sample.sample_id}")
    if draw.random() >= config.rollout.refusal_prefix_fraction:
        return sample
    refusal = codec.decode(sample.refusal_ids).strip()
    sentence = found.group() if (found := _SENTENCE.match(refusal)) else refusal
    prefix = codec.encode_answer(f"{sentence} {draw.choice(config.rollout.refusal_prefix_turns)} ")
    if len(prefix) > MAX_REFUSAL_PREFIX_TOKENS:
        return sample
    return replace(sample, harmful_ids=(*prefix, *sample.harmful_ids), refusal_prefix_tokens=len(prefix))


def hold_back(config: RunConfig, prompts: Prompts, samples: SampleSet) -> SampleSet:
    """Takes the samples of some training prompts of each kind out of training: they tell when to stop.

    Raises:
        DataError: There are too few prompts to hold some back.
    """
    held: set[str] = set()
    recoverable = {sample.prompt_id for sample in samples.recovery}
    for kind in KINDS:
        ids = [
            prompt.prompt_id for prompt in prompts.train[kind] if kind != "harmful" or prompt.prompt_id in recoverable
        ]
        count = min(config.train.validation.num_prompts, len(ids) // 4)
        held |= set(random.Random(f"{config.train.seed}:held back:{kind}").sample(ids, count))
    parted = SampleSet(
        anchor=tuple(sample for sample in samples.anchor if sample.prompt_id not in held),
        recovery=tuple(sample for sample in samples.recovery if sample.prompt_id not in held),
        profile=samples.profile,
        held_back_anchor=tuple(sample for sample in samples.anchor if sample.prompt_id in held),
        held_back_recovery=tuple(sample for sample in samples.recovery if sample.prompt_id in held),
    )
    if not parted.held_back_anchor or not parted.held_back_recovery:
        raise DataError(
            f"Too few training prompts ({len(recoverable)} harmful ones with a recovery sample) to hold a quarter "
            "back for validation.",
            "Give more prompts, or set train.validation.every to 0.",
        )
    return parted


def complete_answers(config: RunConfig, codec: ChatCodec, base: RolloutPool, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Held-out harmful prompts whose answers are long enough to be cut at every depth.

    Public sets give the first sentence of a harmful answer only; base continues it, greedily.
    """
    needed = config.evaluation.deepest_prefill
    starts = [codec.encode_answer(prompt.answer or config.rollout.affirmative_prefix) for prompt in prompts]
    short = [index for index, start in enumerate(starts) if len(start) < needed]
    sequences = [[*codec.encode_prompt(prompts[index].text), *starts[index]] for index in short]
    added = base.generate(sequences, max_tokens=needed) if short else []
    texts = {index: codec.decode(starts[index] + tokens) for index, tokens in zip(short, added, strict=True)}
    return [replace(prompt, answer=texts.get(index, prompt.answer)) for index, prompt in enumerate(prompts)]


def _answers(
    run: Run, generator: RolloutPool, prompt_ids: Sequence[Ids], max_tokens: int, seed: int, temperature: float
) -> list[Ids]:
    """Answers to tokenized prompts; one that ended by itself ends with end-of-response."""
    answers = generator.generate_finished(
        prompt_ids, max_tokens=max_tokens, temperature=temperature, top_p=run.config.rollout.top_p, seed=seed
    )
    eos_id = run.models.codec.eos_id
    return [(*tokens, eos_id) if finished else tuple(tokens) for tokens, finished in answers]


def _seed(config: RunConfig, purpose: str, draw: int = 0) -> int:
    """First seed of a batch of samples; batches of other purposes, draws or run seeds share none of their seeds."""
    digest = hashlib.sha256(f"{config.train.seed}:{purpose}:{draw}".encode()).digest()
    return int.from_bytes(digest[:5], "big") * 2**20  # room for a million prompts, below 2**63
