"""Measures how much each response position contributes to the gradient of a safety loss.

docs/method.md derives the norms and why they fade with position. The norm in all parameters needs one backward pass a
position (`parameter_gradient_norms`). The norm in the output head needs none and is the estimator for large models: it
leaves out what flows through the body and, where the head is tied, through the embedding, so it is read as a shape by
position, not as a size. That the signal fades is the finding of arXiv 2511.12155 (known to us by its abstract and
secondary reports); formulas and estimator are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycomplete.config import DiagnoseConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.diagnosis.measurement import Measurement
from raycomplete.diagnosis.partitions import stored_samples
from raycomplete.diagnosis.samples import DiagnosisSample
from raycomplete.diagnosis.statistics import PositionStatistics, intervals
from raycomplete.engines.run import Run
from raycomplete.losses.heads import Head, check_hidden
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.types import Outcome, Prompt

_CHOSEN = ("sft_logits", "sft_hidden", "sft_head", "dpo_chosen_head")
_REJECTED = ("rejected_head", "dpo_rejected_head")
_SETTINGS = ("gradient", "gradient_prompts", "full_prompts", "gradient_tokens", "beta")  # of `diagnose`


@dataclass(frozen=True)
class PreferencePair:
    """One harmful prompt with the answer that a safety loss wants and the one that it rejects."""

    chosen: DiagnosisSample
    rejected: DiagnosisSample


@dataclass(frozen=True, eq=False)
class GradientRows:
    """Norms of each position's contribution to the SFT gradient.

    Attributes:
        log_prob_N: log p(y_t) in nats.
        logits_N: |dL_t / d logits| = |p - e|, 0 to sqrt(2).
        hidden_N: |dL_t / d h|.
        head_N: |dL_t / d W|, Frobenius; the estimator of the norm in all parameters.
    """

    log_prob_N: Tensor
    logits_N: Tensor
    hidden_N: Tensor
    head_N: Tensor

    @property
    def log_prob(self) -> float:
        """Log-probability of all rows together, in nats."""
        return float(self.log_prob_N.double().sum())


def measure_gradient(run: Run, measurement: Measurement, harmful: Sequence[Prompt]) -> dict[str, Any] | None:
    """Makes gradient.json from prompts of the first harmful partition, or reads it where the settings are the same.

    Returns:
        Norms by role and position; None where they are off, or aligned refuses next to nothing.
    """
    settings, file = run.config.diagnose, run.folder / "gradient.json"
    if settings.gradient == "off":
        return None
    made_from = {name: getattr(settings, name) for name in _SETTINGS}
    known = read_json(file)
    if known is not None and known["made_from"] == made_from:
        return dict(known)
    with run.console.stage("Gradient of safety losses by position"):
        by_id = {prompt.prompt_id: prompt for prompt in harmful}
        samples = stored_samples(run, by_id)
        pairs = _preference_pairs(run, by_id, samples[: settings.gradient_prompts])
        if len(pairs) < 2:
            run.console.note(f"No gradient: of {len(samples)} harmful prompts aligned refuses {len(pairs)}")
            return None
        signal = gradient_signal(measurement, pairs)
        if settings.gradient == "full":
            signal = exact_gradient(run.models.paths, pairs, signal, settings)
    signal["made_from"] = made_from
    write_json(file, signal)
    return signal


def _preference_pairs(
    run: Run, prompts: Mapping[str, Prompt], samples: Sequence[DiagnosisSample]
) -> list[PreferencePair]:
    """Greedy refusals of the aligned model beside the compliant continuations of the same prompts."""
    aligned = run.engines.generator.with_weights(str(run.models.paths["aligned"]))
    longest, decode = run.config.diagnose.gradient_tokens, run.models.codec.decode
    answers = aligned.generate([sample.prompt_ids for sample in samples], max_tokens=longest)
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
    beta = measurement.settings.beta
    found: dict[str, Any] = {"pairs": len(pairs), "beta": beta, "roles": {}}
    for role in ("base", *measurement.policies):
        statistics, against = (PositionStatistics(len(names), 0, replicates=0) for names in (_CHOSEN, _REJECTED))
        factors: list[float] = []
        for index in range(len(pairs)):
            good, bad = chosen[role][index], rejected[role][index]
            good_ref, bad_ref = chosen["base"][index], rejected["base"][index]
            factor = preference_factor(good.log_prob, good_ref.log_prob, bad.log_prob, bad_ref.log_prob, beta)
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
    paths: Mapping[Any, Path], pairs: Sequence[PreferencePair], signal: dict[str, Any], settings: DiagnoseConfig
) -> dict[str, Any]:
    """Adds norms in all parameters (float32) and how well the estimator follows them.

    `estimator_correlation` is Pearson's, of the logarithms of both norms' means by position: of each role, and over all
    roles together.
    """
    pairs = pairs[: settings.full_prompts]
    norms_of_roles = []
    for role in signal["roles"]:
        model = load_model(paths[role], "float32")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        statistics = PositionStatistics(1, 0, replicates=0)
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


def _correlation(both_2N: Tensor) -> float | None:
    """Pearson's correlation, or None where there are too few values to speak of one."""
    return float(torch.corrcoef(both_2N)[0, 1]) if both_2N.shape[1] > 2 else None


def _rows_by_role(measurement: Measurement, samples: Sequence[DiagnosisSample]) -> dict[str, list[GradientRows]]:
    found: dict[str, list[GradientRows]] = {role: [] for role in measurement.sources}
    for batch, hidden in measurement.hidden_states(samples):
        target_N = torch.cat([torch.tensor(sample.answer_ids) for sample in batch])
        lengths = [len(sample.answer_ids) for sample in batch]
        for role, hidden_NH in hidden.items():
            target = target_N.to(hidden_NH.device)
            rows = gradient_rows(hidden_NH, measurement.heads[role], target, measurement.settings.chunk_tokens)
            columns = [getattr(rows, column.name).cpu().split(lengths) for column in fields(rows)]
            found[role] += [GradientRows(*parts) for parts in zip(*columns, strict=True)]
    return found


def _profile(statistics: PositionStatistics, names: Sequence[str]) -> dict[str, Any]:
    count = [int(count) for count in statistics.count_T.tolist()]
    return {name: curve | {"n": count} for name, curve in zip(names, intervals(statistics), strict=True)}


@torch.no_grad()
def gradient_rows(hidden_NH: Tensor, head: Head, target_N: Tensor, chunk_tokens: int) -> GradientRows:
    """Exact norms of the SFT gradient of each token row; softcap and scale of the head included.

    Args:
        hidden_NH: Final hidden states from which each target is predicted.
        head: Output head.
        target_N: Token ids.
        chunk_tokens: Rows whose logits exist at a time, at least 1.

    Raises:
        ValueError: Shapes do not fit together.
        NotFiniteError: Hidden states hold NaN or infinity.
    """
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


def parameter_gradient_norms(log_prob_T: Tensor, parameters: Iterable[Any]) -> list[float]:
    """|dL_t / d theta| of each position's contribution to the SFT gradient, by one backward pass a position.

    Args:
        log_prob_T: log p(y_t | x, y<t), still attached to its graph.
        parameters: Tensors that the norm runs over; those without requires_grad are left out.
    """
    # A tied head and embedding are one tensor under two names; counted twice it would weigh double.
    wanted = list({id(item): item for item in parameters if item.requires_grad}.values())
    norms = []
    for log_prob in log_prob_T:
        gradients = torch.autograd.grad(-log_prob, wanted, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))
    return norms
