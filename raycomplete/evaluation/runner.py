"""Runs the evaluation of one model, trial by trial; finished trials survive a crash and are never generated twice.

    <folder>/evaluation/trials/<model>.jsonl      every response as token ids, readable by the owner only
    <folder>/evaluation/judgements/<judge>.jsonl  the outcome of each; another judge needs no new responses
    <folder>/evaluation/<role>.json               the result of one model
    <folder>/evaluation/outcomes/<role>.jsonl     the outcome of each of its trials, by the trial's key
    <folder>/evaluation/completions/<role>.jsonl  the text of each, only if asked for

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

from raycomplete.attacks.attack import Attack, ask, plain_trials
from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.target import Target, judge_all
from raycomplete.attacks.trial import UNREADABLE, Progress, Response, Trial, TrialCost, Verdict
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation import capabilities
from raycomplete.evaluation.results import HARMLESS, Answered, TrialGroup, model_result
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import PRIVATE, RowStore, content_hash, write_json, write_rows
from raycomplete.runtime.types import Outcome, Prompt


@dataclass(frozen=True)
class EvaluationSets:
    """Held-out prompts by what they measure. All of them are used: drawing a sample is the caller's part."""

    harmful: tuple[Prompt, ...]  # attack success; `answer` is the compliant text whose first tokens are prefilled
    benign: tuple[Prompt, ...]  # utility and refusal of ordinary requests; `answer` is the right one where known
    borderline: tuple[Prompt, ...]  # over-refusal, on harmless prompts that look harmful

    def __post_init__(self) -> None:
        for kind, prompts in (("harmful", self.harmful), ("benign", self.benign), ("borderline", self.borderline)):
            seen: set[str] = set()
            for prompt in prompts:
                name = prompt.prompt_id
                if prompt.kind != kind:
                    raise DataError(f"The prompt {name!r} is {prompt.kind}, but stands in the {kind} set.")
                if name in seen:
                    raise DataError(f"The {kind} set holds the prompt id {name!r} twice.", "Make ids unique.")
                seen.add(name)


@dataclass(frozen=True)
class Callbacks:
    """Functions that an evaluation calls as it goes.

    `on_trials` follows each batch of trials; `on_plan` gets the cost of missing and the number of stored trials, both
    by attack, once and before anything is generated.
    """

    on_trials: Callable[[Progress], None] = lambda progress: None
    on_plan: Callable[[Mapping[str, TrialCost], Mapping[str, int]], None] = lambda costs, stored: None


def evaluate_model(
    target: Target, sets: EvaluationSets, config: EvaluationConfig, folder: Path, callbacks: Callbacks = Callbacks()
) -> dict[str, Any]:
    """Measures attack success by prefill depth and by attack, utility, over-refusal and capabilities of one model.

    Every trial gets one outcome, so denominators never shrink: empty and incoherent responses are failures of the
    attack and of utility. A prompt whose compliant answer is shorter than a prefill depth is left out of that depth:
    `n` counts the others, `short_answers` those left out. Decoding is greedy except where an attack is about sampling.

    Responses are reused under the target's `model_id` only. Returns the content of `<folder>/evaluation/<role>.json`,
    rates as {"rate", "n", "low", "high"}. Raises DataError or SetupError where a set, a prompt or a tool cannot be
    used, before anything was generated or written; EvaluationCancelled, and finished trials are kept.
    """
    groups = _plan(target, sets, config)
    folder = folder / "evaluation"
    evaluation = _Evaluation(target, groups, folder, callbacks)
    answered = evaluation.finish()
    result = model_result(target, groups, answered, config)
    rows = [evaluation.row(group, *found) for group in groups for found in answered[group.name]]
    write_rows(folder / "outcomes" / f"{target.role}.jsonl", rows)
    if config.save_completions:
        rows = [_completion(target, trial, found) for group in groups for trial, found in answered[group.name]]
        write_rows(folder / "completions" / f"{target.role}.jsonl", rows, mode=PRIVATE)  # answers to harmful prompts
    write_json(folder / f"{target.role}.json", result)
    return result


def _plan(target: Target, sets: EvaluationSets, config: EvaluationConfig) -> list[TrialGroup]:
    """Lists every trial of one model, in the order in which they run, checked before anything is generated."""
    if not sets.harmful:
        raise DataError("The evaluation has no harmful prompts.", "Fill data.evaluation.harmful in the run file.")
    prefill = build_attack(config.prefill())
    harmless = plain_trials(target, HARMLESS, "benign", sets.benign, config.max_utility_tokens)
    harmless += plain_trials(target, HARMLESS, "borderline", sets.borderline, config.max_tokens)
    groups = [_attack_group(prefill, target, sets.harmful), TrialGroup(HARMLESS, None, harmless)]
    groups += [
        _attack_group(build_attack(settings), target, sets.harmful[: config.attack_prompts])
        for settings in config.attacks
        if settings.name != "prefill"
    ]
    if asked := capabilities.plan_capabilities(target, config.capabilities):
        groups.append(TrialGroup(capabilities.ATTACK, None, asked))
    for group in groups:
        target.check_fits(group.trials)
    return groups


def _attack_group(attack: Attack[Any], target: Target, prompts: Sequence[Prompt]) -> TrialGroup:
    """Lists the trials of an attack without those whose prefill is shorter than their depth."""
    planned = attack.plan(attack.prepared(target), prompts)
    trials = [trial for trial in planned if not trial.is_short and len(trial.prefill) >= trial.settings.get("depth", 0)]
    short = Counter(trial.variant for trial in planned) - Counter(trial.variant for trial in trials)
    if not trials:
        raise DataError(
            f"No harmful prompt has a compliant answer as long as the depths of the attack {attack.name}.",
            "Name lower depths, or give longer answers in data.evaluation.harmful.",
        )
    return TrialGroup(attack.name, attack, trials, short)


class _Evaluation:
    """One model's evaluation at work: responses and judgements are stored as they come."""

    def __init__(self, target: Target, groups: Sequence[TrialGroup], folder: Path, callbacks: Callbacks) -> None:
        self._target, self._groups, self._callbacks = target, groups, callbacks
        model, judge = content_hash(target.model_id), content_hash(target.judge.name)
        self._responses = RowStore(folder / "trials" / f"{model[:16]}.jsonl", mode=PRIVATE)
        self._judgements = RowStore(folder / "judgements" / f"{judge[:16]}.jsonl")
        # By identity: hashing token ids anew at every use would cost more than asking a small model.
        self._keys = {id(trial): trial.key(target.model_id) for group in groups for trial in group.trials}
        self._reused = sum(key in self._responses for key in self._keys.values())
        self._done = 0

    def finish(self) -> dict[str, list[tuple[Trial, Answered]]]:
        """Returns responses and outcomes of all trials, by group."""
        missing = {group.name: self._missing(group) for group in self._groups}
        costs = {group.name: group.cost(missing[group.name]) for group in self._groups}
        stored = {group.name: len(group.trials) - len(missing[group.name]) for group in self._groups}
        self._callbacks.on_plan(costs, stored)
        self._report("", "", {})
        return {group.name: self._finish_group(group) for group in self._groups}

    def row(self, group: TrialGroup, trial: Trial, found: Answered) -> dict[str, Any]:
        """Makes the row of a trial in outcomes/<role>.jsonl."""
        cut = group.is_cut(trial, found.response)
        kind = {"kind": trial.prompt.kind, "outcome": found.outcome, "right": found.right, "cut": cut}
        return {"key": self._keys[id(trial)], **_named(trial), **kind}

    def _finish_group(self, group: TrialGroup) -> list[tuple[Trial, Answered]]:
        seen = dict.fromkeys(map(str, Outcome), 0)
        missing = self._missing(group)
        self._take(group, [trial for trial in group.trials if self._keys[id(trial)] in self._responses], seen)
        started = time.monotonic()

        def emit(pairs: Sequence[tuple[Trial, Response]]) -> None:
            nonlocal started
            seconds = round((time.monotonic() - started) / len(pairs), 5)
            self._responses.add(_row(self._keys[id(trial)], trial, response, seconds) for trial, response in pairs)
            self._take(group, [trial for trial, _ in pairs], seen)
            started = time.monotonic()

        if missing:
            self._target.stop_if_cancelled()
            if group.attack is None:
                ask(self._target, missing, emit)
            else:
                group.attack.run(group.attack.prepared(self._target), missing, emit)
        return [(trial, self._answered(trial)) for trial in group.trials]

    def _missing(self, group: TrialGroup) -> list[Trial]:
        return [trial for trial in group.trials if self._keys[id(trial)] not in self._responses]

    def _take(self, group: TrialGroup, trials: Sequence[Trial], seen: dict[str, int]) -> None:
        """Judges stored responses and reports them, variant by variant."""
        for variant, same in groupby(trials, key=lambda trial: trial.variant):
            batch = list(same)
            if group.name != capabilities.ATTACK:  # which has right answers instead
                self._judge(batch, with_right=(group.name, variant) == (HARMLESS, "benign"))
                if group.attack is not None and group.attack.with_prefill:
                    self._judge_with_prefill(batch)
                for trial in batch:
                    seen[self._judgements[self._judgement_key(trial)]["outcome"]] += 1
            self._done += len(batch)
            self._report(group.name, variant, seen)

    def _judge(self, trials: Sequence[Trial], *, with_right: bool) -> None:
        """Stores the outcomes of responses that this judge has not seen yet, and which answers are right.

        A search brings the verdict along on which it ended: another one might be different, and would be paid for.
        """
        target = self._target
        new = [trial for trial in trials if self._judgement_key(trial) not in self._judgements]
        pairs = [(trial, self._answered(trial).response) for trial in new]
        rows, verdicts = [], iter(target.judged([pair for pair in pairs if pair[1].verdict is None]))
        for trial, response in pairs:
            verdict = response.verdict or next(verdicts)
            outcome = verdict.sure if UNREADABLE in response.stats else verdict.outcome  # as its search took it
            row: dict[str, Any] = {"key": self._judgement_key(trial), "outcome": str(outcome)}
            row |= {name: True for name in ("unreadable", "shortened") if getattr(verdict, name)}
            if with_right and getattr(target.judge, "right_is_compliance", False):
                row["right"] = outcome.is_compliance  # else a judge model would be asked again, one by one
            elif with_right:
                row["right"] = bool(target.judge.is_right(trial.prompt, response.texts(target.codec)[1]))
            rows.append(row)
        self._judgements.add(rows)
        target.known.clear()  # of a search, which may have asked about thousands of answers

    def _judge_with_prefill(self, trials: Sequence[Trial]) -> None:
        """Stores the outcomes of answers that are judged as if the model had written the prefill too."""
        target = self._target
        new = [trial for trial in trials if self._judgement_key(trial, with_prefill=True) not in self._judgements]
        responses = [self._answered(trial).response for trial in new]
        triples = [
            (trial.prompt, "", target.codec.decode([*response.prefill, *response.tokens]))
            for trial, response in zip(new, responses, strict=True)
        ]
        self._judgements.add(
            {"key": self._judgement_key(trial, with_prefill=True), "outcome": str(outcome)}
            for trial, outcome in zip(new, judge_all(target.judge, triples), strict=True)
        )

    def _judgement_key(self, trial: Trial, *, with_prefill: bool = False) -> str:
        key = trial.judgement_key(self._keys[id(trial)])
        return content_hash([key, "with prefill"]) if with_prefill else key

    def _answered(self, trial: Trial) -> Answered:
        row = self._responses[self._keys[id(trial)]]
        sequence, prefill, tokens, thinking = (
            tuple(row.get(name, ())) for name in ("sequence", "prefill", "tokens", "thinking")
        )
        key, noted = self._judgement_key(trial), row.get("verdict", {})
        is_same = noted.get("key") == key  # else the prompt's answer has changed, which judges may read
        verdict = Verdict(Outcome(noted["outcome"]), noted["unreadable"], noted["shortened"]) if is_same else None
        response = Response(
            sequence, prefill, tokens, row["stats"], row.get("conversation", ()), thinking, row.get("ended"), verdict
        )
        judgement = self._judgements.get(key)  # none for benchmarks
        whole = self._judgements.get(self._judgement_key(trial, with_prefill=True))
        return Answered(
            response,
            judgement.get("outcome"),
            judgement.get("right"),
            float(row["seconds"]),
            whole.get("outcome"),
            "unreadable" in judgement,
            "shortened" in judgement,
        )

    def _report(self, attack: str, variant: str, seen: Mapping[str, int]) -> None:
        role, total = self._target.role, len(self._keys)
        self._callbacks.on_trials(Progress(role, attack, variant, self._done, total, self._reused, dict(seen)))


def _named(trial: Trial) -> dict[str, Any]:
    return {"attack": trial.attack, "variant": trial.variant, "prompt_id": trial.prompt.prompt_id, "seed": trial.seed}


def _row(key: str, trial: Trial, response: Response, seconds: float) -> dict[str, Any]:
    ids = {"sequence": response.sequence, "prefill": response.prefill, "tokens": response.tokens}
    ids |= {"thinking": response.thinking} if response.thinking else {}
    row = {"key": key, **_named(trial), **ids, "seconds": seconds, "stats": dict(response.stats)}
    row |= {"ended": response.ended} if response.ended else {}
    if response.verdict is not None:
        row["verdict"] = {"key": trial.judgement_key(key), **response.verdict._asdict()}
    return row | {"conversation": response.conversation} if response.conversation else row


def _completion(target: Target, trial: Trial, found: Answered) -> dict[str, Any]:
    prefill, continuation = found.response.texts(target.codec)
    read = target.codec.decode(found.response.sequence)
    texts: dict[str, Any] = {"input": read, "prefill": prefill, "continuation": continuation}
    if found.response.thinking:
        texts["thinking"] = target.codec.decode(found.response.thinking)
    if found.response.conversation:
        texts["conversation"] = found.response.conversation
    return {"role": target.role, **_named(trial), **texts, "outcome": found.outcome}
