"""PRESTO: refusal augmentation that also takes attention away from the prefill.

Source: arXiv 2512.05518; its code, uiuc-focal-lab/push-forward-alignment (`deep_safety_alignment.py`). Beside the
cross-entropy of `augmentation`, with cuts D in 1 .. min(100, |h|) - 1: for each layer of N and each query q from the
first token of h to the end of r, summed over the H heads, with A the attention that q pays,

    A(q -> h so far) - A(q -> all before h) - A(q -> r so far) + H,  divided by N

As attention sums to 1 this is twice the attention on h. All is divided by the tokens of refusals, harmless answers and
prefills of a step. The weight is 1.

Theirs besides: `train: {lr: 2.0e-5}`, linear decay, 10 epochs, 4 devices with batches of 2 safety and 8 utility
sequences, twice accumulated (the defaults here). The student computes its attention eagerly: each layer holds
[B, H, T, T], so keep `train.per_device_batch_size` small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raycomplete.methods.registry import OwnTerm, RecoveryItem, RowSpan, StudentPass, TrainSequence, register
from raycomplete.methods.rivals.augmentation import Augmentation
from raycomplete.methods.rivals.shared import refusal_after

if TYPE_CHECKING:
    from torch import Tensor


def attention_on_prefill(attention_BHTT: Tensor, row_R: Tensor, first_R: Tensor, length_R: Tensor) -> Tensor:
    """Twice the attention on the prefill, summed over heads [R].

    Args:
        attention_BHTT: Attention of one layer, query before key.
        row_R: Flat positions b * T + t of the queries.
        first_R: Flat position of the first token of each query's prefill.
        length_R: Tokens of that prefill.
    """
    import torch

    size = attention_BHTT.shape[-1]
    paid_RHT = attention_BHTT.transpose(1, 2).flatten(0, 1)[row_R]
    behind_RT = torch.arange(size, device=row_R.device) - (first_R % size)[:, None]  # bfloat16 ends counting at 256
    is_prefill_RT = (behind_RT >= 0) & (behind_RT < length_R[:, None])
    precise = torch.promote_types(paid_RHT.dtype, torch.float32)
    return 2 * (paid_RHT * is_prefill_RT[:, None]).sum(dim=(1, 2), dtype=precise)


@register
class PRESTO(Augmentation):
    """Refusal augmentation, and as little attention on the prefill as possible."""

    name: Literal["presto"] = "presto"  # type: ignore[assignment]

    attention_weight: ClassVar[float] = 1.0
    published = (("train.lr", 2e-05),)  # type: ignore[assignment]
    departures = (*Augmentation.departures, "the last token of a refusal pays no attention")  # type: ignore[assignment]
    terms = (OwnTerm("presto", "PRESTO", "twice the attention on the prefill, mean over layers"),)

    def loss_weights(self) -> dict[str, float]:
        return {"nll": 1.0, "presto": self.attention_weight}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        """Adds a row of attention for each token of h and r that is read to the sequence of `augmentation`."""
        cut = item.redrawn_cut(self.plain_fraction, spare=1)
        plain = refusal_after(item, cut, "nll")
        start = len(item.sample.prompt_ids) + 1
        spans = (RowSpan("presto", start, len(plain.token_ids) - start),) if cut else ()
        return (replace(plain, spans=(*plain.spans, *spans)),)

    def normalisers(self, sequences: Iterable[TrainSequence]) -> dict[str, float]:
        """Tokens of refusals, harmless answers and prefills for both terms."""
        tokens = sum(max(item.depth, 0) + item.spans[0].count for item in sequences if item.spans)
        return {"nll": tokens, "presto": tokens}

    def student_pass(self, lm: Any) -> StudentPass:
        """Keeps the attention of every layer."""
        import torch

        from raycomplete.losses.torch_rows import TermRows

        lm.set_attn_implementation("eager")

        def run(student: Any, batch: Any) -> Any:
            found = student.states(batch, output_attentions=True)
            own_N = batch.term_N == batch.terms.index("presto")
            row_R, sequence_R = batch.row_N[own_N], batch.sequence_N[own_N]
            first_S = batch.depth_S.new_zeros(len(batch.depth_S))
            first_S = first_S.scatter_reduce(0, sequence_R, row_R, "amin", include_self=False)
            places = (row_R, first_S[sequence_R], batch.depth_S[sequence_R])
            layers = [attention_on_prefill(attention_BHTT, *places) for attention_BHTT in found.attentions]
            loss_R = torch.stack(layers).mean(dim=0)
            return student.total(found.last_hidden_state, batch, {"presto": TermRows(loss_R)})

        return run
