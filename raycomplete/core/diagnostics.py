"""How far policies have moved from base at each response position, streamed and with intervals over prompts.

Three parts: the walk over token rows (logits of one chunk at a time, never [N, V]), running statistics by position
(sums in float64, so that any number of prompts fits), and the completion depth, the one number a reader remembers.

Base-favored tokens are the idea of arXiv 2511.12155 (known to us by its abstract and secondary reports); every formula
here, the margin, the statistics and the completion depth are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raycomplete.core.base_favored import base_favored_mask, deficit
from raycomplete.core.checks import check_hidden, check_rows_finite, check_same_vocabulary
from raycomplete.core.heads import Head

METRICS = (
    "base_favored_mass",
    "base_favored_count",
    "kl_to_base",
    "deficit",
    "agreement",
    "refusal_probability",
)
"""Columns of `DiagnosisRows.values_NM`: mass and count of B_t, KL(policy || base) in nats, exp(-KL / kappa), whether
the two argmaxes agree (0 or 1), and the policy's probability of the refusal tokens."""
_DEFICIT = METRICS.index("deficit")
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class DiagnosisSettings:
    """Settings of the walk.

    Attributes:
        tau: Smallest base probability of a base-favored token, 0 to 1.
        margin: Nats by which log p_base must exceed log p_policy. The set is cut at p_b = p_a, so where the two are
            equal but for rounding, the rounding alone decides which half of the mass counts. Measured on
            SmolLM2-135M, a bf16 forward pass against a float32 one of the same weights (576 tokens): mass 0.43 at
            margin 0, 0.11 at 0.02, 0.04 at 0.05, 0.006 at 0.1. KL and deficit need none (KL 0.0006 nats).
        kappa: Scale of the deficit in nats.
        chunk_tokens: Rows whose logits exist at a time.
    """

    tau: float = 0.01
    margin: float = 0.1
    kappa: float = 0.5
    chunk_tokens: int = 128

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}.")


@dataclass(frozen=True, eq=False)
class DiagnosisRows:
    """One policy against base at every token row, K base-favored tokens in all.

    Attributes:
        values_NM: One column for each of `METRICS` [N, M].
        row_K: Token row of each base-favored token.
        token_K: Its id.
        base_probability_K: p_b of it.
        policy_probability_K: p_policy of it.
    """

    values_NM: Tensor
    row_K: Tensor
    token_K: Tensor
    base_probability_K: Tensor
    policy_probability_K: Tensor


@torch.no_grad()
def diagnose_rows(
    policies: Mapping[str, tuple[Tensor, Head]],
    base_hidden_NH: Tensor,
    base_head: Head,
    refusal_ids: Sequence[int],
    settings: DiagnosisSettings,
) -> dict[str, DiagnosisRows]:
    """Compares each policy with base at every token row; base's logits are made once for all policies.

    Args:
        policies: Hidden states [N, H of its head] and head of each policy, by name.
        base_hidden_NH: Hidden states of base on the same tokens [N, H of its head].
        base_head: Head of base.
        refusal_ids: Tokens that start a refusal; none gives probability 0.
        settings: Thresholds and chunk size.

    Returns:
        Rows by policy, values in at least float32, on the device of the hidden states.

    Raises:
        ValueError: Shapes or vocabularies do not fit together.
        NotFiniteError: Hidden states hold NaN or infinity, or a KL came out so, as where base excludes (bias -inf) what
            a policy does not.
    """
    num_rows = base_hidden_NH.shape[0]
    check_hidden("base", base_hidden_NH, base_head, num_rows)
    for name, (hidden_NH, head) in policies.items():
        check_hidden(name, hidden_NH, head, num_rows)
    check_same_vocabulary({"base": base_head, **{name: head for name, (_, head) in policies.items()}})
    refusal_R = torch.tensor(list(refusal_ids), dtype=torch.long, device=base_hidden_NH.device)
    chunks: dict[str, list[DiagnosisRows]] = {name: [] for name in policies}
    for start in range(0, max(num_rows, 1), settings.chunk_tokens):
        rows = slice(start, start + settings.chunk_tokens)
        base = _distribution(base_hidden_NH[rows], base_head)
        # Few tokens reach tau, so everything but the KL needs only these. A hair of slack, as the set itself is cut in
        # logarithms.
        candidate_2K = (base.probability_CV >= settings.tau * 0.999).nonzero().T
        for name, (hidden_NH, head) in policies.items():
            chunk = _compare(_distribution(hidden_NH[rows], head), base, candidate_2K, refusal_R, settings)
            chunks[name].append(_shifted(chunk, start))
    found = {name: _joined(parts) for name, parts in chunks.items()}
    for name, rows_of_policy in found.items():
        check_rows_finite(f"the KL of {name} to base", rows_of_policy.values_NM[:, METRICS.index("kl_to_base")])
    return found


@dataclass(frozen=True, eq=False)
class _Distribution:
    """Next-token distributions of a chunk: log p = logits - log_norm."""

    logits_CV: Tensor
    probability_CV: Tensor
    log_norm_C: Tensor
    argmax_C: Tensor

    def log_prob(self, row_K: Tensor, token_K: Tensor) -> Tensor:
        return self.logits_CV[row_K, token_K] - self.log_norm_C[row_K]


def _distribution(hidden_CH: Tensor, head: Head) -> _Distribution:
    logits_CV = head.logits(hidden_CH)
    probability_CV = logits_CV.softmax(dim=-1)
    top_C, argmax_C = logits_CV.max(dim=-1)
    # From the largest probability, which softmax has computed already: logsumexp would go over the vocabulary again.
    log_norm_C = top_C - probability_CV.gather(1, argmax_C[:, None])[:, 0].log()
    return _Distribution(logits_CV, probability_CV, log_norm_C, argmax_C)


def _compare(
    policy: _Distribution,
    base: _Distribution,
    candidate_2K: Tensor,
    refusal_R: Tensor,
    settings: DiagnosisSettings,
) -> DiagnosisRows:
    row_K, token_K = candidate_2K
    log_policy_K, log_base_K = policy.log_prob(row_K, token_K), base.log_prob(row_K, token_K)
    favored_K = base_favored_mask(log_policy_K, log_base_K, settings.tau, settings.margin)
    row_K, token_K = row_K[favored_K], token_K[favored_K]
    base_K, policy_K = log_base_K[favored_K].exp(), log_policy_K[favored_K].exp()
    zeros_C = torch.zeros_like(base.log_norm_C)
    kl_C = _kl(policy, base)
    values_CM = torch.stack(
        [
            zeros_C.index_add(0, row_K, base_K),
            zeros_C.index_add(0, row_K, torch.ones_like(base_K)),
            kl_C,
            deficit(kl_C, settings.kappa),
            (policy.argmax_C == base.argmax_C).to(kl_C.dtype),
            policy.probability_CV[:, refusal_R].sum(dim=-1),
        ],
        dim=-1,
    )
    return DiagnosisRows(values_CM, row_K, token_K, base_K, policy_K)


def _kl(policy: _Distribution, base: _Distribution) -> Tensor:
    """KL(policy || base) of each row in nats, as `trained_depth` in a third of its passes over the vocabulary.

    KL = sum_v p(v) (logit_p(v) - logit_b(v)) - log_norm_p + log_norm_b. Tokens that the policy excludes (bias -inf) add
    0; rounding below 0 is cut off.
    """
    difference_CV = (policy.logits_CV - base.logits_CV).masked_fill_(policy.probability_CV == 0, 0.0)
    mean_C = torch.bmm(policy.probability_CV[:, None], difference_CV[:, :, None])[:, 0, 0]
    return (mean_C - policy.log_norm_C + base.log_norm_C).clamp(min=0.0)


def _shifted(chunk: DiagnosisRows, start: int) -> DiagnosisRows:
    return DiagnosisRows(
        chunk.values_NM, chunk.row_K + start, chunk.token_K, chunk.base_probability_K, chunk.policy_probability_K
    )


def _joined(parts: Sequence[DiagnosisRows]) -> DiagnosisRows:
    names = ("values_NM", "row_K", "token_K", "base_probability_K", "policy_probability_K")
    return DiagnosisRows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def t_quantile(degrees_of_freedom: Tensor) -> Tensor:
    """The 97.5 % point of Student's t: exact for 1 and 2, else Cornish and Fisher's expansion (within 0.15 %).

    Args:
        degrees_of_freedom: Any shape, at least 1.
    """
    z, n = _Z, degrees_of_freedom.double()
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    value = z + sum(term / n ** (power + 1) for power, term in enumerate(terms))
    value = torch.where(n == 1, math.tan(math.pi * 0.475), value)
    return torch.where(n == 2, 0.95 / math.sqrt(2 * 0.975 * 0.025), value)


class PositionStatistics:
    """Running mean, spread and bootstrap of values by position; one prompt after the other, none is kept.

    The unit of sampling is the prompt: each gives at most one value at a position. The interval of a mean is Student's
    t over the prompts that reach the position, pointwise. The completion depth is no mean, so its interval comes from
    a Poisson bootstrap over prompts: prompt i enters replicate r with weight Poisson(1) drawn under (seed, i), which
    needs running sums only and does not depend on how prompts were split into batches.

    Args:
        num_columns: Values of a row, M.
        bootstrap_column: The column whose sums are kept for each replicate.
        replicates: Bootstrap replicates.
        seed: Of the bootstrap.
    """

    def __init__(
        self,
        num_columns: int = len(METRICS),
        *,
        bootstrap_column: int = _DEFICIT,
        replicates: int = 400,
        seed: int = 0,
    ) -> None:
        self._column, self._seed = bootstrap_column, seed
        self._count_T = torch.zeros(0, dtype=torch.float64)
        self._sum_TM = torch.zeros(0, num_columns, dtype=torch.float64)
        self._square_TM = torch.zeros(0, num_columns, dtype=torch.float64)
        # Rows: the two halves of the prompts (even and odd), then the replicates.
        self._weight_RT = torch.zeros(2 + replicates, 0, dtype=torch.float64)
        self._weighted_RT = torch.zeros(2 + replicates, 0, dtype=torch.float64)
        self.num_prompts = 0

    def add(self, values_TM: Tensor) -> None:
        """Adds one prompt: its values at positions 0 to T - 1."""
        values_TM = values_TM.detach().double().cpu()
        length = values_TM.shape[0]
        self._grow(length)
        self._count_T[:length] += 1
        self._sum_TM[:length] += values_TM
        self._square_TM[:length] += values_TM.square()
        # NumPy's, which takes both numbers whole; torch's reads the lower 32 bits of a seed only.
        drawn_R = np.random.default_rng([self._seed, self.num_prompts]).poisson(1.0, self._weight_RT.shape[0] - 2)
        even = float(self.num_prompts % 2 == 0)
        weight_R = torch.cat(
            [
                torch.tensor([even, 1 - even], dtype=torch.float64),
                torch.from_numpy(drawn_R).double(),
            ]
        )
        self._weight_RT[:, :length] += weight_R[:, None]
        self._weighted_RT[:, :length] += weight_R[:, None] * values_TM[:, self._column]
        self.num_prompts += 1

    def _grow(self, length: int) -> None:
        missing = length - self._count_T.shape[0]
        if missing > 0:
            pad = torch.nn.functional.pad
            self._count_T = pad(self._count_T, (0, missing))
            self._sum_TM, self._square_TM = (pad(sums, (0, 0, 0, missing)) for sums in (self._sum_TM, self._square_TM))
            self._weight_RT, self._weighted_RT = (
                pad(sums, (0, missing)) for sums in (self._weight_RT, self._weighted_RT)
            )

    @property
    def count_T(self) -> Tensor:
        """Prompts that reach each position [T]."""
        return self._count_T.clone()

    def mean_TM(self) -> Tensor:
        """Means over the prompts that reach each position [T, M]."""
        return self._sum_TM / self._count_T[:, None]

    def half_width_TM(self) -> Tensor:
        """Half of the 95 % interval of each mean [T, M]; infinite where a single prompt reaches the position."""
        count_T1 = self._count_T[:, None]
        spread_TM = (self._square_TM - self._sum_TM.square() / count_T1).clamp(min=0.0)
        alone_T1 = count_T1 < 2
        free_T1 = (count_T1 - 1).clamp(min=1)
        half_TM = t_quantile(free_T1) * (spread_TM / free_T1 / count_T1).sqrt()
        return half_TM.masked_fill(alone_T1.expand_as(half_TM), math.inf)

    def completion_depth(self, threshold: float) -> CompletionDepth:
        """See `CompletionDepth`; the halves are the prompts of even and of odd number."""
        whole = _crossing(self._count_T[None], self._sum_TM[None, :, self._column], threshold)
        depths_R = _crossing(self._weight_RT, self._weighted_RT, threshold)
        drawn_R = depths_R[2:].double()
        ends = (
            torch.quantile(drawn_R, torch.tensor([0.025, 0.975], dtype=torch.float64))
            if len(drawn_R)
            else whole[[0, 0]]
        )
        size = self._count_T.shape[0]

        def reached(depth: float) -> int | None:
            return None if depth >= size else int(depth)

        return CompletionDepth(
            depth=reached(whole.item()),
            low=reached(math.floor(ends[0].item())),
            high=reached(math.ceil(ends[1].item())),
            halves=(reached(depths_R[0].item()), reached(depths_R[1].item())),
            threshold=threshold,
            num_positions=size,
        )


@dataclass(frozen=True)
class CompletionDepth:
    """The completion depth: the first position at which the non-decreasing fit of the mean deficit exceeds a threshold.

    Up to there alignment changed the model, from there on it is base. Fitting a non-decreasing curve first keeps one
    noisy position from deciding. The definition is ours. None stands for "not within the measured positions".

    Attributes:
        depth: First position, or None where the fit stays below the threshold.
        low: Lower end of the 95 % percentile bootstrap interval over prompts.
        high: Upper end, or None where it lies beyond the measured positions.
        halves: The same of every second prompt and of the others, a check against the choice of prompts.
        threshold: Deficit that must be exceeded, 0 to 1.
        num_positions: Positions that were measured.
    """

    depth: int | None
    low: int | None
    high: int | None
    halves: tuple[int | None, int | None]
    threshold: float
    num_positions: int


def _crossing(weight_RT: Tensor, weighted_RT: Tensor, threshold: float) -> Tensor:
    """First position [R] at which the isotonic fit of weighted_RT / weight_RT exceeds the threshold, T for none.

    The isotonic fit exceeds a level from the last minimum of the cumulative sum of (value - level) on, so no fit has to
    be computed.
    """
    excess_RT = weighted_RT - threshold * weight_RT
    partial_RT = torch.nn.functional.pad(excess_RT.cumsum(dim=-1), (1, 0))
    return partial_RT.shape[1] - 1 - partial_RT.flip(-1).argmin(dim=-1)


def position_bands(num_positions: int) -> list[tuple[int, int]]:
    """First and last position of each band: 0, 1 to 3, 4 to 7, 8 to 15 and on, doubling."""
    bands, start = [(0, 0)], 1
    while start < num_positions:
        end = 3 if start == 1 else 2 * start - 1
        bands.append((start, min(end, num_positions - 1)))
        start = end + 1
    return bands
