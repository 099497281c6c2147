"""Reads responses with base and the policies that are compared with it, batch by batch.

A batch of prompts is measured once and kept as `<run>/batches/<kind>-<number>.npz`, so that a diagnosis which was
killed measures only what is missing.
"""

from __future__ import annotations

import ctypes
import io
import json
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import load_head
from raycomplete.data.prompts import content_key
from raycomplete.diagnosis.rows import DiagnosisRows, DiagnosisSettings, Opening, diagnose_rows
from raycomplete.diagnosis.samples import DiagnosisSample, batch_samples
from raycomplete.engines.run import Run
from raycomplete.engines.scorers import TeacherClient
from raycomplete.losses.heads import Head
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import PRIVATE, read_json, write_bytes, write_json
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.types import ModelRole, Prompt, PromptKind

BATCH_PROMPTS = 64  # prompts of one file
BATCH_TOKENS = 4096  # tokens that a scorer is asked for at a time
IN_FLIGHT = 2  # requests ahead of the one that is measured
SETTINGS = DiagnosisSettings()
MEASURED_WITH = {"tau": SETTINGS.tau, "margin": SETTINGS.margin, "kappa": SETTINGS.kappa}
_PARITY_TOKENS = 48
_REFUSAL_RATIO = 2.0
# Parameters of glibc's mallopt (malloc.h): how much free memory the process keeps, how much more it asks for at a time,
# and from which size on a block is handed back on its own.
_MALLOPT = {-1: 2**30, -2: 2**26, -3: 2**25}


@dataclass(frozen=True)
class Measurement:
    """Scorers and heads by role ("base" and the policies), and the tokens that start a refusal."""

    sources: Mapping[str, TeacherClient]
    heads: Mapping[str, Head]
    refusal_ids: tuple[int, ...]

    @classmethod
    def of_run(cls, run: Run) -> Measurement:
        """Reads with the run's scorers and with heads in the models' own dtype; the refusal tokens come later.

        Heads in float32 would cost three times as much on a CPU and change next to nothing: on SmolLM2-135M the mass
        went from 0.209 to 0.215 and the KL from 0.0347 to 0.0352 nats with heads in bf16 (float32 throughout: 0.206,
        0.0342).
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            make_room_for_engines(len(run.engines.scorers))
        dtype = TORCH_DTYPES[run.config.models.weight_dtype]
        heads = {str(role): load_head(spec, dtype=dtype, device=device) for role, spec in run.models.heads.items()}
        return cls(dict(run.engines.scorers), heads, ())

    @property
    def policies(self) -> tuple[str, ...]:
        """Roles that are compared with base, in a fixed order."""
        return tuple(role for role in ("aligned", "student") if role in self.sources)

    def rows(
        self, samples: Sequence[DiagnosisSample]
    ) -> Iterator[tuple[list[DiagnosisSample], dict[str, DiagnosisRows]]]:
        """Yields groups of samples with their rows, token after token and sample after sample."""
        for batch, hidden in self.hidden_states(samples):
            policies = {role: (hidden[role], self.heads[role]) for role in self.policies}
            lengths = torch.tensor([len(sample.answer_ids) for sample in batch], device=hidden["base"].device)
            prompt_N = torch.arange(len(batch), device=lengths.device).repeat_interleave(lengths)
            opening = Opening.of_rows(hidden["aligned"], self.heads["aligned"], prompt_N)
            base = hidden["base"], self.heads["base"]
            yield batch, diagnose_rows(policies, *base, opening, self.refusal_ids, SETTINGS)

    def hidden_states(
        self, samples: Sequence[DiagnosisSample]
    ) -> Iterator[tuple[list[DiagnosisSample], dict[str, torch.Tensor]]]:
        """Yields groups of samples with [N, H] hidden states of every role; few groups are under way at a time."""
        pending: deque[tuple[list[DiagnosisSample], dict[str, Any]]] = deque()
        groups = token_groups(samples)
        while True:
            if (group := next(groups, None)) is not None:
                sequences = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in group]
                asked = {role: source.submit_sequences(sequences) for role, source in self.sources.items()}
                pending.append((group, asked))
            elif not pending:
                return
            if group is None or len(pending) > IN_FLIGHT:
                group, asked = pending.popleft()
                found = {role: torch.cat(self.sources[role].collect_tensors(it)) for role, it in asked.items()}
                yield group, {role: it.to(self.heads[role].weight_VH.device) for role, it in found.items()}


def token_groups(samples: Sequence[DiagnosisSample]) -> Iterator[list[DiagnosisSample]]:
    """Consecutive samples of at most `BATCH_TOKENS` tokens together, and at least one."""
    group: list[DiagnosisSample] = []
    tokens = 0
    for sample in samples:
        tokens += (size := len(sample.prompt_ids) + len(sample.answer_ids))
        if group and tokens > BATCH_TOKENS:
            yield group
            group, tokens = [], size
        group.append(sample)
    if group:
        yield group


@dataclass(frozen=True)
class Batch:
    """The measured rows of some prompts.

    `arrays` holds length_P and token_N of the responses, values_RNM (policy, row, `METRICS`), and of the K base-favored
    tokens of all policies role_K, row_K, token_K and the probabilities base_K and policy_K. `about` names the prompts.
    """

    arrays: dict[str, Any]
    about: dict[str, Any]

    def values_of(self, policy: int) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """Values [T, M] of each prompt."""
        ends = self.arrays["length_P"].cumsum()[:-1]
        values_NM = self.arrays["values_RNM"][policy].astype(np.float64)
        return np.split(values_NM, ends) if len(self.arrays["length_P"]) else []

    def samples(self, prompts: Mapping[str, Prompt], codec: ChatCodec) -> list[DiagnosisSample]:
        """The responses as they were measured, given their prompts by id."""
        answers = np.split(self.arrays["token_N"], self.arrays["length_P"].cumsum()[:-1])
        return [
            DiagnosisSample(name, tuple(prompts[name].encoded(codec)), tuple(answer.tolist()))
            for name, answer in zip(self.about["measured_ids"], answers, strict=False)
        ]

    def write(self, path: Path) -> None:
        """Writes one file, readable by the owner only: it holds what models say after harmful prompts."""
        content = io.BytesIO()
        np.savez_compressed(content, about=np.asarray(json.dumps(self.about)), **self.arrays)
        write_bytes(path, content.getvalue(), mode=PRIVATE)

    @classmethod
    def read(cls, path: Path) -> Batch | None:
        """Reads a batch; None where there is none or it cannot be read."""
        try:
            with np.load(path) as found:
                arrays = dict(found)
            return cls(arrays, json.loads(str(arrays.pop("about"))))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def measure_kind(run: Run, measurement: Measurement, kind: PromptKind, prompts: Sequence[Prompt]) -> list[Batch]:
    """Measures every batch of a kind of prompts that is not there yet, and returns all in order."""
    found: list[Batch] = []
    with run.console.progress(f"Measured {kind} prompts", len(prompts)) as advance:
        for first in range(0, len(prompts), BATCH_PROMPTS):
            part, number = prompts[first : first + BATCH_PROMPTS], first // BATCH_PROMPTS
            path = run.folder / "batches" / f"{kind}-{number:05d}.npz"
            batch = Batch.read(path)
            if batch is None:
                batch = _measured(run, measurement, kind, part, number)
                batch.write(path)
            elif batch.about["key"] != content_key(part):
                raise ConfigError(
                    f"The {kind} prompts of batch {number} changed since the diagnosis was started.",
                    "Run again with --overwrite, or choose another output.name.",
                )
            found.append(batch)
            advance(first + len(part), f"{first + len(part)} prompts")
    return found


def _measured(run: Run, measurement: Measurement, kind: PromptKind, prompts: Sequence[Prompt], number: int) -> Batch:
    samples = batch_samples(run, kind, prompts, number)
    started = time.perf_counter()
    arrays = measure_samples(measurement, samples)
    about = {
        "key": content_key(prompts),
        "prompts": len(prompts),
        "measured_ids": [sample.prompt_id for sample in samples],
        "measured_s": time.perf_counter() - started,
        "read_tokens": sum(len(sample.prompt_ids) + len(sample.answer_ids) for sample in samples),
    }
    return Batch(arrays, about)


def measure_samples(measurement: Measurement, samples: Sequence[DiagnosisSample]) -> dict[str, Any]:
    """Measures the arrays of a batch."""
    values: list[list[Any]] = [[] for _ in measurement.policies]
    favored: dict[str, list[Any]] = {name: [] for name in ("role_K", "row_K", "token_K", "base_K", "policy_K")}
    first = 0
    for group, by_role in measurement.rows(samples):
        for number, role in enumerate(measurement.policies):
            rows = by_role[role]
            values[number].append(rows.values_NM.float().cpu().numpy())
            favored["role_K"].append(np.full(len(rows.row_K), number, dtype=np.int8))
            favored["row_K"].append(rows.row_K.cpu().numpy() + first)
            favored["token_K"].append(rows.token_K.cpu().numpy().astype(np.int32))
            favored["base_K"].append(rows.base_probability_K.double().cpu().numpy())
            favored["policy_K"].append(rows.policy_probability_K.double().cpu().numpy())
        first += sum(len(sample.answer_ids) for sample in group)
    return {
        "length_P": np.asarray([len(sample.answer_ids) for sample in samples], dtype=np.int32),
        "token_N": np.asarray([token for sample in samples for token in sample.answer_ids], dtype=np.int32),
        "values_RNM": np.stack([np.concatenate(parts) for parts in values])
        if samples
        else np.zeros((len(values), 0, 0)),
        **{name: np.concatenate(parts) if parts else np.zeros(0, int) for name, parts in favored.items()},
    }


def make_room_for_engines(num_engines: int) -> None:
    """Readies this process for its matrix products on a CPU, beside engines that keep one core busy each.

    It takes the threads that they leave, at least one, and keeps the memory that it frees, since blocks of megabytes
    come and go. Processor time a token, SmolLM2-135M's head on 2 idle cores: 0.87 ms before, 0.80 with the memory kept,
    0.77 with one thread as well.
    """
    torch.set_num_threads(max(1, available_cpus() - num_engines))
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: slower, nothing else
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


@contextmanager
def start_diagnosis_engines(run: Run, prompts: Sequence[Prompt]) -> Iterator[None]:
    """Starts the run's generator and a scorer of each model, which is checked on the first prompts.

    Scores are not cached, as every response is read once.
    """
    count, max_length = run.config.teacher.parity_prompts, run.config.models.max_length
    parity = parity_sequences(run.models.codec, prompts, count, max_length)
    roles: tuple[ModelRole, ...] = ("aligned", "base", "student")
    scored = tuple(role for role in roles if role in run.models.paths)
    with run.start_engines(parity_sequences=parity, scored=scored, cache_bytes=0):
        yield


def parity_sequences(
    codec: ChatCodec, prompts: Iterable[Prompt], count: int, max_length: int
) -> list[tuple[tuple[int, ...], int]]:
    """Makes sequences of the parity check, each a prompt with a few response tokens, and the prompt's length."""
    found: list[tuple[tuple[int, ...], int]] = []
    for prompt in prompts:
        if len(found) == count:
            break
        prompt_ids = prompt.encoded(codec)
        if len(prompt_ids) < max_length:
            answer_ids = codec.encode_answer(prompt.answer or prompt.text)[:_PARITY_TOKENS]
            found.append(((*prompt_ids, *answer_ids)[:max_length], len(prompt_ids)))
    return found


def with_refusal_tokens(run: Run, measurement: Measurement, harmful: Sequence[Prompt]) -> Measurement:
    """Adds the tokens that start a refusal, from refusal_tokens.json where it is there."""
    codec, file = run.models.codec, run.folder / "refusal_tokens.json"
    known = read_json(file)
    if known is None:
        longest = run.config.models.max_length - 1
        fitting = [prompt for prompt in harmful if len(prompt.encoded(codec)) <= longest]
        ids = find_refusal_tokens(measurement, codec, fitting)
        known = {"ids": ids, "tokens": [codec.decode([token]) for token in ids]}
        write_json(file, known)
    run.console.note(f"Refusal tokens: {', '.join(map(repr, known['tokens'])) or 'none found'}")
    return replace(measurement, refusal_ids=tuple(known["ids"]))


def find_refusal_tokens(measurement: Measurement, codec: ChatCodec, prompts: Sequence[Prompt]) -> list[int]:
    """Finds tokens that start a refusal, most frequent first.

    They are the aligned model's likeliest first tokens on harmful prompts, where it finds them at least twice as likely
    as base does. The definition is ours.
    """
    # Any token may stand in for the response: only the state before it is asked for.
    samples = [DiagnosisSample(prompt.prompt_id, tuple(prompt.encoded(codec)), (0,)) for prompt in prompts]
    found: Counter[int] = Counter()
    for _, hidden in measurement.hidden_states(samples):
        log_aligned_NV, log_base_NV = (
            measurement.heads[role].logits(hidden[role]).log_softmax(dim=-1) for role in ("aligned", "base")
        )
        likeliest_N1 = log_aligned_NV.argmax(dim=-1, keepdim=True)
        ratio_N = (log_aligned_NV - log_base_NV).gather(1, likeliest_N1)[:, 0].exp()
        found.update(likeliest_N1[ratio_N >= _REFUSAL_RATIO, 0].tolist())
    return sorted(found, key=lambda token: (-found[token], token))
