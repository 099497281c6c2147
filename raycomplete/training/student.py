"""The student and its loss as one module, which is what DeepSpeed wraps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from raycomplete.diagnosis.rows import PROFILE_METRICS, DiagnosisSettings, diagnose_rows
from raycomplete.losses.chunks import rows_per_chunk
from raycomplete.losses.heads import Head
from raycomplete.losses.loss import distillation_loss
from raycomplete.losses.loss_types import LossOutput, LossSettings
from raycomplete.training.batches import MicroBatch

_CROSS_ENTROPY_COPIES = 3  # logits, their log-softmax and its gradient


@dataclass(frozen=True)
class HeadSettings:
    """What the student's head does besides its matrix product (see `raycomplete.losses.heads.Head`)."""

    scale: float
    softcap: float | None
    vocab_size: int


class HeadLoss(nn.Module):
    """Everything that reads the student's output head, so that ZeRO-3 gathers it around this module and nowhere else.

    The head belongs to the language model (often tied to its embedding), so it is held outside the module tree and
    announced to DeepSpeed as an external parameter.
    """

    def __init__(self, lm_head: nn.Module, settings: HeadSettings, *, external: bool) -> None:
        super().__init__()
        self._held = [lm_head]
        self.settings = settings
        if external:
            from deepspeed import zero

            for parameter in lm_head.parameters():
                zero.register_external_parameter(self, parameter)

    def head(self) -> Head:
        """The student's head as it is now; under ZeRO-3 only inside `forward`."""
        lm_head: Any = self._held[0]
        head = Head(lm_head.weight, getattr(lm_head, "bias", None), self.settings.scale, self.settings.softcap)
        return head.rows(self.settings.vocab_size)

    def forward(self, mode: str, hidden_NH: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Plain tuples of tensors, because DeepSpeed's hooks look for tensors in tuples only."""
        if mode == "completion":
            # A step of training with NaN is left out by `bad_steps`; an exception of one rank would end the run.
            return _to_tuple(distillation_loss(hidden_NH, self.head(), *arguments, must_be_finite=not self.training))
        if mode == "sft":
            return (self._cross_entropy(hidden_NH, *arguments),)
        if mode == "log_probs":
            return (self._log_probs(hidden_NH, *arguments),)
        return self._profile(hidden_NH, *arguments)

    def _profile(
        self, hidden_NH: Tensor, base_hidden_NH: Tensor, base: Head, settings: DiagnosisSettings
    ) -> tuple[Tensor, ...]:
        policies = {"student": (hidden_NH, self.head())}
        rows = diagnose_rows(policies, base_hidden_NH, base, (), settings)["student"]
        return tuple(rows.column(name) for name in PROFILE_METRICS)

    def _log_probs(self, hidden_NH: Tensor, target_N: Tensor, chunk_tokens: int) -> Tensor:
        """log p_s(target_n) [N], a chunk of logits at a time."""
        chunks = zip(hidden_NH.split(chunk_tokens), target_N.split(chunk_tokens), strict=True)
        losses = [
            nn.functional.cross_entropy(self.head().logits(hidden_CH), target_C, reduction="none")
            for hidden_CH, target_C in chunks
        ]
        return -torch.cat(losses)

    def _cross_entropy(self, hidden_NH: Tensor, target_N: Tensor, weight_N: Tensor, chunk_tokens: int) -> Tensor:
        """sum_n weight_n * -log p_s(target_n), a chunk of logits at a time."""

        def part(hidden_CH: Tensor, target_C: Tensor, weight_C: Tensor) -> Tensor:
            losses_C = nn.functional.cross_entropy(self.head().logits(hidden_CH), target_C, reduction="none")
            return (losses_C * weight_C).sum()

        chunks = zip(
            hidden_NH.split(chunk_tokens), target_N.split(chunk_tokens), weight_N.split(chunk_tokens), strict=True
        )
        if not torch.is_grad_enabled():
            return torch.stack([part(*chunk) for chunk in chunks]).sum()
        # Recomputing a chunk's logits in backward keeps one chunk of them alive at a time.
        losses = [torch.utils.checkpoint.checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()


class StudentModule(nn.Module):
    """A causal language model that returns its loss instead of its logits.

    Args:
        lm: Transformers model.
        settings: Its head's settings.
        teachers: Frozen heads by role; not parameters, so DeepSpeed neither shards nor trains them.
        loss: Settings of the completion loss.
        external_head: True under ZeRO-3.
    """

    def __init__(
        self, lm: Any, settings: HeadSettings, teachers: dict[str, Head], loss: LossSettings, *, external_head: bool
    ) -> None:
        super().__init__()
        self.lm = lm
        self.head_loss = HeadLoss(lm.get_output_embeddings(), settings, external=external_head)
        self._teachers = teachers
        self._loss = loss

    def forward(self, batch: MicroBatch, mode: str = "completion") -> tuple[Tensor, ...]:
        """Loss of a micro-batch.

        Args:
            batch: On the model's device.
            mode: "completion" (see `to_loss_output`), "sft" (one scalar), "profile" (mass, KL, deficit by row)
                or "log_probs" (log p_s of the target of each row).
        """
        hidden_BTH = self.lm.base_model(**batch.model_inputs()).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1)[batch.row_N]
        settings = self._loss
        if mode == "sft":
            return self._call(mode, hidden_NH, batch.target_N, batch.weight_N, self._chunk_rows(hidden_NH))
        if mode == "log_probs":
            return self._call(mode, hidden_NH, batch.target_N, self._chunk_rows(hidden_NH))
        base = self._teachers.get("base")
        if mode == "profile":
            walk = DiagnosisSettings.of_loss(settings)
            return self._call(mode, hidden_NH, batch.base_hidden_PH, base, walk)
        return self._call(
            mode,
            hidden_NH,
            batch.aligned_hidden_NH,
            self._teachers["aligned"],
            batch.base_hidden_PH,
            base,
            batch.kind_N,
            batch.weight_N,
            settings,
        )

    def _chunk_rows(self, hidden_NH: Tensor) -> int:
        """Rows whose float32 logits a cross-entropy may keep."""
        vocab_size = self.head_loss.settings.vocab_size
        return rows_per_chunk(
            self._loss.chunk_tokens, vocab_size, torch.float32, hidden_NH.device, copies=_CROSS_ENTROPY_COPIES
        )

    def _call(self, mode: str, hidden_NH: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.head_loss(mode, hidden_NH, *arguments)
        return result


def to_loss_output(values: tuple[Tensor, ...]) -> LossOutput:
    """The named result of `StudentModule` in mode "completion"."""
    return LossOutput(**dict(zip((field.name for field in fields(LossOutput)), values, strict=True)))


def _to_tuple(output: LossOutput) -> tuple[Tensor, ...]:
    return tuple(getattr(output, field.name) for field in fields(output))
