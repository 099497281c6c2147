"""Gradient of safety losses by position: along the aligned model's own refusals, at each model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raycomplete.config import DiagnoseConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.diagnosis.gradient_signal import (
    GradientRows,
    gradient_rows,
    parameter_gradient_norms,
    preference_factor,
)
from raycomplete.diagnosis.partitions import Walk
from raycomplete.diagnosis.samples import Sample
from raycomplete.diagnosis.statistics import PositionStatistics
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.runtime.types import Judge, Outcome, Prompt

_CHOSEN = ("sft_logits", "sft_hidden", "sft_head", "dpo_chosen_head")
_REJECTED = ("rejected_head", "dpo_rejected_head")


@dataclass(frozen=True)
class Pair:
    """One harmful prompt with the answer that a safety loss wants and the one that it rejects."""

    chosen: Sample
    rejected: Sample


def preference_pairs(
    settings: DiagnoseConfig,
    codec: ChatCodec,
    aligned: RolloutPool,
    judge: Judge,
    prompts: Mapping[str, Prompt],
    samples: Sequence[Sample],
) -> list[Pair]:
    """Greedy refusals of the aligned model beside the compliant continuations of the same prompts."""
    samples = samples[: settings.gradient_prompts]
    answers = aligned.generate([sample.prompt_ids for sample in samples], max_tokens=settings.gradient_tokens)
    return [
        Pair(Sample(sample.prompt_id, sample.prompt_ids, tuple(answer)), sample)
        for sample, answer in zip(samples, answers, strict=True)
        if answer and judge.outcome(prompts[sample.prompt_id], "", codec.decode(answer)) is Outcome.REFUSED
    ]


def gradient_signal(walk: Walk, pairs: Sequence[Pair], settings: DiagnoseConfig) -> dict[str, Any]:
    """Norms by position with 95 % intervals over prompts, for each role; base is the reference of the preference loss.

    At the weights of base this is what safety training saw in its first step. `rejected_head` is the norm of
    d log p(z_t) / d W. The preference loss multiplies it, and that of the chosen answer, with `preference_factor`,
    which falls towards 0 once a model prefers the refusal.
    """
    chosen = _by_role(walk, [pair.chosen for pair in pairs], settings)
    rejected = _by_role(walk, [pair.rejected for pair in pairs], settings)
    found: dict[str, Any] = {"pairs": len(pairs), "beta": settings.beta, "roles": {}}
    for role in ("base", *walk.policies):
        statistics = PositionStatistics(len(_CHOSEN), bootstrap_column=0, replicates=0)
        factors: list[float] = []
        against = PositionStatistics(len(_REJECTED), bootstrap_column=0, replicates=0)
        for index in range(len(pairs)):
            good, bad = chosen[role][index], rejected[role][index]
            factor = preference_factor(
                float(good.log_prob_N.double().sum()),
                float(chosen["base"][index].log_prob_N.double().sum()),
                float(bad.log_prob_N.double().sum()),
                float(rejected["base"][index].log_prob_N.double().sum()),
                settings.beta,
            )
            statistics.add(torch.stack([good.logits_N, good.hidden_N, good.head_N, factor * good.head_N], dim=1))
            against.add(torch.stack([bad.head_N, factor * bad.head_N], dim=1))
            factors.append(factor)
        found["roles"][role] = {
            **_profile(statistics, _CHOSEN),
            **_profile(against, _REJECTED),
            "preference_factor": sum(factors) / len(factors),
        }
    return found


def exact_gradient(
    paths: Mapping[str, Path], pairs: Sequence[Pair], signal: dict[str, Any], settings: DiagnoseConfig
) -> dict[str, Any]:
    """Adds norms in all parameters (float32, one backward pass a position) and how well the estimator follows them.

    `estimator_correlation` is Pearson's, of the logarithms of both norms' means by position: of each role, and over all
    roles together.
    """
    pairs = pairs[: settings.full_prompts]
    norms_of_roles = []
    for role in signal["roles"]:
        model = load_model(paths[role], "float32")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        statistics = PositionStatistics(1, bootstrap_column=0, replicates=0)
        for pair in pairs:
            sample = pair.chosen
            tokens = torch.tensor([sample.prompt_ids + sample.answer_ids], device=model.device)
            logits_TV = model(tokens[:, :-1], use_cache=False).logits[0, len(sample.prompt_ids) - 1 :]
            target_T1 = tokens[0, len(sample.prompt_ids) :, None]
            log_prob_T = logits_TV.float().log_softmax(dim=-1).gather(1, target_T1)[:, 0]
            norms = parameter_gradient_norms(log_prob_T, model.parameters())
            statistics.add(torch.tensor(norms)[:, None])
        entry = signal["roles"][role]
        entry |= _profile(statistics, ("sft_all",))
        exact_T = torch.tensor(entry["sft_all"]["mean"])
        both_2T = torch.stack([exact_T, torch.tensor(entry["sft_head"]["mean"][: len(exact_T)])]).log()
        entry["estimator_correlation"] = _correlation(both_2T)
        norms_of_roles.append(both_2T)
    whole = _correlation(torch.cat(norms_of_roles, dim=1))
    return {**signal, "full_prompts": len(pairs), "estimator_correlation": whole}


def _correlation(both_2N: torch.Tensor) -> float | None:
    """None where there are too few values to speak of one."""
    return float(torch.corrcoef(both_2N)[0, 1]) if both_2N.shape[1] > 2 else None


def _by_role(walk: Walk, samples: Sequence[Sample], settings: DiagnoseConfig) -> dict[str, list[GradientRows]]:
    found: dict[str, list[GradientRows]] = {role: [] for role in walk.sources}
    for batch, hidden in walk.hidden_states(samples):
        target_N = torch.cat([torch.tensor(sample.answer_ids) for sample in batch])
        lengths = [len(sample.answer_ids) for sample in batch]
        for role, hidden_NH in hidden.items():
            head = walk.heads[role]
            rows = gradient_rows(hidden_NH, head, target_N.to(hidden_NH.device), settings.chunk_tokens)
            columns = [getattr(rows, name).cpu().split(lengths) for name in GradientRows.__dataclass_fields__]
            found[role] += [GradientRows(*parts) for parts in zip(*columns, strict=True)]
    return found


def _profile(statistics: PositionStatistics, names: Sequence[str]) -> dict[str, Any]:
    count = [int(count) for count in statistics.count_T.tolist()]
    found = {}
    for name, mean_T, half_T in zip(names, statistics.mean_TM().T, statistics.half_width_TM().T, strict=True):
        rows = list(zip(mean_T.tolist(), half_T.tolist(), strict=True))
        found[name] = {
            "mean": mean_T.tolist(),
            "low": [max(0.0, mean - half) if math.isfinite(half) else None for mean, half in rows],
            "high": [mean + half if math.isfinite(half) else None for mean, half in rows],
            "n": count,
        }
    return found
