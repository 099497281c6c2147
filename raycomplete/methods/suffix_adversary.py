"""An adversary who moves the suffix of a harmful prompt while the student trains.

A suffix search such as GCG's finds tokens behind x after which the student says h. This adversary is cheaper and not
bound to tokens: he moves the embeddings e of all tokens of a suffix at once. With T at most `target_tokens`, and s the
root mean square of the entries of e at the start:

    e <- e - lr s sign(gradient of -log p_s(h_0 .. h_T-1 | x, e)), `steps` times from random words of the vocabulary

Behind this suffix the student then trains what completion trains behind x alone: recovery, and push-forward, here from
position 0 of h on. The rows at which it predicts h_0 .. h_T-1 are those where the search breaks in, a few of a long h,
and count `weight` times. The gradient of the loss treats e as given. Other words at every depth matter: where a suffix
always began with the same ones, GCG got through again. Harmless prompts with suffixes that nobody moved are anchored,
so that a suffix is no reason to refuse.

Ours. Nearest are latent adversarial training, which perturbs x itself, and R2D2 (Mazeika et al., arXiv 2402.04249),
which searches tokens by GCG.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raycomplete.methods.registry import StudentPass


class SuffixAdversaryConfig(Section):
    """The adversary of recovery samples whose prompt has a suffix (`rollout.prompt_augmentation`)."""

    steps: int = Field(0, ge=0, description="steps of the adversary; 0: suffixes stay as they are")
    lr: float = Field(
        0.1, gt=0, description="step of a coordinate, as a share of the root mean square of the first embeddings"
    )
    target_tokens: int = Field(20, ge=1, description="tokens of h that the adversary wants, at most")
    weight: float = Field(
        8.0,
        gt=0,
        description="factor on push-forward at those tokens, behind a suffix that was moved; its loss grows by that",
    )


def adversarial_pass(lm: Any, settings: SuffixAdversaryConfig, term: str) -> StudentPass:
    """Lets the adversary move first.

    Args:
        lm: The student, a transformers model.
        settings: Steps and their size.
        term: Loss term whose rows predict h.
    """
    embedding = lm.get_input_embeddings()

    def run(student: Any, batch: Any) -> Any:
        search = SuffixedSequences.of_batch(batch, term, settings.target_tokens)
        if search is None:
            return student.total(student.states(batch).last_hidden_state, batch, {})
        suffix_PH = moved_suffixes(student, embedding, search, settings)
        batch = search.weighted(batch, settings.weight)
        with replaced(embedding, suffix_PH, search.origin_P):
            return student.total(student.states(batch).last_hidden_state, batch, {})

    return run


@dataclass(frozen=True, eq=False)
class SuffixedSequences:
    """The sequences of a micro-batch that have a suffix, one a row and cut after the h that the adversary wants.

    Attributes:
        batch: The `MicroBatch` of those sequences; its rows predict the first tokens of h, and none has a teacher.
        place_P: Flat positions of all suffix tokens in it.
        origin_P: Flat positions of the same tokens in the whole micro-batch.
        origin_N: Numbers of its rows among those of the whole micro-batch.
    """

    batch: Any
    place_P: Tensor
    origin_P: Tensor
    origin_N: Tensor

    @classmethod
    def of_batch(cls, batch: Any, term: str, target_tokens: int) -> SuffixedSequences | None:
        """Cuts them out of a micro-batch; None where no sequence has both a suffix and rows of h."""
        import torch

        is_term_N = batch.term_N == batch.terms.index(term)
        input_N, position_N = batch.input_ids_BT.flatten(), batch.position_ids_BT.flatten()
        reads, positions, rows, owned, places, origins, suffixes = [], [], [], [], [], [], []
        for sequence, (start, count, _) in enumerate(batch.suffix_S3.tolist()):
            own_N = (is_term_N & (batch.sequence_N == sequence)).nonzero()[:target_tokens, 0]
            if not count or not len(own_N):
                continue
            first = start - int(position_N[start])
            row_T = batch.row_N[own_N] - first
            read = slice(first, first + int(row_T[-1]) + 1)
            reads.append(input_N[read])
            positions.append(position_N[read])
            rows.append(row_T)
            owned.append(own_N)
            origins.append(torch.arange(start, start + count, device=input_N.device))
            places.append(origins[-1] - first)
            suffixes.append(sequence)
        if not reads:
            return None
        input_ids_BT = torch.nn.utils.rnn.pad_sequence(reads, batch_first=True)
        offsets = [number * input_ids_BT.shape[1] for number in range(len(reads))]
        own_N = torch.cat(owned)
        suffix_S3 = batch.suffix_S3[suffixes].clone()
        suffix_S3[:, 0] = torch.stack([place_P[0] for place_P in places]) + suffix_S3.new_tensor(offsets)
        cut = replace(
            batch,
            input_ids_BT=input_ids_BT,
            position_ids_BT=torch.nn.utils.rnn.pad_sequence(positions, batch_first=True),
            row_N=torch.cat([row_T + offset for row_T, offset in zip(rows, offsets, strict=True)]),
            term_N=batch.term_N[own_N],
            weight_N=batch.weight_N[own_N],
            sequence_N=torch.cat([torch.full_like(own, number) for number, own in enumerate(owned)]),
            token_N=batch.token_N[own_N],
            aligned_hidden_PH=None,
            base_hidden_PH=None,
            depth_S=batch.depth_S[suffixes],
            suffix_S3=suffix_S3,
            num_tokens=sum(map(len, reads)),
        )
        place_P = torch.cat([place_P + offset for place_P, offset in zip(places, offsets, strict=True)])
        return cls(cut, place_P, torch.cat(origins), own_N)

    def weighted(self, batch: Any, factor: float) -> Any:
        """Multiplies the weights of these rows in the whole micro-batch."""
        weight_N = batch.weight_N.clone()
        weight_N[self.origin_N] *= factor
        return replace(batch, weight_N=weight_N)

    def words(self, vocab_size: int) -> list[Tensor]:
        """Draws the token ids at which the suffix of each sequence starts, from the seed of each."""
        import torch

        return [
            torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).to(self.place_P.device)
            for _, count, seed in self.batch.suffix_S3.tolist()
        ]


def moved_suffixes(
    student: Any, embedding: nn.Module, search: SuffixedSequences, settings: SuffixAdversaryConfig
) -> Tensor:
    """Searches embeddings [P, H] for all suffix tokens, in float32 or wider, by passes of a `StudentModule`."""
    import torch

    with torch.no_grad():  # a hook of gradient checkpointing asks for gradients even here, hence `detach`
        starts = [embedding(word_T[None])[0].detach() for word_T in search.words(student.head_loss.vocab_size)]
    wide = torch.promote_types(starts[0].dtype, torch.float32)
    suffix_PH = torch.cat(starts).to(wide)
    scales = [start_TH.to(wide).square().mean().sqrt().expand(len(start_TH), 1) for start_TH in starts]
    move_P1 = settings.lr * torch.cat(scales)
    for _ in range(settings.steps):
        suffix_PH.requires_grad_()
        with replaced(embedding, suffix_PH, search.place_P):
            hidden_NH = student.states(search.batch).last_hidden_state.flatten(0, 1)[search.batch.row_N]
        (log_p_N,) = student.head_loss("log_probs", hidden_NH, search.batch)
        # The gradient of the suffix alone: nothing reaches the student's own.
        (gradient_PH,) = torch.autograd.grad(-log_p_N.sum(), suffix_PH)
        suffix_PH = suffix_PH.detach() - move_P1 * gradient_PH.sign()
    return suffix_PH


@contextmanager
def replaced(embedding: nn.Module, embedding_PH: Tensor, position_P: Tensor) -> Iterator[None]:
    """Has the model read other embeddings at some flat positions b * T + t."""

    def hook(module: nn.Module, arguments: Any, output_BTH: Tensor) -> Tensor:
        flat_NH = output_BTH.flatten(0, 1)
        return flat_NH.index_copy(0, position_P, embedding_PH.to(flat_NH.dtype)).view_as(output_BTH)

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
