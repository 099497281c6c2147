"""Measures how much each response position contributes to the gradient of a safety loss.

docs/method.md derives the norms and why they fade with position. The norm in the output head needs no backward pass. It
leaves out what flows through the body and, where the head is tied, through the embedding, so it is read as a shape by
position, not as a size. That the signal fades is the finding of arXiv 2511.12155 (known to us by its abstract and
secondary reports); formulas and estimator are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from raycomplete.diagnosis.measurement import Batch, Measurement
from raycomplete.diagnosis.samples import DiagnosisSample
from raycomplete.diagnosis.statistics import counts, intervals, padded
from raycomplete.engines.run import Run
from raycomplete.losses.heads import Head, check_hidden
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.types import Outcome, Prompt

NUM_PROMPTS = 32  # harmful prompts whose refusals carry the gradient
NUM_TOKENS = 32  # positions of the refusal
BETA = 0.1  # temperature of the preference loss
_CHUNK_TOKENS = 256  # rows whose logits exist at a time
_CHOSEN = ("sft_logits", "sft_hidden", "sft_head", "dpo_chosen_head")
_REJECTED = ("rejected_head", "dpo_rejected_head")


@dataclass(frozen=True)
class PreferencePair:
    """One harmful prompt with the answer that a safety loss wants and the one that it rejects."""

    chosen: DiagnosisSample
    rejected: DiagnosisSample


@dataclass(frozen=True, eq=False)
class GradientRows:
    """Norms of each position's contribution to the SFT gradient, and log p(y_t) in nats.

    |dL_t / d logits| = |p - e| is 0 to sqrt(2); |dL_t / d W| is Frobenius, the estimator of the norm in all parameters.
    """

    log_prob_N: Tensor
    logits_N: Tensor
    hidden_N: Tensor
    head_N: Tensor

    @property
    def log_prob(self) -> float:
        """Log-probability of all rows together, in nats."""
        return float(self.log_prob_N.double().sum())


def measure_gradient(
    run: Run, measurement: Measurement, batch: Batch, harmful: Sequence[Prompt]
) -> dict[str, Any] | None:
    """Makes gradient.json from the first harmful batch, or reads it; None where it is off or aligned hardly refuses."""
    file = run.folder / "gradient.json"
    if run.config.diagnose.gradient == "off" or (known := read_json(file)) is not None:
        return None if run.config.diagnose.gradient == "off" else known
    with run.console.stage("Gradient of safety losses by position"):
        by_id = {prompt.prompt_id: prompt for prompt in harmful}
        samples = batch.samples(by_id, run.models.codec)
        pairs = _preference_pairs(run, by_id, samples[:NUM_PROMPTS])
        if len(pairs) < 2:
            run.console.note(f"No gradient: of {len(samples)} harmful prompts aligned refuses {len(pairs)}")
            return None
        signal = gradient_signal(measurement, pairs)
    write_json(file, signal)
    return signal


def _preference_pairs(
    run: Run, prompts: Mapping[str, Prompt], samples: Sequence[DiagnosisSample]
) -> list[PreferencePair]:
    """Greedy refusals of the aligned model beside the compliant continuations of the same prompts."""
    aligned = run.engines.generator.with_weights(str(run.models.paths["aligned"]))
    decode = run.models.codec.decode
    answers = aligned.generate([sample.prompt_ids for sample in samples], max_tokens=NUM_TOKENS)
    return [
        PreferencePair(replace(sample, answer_ids=tuple(answer)), sample)
        for sample, answer in zip(samples, answers, strict=True)
        if answer and run.judge.outcome(prompts[sample.prompt_id], "", decode(answer)) is Outcome.REFUSED
    ]


def gradient_signal(measurement: Measurement, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Norms by position with 95 % intervals over prompts, for each role; base is the reference of the preference loss.

    At the weights of base this is what safety training saw in its first step. `rejected_head` is the norm of
    d log p(z_t) / d W. The preference loss multiplies it, and that of the chosen answer, with `preference_factor`,
    which falls towards 0 once a model prefers the refusal.
    """
    chosen = _rows_by_role(measurement, [pair.chosen for pair in pairs])
    rejected = _rows_by_role(measurement, [pair.rejected for pair in pairs])
    found: dict[str, Any] = {"pairs": len(pairs), "beta": BETA, "roles": {}}
    for role in ("base", *measurement.policies):
        safe, against, factors = [], [], []
        for index in range(len(pairs)):
            good, bad = chosen[role][index], rejected[role][index]
            good_ref, bad_ref = chosen["base"][index], rejected["base"][index]
            factor = preference_factor(good.log_prob, good_ref.log_prob, bad.log_prob, bad_ref.log_prob, BETA)
            safe.append(torch.stack([good.logits_N, good.hidden_N, good.head_N, factor * good.head_N], dim=1))
            against.append(torch.stack([bad.head_N, factor * bad.head_N], dim=1))
            factors.append(factor)
        found["roles"][role] = {
            **_profile(safe, _CHOSEN),
            **_profile(against, _REJECTED),
            "preference_factor": sum(factors) / len(factors),
        }
    return found


def _rows_by_role(measurement: Measurement, samples: Sequence[DiagnosisSample]) -> dict[str, list[GradientRows]]:
    found: dict[str, list[GradientRows]] = {role: [] for role in measurement.sources}
    for batch, hidden in measurement.hidden_states(samples):
        target_N = torch.cat([torch.tensor(sample.answer_ids) for sample in batch])
        lengths = [len(sample.answer_ids) for sample in batch]
        for role, hidden_NH in hidden.items():
            target = target_N.to(hidden_NH.device)
            rows = gradient_rows(hidden_NH, measurement.heads[role], target, _CHUNK_TOKENS)
            columns = [getattr(rows, column.name).cpu().split(lengths) for column in fields(rows)]
            found[role] += [GradientRows(*parts) for parts in zip(*columns, strict=True)]
    return found


def _profile(prompts: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    values_PTM = padded([values_TM.double().numpy() for values_TM in prompts])
    n = counts(values_PTM)
    return {name: curve | {"n": n} for name, curve in zip(names, intervals(values_PTM), strict=True)}


@torch.no_grad()
def gradient_rows(hidden_NH: Tensor, head: Head, target_N: Tensor, chunk_tokens: int) -> GradientRows:
    """Exact norms of the SFT gradient of each token row, with the logits of `chunk_tokens` rows at a time."""
    check_hidden("policy", hidden_NH, head, target_N.shape[0])
    parts = []
    for chunk_CH, target_C in zip(hidden_NH.split(chunk_tokens), target_N.split(chunk_tokens), strict=True):
        logits_CV, target_C1 = head.logits(chunk_CH), target_C[:, None]
        log_p_CV = logits_CV.log_softmax(dim=-1)
        grad_CV = log_p_CV.exp()
        grad_CV.scatter_add_(1, target_C1, -torch.ones_like(target_C1, dtype=grad_CV.dtype))
        logits_C = grad_CV.norm(dim=-1)
        raw_CV = head.raw_gradient_(logits_CV, grad_CV)  # overwrites grad_CV
        hidden_C = (raw_CV.to(head.weight_VH.dtype) @ head.weight_VH).to(head.logits_dtype).norm(dim=-1)
        head_C = raw_CV.norm(dim=-1) * chunk_CH.to(head.logits_dtype).norm(dim=-1)
        parts.append(torch.stack([log_p_CV.gather(1, target_C1)[:, 0], logits_C, hidden_C, head_C]))
    return GradientRows(*torch.cat(parts, dim=1))


def preference_factor(
    log_prob_chosen: float, log_ref_chosen: float, log_prob_rejected: float, log_ref_rejected: float, beta: float
) -> float:
    """beta sigmoid(-m), with which DPO multiplies every position's SFT gradient in both answers.

    Log-probabilities are summed over the tokens of the answer, in nats; `log_ref_*` under the frozen reference.
    """
    margin = beta * (log_prob_chosen - log_ref_chosen - log_prob_rejected + log_ref_rejected)
    return beta * float(torch.sigmoid(torch.tensor(-margin, dtype=torch.float64)))
