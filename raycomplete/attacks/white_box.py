"""A torch model whose distributions and gradients an attacker can see. Imports no transformers.

Shape letters beside the usual ones: S suffix tokens, C candidates, K tokens asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycomplete.attacks.target import FloatArray, SuffixProblem
from raycomplete.data.families import embedding_scale
from raycomplete.runtime.types import Codec

_CLASSIFIED_TOGETHER = 64


class TorchModel:
    """A causal language model of transformers in evaluation mode (implements `raycomplete.attacks.target.WhiteBox`).

    Two caches of keys and values save most of the work: that of the fixed words before a suffix, and that of the last
    batch of sequences. A caller extends its rows by one token a call; rows may go back before that, or be left out.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.requires_grad_(False)
        self._device = next(model.parameters()).device
        self._prefix: tuple[tuple[int, ...], Any] | None = None
        self._last: _Read | None = None

    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
        values_BK, ids_BK = self._next_logprobs(sequences).topk(min(top, self.vocab_size()), dim=-1)
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
        """Log-probabilities of the next token of each sequence, [B, V]; one token a row where the rest was read."""
        rows = [tuple(sequence) for sequence in sequences]
        if self._last is not None and self._last.rows == rows:
            return self._last.logprobs_BV
        known = self._extendable(rows)
        with torch.no_grad():
            if known is not None:
                cache, mask_BT, has_gaps = known
                ids_BT = self._ids([row[-1:] for row in rows])
                mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
                positions_BT = mask_BT.sum(dim=1, keepdim=True) - 1
            else:
                longest = max(map(len, rows))
                ids_BT = self._ids([[0] * (longest - len(row)) + list(row) for row in rows])
                mask_BT = self._ids([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
                positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
                cache, has_gaps = None, False
            self._last = None  # whose cache the call below lengthens
            output = self._model(
                ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logprobs_BV = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
        self._last = _Read(rows, output.past_key_values, mask_BT, has_gaps, logprobs_BV)
        return logprobs_BV

    def _extendable(self, rows: Sequence[tuple[int, ...]]) -> tuple[Any, Tensor, bool] | None:
        """Finds keys and values of all but the last token of each row among what was read last.

        A row may go back: the tokens that it gave up stay in the cache and are masked, and positions say what comes
        after what. That holds where every layer attends to all that it keeps, so other layers read such rows anew.
        Rows that were left out are dropped; the others keep their order.

        Returns:
            The cache, the mask of its slots, [B, T], and whether some were given up; None where the rows have to be
            read anew.
        """
        if self._last is None:
            return None
        places: list[int] = []
        place = 0
        for row in rows:
            while place < len(self._last.rows) and self._last.rows[place][: len(row) - 1] != row[:-1]:
                place += 1
            if place == len(self._last.rows):
                return None
            places.append(place)
            place += 1
        went_back = any(len(self._last.rows[place]) >= len(row) for place, row in zip(places, rows, strict=True))
        cache, mask_BT = self._last.cache, self._last.mask_BT
        has_gaps = self._last.has_gaps or went_back
        if has_gaps and not _attends_to_all(cache, mask_BT.shape[1]):
            return None
        if len(places) < len(self._last.rows):
            kept_B = self._ids(places)
            cache.batch_select_indices(kept_B)
            mask_BT = mask_BT[kept_B]
        if went_back:
            kept_B1 = self._ids([[len(row) - 1] for row in rows])
            mask_BT = mask_BT * (mask_BT.cumsum(dim=1) <= kept_B1)
        return cache, mask_BT, has_gaps

    def _ids(self, ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


class TokenClassifier:
    """A model that labels tokens: 1 where the answer is harmful so far (implements `PrefillHelper` of `target`).

    It reads prompt and answer in its own template. That only its label at the last token counts, and that the larger of
    two labels decides, is the rule of arXiv 2512.05518.
    """

    def __init__(self, model: Any, codec: Codec) -> None:
        self._model, self._codec = model.requires_grad_(False), codec
        self._device = next(model.parameters()).device

    def accepts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Tells for each prompt and beginning of an answer whether the label of its last token is 1."""
        rows = [
            [*self._codec.encode_prompt(prompt), *self._codec.encode_answer(answer)]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        found: list[bool] = []
        for start in range(0, len(rows), _CLASSIFIED_TOGETHER):
            batch = rows[start : start + _CLASSIFIED_TOGETHER]
            longest = max(map(len, batch))
            ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=self._device)
            lengths_B = torch.tensor([len(row) for row in batch], device=self._device)
            mask_BT = (torch.arange(longest, device=self._device) < lengths_B[:, None]).long()
            with torch.no_grad():
                logits_BT2 = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
            last_B2 = logits_BT2[torch.arange(len(batch), device=self._device), lengths_B - 1]
            found += (last_B2.argmax(dim=-1) == 1).tolist()
        return found


@dataclass(frozen=True, slots=True)
class _Read:
    """The last batch that was read; a slot of the cache is masked where it is padding or was given up."""

    rows: list[tuple[int, ...]]
    cache: Any
    mask_BT: Tensor
    has_gaps: bool
    logprobs_BV: Tensor


def _attends_to_all(cache: Any, num_slots: int) -> bool:
    """Tells whether every layer keeps the keys and values of all slots, and the next token attends to all of them."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(
        getattr(layer, "keys", None) is not None
        and not hasattr(layer, "recurrent_states")
        and (getattr(layer, "sliding_window", None) or num_slots + 1) > num_slots
        for layer in layers
    )
