"""A GCG step without short cuts: one call of the tokenizer each, a full sort, logits of every position."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomplete.attacks.suffix import IntArray, Search
from raycomplete.attacks.target import FloatArray, SuffixProblem

Suffix = tuple[int, ...]


def surviving(found: Search, suffixes: list[Suffix]) -> list[Suffix]:
    """Suffixes that come back from text, found one by one."""
    before, after = found.problem.before, found.problem.after
    kept = []
    for ids in suffixes:
        typed = found.codec.encode_prompt(f"{found.prompt.text} {found.codec.decode(ids).strip()}")
        if tuple(typed) == (*before, *ids, *after):
            kept.append(ids)
    return kept


def candidates(
    suffix: Suffix, gradient_SV: FloatArray, usable: IntArray, top: int, width: int, rng: np.random.Generator
) -> list[Suffix]:
    """Suffixes that differ from the current one in one token, drawn from a full sort."""
    best_ST = usable[np.argsort(gradient_SV[:, usable], axis=1)[:, :top]]
    positions = np.arange(width) * len(suffix) // width
    picks = rng.integers(top, size=width)
    return [
        (*suffix[:position], int(best_ST[position, pick]), *suffix[position + 1 :])
        for position, pick in zip(positions.tolist(), picks.tolist(), strict=True)
    ]


class PlainModel:
    """Gradients and losses that keep the prompt's keys and values, and compute everything after them."""

    def __init__(self, model: Any) -> None:
        self._model = model.requires_grad_(False)
        self._prefix: Any = None

    def suffix_gradient(self, problem: SuffixProblem, suffix: Suffix) -> FloatArray:
        embedding_VH = self._model.get_input_embeddings()
        one_hot_SV = torch.nn.functional.one_hot(torch.tensor(suffix), embedding_VH.weight.shape[0])
        one_hot_SV = one_hot_SV.to(embedding_VH.weight.dtype).requires_grad_(True)
        tail_TH = embedding_VH(torch.tensor([*problem.after, *problem.target]))
        inputs_1TH = torch.cat([one_hot_SV @ embedding_VH.weight, tail_TH])[None]
        loss_1 = self._loss(problem, len(suffix), inputs_embeds=inputs_1TH)
        (gradient_SV,) = torch.autograd.grad(loss_1.sum(), one_hot_SV)
        result: FloatArray = gradient_SV.float().numpy()
        return result

    def suffix_losses(self, problem: SuffixProblem, suffixes: list[Suffix], batch: int) -> list[float]:
        losses: list[float] = []
        with torch.no_grad():
            for start in range(0, len(suffixes), batch):
                rows = [[*suffix, *problem.after, *problem.target] for suffix in suffixes[start : start + batch]]
                losses += self._loss(problem, len(suffixes[0]), input_ids=torch.tensor(rows)).tolist()
        return losses

    def _loss(self, problem: SuffixProblem, num_suffix: int, **inputs: Tensor) -> Tensor:
        count = next(iter(inputs.values())).shape[0]
        if self._prefix is None:
            with torch.no_grad():
                self._prefix = self._model(torch.tensor([problem.before]), use_cache=True).past_key_values
        cache = copy.deepcopy(self._prefix)
        cache.batch_repeat_interleave(count)
        logits_CTV = self._model(**inputs, past_key_values=cache, use_cache=True).logits
        start = num_suffix + len(problem.after) - 1
        predicted_CTV = logits_CTV[:, start : start + len(problem.target)].float()
        target_CT = torch.tensor(problem.target).expand(count, -1)
        loss_CT = torch.nn.functional.cross_entropy(predicted_CTV.transpose(1, 2), target_CT, reduction="none")
        return loss_CT.mean(dim=1)
