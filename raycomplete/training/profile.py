"""The position profile of aligned and student: where alignment is incomplete along held-out harmful answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raycomplete.data.samples import AnchorSample
from raycomplete.diagnosis.rows import PROFILE_METRICS, DiagnosisSettings, Opening, diagnose_rows
from raycomplete.engines.scorers import TeacherClient
from raycomplete.losses.heads import Head
from raycomplete.losses.settings import LossSettings
from raycomplete.methods.registry import TeacherContext
from raycomplete.runtime.files import read_json, write_json
from raycomplete.training.batches import MicroBatch, answer_batch
from raycomplete.training.teacher_prefetcher import Scores, TeacherPrefetcher

Profile = dict[str, list[float]]  # mean by position for each name, and "n"


def scored_samples(
    samples: Sequence[AnchorSample], scorers: Mapping[str, TeacherClient]
) -> tuple[list[AnchorSample], Scores]:
    """The samples that both models could read for every rank, and their scores.

    Ranks ask on their own, and a sequence that kills scorers may be quarantined between two of their questions: they
    must agree on what is left, or their forward passes would not match.
    """
    answers = [TeacherContext(sample.prompt_ids, sample.answer_ids) for sample in samples]
    prefetcher = TeacherPrefetcher(scorers, lambda _anchor, _recovery: dict.fromkeys(scorers, answers))
    prefetcher.request(0, samples, [])
    scores = prefetcher.take(0)
    places = {
        place for place, answer in enumerate(answers) if all(len(scores.hidden(role, answer)) for role in scorers)
    }
    if dist.is_initialized():
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, places)
        places.intersection_update(*ranks)
    return [samples[place] for place in sorted(places)], scores


def student_profile(
    engine: Any, samples: Sequence[AnchorSample], scores: Scores, per_device_batch_size: int, *, packed: bool
) -> Profile:
    """Means over prompts of unfinished mass, KL(student || base) and deficit at each position.

    Every rank computes the same numbers, on a GPU up to rounding: under ZeRO-3 a forward pass needs all ranks anyway.

    Args:
        engine: DeepSpeed's engine.
        samples: Of `scored_samples`, at least one.
        scores: Of `scored_samples`.
        per_device_batch_size: Sequences of one forward pass.
        packed: Whether they may share rows, as in training.
    """
    engine.eval()
    with torch.no_grad():
        measured = [
            torch.stack([row_N.double().cpu() for row_N in engine(batch.to(engine.device), "profile")])
            for batch in _batches(samples, scores, per_device_batch_size, packed=packed)
        ]
    engine.train()
    return _means(samples, torch.cat(measured, dim=1))


def aligned_profile(
    samples: Sequence[AnchorSample],
    scores: Scores,
    heads: Mapping[str, Head],
    settings: LossSettings,
    per_device_batch_size: int,
) -> Profile:
    """The same for the aligned model, from its scorer's hidden states alone; no rank needs another one."""
    measured = []
    for batch in _batches(samples, scores, per_device_batch_size):
        assert batch.aligned_hidden_PH is not None
        assert batch.base_hidden_PH is not None
        aligned, base = heads["aligned"], heads["base"]
        aligned_NH = batch.aligned_hidden_PH.to(aligned.weight_VH.device)
        rows = diagnose_rows(
            {"aligned": (aligned_NH, aligned)},
            batch.base_hidden_PH.to(base.weight_VH.device),
            base,
            Opening.of_rows(aligned_NH, aligned, batch.sequence_N.to(aligned_NH.device)),
            (),
            DiagnosisSettings.of_loss(settings),
        )["aligned"]
        measured.append(torch.stack([rows.column(name).double().cpu() for name in PROFILE_METRICS]))
    return _means(samples, torch.cat(measured, dim=1))


def _batches(
    samples: Sequence[AnchorSample], scores: Scores, per_device_batch_size: int, *, packed: bool = True
) -> Iterator[MicroBatch]:
    for start in range(0, len(samples), per_device_batch_size):
        part = samples[start : start + per_device_batch_size]
        yield answer_batch(part, scores, term="penalty", packed=packed)  # a term that reads both teachers


def _means(samples: Sequence[AnchorSample], measured_3N: torch.Tensor) -> Profile:
    """Rows of all samples, one after the other, averaged by position; "n" counts prompts that reach a position."""
    size = max(len(sample.answer_ids) for sample in samples)
    position_N = torch.cat([torch.arange(len(sample.answer_ids)) for sample in samples])
    sums_3T = torch.zeros(len(PROFILE_METRICS), size, dtype=torch.float64).index_add_(1, position_N, measured_3N)
    count_T = torch.bincount(position_N, minlength=size)
    means_3T = sums_3T / count_T.clamp(min=1)
    profile = {name: means_3T[index].tolist() for index, name in enumerate(PROFILE_METRICS)}
    return profile | {"n": count_T.tolist()}


def write_profile(path: Path, who: str, profile: Profile, settings: LossSettings) -> None:
    """Adds one model's profile to profile.json, atomically."""
    content = read_json(path) or {}
    measured = DiagnosisSettings.of_loss(settings)
    content |= {
        "positions": list(range(len(profile["n"]))),
        "tau": measured.tau,
        "kappa": measured.kappa,
        who: profile,
    }
    write_json(path, content)
