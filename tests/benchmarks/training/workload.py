"""The workload that every trainer is given, and the result that it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

Sequence = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and answer as token ids."""


@dataclass(frozen=True)
class Workload:
    """One short run: distil the teacher into the student on given answers with forward KL, full fine-tuning with AdamW.

    Where teachers read ahead, the last steps find their scores ready, so `tail_steps` are not counted.
    """

    student: Path
    teacher: Path
    vocab_size: int
    batch: int = 8
    per_device_batch_size: int = 4
    warmup_steps: int = 1
    counted_steps: int = 3
    tail_steps: int = 1
    threads: int = 1
    seed: int = 0
    lr: float = 1e-5

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.counted_steps + self.tail_steps

    @property
    def accumulation(self) -> int:
        return self.batch // self.per_device_batch_size

    def sequences(self) -> list[Sequence]:
        """Random tokens; lengths as of chat prompts with short answers. Every sequence is trained once."""
        rng = np.random.default_rng([self.seed, 1])

        def tokens(low: int, high: int) -> tuple[int, ...]:
            return tuple(int(token) for token in rng.integers(5, self.vocab_size, rng.integers(low, high)))

        return [(tokens(20, 60), tokens(40, 160)) for _ in range(self.batch * self.steps)]


@dataclass(frozen=True)
class Throughput:
    """The counted steps of one run: tokens of prompts and answers, wall-clock and processor time of all threads.

    Processor time is what a busy machine distorts least; None where the work is spread over processes.
    """

    tokens: int
    seconds: float
    cpu_seconds: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float | None:
        return None if self.cpu_seconds is None else self.tokens / self.cpu_seconds

    @classmethod
    def of_steps(
        cls, workload: Workload, tokens: list[int], seconds: list[float], cpu_marks: list[float] | None
    ) -> Throughput:
        """From one entry a step; of processor time, its reading where each step begins."""
        assert len(tokens) >= workload.steps, "the trainer read fewer batches than the workload has"
        assert len(seconds) == workload.steps, "the trainer made another number of steps than the workload has"
        counted = slice(workload.warmup_steps, workload.warmup_steps + workload.counted_steps)
        cpu_seconds = None if cpu_marks is None else cpu_marks[counted.stop] - cpu_marks[counted.start]
        return cls(sum(tokens[counted]), sum(seconds[counted]), cpu_seconds)
