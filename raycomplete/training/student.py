"""The student and its loss as one module, which is what DeepSpeed wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycomplete.data.heads import HeadSpec
from raycomplete.data.samples import AnchorSample
from raycomplete.diagnosis.rows import PROFILE_METRICS, DiagnosisSettings, Opening, diagnose_rows
from raycomplete.losses.base_favored import base_favored_mask
from raycomplete.losses.chunked_pass import rows_per_chunk
from raycomplete.losses.heads import Head, HiddenStates
from raycomplete.losses.loss import LossInputs, LossOutput, distillation_loss
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.torch_rows import TermRows
from raycomplete.runtime.section import Dtype
from raycomplete.training.batches import MicroBatch, answer_batch

_COPIES_OF_LOGITS = 6  # of three models, and their log-softmax
# Mean |log p - log p'| in nats. Another batch shape moves bfloat16 by hundredths; a neighbour's words by whole nats.
_TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.15}


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """Sequences [B, T] that the student continues by `max_tokens`, padded on the left; the mask is 0 on padding."""

    input_ids_BT: Tensor
    mask_BT: Tensor
    max_tokens: int

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], max_tokens: int) -> PrefixBatch:
        """Pads sequences."""
        shape = (len(sequences), max(map(len, sequences)))
        input_ids_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            input_ids_BT[row, -len(sequence) :] = torch.tensor(sequence)
            mask_BT[row, -len(sequence) :] = 1
        return cls(input_ids_BT, mask_BT, max_tokens)

    def to(self, device: torch.device) -> PrefixBatch:
        """The same on another device."""
        return PrefixBatch(self.input_ids_BT.to(device), self.mask_BT.to(device), self.max_tokens)


class HeadLoss(nn.Module):
    """Everything that reads the student's output head, so that ZeRO-3 gathers it around this module and nowhere else.

    The head belongs to the language model (often tied to its embedding), so it is held outside the module tree and
    announced to DeepSpeed as an external parameter.
    """

    def __init__(
        self,
        lm_head: nn.Module,
        spec: HeadSpec,
        teachers: dict[str, Head],
        loss: LossSettings,
        *,
        external: bool,
    ) -> None:
        super().__init__()
        self._held = [lm_head]
        self._spec, self._teachers, self._loss = spec, teachers, loss
        # KL(aligned || student), whatever divergence and temperature the method trains.
        self._anchor_kl = LossSettings({"anchor": 1.0}, chunk_tokens=loss.chunk_tokens, backend=loss.backend)
        if external:
            from deepspeed import zero

            for parameter in lm_head.parameters():
                zero.register_external_parameter(self, parameter)

    @property
    def vocab_size(self) -> int:
        """Tokens that the student may say."""
        return self._spec.vocab_size

    def head(self) -> Head:
        """The student's head as it is now; under ZeRO-3 only inside `forward`."""
        lm_head: Any = self._held[0]
        head = Head(lm_head.weight, getattr(lm_head, "bias", None), self._spec.scale, self._spec.softcap)
        return head.rows(self._spec.vocab_size)

    def forward(self, mode: str, hidden_NH: Tensor, batch: MicroBatch | None = None) -> tuple[Tensor, ...]:
        """Computes from hidden states what a mode of `StudentModule.forward` wants; next tokens without a batch.

        The result is a plain tuple of tensors, because DeepSpeed's hooks look for tensors in tuples only.
        """
        if batch is None:
            return (self.head().logits(hidden_NH).argmax(-1),)
        if mode in ("loss", "anchor_kl"):
            inputs = LossInputs(
                HiddenStates(hidden_NH, self.head()),
                self._states("aligned", batch.aligned_hidden_PH),
                self._states("base", batch.base_hidden_PH),
                batch.term_N,
                batch.weight_N,
                batch.token_N,
                batch.sequence_N,
            )
            # A step of training with NaN is left out by `BadSteps`; an exception of one rank would end the run.
            settings = self._loss if mode == "loss" else self._anchor_kl
            return distillation_loss(inputs, settings, must_be_finite=not self.training).flatten()
        if mode == "log_probs":
            losses = [
                nn.functional.cross_entropy(self.head().logits(hidden_CH), token_C, reduction="none")
                for hidden_CH, token_C in self._chunks(hidden_NH, batch.token_N)
            ]
            return (-torch.cat(losses),)
        assert batch.aligned_hidden_PH is not None
        assert batch.base_hidden_PH is not None
        settings_of_rows = DiagnosisSettings.of_loss(self._loss)
        opening = Opening.of_rows(batch.aligned_hidden_PH, self._teachers["aligned"], batch.sequence_N)
        if mode == "along_h":
            return self._along_h(hidden_NH, batch.base_hidden_PH, opening, settings_of_rows)
        policies = {
            "aligned": (batch.aligned_hidden_PH, self._teachers["aligned"]),
            "student": (hidden_NH, self.head()),
        }
        base = self._teachers["base"]
        rows = diagnose_rows(policies, batch.base_hidden_PH, base, opening, (), settings_of_rows)
        return tuple(rows[role].column(name) for role in policies for name in PROFILE_METRICS)

    def _states(self, role: str, hidden_PH: Tensor | None) -> HiddenStates | None:
        return None if hidden_PH is None else HiddenStates(hidden_PH, self._teachers[role])

    def _along_h(
        self, hidden_NH: Tensor, base_hidden_NH: Tensor, opening: Opening, settings: DiagnosisSettings
    ) -> tuple[Tensor, Tensor]:
        """Counts tokens likelier than base's likeliest one, and sums the student's mass on base-favored ones [N].

        Where its logits are NaN the rank is 0 and the mass NaN.
        """
        ranks, masses = [], []
        for hidden_CH, base_CH, prompt_C in self._chunks(hidden_NH, base_hidden_NH, opening.prompt_N):
            student_CV = self.head().logits(hidden_CH).log_softmax(-1)
            base_CV = self._teachers["base"].logits(base_CH).log_softmax(-1)
            opening_CV = opening.head.logits(opening.hidden_PH[prompt_C]).log_softmax(-1)
            ranks.append((student_CV > student_CV.gather(1, base_CV.argmax(-1, keepdim=True))).sum(-1))
            favored_CV = base_favored_mask(opening_CV, base_CV, settings.tau, settings.margin)
            masses.append((student_CV.exp() * favored_CV).sum(-1))
        return torch.cat(ranks), torch.cat(masses)

    def _chunks(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A few rows of each tensor at a time, as many as there is memory for their logits."""
        vocab_size, limit = self._spec.vocab_size, self._loss.chunk_tokens
        size = rows_per_chunk(limit, vocab_size, torch.float32, rows[0].device, copies=_COPIES_OF_LOGITS)
        return zip(*(values.split(size) for values in rows), strict=True)


class StudentModule(nn.Module):
    """A causal language model that returns its loss instead of its logits."""

    def __init__(
        self,
        lm: Any,
        spec: HeadSpec,
        teachers: dict[str, Head],
        loss: LossSettings,
        *,
        external_head: bool,
        student_pass: Callable[[StudentModule, MicroBatch], LossOutput] | None = None,
    ) -> None:
        super().__init__()
        self.lm, self.loss, self.student_pass = lm, loss, student_pass
        self.head_loss = HeadLoss(lm.get_output_embeddings(), spec, teachers, loss, external=external_head)

    def forward(self, batch: MicroBatch | PrefixBatch, mode: str = "loss") -> tuple[Tensor, ...]:
        """Reads a micro-batch, or continues the sequences of a `PrefixBatch` greedily (token ids [B, max_tokens]).

        The mode "loss" gives `LossOutput.flatten`; "anchor_kl" the same of anchor rows, whose first value is the
        weighted sum of KL(aligned || student); "log_probs" log p_s of the token of each row; "along_h" by row the rank
        of base's likeliest token among the student's, from 0, and the unfinished mass; "profile" mass, KL and deficit
        by row of aligned, then of the student.
        """
        if isinstance(batch, PrefixBatch):
            return (self._continue(batch),)
        if mode == "loss" and self.student_pass is not None:
            return self.student_pass(self, batch).flatten()
        return self._read_rows(mode, self.states(batch).last_hidden_state, batch)

    def _read_rows(self, mode: str, hidden_BTH: Tensor, batch: MicroBatch) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.head_loss(mode, hidden_BTH.flatten(0, 1)[batch.row_N], batch)
        return result

    def states(self, batch: MicroBatch, **wanted: bool) -> Any:
        """The model's output without its head: `last_hidden_state`, and what is wanted (`output_attentions=True`)."""
        return self.lm.base_model(**batch.model_inputs(), **wanted)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model that the student started from, while LoRA adapters are off."""
        adapted = [module for module in self.lm.modules() if hasattr(module, "lora_A")]
        for module in adapted:  # `enable_adapters` would also switch requires_grad, which DeepSpeed's hooks watch
            module._disable_adapters = True
        try:
            yield
        finally:
            for module in adapted:
                module._disable_adapters = False

    def total(self, hidden_BTH: Tensor, batch: MicroBatch, found: Mapping[str, TermRows]) -> LossOutput:
        """The loss of a batch, for a pass that has computed the rows of some terms itself, which read no teacher."""
        output = LossOutput.unflatten(self._read_rows("loss", hidden_BTH, batch.without(tuple(found))), self.loss)
        total, row_loss_N = output.total, output.row_loss_N.new_zeros(len(batch.term_N))
        is_rest_N = torch.ones_like(batch.term_N, dtype=torch.bool)
        for name, rows in found.items():
            own_N = batch.term_N == self.loss.names.index(name)
            is_rest_N &= ~own_N
            loss = (batch.weight_N[own_N] * rows.loss_R).sum()
            total = total + self.loss.weights[name] * loss
            row_loss_N[own_N] = rows.loss_R.detach().to(row_loss_N.dtype)
            output.losses[name] = loss.detach()
            output.metrics.update({metric: values_R.detach() for metric, values_R in rows.metrics.items()})
        row_loss_N[is_rest_N] = output.row_loss_N
        return LossOutput(total, output.losses, row_loss_N, output.metrics)

    def _continue(self, batch: PrefixBatch) -> Tensor:
        """Greedy tokens [B, max_tokens]; what follows an end-of-response is for the caller to cut.

        The number of forward passes depends on nothing that ranks could differ in: under ZeRO-3 each gathers weights.
        """
        mask_BT = batch.mask_BT
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        token_BT, cache, found = batch.input_ids_BT, None, []
        for _ in range(batch.max_tokens):
            states = self.lm.base_model(
                input_ids=token_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
            )
            cache = states.past_key_values
            (token_B,) = self.head_loss("next", states.last_hidden_state[:, -1])
            token_BT = token_B[:, None]
            found.append(token_BT)
            mask_BT = torch.cat([mask_BT, torch.ones_like(token_BT)], dim=1)
            position_BT = position_BT[:, -1:] + 1
        return torch.cat(found, dim=1)


def widening_size(config: Any) -> int | None:
    """Returns the hidden size by which packed rows may be wider than their longest sequence; None where they must not.

    Eager attention keeps scores of the width squared for the backward pass. Attention in chunks counts columns, and
    would cut a sequence that begins late in a row.
    """
    text = config.get_text_config()
    if text._attn_implementation == "eager" or getattr(text, "attention_chunk_size", None):
        return None
    size: int = text.hidden_size
    return size


def keeps_sequences_apart(engine: Any, sample: AnchorSample, dtype: Dtype) -> bool:
    """Tells whether the student keeps packed sequences apart; some model families do not. Every rank must call this.

    The student reads a sequence whole and its two halves packed into one row, and each of the three in a row of its
    own: log-probabilities must be the same up to rounding. Models that ignore positions when they build their mask, and
    recurrent ones, let the second half see the first. Any sample will do.
    """
    tokens = sample.prompt_ids + sample.answer_ids
    half = len(tokens) // 2
    pieces = [piece for piece in (tokens, tokens[:half], tokens[half:]) if len(piece) > 1]
    samples = [AnchorSample("probe", piece[:1], piece[1:]) for piece in pieces]
    found = []
    engine.eval()
    with torch.no_grad():
        for packed in (True, False):
            (log_probs_N,) = engine(answer_batch(samples, packed=packed).to(engine.device), "log_probs")
            found.append(torch.as_tensor(log_probs_N).float().cpu())
    engine.train()
    return float((found[0] - found[1]).abs().mean()) <= _TOLERANCE[dtype]
