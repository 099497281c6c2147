"""TRL's two distillation trainers on given answers, forward KL, float32 weights under bfloat16 autocast (its default).

GKDTrainer is TRL's off-policy trainer (lmbda=0, beta=0) and runs as it is; its logits are materialised.
DistillationTrainer (chunked loss) samples every answer itself, so sampling is replaced by the given answers: only its
training is measured. Both read the teacher in the trainer's process in bfloat16 and keep their default optimizer.
Gradient checkpointing is off.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch

from tests.benchmarks.training.workload import Sequence, Throughput, Workload

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
_IGNORED = -100


def run_gkd(workload: Workload) -> Throughput:
    """`GKDTrainer` with batches collated from the given ids; call it in a process of its own."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return _run(workload, GKDTrainer, GKDConfig, {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "max_length": None})


def run_distillation(workload: Workload) -> Throughput:
    """`DistillationTrainer` with the given answers in place of its sampling; call it in a process of its own."""
    from trl import DistillationConfig, DistillationTrainer

    class OnGivenAnswers(DistillationTrainer):
        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            rows = [sequences[int(prompt)] for prompt in prompts]
            tokens.append(_count(rows))
            return [list(prompt) for prompt, _ in rows], [list(answer) for _, answer in rows], None, None, None

    sequences = workload.sequences()
    tokens: list[int] = []
    return _run(workload, OnGivenAnswers, DistillationConfig, {"beta": 0.0}, tokens_by_step=tokens)


def _run(
    workload: Workload, trainer_type: Any, config_type: Any, options: dict[str, Any], tokens_by_step: Any = None
) -> Throughput:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from raycomplete.data.checkpoints import load_model

    torch.set_num_threads(workload.threads)
    sequences = workload.sequences()
    collator = _Collator(sequences, workload.accumulation)
    tokenizer = AutoTokenizer.from_pretrained(str(workload.student))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    gkd = tokens_by_step is None
    clock = _clock()
    with tempfile.TemporaryDirectory() as folder:
        config = config_type(
            output_dir=folder,
            per_device_train_batch_size=workload.per_device_batch_size,
            gradient_accumulation_steps=workload.accumulation,
            max_steps=workload.steps,
            learning_rate=workload.lr,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=workload.seed,
            **options,
        )
        trainer = trainer_type(
            model=str(workload.student),
            teacher_model=load_model(workload.teacher, "bfloat16"),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [str(index) for index in range(len(sequences))]}),
            processing_class=tokenizer,
            callbacks=[clock],
            **({"data_collator": collator} if gkd else {}),
        )
        trainer.train()
    tokens = collator.tokens_by_step() if gkd else tokens_by_step
    return Throughput.of_steps(workload, tokens, clock.seconds, clock.cpu_marks)


class _Collator:
    """Right-padded batches, answers as labels; the loss is told which rows are prompt."""

    def __init__(self, sequences: list[Sequence], accumulation: int) -> None:
        self._sequences = sequences
        self._accumulation = accumulation
        self._tokens: list[int] = []

    def __call__(self, features: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        rows = [self._sequences[int(feature["prompt"])] for feature in features]
        self._tokens.append(_count(rows))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        attention_mask_BT, labels_BT = torch.zeros_like(input_ids_BT), torch.full_like(input_ids_BT, _IGNORED)
        for index, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            input_ids_BT[index, :end] = torch.tensor(prompt + answer)
            attention_mask_BT[index, :end] = 1
            labels_BT[index, len(prompt) : end] = torch.tensor(answer)
        return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}

    def tokens_by_step(self) -> list[int]:
        """Batches are collated in the order in which they are trained."""
        size = self._accumulation
        return [sum(self._tokens[start : start + size]) for start in range(0, len(self._tokens), size)]


def _count(rows: list[Sequence]) -> int:
    return sum(len(prompt) + len(answer) for prompt, answer in rows)


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Time from the end of a step to the end of the next, reading its batch included."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu_marks: list[float] = []
            self._last = 0.0

        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            self._last = time.perf_counter()
            self.cpu_marks.append(time.process_time())

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self._last)
            self.cpu_marks.append(time.process_time())
            self._last = now

    return Clock()
