"""Partitions of a diagnosis: each is measured once, and its result is two Parquet files.

    partitions/<kind>-<number>.parquet   a row for each response token and policy
    tokens/<kind>-<number>.parquet       base-favored tokens by policy and band of positions

A partition is scored in batches of a bounded number of tokens, of which a bounded number is under way, so memory does
not grow with the number of prompts or with their length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from raycomplete.data import stream
from raycomplete.data.stream import Columns, content_key, partition_metadata, read_partition, write_partition
from raycomplete.diagnosis.measurement import Measurement
from raycomplete.diagnosis.rows import METRICS
from raycomplete.diagnosis.samples import DiagnosisSample, partition_samples, read_prompts
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.types import Prompt, PromptKind

CONTEXT_TOKENS = 12  # response tokens shown before a base-favored token


def measure_kind(run: Run, measurement: Measurement, kind: PromptKind) -> list[str]:
    """Measures every partition of a kind of prompts that is not there yet, and returns the names of all in order.

    Raises:
        ConfigError: The prompts of a finished partition changed.
    """
    settings = run.config.diagnose
    names: list[str] = []
    done = 0
    with run.console.progress(f"Measured {kind} prompts", settings.num_prompts or 0) as advance:
        for number, prompts in enumerate(stream.partitions(read_prompts(run.config, kind), settings.partition_prompts)):
            names.append(f"{kind}-{number:05d}")
            stats = partition_metadata(run.folder / "partitions" / f"{names[-1]}.parquet")
            if stats is None:
                _make_partition(run, measurement, kind, prompts, number)
            elif stats["key"] != content_key(prompts):
                raise ConfigError(
                    f"The {kind} prompts of partition {number} changed since the diagnosis was started.",
                    "Run again with --overwrite, or choose another output.name.",
                )
            done += len(prompts)
            advance(done, f"{done} prompts")
    return names


def _make_partition(
    run: Run, measurement: Measurement, kind: PromptKind, prompts: Sequence[Prompt], number: int
) -> None:
    started = time.perf_counter()
    samples = partition_samples(run, kind, prompts, number)
    sampled_s = time.perf_counter() - started
    rows, tokens = measure_partition(measurement, samples)
    stats = {
        "key": content_key(prompts),
        "prompts": len(prompts),
        "measured": len(samples),
        "measured_ids": [sample.prompt_id for sample in samples],
        "policies": list(measurement.policies),
        "sampled_s": sampled_s,
        "measured_s": time.perf_counter() - started - sampled_s,
        "read_tokens": sum(len(sample.prompt_ids) + len(sample.answer_ids) for sample in samples),
    }
    write_measured(run.folder, f"{kind}-{number:05d}", rows, tokens, stats)


def measure_partition(measurement: Measurement, samples: Sequence[DiagnosisSample]) -> tuple[Columns, dict[str, Any]]:
    """Measures the columns of both files of a partition.

    Returns:
        Rows: prompt (its place in `samples`), role (its place in `Measurement.policies`), position, token_id and
        `METRICS`. Tokens: role, band, token_id, mass and policy_mass (summed probabilities), count, and of the
        occurrence with the largest base probability its prompt, position and context (the response tokens before it).
    """
    rows: list[Columns] = []
    favored: list[Columns] = []
    first = 0
    for batch, by_role in measurement.rows(samples):
        lengths = [len(sample.answer_ids) for sample in batch]
        read: Columns = {
            "prompt": np.repeat(np.arange(first, first + len(batch), dtype=np.int32), lengths),
            "position": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            "token_id": np.concatenate([np.asarray(sample.answer_ids, dtype=np.int32) for sample in batch]),
        }
        for number, role in enumerate(measurement.policies):
            found = by_role[role]
            row_K, values_NM = found.row_K.cpu().numpy(), found.values_NM.float().cpu().numpy()
            columns = {"prompt": read["prompt"], "role": np.full(len(values_NM), number, dtype=np.int8)} | read
            rows.append(columns | dict(zip(METRICS, values_NM.T, strict=True)))
            probabilities = {"base": found.base_probability_K, "policy": found.policy_probability_K}
            favored.append(
                {name: columns[name][row_K] for name in ("role", "prompt", "position")}
                | {"token_id": found.token_K.cpu().numpy().astype(np.int32)}
                | {name: values_K.double().cpu().numpy() for name, values_K in probabilities.items()}
            )
        first += len(batch)
    return _stacked(rows), _token_columns(_stacked(favored), samples)


def write_measured(
    folder: Path, name: str, rows: Mapping[str, Any], tokens: Mapping[str, Any], stats: Mapping[str, Any]
) -> None:
    """Writes both files; the rows last, since their file stands for a finished partition."""
    write_partition(folder / "tokens" / f"{name}.parquet", tokens, stats)
    write_partition(folder / "partitions" / f"{name}.parquet", rows, stats)


def stored_samples(run: Run, prompts: Mapping[str, Prompt]) -> list[DiagnosisSample]:
    """Reads the responses of the first harmful partition as they were measured, given its prompts by id."""
    file = run.folder / "partitions" / "harmful-00000.parquet"
    rows, stats = read_partition(file), partition_metadata(file)
    assert stats is not None
    samples = []
    for prompt, role, where in samples_of(rows):
        if role == 0:  # every policy read the same tokens
            name = stats["measured_ids"][prompt]
            prompt_ids = prompts[name].encoded(run.models.codec)
            samples.append(DiagnosisSample(name, tuple(prompt_ids), tuple(rows["token_id"][where].tolist())))
    return samples


def samples_of(rows: Columns) -> Iterator[tuple[int, int, slice]]:
    """Yields (prompt, role, rows) of each sample and policy, in the order of the file."""
    keys = zip(rows["prompt"].tolist(), rows["role"].tolist(), strict=True) if rows else ()
    start = 0
    for (prompt, role), group in groupby(keys):
        end = start + sum(1 for _ in group)
        yield prompt, role, slice(start, end)
        start = end


def position_bands(num_positions: int) -> list[tuple[int, int]]:
    """First and last position of each band: 0, 1 to 3, 4 to 7, 8 to 15 and on, doubling."""
    bands, start = [(0, 0)], 1
    while start < num_positions:
        end = 3 if start == 1 else 2 * start - 1
        bands.append((start, min(end, num_positions - 1)))
        start = end + 1
    return bands


def _stacked(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _token_columns(favored: Columns, samples: Sequence[DiagnosisSample]) -> dict[str, Any]:
    """Sums by (policy, band, token), and where each stood out most."""
    if not favored:
        return {}
    starts = np.asarray([start for start, _ in position_bands(2**20)])
    band_K = np.searchsorted(starts, favored["position"], side="right") - 1
    key_G, group_K, example_G = _groups(favored["role"], band_K, favored["token_id"], favored["base"])
    size = len(key_G)
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


def merged_tokens(parts: Sequence[Columns]) -> Columns:
    """Sums token files by policy, band and token in order; of several strongest occurrences the first one stays."""
    columns = _stacked([part for part in parts if part])
    if not columns:
        return {}
    strength = columns["base_probability"]
    _, group_K, example_G = _groups(columns["role"], columns["band"], columns["token_id"], strength)
    sums = {name: np.bincount(group_K, weights=columns[name]) for name in ("mass", "policy_mass", "count")}
    return {name: values[example_G] for name, values in columns.items()} | sums


def _groups(role_K: Any, band_K: Any, token_K: Any, strength_K: Any) -> tuple[Any, Any, Any]:
    """Key of each group [G], group of each row [K], and the strongest row of each group [G]."""
    # One integer a group: np.unique over rows of three would sort far more slowly.
    key_K = (role_K.astype(np.int64) << 48) | (band_K.astype(np.int64) << 32) | token_K.astype(np.int64)
    key_G, group_K = np.unique(key_K, return_inverse=True)
    # Sorted by group and by falling strength, the first row of each group is its example.
    order_K = np.lexsort((-strength_K, group_K))
    return key_G, group_K, order_K[np.searchsorted(group_K[order_K], np.arange(len(key_G)))]
