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
from raycomplete.evaluation.defences.any_depth import Passes
from raycomplete.evaluation.model_actors import WhiteBoxClient
from raycomplete.losses.divergences import contrastive_log_probs
from raycomplete.runtime.ray_calls import wait_for
from raycomplete.runtime.types import Generator

_FLOOR = 1e-8  # of a probability, as in the authors' code
_BATCH = 16  # sequences decoded side by side


def safe_log_probs(log_model_NV: Tensor, log_expert_NV: Tensor, alpha: float, common: int) -> Tensor:
    """Log-probabilities of SafeDecoding, arXiv 2402.08983, from its code (uw-nsl/SafeDecoding).

    max(p_m + alpha (p_e - p_m), 1e-8), normalised, on the tokens that are among the k likeliest of both models; k is
    the least one that gives `common` such tokens."""
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
    """The rule by which two distributions become one: "contrastive" or "safe_decoding", with its settings."""

    name: str
    alpha: float
    limit: float  # plausibility of contrastive decoding; number of common tokens of SafeDecoding

    def combine(self, log_model_NV: Tensor, log_other_NV: Tensor) -> Tensor:
        """Log-probabilities of the next token, [N, V]."""
        if self.name == "contrastive":
            return contrastive_log_probs(log_model_NV, log_other_NV, self.alpha, self.limit)
        return safe_log_probs(log_model_NV, log_other_NV, self.alpha, int(self.limit))


class TwoModelDecoder:
    """Continues sequences with two models."""

    def __init__(
        self,
        model: TorchModel,
        other: TorchModel,
        rule: Rule,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        max_length: int,
    ) -> None:
        self._models, self._rule = (model, other), rule
        self._vocab_size, self._stop_ids, self._max_length = vocab_size, frozenset(stop_ids), max_length

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
        """Continues sequences as a `Generator` does; says of each whether it ended by itself."""
        draws = [Draw(temperature, top_p, top_k, None if seed is None else seed + i) for i in range(len(sequences))]
        found: list[tuple[list[int], bool]] = []
        for start in range(0, len(sequences), _BATCH):
            batch = slice(start, start + _BATCH)
            found += self._continue([list(row) for row in sequences[batch]], draws[batch], max_tokens)
        return found

    def next_logprobs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of the next token of each sequence, [B, V]."""
        logs = [model.next_logprobs(sequences)[:, : self._vocab_size].log_softmax(dim=-1) for model in self._models]
        return self._rule.combine(*logs)

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
        self._loaded = {path: model for path, model in self._loaded.items() if path in paths}
        for path in paths:
            if path not in self._loaded:
                model = load_model(path, self._dtype, trust_remote_code=self._remote)
                self._loaded[path] = TorchModel(model.to(self._device))
        model, other = (self._loaded[path] for path in paths)
        decoder = TwoModelDecoder(model, other, self._rule, **self._options)
        return getattr(decoder, method)(*arguments, **options)


class TwoModelClient:
    """A decoder of two models in a Ray actor (implements `raycomplete.runtime.types.Generator`)."""

    def __init__(self, actor: Any, paths: tuple[Path, Path], timeout_s: float, passes: Passes) -> None:
        self._actor, self._paths, self._timeout_s, self._passes = actor, paths, timeout_s, passes

    def generate(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        answers = [tokens for tokens, _ in self.generate_finished(sequences, **sampling)]
        self._passes.tokens += sum(map(len, answers))
        return answers

    def generate_finished(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[tuple[list[int], bool]]:
        found = self.ask("generate_finished", [list(sequence) for sequence in sequences], **sampling)
        self._passes.passes += 2 * sum(len(tokens) for tokens, _ in found)
        return list(found)

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the decoder."""
        reference = self._actor.call.remote(self._paths, method, *arguments, **options)
        return wait_for(reference, who="decoder of two models", what="an answer", timeout_s=self._timeout_s)


class FirstTokens:
    """Decodes the first tokens of an answer with two models, and the rest with one (implements `Generator`)."""

    def __init__(self, pair: TwoModelClient, rest: Generator, count: int, passes: Passes) -> None:
        self._pair, self._rest, self._count, self._passes = pair, rest, count, passes

    def generate(self, sequences: Sequence[Sequence[int]], *, max_tokens: int, **sampling: Any) -> list[list[int]]:
        first = self._pair.generate_finished(sequences, max_tokens=min(self._count, max_tokens), **sampling)
        answers = [list(tokens) for tokens, _ in first]
        open_rows = [
            index
            for index, (tokens, ended) in enumerate(first)
            if not ended and len(tokens) == self._count < max_tokens
        ]
        seed = sampling.get("seed")
        each_alone = seed is not None and sampling.get("temperature", 0.0) > 0  # under the seed of its first tokens
        for batch in [[index] for index in open_rows] if each_alone else [open_rows] * bool(open_rows):
            own = sampling | ({"seed": seed + batch[0]} if each_alone and seed is not None else {})
            more = self._rest.generate(
                [[*sequences[index], *answers[index]] for index in batch], max_tokens=max_tokens - self._count, **own
            )
            for index, tokens in zip(batch, more, strict=True):
                answers[index] += tokens
                self._passes.passes += len(tokens)
        self._passes.tokens += sum(map(len, answers))
        return answers


class ShapedWhiteBox(WhiteBoxClient):
    """A model whose next-token distributions are those of a decoder of two models; gradients are its own."""

    def __init__(self, box: WhiteBoxClient, decoder: TwoModelClient) -> None:
        super().__init__(box.actor, box.path, box.timeout_s)
        self._shaped = decoder

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> Any:
        return self._shaped.ask("top_logprobs", [list(sequence) for sequence in sequences], top)

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Any:
        asked = [list(ids) for ids in tokens]
        return self._shaped.ask("logprobs_of", [list(sequence) for sequence in sequences], asked)
