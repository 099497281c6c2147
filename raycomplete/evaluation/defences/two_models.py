"""Decoding that asks a second model about every token: contrastive decoding and SafeDecoding.

Two models have to agree on every token, which a generating engine cannot do; both are therefore read by transformers
with key-value caches, in batches, inside a Ray actor.

A departure of SafeDecoding: its expert's adapters are this trainer's, of rank 16 and alpha 32, where the authors' have
alpha 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycomplete.attacks.white_box import TorchModel
from raycomplete.config import Dtype
from raycomplete.data.checkpoints import load_model
from raycomplete.losses.divergences import contrastive_log_probs

_FLOOR = 1e-8  # of a probability, as in the authors' code


def safe_log_probs(log_model_NV: Tensor, log_expert_NV: Tensor, alpha: float, common: int) -> Tensor:
    """Log-probabilities of SafeDecoding, arXiv 2402.08983, from its code (uw-nsl/SafeDecoding).

    max(p_m + alpha (p_e - p_m), 1e-8), normalised, on the tokens that are among the k likeliest of both models; k is
    the least one that gives `common` such tokens.

    Args:
        log_model_NV: log p_m [N, V].
        log_expert_NV: log p_e [N, V].

    Returns:
        [N, V], normalised; -inf at all other tokens.
    """
    rank_NV = torch.maximum(*(_ranks(log_NV) for log_NV in (log_model_NV, log_expert_NV)))
    least_N1 = rank_NV.topk(min(common, rank_NV.shape[1]), largest=False).values[:, -1:]  # both lists hold as many
    model_NV, expert_NV = log_model_NV.exp(), log_expert_NV.exp()
    moved_NV = (model_NV + alpha * (expert_NV - model_NV)).clamp(min=_FLOOR)
    return moved_NV.masked_fill(rank_NV > least_N1, 0.0).log().log_softmax(dim=-1)


def _ranks(log_NV: Tensor) -> Tensor:
    """Places of tokens among the likeliest, from 0."""
    return log_NV.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


@dataclass(frozen=True)
class Rule:
    """The rule by which two distributions become one: "contrastive" or "safe_decoding", with its settings.

    Attributes:
        limit: Plausibility of contrastive decoding; number of common tokens of SafeDecoding.
    """

    name: str
    alpha: float
    limit: float

    def combine(self, log_model_NV: Tensor, log_other_NV: Tensor) -> Tensor:
        """Log-probabilities of the next token, [N, V]."""
        if self.name == "contrastive":
            return contrastive_log_probs(log_model_NV, log_other_NV, self.alpha, self.limit)
        return safe_log_probs(log_model_NV, log_other_NV, self.alpha, int(self.limit))


class TwoModelDecoder:
    """Continues sequences with two models (implements `raycomplete.runtime.types.Generator`).

    Args:
        other: None decodes plainly from the model.
        vocab_size: True tokens; logits from here on belong to padding.
        stop_ids: Tokens that end a response.
        max_length: Longest sequence in tokens, new ones included.
        batch: Sequences decoded side by side.
    """

    def __init__(
        self,
        model: TorchModel,
        other: TorchModel | None,
        rule: Rule,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        max_length: int,
        batch: int,
    ) -> None:
        self._models = [model, *([other] if other is not None else [])]
        self._rule, self._vocab_size, self._stop_ids = rule, vocab_size, frozenset(stop_ids)
        self._max_length, self._batch = max_length, batch

    def generate(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        """Continues sequences (see `raycomplete.runtime.types.Generator.generate`)."""
        return [tokens for tokens, _ in self.generate_finished(sequences, **sampling)]

    def generate_finished(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[tuple[list[int], bool]]:
        """Continues sequences as `generate` does; says of each whether it ended by itself."""
        draws = [Draw(temperature, top_p, top_k, None if seed is None else seed + i) for i in range(len(sequences))]
        found: list[tuple[list[int], bool]] = []
        for start in range(0, len(sequences), self._batch):
            batch = slice(start, start + self._batch)
            found += self._continue([list(row) for row in sequences[batch]], draws[batch], max_tokens)
        return found

    def next_logprobs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of the next token of each sequence, [B, V]."""
        logs = [model.next_logprobs(sequences)[:, : self._vocab_size].log_softmax(dim=-1) for model in self._models]
        return logs[0] if len(logs) == 1 else self._rule.combine(*logs)

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
        """The likeliest next tokens; see `raycomplete.attacks.target.WhiteBox.top_logprobs`."""
        values_BK, ids_BK = self.next_logprobs(sequences).topk(min(top, self._vocab_size), dim=-1)
        return [
            [(token, value) for token, value in zip(*row, strict=True) if value > -math.inf]  # the others are excluded
            for row in zip(ids_BK.tolist(), values_BK.tolist(), strict=True)
        ]

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of given next tokens; see `raycomplete.attacks.target.WhiteBox.logprobs_of`."""
        logprobs_BV = self.next_logprobs(sequences)
        return [row_V[list(asked)].tolist() for row_V, asked in zip(logprobs_BV, tokens, strict=True)]

    def _continue(self, rows: list[list[int]], draws: Sequence[Draw], max_tokens: int) -> list[tuple[list[int], bool]]:
        starts = [len(row) for row in rows]
        ends = [min(start + max_tokens, self._max_length) for start in starts]
        has_ended = [False] * len(rows)
        open_rows = [index for index, row in enumerate(rows) if len(row) < ends[index]]
        while open_rows:
            log_BV = self.next_logprobs([rows[index] for index in open_rows])
            for log_V, index in zip(log_BV, open_rows, strict=True):
                token = draws[index].token(log_V)
                if token in self._stop_ids:
                    has_ended[index] = True
                else:
                    rows[index].append(token)
            open_rows = [index for index in open_rows if not has_ended[index] and len(rows[index]) < ends[index]]
        return [(row[start:], ended) for row, start, ended in zip(rows, starts, has_ended, strict=True)]


class Draw:
    """Draws the tokens of one sequence."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int | None) -> None:
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k
        self._generator = torch.Generator()
        if seed is not None:
            self._generator.manual_seed(seed)

    def token(self, log_V: Tensor) -> int:
        """The next token: the likeliest at temperature 0, else one of the likeliest top_k that hold top_p of all."""
        if self._temperature <= 0:
            return int(log_V.argmax())
        values_V, ids_V = (log_V.cpu().double() / self._temperature).softmax(dim=-1).sort(descending=True, stable=True)
        if self._top_k > 0:
            values_V = values_V[: self._top_k]
        values_V = values_V / values_V.sum()
        kept = int((values_V.cumsum(dim=0) - values_V < self._top_p).sum())  # the first one always
        return int(ids_V[torch.multinomial(values_V[:kept], 1, generator=self._generator)])


class TwoModelWorker:
    """A decoder with its models, run as a Ray actor; models are read where a call first names their checkpoints."""

    def __init__(
        self, dtype: Dtype, use_gpu: bool, trust_remote_code: bool, rule: Rule, options: Mapping[str, Any]
    ) -> None:
        self._dtype, self._remote, self._rule, self._options = dtype, trust_remote_code, rule, dict(options)
        self._device = "cuda" if use_gpu else "cpu"
        self._loaded: dict[Path, TorchModel] = {}

    def call(self, paths: tuple[Path, Path], method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the decoder of two checkpoints: the model's and the other one's."""
        return getattr(self._decoder(paths), method)(*arguments, **options)

    def _decoder(self, paths: tuple[Path, Path]) -> TwoModelDecoder:
        self._loaded = {path: model for path, model in self._loaded.items() if path in paths}
        for path in paths:
            if path not in self._loaded:
                model = load_model(path, self._dtype, trust_remote_code=self._remote)
                self._loaded[path] = TorchModel(model.to(self._device))
        model, other = (self._loaded[path] for path in paths)
        return TwoModelDecoder(model, other, self._rule, **self._options)
