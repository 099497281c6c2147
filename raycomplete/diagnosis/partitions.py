"""The scoring half of a diagnosis: hidden states from the scorers, the walk over them, one Parquet file a partition.

    partitions/<kind>-<number>.parquet   a row for each response token and policy
    tokens/<kind>-<number>.parquet       base-favored tokens by policy and band of positions

A partition is scored in batches of a bounded number of tokens, of which a bounded number is under way, so memory does
not grow with the number of prompts or with their length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycomplete.config import DiagnoseConfig
from raycomplete.data.stream import Columns, write_partition
from raycomplete.diagnosis.rows import METRICS, DiagnosisRows, DiagnosisSettings, diagnose_rows
from raycomplete.diagnosis.samples import Sample
from raycomplete.diagnosis.statistics import position_bands
from raycomplete.engines.scorers import TeacherClient
from raycomplete.losses.heads import Head

CONTEXT_TOKENS = 12  # response tokens shown before a base-favored token


@dataclass(frozen=True)
class Walk:
    """What turns samples into rows.

    Attributes:
        sources: Scorers by role; "base" and the policies that are compared with it.
        heads: Their heads.
        refusal_ids: Tokens that start a refusal.
        settings: Thresholds and sizes.
    """

    sources: Mapping[str, TeacherClient]
    heads: Mapping[str, Head]
    refusal_ids: tuple[int, ...]
    settings: DiagnoseConfig

    @property
    def policies(self) -> tuple[str, ...]:
        """Roles that are compared with base, in a fixed order."""
        return tuple(role for role in ("aligned", "student") if role in self.sources)

    def rows(self, samples: Sequence[Sample]) -> Iterator[tuple[list[Sample], dict[str, DiagnosisRows]]]:
        """Batches of samples with their rows, token after token and sample after sample."""
        settings = self.settings
        walk = DiagnosisSettings(
            tau=settings.tau, margin=settings.margin, kappa=settings.kappa, chunk_tokens=settings.chunk_tokens
        )
        for batch, hidden in self.hidden_states(samples):
            policies = {role: (hidden[role], self.heads[role]) for role in self.policies}
            yield batch, diagnose_rows(policies, hidden["base"], self.heads["base"], self.refusal_ids, walk)

    def hidden_states(self, samples: Sequence[Sample]) -> Iterator[tuple[list[Sample], dict[str, torch.Tensor]]]:
        """Batches of samples with [N, H] hidden states of every role, a bounded number of batches ahead."""
        pending: deque[tuple[list[Sample], dict[str, Any]]] = deque()
        batches = token_batches(samples, self.settings.batch_tokens)
        for batch in batches:
            pending.append((batch, self._submit(batch)))
            if len(pending) > self.settings.in_flight:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def _submit(self, batch: Sequence[Sample]) -> dict[str, Any]:
        sequences = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in batch]
        return {role: source.submit_sequences(sequences) for role, source in self.sources.items()}

    def _collect(
        self, batch: list[Sample], references: Mapping[str, Any]
    ) -> tuple[list[Sample], dict[str, torch.Tensor]]:
        hidden = {
            role: torch.cat(self.sources[role].collect_tensors(reference)).to(self.heads[role].weight_VH.device)
            for role, reference in references.items()
        }
        return batch, hidden


def token_batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Consecutive samples of at most `batch_tokens` tokens together, and at least one."""
    batch: list[Sample] = []
    tokens = 0
    for sample in samples:
        length = len(sample.prompt_ids) + len(sample.answer_ids)
        if batch and tokens + length > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(sample)
        tokens += length
    if batch:
        yield batch


def measure_partition(walk: Walk, samples: Sequence[Sample]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of both files of a partition.

    Returns:
        Rows: prompt (its place in `samples`), role (its place in `walk.policies`), position, token_id and `METRICS`.
        Tokens: role, band, token_id, mass and policy_mass (summed probabilities), count, and of the occurrence with
        the largest base probability its prompt, position and context (the response tokens before it).
    """
    rows: list[Columns] = []
    favored: list[Columns] = []
    first = 0
    for batch, by_role in walk.rows(samples):
        lengths = [len(sample.answer_ids) for sample in batch]
        prompt_N = np.repeat(np.arange(first, first + len(batch), dtype=np.int32), lengths)
        position_N = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        token_N = np.concatenate([np.asarray(sample.answer_ids, dtype=np.int32) for sample in batch])
        for number, role in enumerate(walk.policies):
            found = by_role[role]
            values_MN = found.values_NM.float().cpu().numpy().T
            role_N = np.full(len(prompt_N), number, dtype=np.int8)
            measured: Columns = {name: values_MN[index] for index, name in enumerate(METRICS)}
            rows.append({"prompt": prompt_N, "role": role_N, "position": position_N, "token_id": token_N, **measured})
            row_K = found.row_K.cpu().numpy()
            favored.append(
                {
                    "role": np.full(len(row_K), number, dtype=np.int8),
                    "prompt": prompt_N[row_K],
                    "position": position_N[row_K],
                    "token_id": found.token_K.cpu().numpy().astype(np.int32),
                    "base": found.base_probability_K.double().cpu().numpy(),
                    "policy": found.policy_probability_K.double().cpu().numpy(),
                }
            )
        first += len(batch)
    return _stacked(rows), _token_table(_stacked(favored), samples)


def write_measured(
    folder: Path, name: str, rows: Mapping[str, Any], tokens: Mapping[str, Any], stats: Mapping[str, Any]
) -> None:
    """Writes both files; the rows last, since their file stands for a finished partition."""
    write_partition(folder / "tokens" / f"{name}.parquet", tokens, stats)
    write_partition(folder / "partitions" / f"{name}.parquet", rows, stats)


def samples_of(rows: Columns) -> Iterator[tuple[int, int, slice]]:
    """(prompt, role, rows) of each sample and policy, in the order of the file."""
    keys = zip(rows["prompt"].tolist(), rows["role"].tolist(), strict=True)
    start = 0
    for (prompt, role), group in groupby(keys):
        end = start + sum(1 for _ in group)
        yield prompt, role, slice(start, end)
        start = end


def _stacked(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _token_table(favored: Columns, samples: Sequence[Sample]) -> dict[str, Any]:
    """Sums by (policy, band, token), and where each stood out most."""
    if not favored:
        return {}
    starts = np.asarray([start for start, _ in position_bands(2**20)])
    band_K = (np.searchsorted(starts, favored["position"], side="right") - 1).astype(np.int64)
    # One integer a group: np.unique over rows of three would sort far more slowly.
    key_K = (favored["role"].astype(np.int64) << 48) | (band_K << 32) | favored["token_id"].astype(np.int64)
    key_G, group_K = np.unique(key_K, return_inverse=True)
    size = len(key_G)
    # Sorted by group and by falling base probability, the first of each group is its example.
    order_K = np.lexsort((-favored["base"], group_K))
    example_G = order_K[np.searchsorted(group_K[order_K], np.arange(size))]
    prompt_G, position_G = favored["prompt"][example_G], favored["position"][example_G]
    contexts = [
        list(samples[prompt].answer_ids[max(0, position - CONTEXT_TOKENS) : position])
        for prompt, position in zip(prompt_G.tolist(), position_G.tolist(), strict=True)
    ]
    return {
        "role": (key_G >> 48).astype(np.int8),
        "band": ((key_G >> 32) & 0xFFFF).astype(np.int16),
        "token_id": (key_G & 0xFFFFFFFF).astype(np.int32),
        "mass": np.bincount(group_K, weights=favored["base"], minlength=size),
        "policy_mass": np.bincount(group_K, weights=favored["policy"], minlength=size),
        "count": np.bincount(group_K, minlength=size),
        "base_probability": favored["base"][example_G],
        "policy_probability": favored["policy"][example_G],
        "prompt": prompt_G,
        "position": position_G,
        "context": contexts,
    }
