"""Reading responses with base and the policies that are compared with it: engines, hidden states, refusal tokens."""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from raycomplete.config import DiagnoseConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import load_head
from raycomplete.diagnosis.rows import DiagnosisRows, DiagnosisSettings, Opening, diagnose_rows
from raycomplete.diagnosis.samples import DiagnosisSample
from raycomplete.engines.run import Run
from raycomplete.engines.scorers import TeacherClient
from raycomplete.losses.heads import Head
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.types import ModelRole, Prompt

_Batch = list[DiagnosisSample]
_PARITY_TOKENS = 48
_REFUSAL_RATIO = 2.0
# Parameters of glibc's mallopt (malloc.h): how much free memory the process keeps, how much more it asks for at a time,
# and from which size on a block is handed back on its own.
_MALLOPT = {-1: 2**30, -2: 2**26, -3: 2**25}


@dataclass(frozen=True)
class Measurement:
    """The models that are compared, and how their hidden states are read.

    Attributes:
        sources: Scorers by role; "base" and the policies that are compared with it.
        heads: Their heads.
        refusal_ids: Tokens that start a refusal.
    """

    sources: Mapping[str, TeacherClient]
    heads: Mapping[str, Head]
    refusal_ids: tuple[int, ...]
    settings: DiagnoseConfig

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
        return cls(dict(run.engines.scorers), heads, (), run.config.diagnose)

    @property
    def policies(self) -> tuple[str, ...]:
        """Roles that are compared with base, in a fixed order."""
        return tuple(role for role in ("aligned", "student") if role in self.sources)

    def rows(self, samples: Sequence[DiagnosisSample]) -> Iterator[tuple[_Batch, dict[str, DiagnosisRows]]]:
        """Yields batches of samples with their rows, token after token and sample after sample."""
        given = self.settings
        settings = DiagnosisSettings(given.tau, given.margin, given.kappa, given.chunk_tokens)
        for batch, hidden in self.hidden_states(samples):
            policies = {role: (hidden[role], self.heads[role]) for role in self.policies}
            lengths = torch.tensor([len(sample.answer_ids) for sample in batch], device=hidden["base"].device)
            prompt_N = torch.arange(len(batch), device=lengths.device).repeat_interleave(lengths)
            opening = Opening.of_rows(hidden["aligned"], self.heads["aligned"], prompt_N)
            base = hidden["base"], self.heads["base"]
            yield batch, diagnose_rows(policies, *base, opening, self.refusal_ids, settings)

    def hidden_states(self, samples: Sequence[DiagnosisSample]) -> Iterator[tuple[_Batch, dict[str, torch.Tensor]]]:
        """Yields batches of samples with [N, H] hidden states of every role; few batches are under way at a time."""

        def collected(batch: _Batch, references: Mapping[str, Any]) -> tuple[_Batch, dict[str, torch.Tensor]]:
            found = {role: torch.cat(self.sources[role].collect_tensors(asked)) for role, asked in references.items()}
            return batch, {role: hidden.to(self.heads[role].weight_VH.device) for role, hidden in found.items()}

        pending: deque[tuple[_Batch, dict[str, Any]]] = deque()
        for batch in token_batches(samples, self.settings.batch_tokens):
            sequences = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in batch]
            pending.append((batch, {role: source.submit_sequences(sequences) for role, source in self.sources.items()}))
            if len(pending) > self.settings.in_flight:
                yield collected(*pending.popleft())
        while pending:
            yield collected(*pending.popleft())


def token_batches(samples: Sequence[DiagnosisSample], batch_tokens: int) -> Iterator[_Batch]:
    """Consecutive samples of at most `batch_tokens` tokens together, and at least one."""
    batch: _Batch = []
    tokens = 0
    for sample in samples:
        tokens += (size := len(sample.prompt_ids) + len(sample.answer_ids))
        if batch and tokens > batch_tokens:
            yield batch
            batch, tokens = [], size
        batch.append(sample)
    if batch:
        yield batch


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
    teacher = run.config.teacher.model_copy(update={"cache_gib": 0.0})
    uncached = replace(run, config=run.config.model_copy(update={"teacher": teacher}))
    parity = parity_sequences(run.models.codec, prompts, teacher.parity_prompts, run.config.models.max_length)
    roles: tuple[ModelRole, ...] = ("aligned", "base", "student")
    scored = tuple(role for role in roles if role in run.models.paths)
    with uncached.start_engines(parity_sequences=parity, scored=scored) as run.engines:
        yield


def parity_sequences(
    codec: ChatCodec, prompts: Iterable[Prompt], count: int, max_length: int
) -> list[tuple[tuple[int, ...], int]]:
    """Makes the sequences of the parity check: a prompt and a few response tokens, at most `max_length`, and the
    prompt's length. Prompts that leave no room for a response are passed over.
    """
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

    Given texts (`diagnose.refusal_starts`) give their first tokens. Otherwise: the aligned model's likeliest first
    tokens on harmful prompts, where it finds them at least twice as likely as base does. The definition is ours.
    """
    if measurement.settings.refusal_starts:
        return list(dict.fromkeys(codec.encode_answer(text)[0] for text in measurement.settings.refusal_starts))
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
