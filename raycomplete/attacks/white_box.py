"""A torch model whose distributions and gradients an attacker can see. Imports no transformers.

Shape letters beside the usual ones: S suffix tokens, C candidates, K tokens asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raycomplete.attacks.target import FloatArray, SuffixProblem
from raycomplete.data.families import embedding_scale


class TorchModel:
    """A causal language model of transformers in evaluation mode (implements `raycomplete.attacks.target.WhiteBox`).

    Two caches of keys and values save most of the work: that of the fixed words before a suffix, and that of the last
    batch of sequences, which a caller extends by one token a call.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.requires_grad_(False)
        self._device = next(model.parameters()).device
        self._prefix: tuple[tuple[int, ...], Any] | None = None
        self._last: tuple[list[tuple[int, ...]], Any, Tensor] | None = None

    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
        values_BK, ids_BK = self._next_logprobs(sequences).topk(top, dim=-1)
        rows = zip(ids_BK.tolist(), values_BK.tolist(), strict=True)
        return [list(zip(ids, values, strict=True)) for ids, values in rows]

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        logprobs_BV = self._next_logprobs(sequences)
        return [row_V[list(asked)].tolist() for row_V, asked in zip(logprobs_BV, tokens, strict=True)]

    def suffix_gradient(self, problem: SuffixProblem, suffix: Sequence[int]) -> FloatArray:
        embedding_VH = self._model.get_input_embeddings()
        num_tokens = int(embedding_VH.weight.shape[0])
        one_hot_SV = torch.nn.functional.one_hot(self._ids(suffix), num_tokens).to(embedding_VH.weight.dtype)
        one_hot_SV.requires_grad_(True)
        scale = embedding_scale(embedding_VH, self._ids(suffix))
        tail_TH = embedding_VH(self._ids([*problem.after, *problem.target]))
        inputs_1TH = torch.cat([scale * (one_hot_SV @ embedding_VH.weight), tail_TH])[None]
        with torch.enable_grad():
            loss_1 = self._target_loss(problem, len(suffix), inputs_embeds=inputs_1TH)
            (gradient_SV,) = torch.autograd.grad(loss_1.sum(), one_hot_SV)
        result: FloatArray = gradient_SV.float().cpu().numpy()
        return result

    def suffix_losses(self, problem: SuffixProblem, suffixes: Sequence[Sequence[int]]) -> list[float]:
        rows_CT = self._ids([[*suffix, *problem.after, *problem.target] for suffix in suffixes])
        with torch.no_grad():
            losses: list[float] = self._target_loss(problem, len(suffixes[0]), input_ids=rows_CT).tolist()
        return losses

    def _target_loss(self, problem: SuffixProblem, num_suffix: int, **inputs: Tensor) -> Tensor:
        """Computes the mean cross-entropy of the target for each row of inputs that follow `problem.before`, [C]."""
        count = next(iter(inputs.values())).shape[0]
        cache = copy.deepcopy(self._prefix_cache(problem.before))  # which the call below lengthens
        cache.batch_repeat_interleave(count)
        logits_CTV = self._model(**inputs, past_key_values=cache, use_cache=True).logits
        start = num_suffix + len(problem.after) - 1
        predicted_CTV = logits_CTV[:, start : start + len(problem.target)].float()
        target_CT = self._ids(problem.target).expand(count, -1)
        loss_CT = torch.nn.functional.cross_entropy(predicted_CTV.transpose(1, 2), target_CT, reduction="none")
        return loss_CT.mean(dim=1)

    def _prefix_cache(self, before: tuple[int, ...]) -> Any:
        """Reads the fixed words, one row, and keeps their keys and values."""
        if self._prefix is None or self._prefix[0] != before:
            with torch.no_grad():
                self._prefix = (before, self._model(self._ids([list(before)]), use_cache=True).past_key_values)
        return self._prefix[1]

    def _next_logprobs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of the next token of each sequence, [B, V]; a batch one token longer takes one step."""
        rows = [tuple(sequence) for sequence in sequences]
        with torch.no_grad():
            if self._last is not None and [row[:-1] for row in rows] == self._last[0]:
                _, cache, mask_BT = self._last
                ids_BT = self._ids([row[-1:] for row in rows])
                mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
                positions_BT = mask_BT.sum(dim=1, keepdim=True) - 1
            else:
                longest = max(map(len, rows))
                ids_BT = self._ids([[0] * (longest - len(row)) + list(row) for row in rows])
                mask_BT = self._ids([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
                positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
                cache = None
            output = self._model(
                ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True
            )
            self._last = (rows, output.past_key_values, mask_BT)
            return torch.log_softmax(output.logits[:, -1].float(), dim=-1)

    def _ids(self, ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)
