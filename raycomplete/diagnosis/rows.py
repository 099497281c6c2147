"""A chunked pass over token rows that compares policies with base, a few rows at a time: never [N, V].

Base-favored tokens are the idea of arXiv 2511.12155 (known to us by its abstract and secondary reports); every formula
here and the margin are ours.

What it costs on a CPU: the two matrix products are near the machine's peak from 128 rows on, so everything else must be
cheap beside them. Measured with SmolLM2-135M's V 49152 and H 576 in bfloat16, processor time a token: 0.8 ms, of which
the products are 0.6; plain softmax, argmax and KL over the chunk took 0.7 ms beside the same products. Products are
made for a chunk of rows, but turned into probabilities a block of rows at a time that stays in the cache. Largest
logits are looked for once, by groups of the vocabulary; argmax and the few tokens that reach tau are then found within
the groups that can hold them. Weights are divided by their sum after the sums over the vocabulary, not before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from raycomplete.losses.base_favored import base_favored_mask, deficit
from raycomplete.losses.chunked_pass import rows_per_chunk
from raycomplete.losses.heads import Head, check_hidden, check_rows_finite, check_same_vocabulary
from raycomplete.losses.settings import BaseFavoredSettings, ChunkTokens, LossSettings

METRICS = (
    "base_favored_mass",
    "base_favored_count",
    "unfinished_mass",
    "kl_to_base",
    "deficit",
    "agreement",
    "refusal_probability",
)
"""Columns of `DiagnosisRows.values_NM`: base's mass on B_t and the number of its tokens, the policy's mass on it,
KL(policy || base) in nats, exp(-KL / kappa), whether the two argmaxes agree (0 or 1), and the policy's probability of
the refusal tokens."""
PROFILE_METRICS = ("unfinished_mass", "kl_to_base", "deficit")
"""The columns of the position profile."""
_GROUP = 64  # tokens of the vocabulary whose largest logit is kept
# Logits of one model in a block. A block keeps up to six tensors of that size. On a CPU they stay in the cache of the
# cores that share the work; elsewhere they bound the memory.
_BLOCK_BYTES_PER_THREAD = 2 * 2**20
_BLOCK_BYTES_OFF_CPU = 64 * 2**20
_SLACK = 1e-3  # nats below log tau at which a token still is a candidate; the set itself is cut by `base_favored_mask`


@dataclass(frozen=True)
class DiagnosisSettings:
    """Settings of the pass."""

    tau: float = 0.01  # smallest base probability of a base-favored token
    # Nats by which log p_base must exceed log p_aligned: where the two are equal but for rounding, the rounding alone
    # would decide which half of the mass counts. SmolLM2-135M, a bf16 forward pass against a float32 one of the same
    # weights (576 tokens): mass 0.43 at margin 0, 0.11 at 0.02, 0.04 at 0.05, 0.006 at 0.1; KL 0.0006 nats.
    margin: float = 0.1
    kappa: float = 0.5  # scale of the deficit in nats
    chunk_tokens: ChunkTokens = 256  # rows whose products with a head exist at a time

    @classmethod
    def of_loss(cls, settings: LossSettings) -> DiagnosisSettings:
        """Takes the base-favored tokens of a training run's penalty, or the defaults where the loss has none."""
        favored = settings.options.get("penalty")
        if not isinstance(favored, BaseFavoredSettings):
            favored = BaseFavoredSettings()
        return cls(tau=favored.tau, margin=favored.margin, chunk_tokens=settings.chunk_tokens)


@dataclass(frozen=True, eq=False)
class Opening:
    """The aligned model's hidden state after each prompt, its head, and the prompt of each token row."""

    hidden_PH: Tensor
    head: Head
    prompt_N: Tensor

    @classmethod
    def of_rows(cls, hidden_NH: Tensor, head: Head, prompt_N: Tensor) -> Opening:
        """Takes the first row of each prompt; rows of a prompt stand side by side."""
        is_first_N = torch.ones_like(prompt_N, dtype=torch.bool)
        is_first_N[1:] = prompt_N[1:] != prompt_N[:-1]
        return cls(hidden_NH[is_first_N], head, is_first_N.cumsum(0) - 1)


@dataclass(frozen=True, eq=False)
class DiagnosisRows:
    """One policy against base: values of `METRICS` at every token row, and the K base-favored tokens of all rows."""

    values_NM: Tensor
    row_K: Tensor
    token_K: Tensor
    base_probability_K: Tensor
    policy_probability_K: Tensor

    def column(self, name: str) -> Tensor:
        """Values [N] of one of `METRICS`."""
        return self.values_NM[:, METRICS.index(name)]


@torch.no_grad()
def diagnose_rows(
    policies: Mapping[str, tuple[Tensor, Head]],
    base_hidden_NH: Tensor,
    base_head: Head,
    opening: Opening,
    refusal_ids: Sequence[int],
    settings: DiagnosisSettings,
) -> dict[str, DiagnosisRows]:
    """Compares each policy (hidden states and head by name) with base at every token row; base is read once for all.

    `opening` is the aligned model at position 0 of each prompt's response. NotFiniteError names hidden states or a KL
    that are NaN or infinite, as where base excludes (bias -inf) what a policy does not.
    """
    num_rows = base_hidden_NH.shape[0]
    check_hidden("base", base_hidden_NH, base_head, num_rows)
    for name, (hidden_NH, head) in policies.items():
        check_hidden(name, hidden_NH, head, num_rows)
    check_hidden("opening", opening.hidden_PH, opening.head, opening.hidden_PH.shape[0])
    heads = {"base": base_head, "opening": opening.head, **{name: head for name, (_, head) in policies.items()}}
    check_same_vocabulary(heads)
    at_first, _ = _read(opening.head, opening.head.product(opening.hidden_PH))
    refusal_R = torch.tensor(list(refusal_ids), dtype=torch.long, device=base_hidden_NH.device)
    parts: dict[str, list[DiagnosisRows]] = {name: [] for name in policies}
    dtype, device = base_head.weight_VH.dtype, base_hidden_NH.device
    copies = 1 + len(policies)
    chunk_rows = rows_per_chunk(settings.chunk_tokens, base_head.vocab_size, dtype, device, copies)
    for start in range(0, max(num_rows, 1), chunk_rows):
        rows = slice(start, start + chunk_rows)
        base_CV = base_head.product(base_hidden_NH[rows])
        policy_CV = {name: head.product(hidden_NH[rows]) for name, (hidden_NH, head) in policies.items()}
        size = _block_rows(base_CV, base_head.logits_dtype)
        for first in range(0, max(len(base_CV), 1), size):
            block = slice(first, first + size)
            base, _ = _read(base_head, base_CV[block])
            row_K, token_K = base.tokens_above(math.log(settings.tau) - _SLACK if settings.tau > 0 else -math.inf)
            prompt_B = opening.prompt_N[rows][block]
            log_opening_K = at_first.log_prob(prompt_B[row_K], token_K)
            favored_K = base_favored_mask(log_opening_K, base.log_prob(row_K, token_K), settings.tau, settings.margin)
            favored_2K = torch.stack([row_K[favored_K], token_K[favored_K]])
            for name, (_, head) in policies.items():
                policy, weight_BV = _read(head, policy_CV[name][block])
                found = _compare(policy, weight_BV, base, favored_2K, refusal_R, settings)
                parts[name].append(replace(found, row_K=found.row_K + start + first))
    joined = {name: _joined(found) for name, found in parts.items()}
    for name, found in joined.items():
        check_rows_finite(f"the KL of {name} to base", found.column("kl_to_base"))
    return joined


def _block_rows(product_CV: Tensor, dtype: torch.dtype) -> int:
    on_cpu = product_CV.device.type == "cpu"
    budget = _BLOCK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _BLOCK_BYTES_OFF_CPU
    return max(budget // (product_CV.shape[1] * dtype.itemsize), 1)


@dataclass(frozen=True, eq=False)
class _Block:
    """A few rows of one model: log p = (logits - top) - log_total.

    Top and total stay apart: their sum would be rounded at the size of the logits, and where a model is sure of a token
    the log of the total is smaller than that. `group_BG` has the largest logit of each group of `_GROUP` tokens.
    """

    logits_BV: Tensor
    group_BG: Tensor
    top_B: Tensor
    total_B: Tensor
    log_total_B: Tensor

    def log_prob(self, row_K: Tensor, token_K: Tensor) -> Tensor:
        """log p of single tokens [K]."""
        return (self.logits_BV[row_K, token_K] - self.top_B[row_K]) - self.log_total_B[row_K]

    def argmax(self) -> Tensor:
        """The most probable token [B], the first of equals."""
        row_B = torch.arange(len(self.group_BG), device=self.group_BG.device)
        token_BL, logits_BL = self._group(row_B, self.group_BG.argmax(dim=-1))
        return token_BL.gather(1, logits_BL.argmax(dim=-1, keepdim=True))[:, 0]

    def tokens_above(self, log_tau: float) -> Tensor:
        """Rows and tokens [2, K] of log p at least `log_tau`, in order."""
        lowest_B = log_tau + self.log_total_B
        row_P, group_P = (self.group_BG - self.top_B[:, None] >= lowest_B[:, None]).nonzero().T
        token_PL, logits_PL = self._group(row_P, group_P)
        reached_PL = logits_PL - self.top_B[row_P, None] >= lowest_B[row_P, None]
        # The last group may be short; its missing tokens repeat the last one, which must count once.
        reached_PL &= (group_P[:, None] * _GROUP + torch.arange(_GROUP, device=group_P.device)) == token_PL
        return torch.stack([row_P[:, None].expand_as(token_PL)[reached_PL], token_PL[reached_PL]])

    def _group(self, row_P: Tensor, group_P: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of one group each, and their logits [P, `_GROUP`]."""
        token_PL = group_P[:, None] * _GROUP + torch.arange(_GROUP, device=group_P.device)
        token_PL.clamp_(max=self.logits_BV.shape[1] - 1)
        return token_PL, self.logits_BV[row_P[:, None], token_PL]


def _read(head: Head, product_BV: Tensor) -> tuple[_Block, Tensor]:
    """The block, and exp(logits - top) [B, V]."""
    logits_BV = head.logits_of_product(product_BV)
    whole, short = divmod(logits_BV.shape[1], _GROUP)
    group_BG = logits_BV[:, : whole * _GROUP].unflatten(1, (whole, _GROUP)).amax(dim=-1)
    if short:
        group_BG = torch.cat([group_BG, logits_BV[:, -short:].amax(dim=-1, keepdim=True)], dim=1)
    top_B1 = group_BG.amax(dim=-1, keepdim=True)
    weight_BV = (logits_BV - top_B1).exp_()
    total_B = weight_BV.sum(dim=-1)
    return _Block(logits_BV, group_BG, top_B1[:, 0], total_B, total_B.log()), weight_BV


def _compare(
    policy: _Block, weight_BV: Tensor, base: _Block, favored_2K: Tensor, refusal_R: Tensor, settings: DiagnosisSettings
) -> DiagnosisRows:
    row_K, token_K = favored_2K
    base_K, policy_K = base.log_prob(row_K, token_K).exp(), policy.log_prob(row_K, token_K).exp()
    zeros_B = torch.zeros_like(base.total_B)
    kl_B = _kl(policy, weight_BV, base)
    values_BM = torch.stack(
        [
            zeros_B.index_add(0, row_K, base_K),
            zeros_B.index_add(0, row_K, torch.ones_like(base_K)),
            zeros_B.index_add(0, row_K, policy_K),
            kl_B,
            deficit(kl_B, settings.kappa),
            (policy.argmax() == base.argmax()).to(kl_B.dtype),
            weight_BV[:, refusal_R].sum(dim=-1) / policy.total_B,
        ],
        dim=-1,
    )
    return DiagnosisRows(values_BM, row_K, token_K, base_K, policy_K)


def _kl(policy: _Block, weight_BV: Tensor, base: _Block) -> Tensor:
    """KL(policy || base) of each row in nats, as `forward_kl` in a third of its passes over the vocabulary.

    KL = sum_v p(v) (logit_p(v) - logit_b(v)) - log_norm_p + log_norm_b. Rounding below 0 is cut off.
    """
    sum_B = (policy.logits_BV - base.logits_BV).mul_(weight_BV).sum(dim=-1)
    if bool(sum_B.isnan().any()):  # 0 * infinity, from tokens that the policy excludes: they add 0
        difference_BV = (policy.logits_BV - base.logits_BV).masked_fill_(weight_BV == 0, 0.0)
        sum_B = difference_BV.mul_(weight_BV).sum(dim=-1)
    difference_B = (policy.top_B - base.top_B) + (policy.log_total_B - base.log_total_B)
    return (sum_B / policy.total_B - difference_B).clamp(min=0.0)


def _joined(parts: Sequence[DiagnosisRows]) -> DiagnosisRows:
    columns = ([getattr(part, column.name) for part in parts] for column in fields(DiagnosisRows))
    return DiagnosisRows(*map(torch.cat, columns))
