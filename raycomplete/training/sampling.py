"""Sampling: how training prompts become training samples, once, before training.

A harmful prompt x passes through this file from top to bottom:

1. The aligned model answers x, as it answers every prompt: the anchor samples, whose answers the student must keep. Of
   an answer that does not refuse x it keeps the first token at most.
2. Its refusals r of x are found: among those answers, or asked for again.
3. Models without the alignment (base, as a rule), or led astray by the start of an answer, write harmful continuations
   h (`harmful_ids`), which are kept where the judge finds that they comply. Some lose their beginning, so that the
   student also reads h from mid-answer. Pairs of r and h make the recovery samples.
4. A share of the recovery samples gets a refusal prefix in front of h.
5. Some prompts of every kind are held back from training, to steer it.
6. A share of what is left is augmented: the student reads another form of x than the teachers.

Answers are kept in the run folder as they come (`raycomplete.engines.generation_cache`), so that a run that is stopped
asks for none of them again. `raycomplete.training.step_plan` then draws the samples of each step.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from raycomplete.config import RunConfig
from raycomplete.data.augmentation import PromptAugmenter, movable_note, read_augmentation_files
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import KINDS, Prompts, longest_response
from raycomplete.data.openings import opened_answer
from raycomplete.data.samples import MAX_REFUSAL_PREFIX_TOKENS, MID_ANSWER, AnchorSample, RecoverySample, SampleSet
from raycomplete.engines.generation_cache import sampled_from
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import DataError, WorkError
from raycomplete.runtime.types import Generator, Judge, Outcome, Prompt, PromptKind

_PROFILE_PROMPTS = 32
_WORD_TOKENS = 8  # within so many tokens a word begins
_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
Ids = tuple[int, ...]
S = TypeVar("S", AnchorSample, RecoverySample)

MIN_HELD_BACK = 4
"""Fewest harmful and fewest harmless prompts that can steer a run."""


def make_samples(run: Run) -> SampleSet:
    """Samples everything that training needs, under `train.seed`."""
    config, codec, prompts = run.config, run.models.codec, run.prompts
    harmful = prompts.train["harmful"]
    anchor = _anchor_samples(run, [prompt for kind in KINDS for prompt in prompts.train[kind]])
    refusals = _refusals(run, harmful, anchor)
    continuations = _harmful_continuations(run, harmful)
    recovery = []
    for prompt in harmful:
        if prompt.prompt_id in refusals:
            read, r = refusals[prompt.prompt_id]
            for draw, (h, source) in enumerate(continuations.get(prompt.prompt_id, [])):
                ids = tuple(prompt.encoded(codec))
                recovery.append(RecoverySample(f"{prompt.prompt_id}#{draw}", ids, read, h, r, source=source))
    _note_samples(run, anchor, recovery)
    if not recovery:
        raise WorkError(
            f"Of {len(harmful)} harmful prompts the aligned model refuses {len(refusals)} and {len(continuations)} "
            "have a compliant continuation, so nothing can be recovered.",
            "Use prompts that the aligned model refuses, or set rollout.safety_prompt, rollout.harmful_from or "
            "rollout.affirmative_prefixes; then run again with --overwrite.",
        )
    profile = [
        AnchorSample(prompt.prompt_id, tuple(prompt.encoded(codec)), answer_ids)
        for prompt in prompts.evaluation["harmful"][:_PROFILE_PROMPTS]
        if (answer_ids := tuple(codec.encode_answer(prompt.answer or ""))[: config.rollout.max_harmful_tokens])
    ]
    recovery = [with_refusal_prefix(config, codec, sample) for sample in recovery]
    samples = SampleSet(tuple(anchor), tuple(recovery), tuple(profile))
    samples = _steering_samples(run, samples)
    return augmented(run, samples) if config.rollout.prompt_augmentation.fraction > 0 else samples


def _anchor_samples(run: Run, prompts: Sequence[Prompt]) -> list[AnchorSample]:
    """The aligned model's answers to prompts; empty ones are left out."""
    config, codec = run.config, run.models.codec
    prompt_ids = [tuple(prompt.encoded(codec)) for prompt in prompts]
    title, seed = f"Answers of the aligned model to {len(prompts)} training prompts", first_seed(config, "anchor")
    answers = _answers(run, title, prompt_ids, config.rollout.max_anchor_tokens, seed, config.rollout.temperature)
    return [
        AnchorSample(
            f"{prompt.prompt_id}#0",
            ids,
            answer_ids,
            prompt.kind,
            complies=prompt.kind == "harmful" and not _refuses(run, prompt, answer_ids),
        )
        for prompt, ids, answer_ids in zip(prompts, prompt_ids, answers, strict=True)
        if answer_ids
    ]


def _refuses(run: Run, prompt: Prompt, answer_ids: Ids) -> bool:
    return run.judge.outcome(prompt, "", run.models.codec.decode(answer_ids)) is Outcome.REFUSED


def _refusals(run: Run, prompts: Sequence[Prompt], anchor: Sequence[AnchorSample]) -> dict[str, tuple[Ids, Ids]]:
    """Pairs (what the teacher reads, its refusal r) by prompt id.

    The refusal is the anchor answer, where that refuses; else the greedy answer where it refuses; and last, where the
    run file gives the teacher a safety prompt, the greedy answer under it. Words before a refusal are left out.
    """
    codec, rollout = run.models.codec, run.config.rollout
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    found: dict[str, tuple[Ids, Ids]] = {}

    def keep_refusal(prompt: Prompt, teacher_prompt_ids: Ids, answer_ids: Ids) -> None:
        if _refuses(run, prompt, answer_ids):
            if start := tokens_before_refusal(run.judge, codec, answer_ids):
                answer_ids = _as_whole_answer(codec, answer_ids[start:])
            found[prompt.prompt_id] = (teacher_prompt_ids, answer_ids[: rollout.max_refusal_tokens])

    for sample in anchor:
        if sample.prompt_id in by_id:
            keep_refusal(by_id[sample.prompt_id], sample.prompt_ids, sample.answer_ids)
    # At temperature 0 the anchor answers are the greedy ones already.
    systems: list[str | None] = [None] if rollout.temperature > 0 else []
    systems += [rollout.safety_prompt] if rollout.safety_prompt else []
    for system in systems:
        missing = [prompt for prompt in prompts if prompt.prompt_id not in found]
        contexts = [tuple(prompt.encoded(codec, system=system)) for prompt in missing]
        title = f"Greedy answers of the aligned model to {len(missing)} harmful prompts that it has not refused yet"
        answers = _answers(run, title, contexts, rollout.max_refusal_tokens, seed=0, temperature=0.0)
        for prompt, context, answer_ids in zip(missing, contexts, answers, strict=True):
            keep_refusal(prompt, context, answer_ids)
    return found


def _as_whole_answer(codec: ChatCodec, token_ids: Ids) -> Ids:
    """Encodes the end of an answer again: a word that starts an answer is another token than within one."""
    ending = token_ids[-1:] if token_ids[-1] in codec.eos_ids else ()
    return (*codec.encode_answer(_typed(codec, token_ids)), *ending)


def _typed(codec: ChatCodec, token_ids: Ids) -> str:
    return codec.decode(token_ids).rstrip("\ufffd").lstrip()  # without half a letter at its end


def tokens_before_refusal(judge: Judge, codec: ChatCodec, token_ids: Sequence[int]) -> int | None:
    """Counts the tokens before a refusal begins; None where there is none, or the judge cannot tell."""
    find = getattr(judge, "refusal_start", None)
    start = None if find is None else find(codec.decode(token_ids))
    return None if start is None else codec.tokens_before(token_ids, start)


def _harmful_continuations(run: Run, prompts: Sequence[Prompt]) -> dict[str, list[tuple[Ids, str]]]:
    """Pairs (h, where it comes from) by prompt id; writers and openings are drawn for each prompt by itself."""
    config, rollout, codec = run.config, run.config.rollout, run.models.codec
    asked: dict[str, list[tuple[Prompt, str]]] = {writer: [] for writer in rollout.harmful_from}
    for prompt in prompts:
        openings = rollout.harmful_openings
        random.Random(f"{config.train.seed}:openings:{prompt.prompt_id}").shuffle(openings)
        for draw in range(rollout.harmful_per_prompt):
            writer, opening = openings[draw % len(openings)]
            asked[writer].append((prompt, opening))
    found: dict[str, list[tuple[Ids, str]]] = {}
    for number, (writer, questions) in enumerate(asked.items()):
        title = f"{len(questions)} compliant continuations of {writer}"
        with sampled_from(run, run.models.writer(writer), title, len(questions)) as generator:
            written = compliant_continuations(config, codec, generator, questions, run.judge, number)
        for (prompt, opening), harmful_ids in zip(questions, written, strict=True):
            if harmful_ids:
                known = found.setdefault(prompt.prompt_id, [])
                rng = random.Random(f"{config.train.seed}:mid-answer:{prompt.prompt_id}#{len(known)}")
                how = f"after {opening!r}" if opening else "without an opening"
                if len(harmful_ids) > 1 and rng.random() < rollout.mid_answer_fraction:
                    harmful_ids, how = from_mid_answer(codec, harmful_ids, rng), MID_ANSWER
                known.append((harmful_ids, f"{writer} {how}"))
    return found


def compliant_continuations(
    config: RunConfig,
    codec: ChatCodec,
    generator: Generator,
    questions: Sequence[tuple[Prompt, str]],
    judge: Judge,
    draw: int = 0,
) -> list[Ids]:
    """h for each pair (prompt, opening): what a model writes after the opening; empty where it does not comply.

    Another `draw` samples under other seeds.
    """
    rollout = config.rollout
    openings = {opening: codec.encode_answer(opening) for _, opening in questions}
    shortest = min(map(len, openings.values()), default=0)
    answers = generator.generate(
        [[*prompt.encoded(codec), *openings[opening]] for prompt, opening in questions],
        max_tokens=max(rollout.max_harmful_tokens - shortest, 1),
        temperature=rollout.temperature,
        seed=first_seed(config, "harmful", draw),
    )
    found: list[Ids] = []
    for (prompt, opening), answer in zip(questions, answers, strict=True):
        written = answer[: max(rollout.max_harmful_tokens - len(openings[opening]), 1)]
        complies = judge.outcome(prompt, opening, codec.decode(written)) is Outcome.COMPLIED
        written = written[: tokens_before_refusal(judge, codec, written)]  # some refuse in the end
        found.append((*openings[opening], *written) if complies and written else ())
    return found


def from_mid_answer(codec: ChatCodec, harmful_ids: Ids, rng: random.Random) -> Ids:
    """Leaves out a drawn beginning of h, at most half, up to where a word begins; that word is typed again."""
    drawn = rng.randint(1, max(len(harmful_ids) // 2, 1))
    near = range(drawn, min(drawn + _WORD_TOKENS, len(harmful_ids)))
    # In a script without spaces no word seems to begin.
    start = next((start for start in near if _begins_word(codec, harmful_ids, start)), drawn)
    return _as_whole_answer(codec, harmful_ids[start:]) or harmful_ids[start:]


def _begins_word(codec: ChatCodec, token_ids: Ids, start: int) -> bool:
    before = codec.decode(token_ids[:start])
    added = codec.decode(token_ids[: start + 1])[len(before) :]
    return added.strip()[:1].isalnum() and not (before[-1:].isalnum() and added[:1].isalnum())


def _note_samples(run: Run, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]) -> None:
    """Notes how many samples there are, and of which sources."""
    harmful = len(run.prompts.train["harmful"])
    recovered = len({sample.prompt_id for sample in recovery})
    run.console.note(
        f"{len(anchor)} anchor samples; {len(recovery)} recovery samples of {recovered} of {harmful} harmful prompts"
    )
    if complied := {sample.prompt_id for sample in anchor if sample.complies}:
        run.console.note(
            f"aligned answers {len(complied)} harmful prompts: at most the first token of those answers is trained"
        )
    run.console.note(f"Harmful continuations: {_counts(sample.source for sample in recovery)}")


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items())) or "none"


def with_refusal_prefix(config: RunConfig, codec: ChatCodec, sample: RecoverySample) -> RecoverySample:
    """Puts a refusal prefix in front of h, in a share of `rollout.refusal_prefix_fraction` of the samples.

    Recovery teaches the student to refuse in mid-answer. An adaptive attack may insert the refusal itself and turn
    away from it: "I cannot help with that. But here is how ...". A student that never read this takes the refusal as
    given. The teacher reads neither the prefix nor h. The scheme is ours, not that of arXiv 2511.12155.

    The imitated refusal is the first sentence of the sample's own, and what turns away from it is one of
    `rollout.refusal_prefix_turns`, both drawn under `train.seed`. A prefix of too many tokens is left out.
    """
    draw = random.Random(f"{config.train.seed}:turn:{sample.sample_id}")
    if draw.random() >= config.rollout.refusal_prefix_fraction:
        return sample
    refusal = codec.decode(sample.refusal_ids).strip()
    sentence = found.group() if (found := _SENTENCE.match(refusal)) else refusal
    opening = f"{sentence} {draw.choice(config.rollout.refusal_prefix_turns)}"
    prefix, h = opened_answer(codec, opening, _typed(codec, sample.harmful_ids))
    if len(prefix) > MAX_REFUSAL_PREFIX_TOKENS:
        return sample
    h = h[: len(sample.harmful_ids)]  # a word that is typed again may have more tokens, and the context is full
    return replace(sample, harmful_ids=(*prefix, *h), refusal_prefix_tokens=len(prefix))


def augmented(run: Run, samples: SampleSet) -> SampleSet:
    """Changes the prompt that the student reads, in a share of the anchor and recovery samples, and notes the kinds.

    Samples of every kind of prompt are drawn alike: harmless ones show that a suffix or a frame alone is no reason to
    refuse.
    """
    config, settings = run.config, run.config.rollout.prompt_augmentation
    prompts = [prompt for kind in KINDS for prompt in run.prompts.train[kind]]
    files = read_augmentation_files(settings, prompts)
    room = config.models.max_length - longest_response(config)
    augmenter = PromptAugmenter(settings, files, run.models.codec, seed=config.train.seed, max_tokens=room)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    parts: dict[str, list[Any]] = {"anchor": [], "recovery": []}
    for part, found in parts.items():
        for sample in getattr(samples, part):
            kind, prompt_ids = augmenter.augment(by_id[sample.prompt_id], part, sample.sample_id)
            found.append(sample.augmented(kind, prompt_ids) if kind else sample)
        run.console.note(f"Prompts of {part} samples: {_counts(sample.augmentation or 'plain' for sample in found)}")
    if config.method.moves_suffixes:
        run.console.note(movable_note(parts["recovery"]))
    return replace(samples, anchor=tuple(parts["anchor"]), recovery=tuple(parts["recovery"]))


def hold_back(config: RunConfig, prompts: Prompts, samples: SampleSet) -> SampleSet:
    """Takes some training prompts of every kind out of training: they steer it."""
    recoverable = {sample.prompt_id for sample in samples.recovery}
    answered = {sample.prompt_id for sample in samples.anchor}
    count, seed = config.train.validation.num_prompts, config.train.seed
    held: set[str] = set()
    counts = Counter[str]()
    usable: dict[PromptKind, set[str]] = {"harmful": recoverable, "borderline": answered, "benign": answered}
    for kind, known in usable.items():
        ids = [prompt.prompt_id for prompt in prompts.train[kind] if prompt.prompt_id in known]
        wanted = {"harmful": count, "borderline": count // 2, "benign": count - counts["harmless"]}[kind]
        named = [name for name in ids if name in prompts.held_back]
        drawn = random.Random(f"{seed}:held back:{kind}").sample(named or ids, min(wanted, len(named) or len(ids) // 4))
        counts["harmful" if kind == "harmful" else "harmless"] += len(drawn)
        held |= set(drawn)
    if min(counts["harmful"], counts["harmless"]) < MIN_HELD_BACK:
        raise DataError(
            f"Too few training prompts ({len(recoverable)} harmful ones with a recovery sample, "
            f"{len(answered - recoverable)} others) to hold back a quarter of them, at least {MIN_HELD_BACK} of each.",
            "Give more prompts, or set train.validation.every to 0.",
        )
    harmless = [sample for sample in samples.anchor if sample.prompt_id in held - recoverable]
    first: dict[str, RecoverySample] = {}  # of each prompt
    for sample in samples.recovery:
        if sample.prompt_id in held:
            first.setdefault(sample.prompt_id, sample)
    return replace(
        samples.without(held | prompts.held_back),
        held_back_anchor=tuple(harmless),
        held_back_recovery=tuple(first.values()),
    )


def _steering_samples(run: Run, samples: SampleSet) -> SampleSet:
    """Holds prompts back, and lets the aligned model answer the harmless ones as the student will be asked: greedily.

    Under `train.validation.every: auto` too few prompts give a note, not an error.
    """
    validation = run.config.train.validation
    if not validation.interval(run.config.train.steps):
        return samples.without(run.prompts.held_back)
    try:
        samples = hold_back(run.config, run.prompts, samples)
    except DataError as error:
        if validation.every != "auto":
            raise
        run.console.note(f"{error.problem} Loss weights stay as they are, and the last step is kept.")
        return samples.without(run.prompts.held_back)
    harmless = samples.held_back_anchor
    title = f"Greedy answers of the aligned model to {len(harmless)} prompts that are held back"
    with sampled_from(run, run.models.paths["aligned"], title, len(harmless)) as aligned:
        answers = aligned.generate([sample.prompt_ids for sample in harmless], max_tokens=validation.max_tokens)
    greedy = [replace(sample, answer_ids=tuple(ids)) for sample, ids in zip(harmless, answers, strict=True)]
    return replace(samples, held_back_greedy=tuple(greedy))


def _answers(
    run: Run, title: str, prompt_ids: Sequence[Ids], max_tokens: int, seed: int, temperature: float
) -> list[Ids]:
    """The aligned model's answers to tokenized prompts; one that ended by itself ends with end-of-response."""
    if not prompt_ids:
        return []
    with sampled_from(run, run.models.paths["aligned"], title, len(prompt_ids)) as aligned:
        answers = aligned.generate_finished(prompt_ids, max_tokens=max_tokens, temperature=temperature, seed=seed)
    eos_id = run.models.codec.eos_id
    return [(*tokens, eos_id) if finished else tuple(tokens) for tokens, finished in answers]


def first_seed(config: RunConfig, purpose: str, draw: int = 0) -> int:
    """Seeds the first sample of a batch; batches of other purposes, draws or run seeds share none of their seeds."""
    digest = hashlib.sha256(f"{config.train.seed}:{purpose}:{draw}".encode()).digest()
    return int.from_bytes(digest[:5], "big") * 2**20  # room for a million prompts, below 2**63
