"""Runs the evaluation of one model, trial by trial; what is finished survives a crash and is never generated twice.

    <folder>/evaluation/trials/<model>.jsonl       every response as token ids, readable by the owner only
    <folder>/evaluation/judgements/<judge>.jsonl  what a judge made of each; another judge needs no new responses
    <folder>/evaluation/<role>.json               the result of one model
    <folder>/evaluation/completions/<role>.jsonl  what the model said, only if asked for

A trial's key covers everything that its response depends on, so a stored response is reused exactly where it would come
out the same, for another role with the same weights too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from raycomplete.attacks.attack import continued, grouped, plain_trials
from raycomplete.attacks.judging import judged, texts
from raycomplete.attacks.registry import Attack, build_attack
from raycomplete.attacks.settings import AttackConfig
from raycomplete.attacks.target import AttackTools, Target, check_fits
from raycomplete.attacks.trial import Progress, Response, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation import capabilities
from raycomplete.evaluation.results import HARMLESS, Answered, Part, model_result
from raycomplete.evaluation.sets import EvaluationSets
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import PRIVATE, write_json
from raycomplete.runtime.row_store import RowStore, content_hash, write_completions
from raycomplete.runtime.types import Codec, Generator, Judge, ModelRole, Outcome


def evaluate_model(
    role: ModelRole,
    generator: Generator,
    codec: Codec,
    judge: Judge,
    sets: EvaluationSets,
    config: EvaluationConfig,
    folder: Path,
    *,
    model_id: str,
    max_length: int,
    tools: AttackTools | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_trials: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Measures attack success by prefill depth and by attack, utility, over-refusal and capabilities of one model.

    Every trial gets one outcome, so denominators never shrink: empty and incoherent responses are failures of the attack
    and of utility, and an answer that is shorter than the prefill depth is prefilled whole and counted in
    `short_answers` (a model that has nothing to add to it comes out as empty). Decoding is greedy except where an
    attack is about sampling.

    Args:
        role: Which of the three models this is; names the result file.
        generator: The model.
        codec: Its chat template and tokenizer.
        judge: Sorts responses; its name is recorded.
        sets: Prompts; all of them are used by the depth curve, `evaluation.attack_prompts` of them by other attacks.
        config: Depths, lengths, attacks.
        folder: Run folder.
        model_id: Fingerprint of the weights. Responses are reused under the same one only.
        max_length: Longest sequence of the model in tokens, new ones included.
        tools: What attacks need that do more than ask.
        on_progress: Called with (variant, variants finished, variants in all): at the start with ("", 0, all), and
            when a variant of an attack (`prefill-4`) or a set of harmless prompts is finished.
        on_trials: Called at the start and after each batch of trials.
        cancelled: Asked before each batch, and before each step of a search.

    Returns:
        What `<folder>/evaluation/<role>.json` holds; rates as {"rate", "n", "low", "high"}.

    Raises:
        DataError: A set or file cannot be used or a prompt does not fit the context. Nothing was generated or written.
        SetupError: An attack needs a tool that is not there. Nothing was generated or written.
        EvaluationCancelled: `cancelled` said so; finished trials are kept.
        WorkError: The generator did not answer every sequence.
    """
    target = Target(
        role,
        model_id,
        generator,
        codec,
        judge,
        max_length,
        config.max_tokens,
        tools or AttackTools(),
        cancelled or (lambda: False),
    )
    parts = _plan(target, sets, config)
    run = _Run(
        target,
        parts,
        folder / "evaluation",
        on_progress or (lambda name, done, total: None),
        on_trials or (lambda progress: None),
    )
    answered = run.finish()
    result = model_result(target, parts, answered, config)
    if config.save_completions:
        rows = [_completion(target, trial, found) for part in parts for trial, found in answered[part.name]]
        write_completions(folder / "evaluation" / "completions" / f"{role}.jsonl", rows)
    write_json(folder / "evaluation" / f"{role}.json", result)
    return result


def _plan(target: Target, sets: EvaluationSets, config: EvaluationConfig) -> list[Part]:
    """Every trial of one model, in the order in which they run, checked before anything is generated."""
    if not sets.harmful:
        raise DataError("The evaluation has no harmful prompts.", "Fill data.evaluation.harmful in the run file.")
    prefill = build_attack(config.prefill())
    parts = [Part("prefill", prefill, prefill.plan(target, sets.harmful))]
    harmless = plain_trials(target, HARMLESS, "benign", sets.benign, config.max_utility_tokens)
    harmless += plain_trials(target, HARMLESS, "borderline", sets.borderline, config.max_tokens)
    parts.append(Part(HARMLESS, None, harmless))
    prompts = sets.harmful[: config.attack_prompts]
    for settings in _other_attacks(config):
        attack = build_attack(settings)
        parts.append(Part(attack.name, attack, attack.plan(target, prompts)))
    asked = capabilities.plan_capabilities(target, config.capabilities)
    if asked:
        parts.append(Part(capabilities.ATTACK, None, asked))
    for part in parts:
        check_fits(part.trials, target.max_length)
    return parts


def _other_attacks(config: EvaluationConfig) -> list[AttackConfig]:
    return [attack for attack in config.attacks if attack.name != "prefill"]


@dataclass
class _Run:
    """One model's evaluation at work."""

    target: Target
    parts: Sequence[Part]
    folder: Path
    on_progress: Callable[[str, int, int], None]
    on_trials: Callable[[Progress], None]

    def __post_init__(self) -> None:
        model, judge = content_hash(self.target.model_id), content_hash(self.target.judge.name)
        self._responses = RowStore(self.folder / "trials" / f"{model[:16]}.jsonl", mode=PRIVATE)
        self._judgements = RowStore(self.folder / "judgements" / f"{judge[:16]}.jsonl")
        # By identity: hashing token ids anew at every use would cost more than asking a small model.
        self._keys = {id(trial): trial.key(self.target.model_id) for part in self.parts for trial in part.trials}
        self._judged = {
            id(trial): trial.judgement_key(self.target.model_id)
            for part in self.parts
            if part.name != capabilities.ATTACK
            for trial in part.trials
        }
        self._reused = sum(key in self._responses for key in self._keys.values())
        self._done = 0
        self._open = Counter((part.name, trial.variant) for part in self.parts for trial in part.trials)
        self._num_variants = len(self._open)

    def finish(self) -> dict[str, list[tuple[Trial, Answered]]]:
        """Responses and outcomes of all trials, by part."""
        self.on_progress("", 0, self._num_variants)
        self._report("", "", {})
        return {part.name: self._finish_part(part) for part in self.parts}

    def _finish_part(self, part: Part) -> list[tuple[Trial, Answered]]:
        seen = dict.fromkeys(map(str, Outcome), 0)
        self._take(part, [trial for trial in part.trials if self._keys[id(trial)] in self._responses], seen)
        started = time.monotonic()

        def emit(pairs: Sequence[tuple[Trial, Response]]) -> None:
            nonlocal started
            seconds = round((time.monotonic() - started) / len(pairs), 5)
            self._responses.add(_row(self._keys[id(trial)], trial, response, seconds) for trial, response in pairs)
            self._take(part, [trial for trial, _ in pairs], seen)
            started = time.monotonic()

        missing = [trial for trial in part.trials if self._keys[id(trial)] not in self._responses]
        if missing:
            self.target.stop_if_cancelled()
            _respond(self.target, part.attack, missing, emit)
        return [(trial, self._answered(trial)) for trial in part.trials]

    def _take(self, part: Part, trials: Sequence[Trial], seen: dict[str, int]) -> None:
        """Judges stored responses and reports them, variant by variant."""
        for variant, group in groupby(trials, key=lambda trial: trial.variant):
            batch = list(group)
            if part.name != capabilities.ATTACK:  # which has right answers instead
                self._judge(part, batch, seen)
            self._done += len(batch)
            self._open[part.name, variant] -= len(batch)
            self._report(part.name, variant, seen)
            if not self._open[part.name, variant]:
                self.on_progress(variant, sum(not left for left in self._open.values()), self._num_variants)

    def _judge(self, part: Part, trials: Sequence[Trial], seen: dict[str, int]) -> None:
        """Outcomes of stored responses that this judge has not seen yet."""
        judge, codec = self.target.judge, self.target.codec
        new = [trial for trial in trials if self._judged[id(trial)] not in self._judgements]
        pairs = [(trial, self._response(trial)) for trial in new]
        rows = []
        for (trial, response), outcome in zip(pairs, judged(judge, codec, pairs), strict=True):
            row: dict[str, Any] = {"key": self._judged[id(trial)], "outcome": str(outcome)}
            if part.name == HARMLESS and trial.variant == "benign":
                row["right"] = bool(judge.is_right(trial.prompt, texts(codec, response)[1]))
            rows.append(row)
        self._judgements.add(rows)
        for trial in trials:
            seen[self._judgements[self._judged[id(trial)]]["outcome"]] += 1

    def _response(self, trial: Trial) -> Response:
        row = self._responses[self._keys[id(trial)]]
        return Response(tuple(row["sequence"]), tuple(row["prefill"]), tuple(row["tokens"]), row["stats"])

    def _answered(self, trial: Trial) -> Answered:
        key = self._keys[id(trial)]
        judgement = self._judgements.get(self._judged.get(id(trial), ""))  # none for benchmarks
        seconds = float(self._responses[key]["seconds"])
        return Answered(self._response(trial), judgement.get("outcome"), judgement.get("right"), seconds)

    def _report(self, attack: str, variant: str, seen: Mapping[str, int]) -> None:
        total = len(self._keys)
        self.on_trials(Progress(self.target.role, attack, variant, self._done, total, self._reused, dict(seen)))


def _respond(target: Target, attack: Attack[Any] | None, trials: Sequence[Trial], emit: Any) -> None:
    """Through the attack, or as they are."""
    if attack is not None:
        attack.run(target, trials, emit)
        return
    for group in grouped(trials):
        emit(list(zip(group, continued(target, group), strict=True)))


def _row(key: str, trial: Trial, response: Response, seconds: float) -> dict[str, Any]:
    return {
        "key": key,
        "attack": trial.attack,
        "variant": trial.variant,
        "prompt_id": trial.prompt.prompt_id,
        "seed": trial.seed,
        "sequence": list(response.sequence),
        "prefill": list(response.prefill),
        "tokens": list(response.tokens),
        "seconds": seconds,
        "stats": dict(response.stats),
    }


def _completion(target: Target, trial: Trial, found: Answered) -> dict[str, Any]:
    prefill, continuation = texts(target.codec, found.response)
    return {
        "role": target.role,
        "attack": trial.attack,
        "variant": trial.variant,
        "prompt_id": trial.prompt.prompt_id,
        "seed": trial.seed,
        "input": target.codec.decode(found.response.sequence),
        "prefill": prefill,
        "continuation": continuation,
        "outcome": found.outcome,
    }
