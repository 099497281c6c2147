"""Likelihood of good answers to harmless prompts: a cost of safety that no judge has to see.

Utility and refusal rates move only when an answer tips over. The negative log-likelihood of given answers moves
earlier, token by token. Each prompt is answered by its file, where that names an answer, else by the aligned model,
greedily. A model finds its own greedy answers likelier than another model does, so on those aligned has an advantage
and the student's ratio to it errs on the strict side.

    <folder>/evaluation/benign_nll/<model>.jsonl  sums by answer; finished ones are never computed again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raycomplete.attacks.trial import Decoding, EvaluationCancelled, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.data.checkpoints import fingerprint
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.run import Run
from raycomplete.evaluation.results import HARMLESS, answers_id
from raycomplete.evaluation.statistics import bootstrap
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import PRIVATE, RowStore, content_hash
from raycomplete.runtime.types import Codec, Generator, ModelRole, Prompt

FORMAT = 1  # part of every key: raise it when the meaning of a stored sum changes
NLL_PROMPTS, NLL_TOKENS = 100, 64  # prompts whose answers are measured, and tokens of an answer that are
_BATCH = 32  # answers that are stored together


@dataclass(frozen=True)
class GivenAnswer:
    """An answer whose likelihood is measured."""

    prompt_id: str
    tokens: tuple[int, ...]  # prompt and answer, without end-of-response
    num_prompt: int  # prompt tokens among them
    source: str  # its author: "file" or "aligned"

    @property
    def num_answer(self) -> int:
        return len(self.tokens) - self.num_prompt


def measure_benign_nll(run: Run, roles: Sequence[ModelRole]) -> dict[str, Any]:
    """Measures the likelihood of good answers to the held-out benign prompts under every role; {} without answers."""
    codec, config = run.models.codec.with_thinking(False), run.config.evaluation
    prompts = run.prompts.evaluation["benign"][:NLL_PROMPTS]
    engine = run.engines.generator
    models = {role: (fingerprint(path), engine.with_weights(str(path))) for role, path in run.models.paths.items()}
    spoken: dict[str, list[int]] = {}
    if "aligned" in models:
        weights, model = models["aligned"]
        spoken = aligned_answers(prompts, codec, config, run.folder, (answers_id(weights, codec), model))
    answers = given_answers(prompts, spoken, codec, run.config.models.max_length)
    # An address tells no likelihood of given answers, and a defence at inference changes none.
    asked = [role for role in roles if role in models and (role != "student" or config.defence is None)]
    read: dict[str, tuple[str, RolloutPool]] = {role: models[role] for role in asked}
    if not answers or not read:
        return {}
    title = f"Likelihood of {len(answers)} benign answers under {len(read)} models"
    with run.console.progress(title, len(read) * len(answers)) as advance:
        return benign_nll(read, answers, run.folder, cancelled=run.is_stopping, advance=lambda done: advance(done, ""))


def aligned_answers(
    prompts: Sequence[Prompt], codec: Codec, config: EvaluationConfig, folder: Path, aligned: tuple[str, Generator]
) -> dict[str, list[int]]:
    """Returns the greedy answers of the aligned model (its `answers_id` and itself) to prompts without one, by id."""
    model_id, generator = aligned
    decoding = Decoding(config.max_utility_tokens)
    trials = [
        Trial(HARMLESS, "benign", prompt, tuple(prompt.encoded(codec)), decoding)
        for prompt in prompts
        if not prompt.answer
    ]
    # Answers that an evaluation left in the run folder are taken from it.
    known = RowStore(folder / "evaluation" / "trials" / f"{content_hash(model_id)[:16]}.jsonl", mode=PRIVATE)
    said = {trial.prompt.prompt_id: known.get(trial.key(model_id)).get("tokens") for trial in trials}
    missing = [trial for trial in trials if said[trial.prompt.prompt_id] is None]
    if missing:
        new = generator.generate([trial.sequence for trial in missing], max_tokens=decoding.max_tokens)
        said |= {trial.prompt.prompt_id: tokens for trial, tokens in zip(missing, new, strict=True)}
    return {name: list(tokens or ()) for name, tokens in said.items()}


def given_answers(
    prompts: Sequence[Prompt], spoken: Mapping[str, list[int]], codec: Codec, max_length: int
) -> list[GivenAnswer]:
    """Returns answers to prompts, cut at `NLL_TOKENS` tokens; prompts without one are left out.

    `spoken` holds tokens of the aligned model's answers by prompt id, for prompts without an answer of their own.
    """
    found = []
    for prompt in prompts:
        answer = codec.encode_answer(prompt.answer) if prompt.answer else spoken.get(prompt.prompt_id, [])
        question = prompt.encoded(codec)
        # One token stays free: engines generate one to answer at all.
        answer = answer[: max(min(NLL_TOKENS, max_length - 1 - len(question)), 0)]
        if answer:
            source = "file" if prompt.answer else "aligned"
            found.append(GivenAnswer(prompt.prompt_id, (*question, *answer), len(question), source))
    return found


def benign_nll(
    models: Mapping[str, tuple[str, RolloutPool]],
    answers: Sequence[GivenAnswer],
    folder: Path,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Computes the mean negative log-likelihood of the same answers, at least one, under each model.

    `models` holds fingerprint and model by role. Returns by role {"nats_per_token", "low", "high", "n", "tokens",
    "answers"}, and, where student and aligned are both there, "student_to_aligned" {"ratio", "low", "high",
    "difference", "difference_low", "difference_high", "n"}, unless aligned is so certain that there is no
    ratio to 0. Intervals are 95 % percentile bootstraps over prompts; n counts those.
    """
    tokens_N = np.asarray([answer.num_answer for answer in answers], dtype=np.float64)
    written = dict(Counter(answer.source for answer in answers))
    counts = {"n": len(answers), "tokens": int(tokens_N.sum()), "answers": written}
    sums = {}
    for number, (role, model) in enumerate(models.items()):
        before = number * len(answers)
        sums[role] = _sums(model, answers, folder, cancelled, lambda done, before=before: advance(before + done))  # type: ignore[misc]
    result = {role: _interval(sum_N, tokens_N, "nats_per_token") | counts for role, sum_N in sums.items()}
    if "student" in sums and "aligned" in sums:
        student_N, aligned_N = sums["student"], sums["aligned"]
        ratio = _interval(student_N, aligned_N, "ratio")
        if np.isfinite(list(ratio.values())).all():
            difference = _interval(student_N - aligned_N, tokens_N, "difference", "difference_")
            result["student_to_aligned"] = ratio | difference | {"n": len(answers)}
    return result


def _sums(
    model: tuple[str, RolloutPool],
    answers: Sequence[GivenAnswer],
    folder: Path,
    cancelled: Callable[[], bool],
    advance: Callable[[int], None],
) -> np.ndarray:
    """Computes -log p of each whole answer, nats [N]."""
    model_id, scorer = model
    store = RowStore(folder / "evaluation" / "benign_nll" / f"{content_hash(model_id)[:16]}.jsonl")
    keys = [content_hash([FORMAT, model_id, answer.tokens, answer.num_prompt]) for answer in answers]
    missing = [(key, answer) for key, answer in zip(keys, answers, strict=True) if key not in store]
    for start in range(0, len(missing), _BATCH):
        if cancelled():
            raise EvaluationCancelled
        batch = missing[start : start + _BATCH]
        found = scorer.log_probs([(answer.tokens, answer.num_prompt) for _, answer in batch])
        rows = []
        for (key, answer), log_probs in zip(batch, found, strict=True):
            nats = -float(sum(log_probs))
            if len(log_probs) != answer.num_answer or not np.isfinite(nats):
                raise WorkError(
                    f"The answer to {answer.prompt_id!r} has {answer.num_answer} tokens, and the model gave "
                    f"{len(log_probs)} log-probabilities for it with the sum {-nats}.",
                    "A checkpoint with NaN in its weights does this; finished answers are kept.",
                )
            rows.append({"key": key, "prompt_id": answer.prompt_id, "nats": nats, "tokens": answer.num_answer})
        store.add(rows)
        advance(len(answers) - len(missing) + start + len(batch))
    return np.asarray([store[key]["nats"] for key in keys], dtype=np.float64)


def _interval(above_N: np.ndarray, below_N: np.ndarray, name: str, prefix: str = "") -> dict[str, Any]:
    """Computes `name`, sum(above) / sum(below), with its 95 % interval by a bootstrap over prompts."""
    with np.errstate(divide="ignore", invalid="ignore"):  # the caller looks
        draws = [above_N[drawn_RN].sum(axis=1) / below_N[drawn_RN].sum(axis=1) for drawn_RN in bootstrap(len(above_N))]
        low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
        value = float(above_N.sum() / below_N.sum())
    return {name: value, f"{prefix}low": float(low), f"{prefix}high": float(high)}
