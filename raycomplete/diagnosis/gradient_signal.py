r"""How much each response position contributes to the gradient of a safety loss, and why that fades with position.

SFT on a safe answer y minimises L = sum_t L_t with L_t = -log p(y_t | x, y<t); DPO on a chosen answer y and a rejected
one z minimises L = -log sigmoid(m), m = beta [log p(y) - log r(y) - log p(z) + log r(z)] with a frozen reference r.
With e the one-hot vector of the target and p the softmax of the logits z = s (W h + b) of position t:

    dL_t / d logits = p - e                                                          exact
    dL_t / d h      = s W^T (p - e)                                                  exact
    dL_t / d W      = s (p - e) h^T,  Frobenius norm  s |p - e| |h|                  exact (rank one)
    dL / d theta    = sum_t dL_t / d theta                                           for SFT
    dL / d theta    = beta sigmoid(-m) [sum_t dL_t(y) / d theta - sum_t dL_t(z) / d theta]      for DPO

so DPO weighs the contributions of SFT with one factor that is the same at every position of both answers. The norm of
the contribution of position t in all parameters needs one backward pass a position (`parameter_gradient_norms`); the
norm in the output head needs none and is the estimator for large models. It leaves out what flows through the body
(and, where the head is tied, through the embedding), so it is read as a shape by position, not as a size.

Why it fades. Between its ends,  (1 - p_y)^2 <= |p - e|^2 <= 2 (1 - p_y)^2: a position teaches only as far as the model
does not yet expect the token. And in expectation over targets drawn from the aligned model q, the gradient in the
logits is p - q, with |p - q|_1 <= sqrt(2 KL(q || p)) by Pinsker's inequality. Once the first tokens of a refusal are
given, a model that has only been pretrained goes on refusing by itself: KL(q || p) is small at later positions of the
safe answer, so is the gradient, and nothing is learned there, while positions inside a compliant answer never occur in
the data. That the signal decays with position and leaves alignment incomplete is the finding of arXiv 2511.12155 (known
to us by its abstract and secondary reports); the formulas, bounds and the estimator on this page are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycomplete.losses.checks import check_hidden
from raycomplete.losses.heads import Head


@dataclass(frozen=True, eq=False)
class GradientRows:
    """Norms of each position's contribution to the SFT gradient.

    Attributes:
        log_prob_N: log p(y_t) [N] in nats.
        logits_N: |dL_t / d logits| = |p - e| [N], 0 to sqrt(2).
        hidden_N: |dL_t / d h| [N].
        head_N: |dL_t / d W|, Frobenius [N]; the estimator of the norm in all parameters.
    """

    log_prob_N: Tensor
    logits_N: Tensor
    hidden_N: Tensor
    head_N: Tensor


@torch.no_grad()
def gradient_rows(hidden_NH: Tensor, head: Head, target_N: Tensor, chunk_tokens: int) -> GradientRows:
    """Exact norms of the SFT gradient of each token row in logits, hidden state and head; softcap and scale included.

    Args:
        hidden_NH: Final hidden states from which each target is predicted [N, H].
        head: Output head.
        target_N: Token ids [N].
        chunk_tokens: Rows whose logits exist at a time, at least 1.

    Raises:
        ValueError: Shapes do not fit together.
        NotFiniteError: Hidden states hold NaN or infinity.
    """
    check_hidden("policy", hidden_NH, head, target_N.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
    parts = []
    for start in range(0, hidden_NH.shape[0], chunk_tokens):
        chunk_CH, target_C1 = (
            hidden_NH[start : start + chunk_tokens],
            target_N[start : start + chunk_tokens, None],
        )
        logits_CV = head.logits(chunk_CH)
        log_p_CV = logits_CV.log_softmax(dim=-1)
        grad_CV = log_p_CV.exp()
        grad_CV.scatter_add_(1, target_C1, -torch.ones_like(target_C1, dtype=grad_CV.dtype))
        logits_C = grad_CV.norm(dim=-1)
        raw_CV = head.raw_gradient_(logits_CV, grad_CV)  # overwrites grad_CV
        hidden_CH = raw_CV.to(head.weight_VH.dtype) @ head.weight_VH
        wide_CH = chunk_CH.to(head.logits_dtype)
        parts.append(
            torch.stack(
                [
                    log_p_CV.gather(1, target_C1)[:, 0],
                    logits_C,
                    hidden_CH.to(head.logits_dtype).norm(dim=-1),
                    raw_CV.norm(dim=-1) * wide_CH.norm(dim=-1),
                ]
            )
        )
    joined_4N = torch.cat(parts, dim=1) if parts else hidden_NH.new_zeros(4, 0)
    return GradientRows(*joined_4N)


def preference_factor(
    log_prob_chosen: float,
    log_ref_chosen: float,
    log_prob_rejected: float,
    log_ref_rejected: float,
    beta: float,
) -> float:
    """beta sigmoid(-m): what DPO multiplies every position's SFT gradient with, in both answers.

    Args:
        log_prob_chosen: log p(y) of the safe answer, summed over its tokens, nats.
        log_ref_chosen: The same under the frozen reference.
        log_prob_rejected: log p(z) of the compliant answer.
        log_ref_rejected: The same under the frozen reference.
        beta: DPO's temperature, positive.
    """
    margin = beta * (log_prob_chosen - log_ref_chosen - log_prob_rejected + log_ref_rejected)
    return beta * float(torch.sigmoid(torch.tensor(-margin, dtype=torch.float64)))


def parameter_gradient_norms(
    log_prob_T: Tensor, parameters: Iterable[Any], max_positions: int | None = None
) -> list[float]:
    """Norm in all parameters of each position's contribution to the SFT gradient, by one backward pass a position.

    Args:
        log_prob_T: log p(y_t | x, y<t) [T], still attached to its graph.
        parameters: What the norm runs over; those without requires_grad are left out, tied ones count once.
        max_positions: Only the first so many positions.

    Returns:
        |dL_t / d theta| for each position.
    """
    # A tied head and embedding are one tensor under two names; counted twice it would weigh double.
    wanted = list({id(item): item for item in parameters if item.requires_grad}.values())
    norms = []
    for log_prob in log_prob_T[:max_positions]:
        gradients = torch.autograd.grad(-log_prob, wanted, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))
    return norms
