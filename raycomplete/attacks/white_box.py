"""A torch model whose distributions and gradients an attacker can see. Imports no transformers.

Shape letters beside the usual ones: S suffix tokens, C candidates, K tokens asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomplete.attacks.target import FloatArray, SuffixProblem
from raycomplete.data.families import embedding_scale
from raycomplete.data.openings import num_common
from raycomplete.runtime.types import Codec

_CLASSIFIED_TOGETHER = 64

_EMBEDDINGS_READ = 1024  # whose size stands for that of all
_LOSS_ELEMENTS = 2**22  # logits whose float32 copies exist at a time: a few MB stay in the processor's cache


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
        self._largest_batch = 2**30  # suffixes of one pass; lower once the device's memory was too small

    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
        values_BK, ids_BK = self.next_logprobs(sequences).topk(min(top, self.vocab_size()), dim=-1)
        rows = zip(ids_BK.tolist(), values_BK.tolist(), strict=True)
        return [list(zip(ids, values, strict=True)) for ids, values in rows]

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        logprobs_BV = self.next_logprobs(sequences)
        return [row_V[list(asked)].tolist() for row_V, asked in zip(logprobs_BV, tokens, strict=True)]

    def suffix_gradient(self, problem: SuffixProblem, suffix: Sequence[int]) -> FloatArray:
        embedding_VH = self._model.get_input_embeddings()
        num_tokens = int(embedding_VH.weight.shape[0])
        one_hot_SV = torch.nn.functional.one_hot(self._ids(suffix), num_tokens).to(embedding_VH.weight.dtype)
        one_hot_SV.requires_grad_(True)
        scale = embedding_scale(embedding_VH, self._ids(suffix))
        tail_TH = embedding_VH(self._ids([*problem.after, *problem.target[:-1]]))
        inputs_1TH = torch.cat([scale * (one_hot_SV @ embedding_VH.weight), tail_TH])[None]
        with torch.enable_grad():
            cache = _rows_of(self._prefix_cache(problem.before), len(problem.before), 1)
            loss_1 = self._target_loss(problem, cache, inputs_embeds=inputs_1TH)
            (gradient_SV,) = torch.autograd.grad(loss_1.sum(), one_hot_SV)
        return np.asarray(gradient_SV.float().cpu().numpy())

    def suffix_losses(self, problem: SuffixProblem, suffixes: Sequence[Sequence[int]], batch: int = 64) -> list[float]:
        """Reads each suffix from where it leaves the one that most of them share; keys and values before are read once.

        A batch that does not fit the memory of the device is halved, for later calls too.
        """
        distinct = list(dict.fromkeys(map(tuple, suffixes)))
        shared = tuple(Counter(column).most_common(1)[0][0] for column in zip(*distinct, strict=True))
        found: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            cache = self._prefix_cache(problem.before)
            if is_plain := _is_plain(cache) and len(distinct) > 1:
                cache, keep = _rows_of(cache, len(problem.before), 1), self._last_positions(1, len(shared))
                self._model(self._ids([shared]), past_key_values=cache, use_cache=True, logits_to_keep=keep)
            # The last token is read by every row, even by those that differ in none.
            starts = {row: min(num_common(row, shared), len(row) - 1) if is_plain else 0 for row in distinct}
            waiting = sorted(distinct, key=starts.__getitem__)  # neighbours leave at neighbouring positions
            while waiting:
                rows = waiting[: min(batch, self._largest_batch)]
                start = starts[rows[0]]
                ids_CT = self._ids([[*row[start:], *problem.after, *problem.target[:-1]] for row in rows])
                try:
                    past = _rows_of(cache, len(problem.before) + start, len(rows))
                    losses = self._target_loss(problem, past, input_ids=ids_CT).tolist()
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    self._largest_batch = len(rows) // 2
                    continue
                found.update(zip(rows, losses, strict=True))
                waiting = waiting[len(rows) :]
        return [found[tuple(suffix)] for suffix in suffixes]

    def suffix_embeddings(self, suffix: Sequence[int]) -> FloatArray:
        with torch.no_grad():
            return np.asarray(self._model.get_input_embeddings()(self._ids(suffix)).float().cpu().numpy())

    def descend(
        self, problem: SuffixProblem, suffix_SH: FloatArray, steps: int, lr: float
    ) -> tuple[FloatArray, list[float]]:
        embedding_VH = self._model.get_input_embeddings()
        some = torch.linspace(0, self.vocab_size() - 1, _EMBEDDINGS_READ, device=self._device).long()
        with torch.no_grad():
            step = lr * float(embedding_VH(some).float().square().mean().sqrt())
            tail_TH = embedding_VH(self._ids([*problem.after, *problem.target[:-1]]))
        moved_SH = torch.tensor(suffix_SH, device=self._device)
        losses: list[float] = []
        for _ in range(steps):
            leaf_SH = moved_SH.requires_grad_(True)
            inputs_1TH = torch.cat([leaf_SH.to(tail_TH.dtype), tail_TH])[None]
            with torch.enable_grad():
                cache = _rows_of(self._prefix_cache(problem.before), len(problem.before), 1)
                loss_1 = self._target_loss(problem, cache, inputs_embeds=inputs_1TH)
                (gradient_SH,) = torch.autograd.grad(loss_1.sum(), leaf_SH)
            losses.append(float(loss_1.detach()))
            moved_SH = leaf_SH.detach() - step * gradient_SH.sign()
        return np.asarray(moved_SH.detach().cpu().numpy()), losses

    def continue_embeddings(
        self, problem: SuffixProblem, suffixes: Sequence[FloatArray], max_tokens: int, eos_ids: Sequence[int]
    ) -> list[list[int]]:
        embedding_VH, ends = self._model.get_input_embeddings(), self._ids(list(eos_ids))
        with torch.no_grad():
            after_AH = embedding_VH(self._ids(problem.after))
            rows = [torch.cat([torch.tensor(row, device=self._device).to(after_AH), after_AH]) for row in suffixes]
            cache = _rows_of(self._prefix_cache(problem.before), len(problem.before), len(rows))
            inputs, said = {"inputs_embeds": torch.stack(rows)}, list[list[int]]()
            is_done_B = torch.zeros(len(rows), dtype=torch.bool, device=self._device)
            while len(said) < max_tokens and not bool(is_done_B.all()):
                length = next(iter(inputs.values())).shape[1]
                keep = self._last_positions(1, length)
                logits_B1V = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
                next_B = logits_B1V[:, -1].argmax(dim=-1)
                is_done_B |= torch.isin(next_B, ends)
                said.append(next_B.masked_fill(is_done_B, -1).tolist())
                inputs = {"input_ids": next_B[:, None]}
        return [[token for token in row if token >= 0] for row in zip(*said, strict=True)]

    def _target_loss(self, problem: SuffixProblem, cache: Any, **inputs: Tensor) -> Tensor:
        """Computes the mean cross-entropy of the target for each row of inputs that follow the cached words, [C]."""
        count = len(problem.target)
        keep = self._last_positions(count, next(iter(inputs.values())).shape[1])
        logits_CTV = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        target_T = self._ids(problem.target)
        rows = max(_LOSS_ELEMENTS // logits_CTV[0].numel(), 1)
        losses = []
        for part_CTV in logits_CTV.split(rows):
            flat_NV, targets_N = part_CTV.flatten(0, 1).float(), target_T.repeat(len(part_CTV))
            loss_N = torch.nn.functional.cross_entropy(flat_NV, targets_N, reduction="none")
            losses.append(loss_N.view(-1, count).mean(dim=1))
        return torch.cat(losses)

    def _prefix_cache(self, before: tuple[int, ...]) -> Any:
        """Reads the fixed words, one row, and keeps their keys and values."""
        if self._prefix is None or self._prefix[0] != before:
            with torch.no_grad():
                keep = self._last_positions(1, len(before))
                output = self._model(self._ids([list(before)]), use_cache=True, logits_to_keep=keep)
            self._prefix = (before, output.past_key_values)
        return self._prefix[1]

    def hidden_states(self, sequences: Sequence[Sequence[int]], layer: int) -> FloatArray:
        """States that a layer reads at the last token of each sequence, behind its first norm if it has one, [N, H]."""
        rows: list[Tensor] = []
        (layers,) = [part for part in self._model.modules() if isinstance(part, torch.nn.ModuleList)][:1]
        read = getattr(layers[layer], "input_layernorm", None)
        states: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            states.append(output if read is not None else inputs[0])

        hook = (layers[layer] if read is None else read).register_forward_hook(keep)
        try:
            with torch.no_grad():
                for start in range(0, len(sequences), _CLASSIFIED_TOGETHER):
                    batch = [list(row) for row in sequences[start : start + _CLASSIFIED_TOGETHER]]
                    longest = max(map(len, batch))
                    ids_BT = self._ids([row + [0] * (longest - len(row)) for row in batch])  # causal: what follows is
                    mask_BT = self._ids([[1] * len(row) + [0] * (longest - len(row)) for row in batch])  # not seen
                    states.clear()
                    self._model(ids_BT, attention_mask=mask_BT, logits_to_keep=1, use_cache=False)
                    rows += [states[0][index, len(row) - 1].float().cpu() for index, row in enumerate(batch)]
        finally:
            hook.remove()
        return np.asarray(torch.stack(rows).numpy())

    def num_layers(self) -> int:
        """Number of layers."""
        return int(self._model.config.get_text_config().num_hidden_layers)

    def next_logprobs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
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
                logits_to_keep=self._last_positions(1, ids_BT.shape[1]),
            )
            logprobs_BV = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
        self._last = _Read(rows, output.past_key_values, mask_BT, has_gaps, logprobs_BV)
        return logprobs_BV

    def _extendable(self, rows: Sequence[tuple[int, ...]]) -> tuple[Any, Tensor, bool] | None:
        """Finds cache, mask of its slots [B, T] and whether some were given up; None if rows have to be read again.

        The cache holds all but the last token of each row. A row may go back: the tokens that it gave up stay in the
        cache and are masked. That holds only if every layer attends to all that it keeps. Rows that were left out are
        dropped; the others keep their order.
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

    def _last_positions(self, count: int, length: int) -> Tensor:
        """Indices of the last positions, for `logits_to_keep`: given a number, torch copies the head for each row."""
        return torch.arange(length - count, length, device=self._device)

    def _ids(self, ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


class TokenClassifier:
    """A model that labels tokens: 1 where the answer is harmful so far (implements `PrefillHelper` of `target`).

    Only its label at the last token counts, and the larger of two labels decides: the rule of arXiv 2512.05518.
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
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(
        getattr(layer, "keys", None) is not None
        and not hasattr(layer, "recurrent_states")
        and (getattr(layer, "sliding_window", None) or num_slots + 1) > num_slots
        for layer in layers
    )


def _is_plain(cache: Any) -> bool:
    """Tells whether every layer keeps keys and values of all tokens, so that a start of them can be taken."""
    return all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


def _rows_of(cache: Any, length: int, count: int) -> Any:
    """Returns the first `length` tokens of a cache of one row, for `count` rows; reading on leaves the cache as it is.

    Plain layers are views, since reading on concatenates into new tensors. Others (sliding windows) are copied.
    """
    if not _is_plain(cache):
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(count)
        return copied
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        layer.keys = layer.keys[..., :length, :].expand(count, -1, -1, -1)
        layer.values = layer.values[..., :length, :].expand(count, -1, -1, -1)
    return made
