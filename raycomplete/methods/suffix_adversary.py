"""An adversary that moves the suffix of a harmful prompt while the student trains.

A suffix search such as GCG's finds tokens behind x after which the student says h. This adversary is cheaper and not
bound to tokens: it moves the embeddings e of all tokens of a suffix at once. With T at most `target_tokens`, and s the
root mean square of the entries of e at the start:

    e <- e - lr s sign(gradient of -log p_s(h_0 .. h_T-1 | x, e)), `steps` times from random words of the vocabulary

Recovery and push-forward, here from position 0 of h on, are then trained behind this suffix. The rows at which the
student predicts h_0 .. h_T-1 are those where a search succeeds, a few of a long h, and count `weight` times. The
gradient of the loss treats e as given. Other words at every depth matter: where a suffix always began with the same
ones, GCG succeeded again. Harmless prompts with suffixes that were not moved are anchored, so that a suffix is no
reason to refuse.

Ours. Nearest are latent adversarial training, which perturbs x itself, and R2D2 (Mazeika et al., arXiv 2402.04249),
which searches tokens by GCG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raycomplete.methods.registry import StudentPass


class SuffixAdversaryConfig(Section):
    """The adversary of recovery samples whose prompt has a suffix (`rollout.prompt_augmentation`)."""

    lr: ClassVar[float] = 0.1  # step of a coordinate, as a share of the root mean square of the first embeddings
    target_tokens: ClassVar[int] = 20  # tokens of h that the adversary wants, at most
    weight: ClassVar[float] = 8.0  # factor on push-forward at those tokens; its loss grows by that

    steps: int = Field(0, ge=0, description="steps of the adversary; 0: suffixes stay as they are")


def adversarial_pass(lm: Any, settings: SuffixAdversaryConfig, term: str) -> StudentPass:
    """Lets the adversary of the student `lm` move first; rows of `term` predict h."""
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
    """The sequences of a micro-batch that have a suffix, one a row and cut after the h that the adversary wants."""

    batch: Any  # the `MicroBatch` of those sequences; its rows predict the first tokens of h, and none has a teacher
    place_P: Tensor  # flat positions of all suffix tokens in it
    origin_P: Tensor  # flat positions of the same tokens in the whole micro-batch
    origin_N: Tensor  # numbers of its rows among those of the whole micro-batch

    @classmethod
    def of_batch(cls, batch: Any, term: str, target_tokens: int) -> SuffixedSequences | None:
        """Cuts them out of a micro-batch; None where no sequence has both a suffix and rows of h."""
        import torch

        is_term_N = batch.term_N == batch.terms.index(term)
        position_N = batch.position_ids_BT.flatten()
        parts = []  # sequence, its first flat position, numbers of its rows of h, flat positions of its suffix
        for sequence, (start, count, _) in enumerate(batch.suffix_S3.tolist()):
            own_N = (is_term_N & (batch.sequence_N == sequence)).nonzero()[:target_tokens, 0]
            if count and len(own_N):
                suffix_P = torch.arange(start, start + count, device=own_N.device)
                parts.append((sequence, start - int(position_N[start]), own_N, suffix_P))
        if not parts:
            return None
        sequences, firsts, owned, origins = map(list, zip(*parts, strict=True))
        reads = [slice(first, int(batch.row_N[own_N[-1]]) + 1) for first, own_N in zip(firsts, owned, strict=True)]

        def padded(flat_N: Tensor) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence([flat_N[read] for read in reads], batch_first=True)

        input_ids_BT = padded(batch.input_ids_BT.flatten())
        shifts = [number * input_ids_BT.shape[1] - first for number, first in enumerate(firsts)]
        own_N, suffix_S3 = torch.cat(owned), batch.suffix_S3[sequences].clone()
        suffix_S3[:, 0] += suffix_S3.new_tensor(shifts)
        cut = replace(
            batch,
            input_ids_BT=input_ids_BT,
            position_ids_BT=padded(position_N),
            row_N=torch.cat([batch.row_N[own] + shift for own, shift in zip(owned, shifts, strict=True)]),
            term_N=batch.term_N[own_N],
            weight_N=batch.weight_N[own_N],
            sequence_N=torch.cat([torch.full_like(own, number) for number, own in enumerate(owned)]),
            token_N=batch.token_N[own_N],
            aligned_hidden_PH=None,
            base_hidden_PH=None,
            depth_S=batch.depth_S[sequences],
            suffix_S3=suffix_S3,
            num_tokens=sum(read.stop - read.start for read in reads),
        )
        place_P = torch.cat([suffix_P + shift for suffix_P, shift in zip(origins, shifts, strict=True)])
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
            loss = -log_probs_of_rows(student, search.batch).sum()
        # The gradient of the suffix alone: nothing reaches the student's own.
        (gradient_PH,) = torch.autograd.grad(loss, suffix_PH)
        suffix_PH = suffix_PH.detach() - move_P1 * gradient_PH.sign()
    return suffix_PH


def log_probs_of_rows(student: Any, batch: Any) -> Tensor:
    """log p_s of the token that follows each row [N], by a pass of a `StudentModule` that keeps its graph."""
    hidden_NH = student.states(batch).last_hidden_state.flatten(0, 1)[batch.row_N]
    (log_p_N,) = student.head_loss("log_probs", hidden_NH, batch)
    found: Tensor = log_p_N
    return found


def replaced(embedding: nn.Module, embedding_PH: Tensor, position_P: Tensor) -> AbstractContextManager[None]:
    """Has the model read other embeddings at some flat positions b * T + t."""

    def copied(flat_NH: Tensor) -> Tensor:
        return flat_NH.index_copy(0, position_P, embedding_PH.to(flat_NH.dtype))

    return changed_outputs([(embedding, copied)])


@contextmanager
def changed_outputs(changes: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Changes what each module gives, [B * T, H], in the passes inside."""

    def hook_of(change: Callable[[Tensor], Tensor]) -> Any:
        def hook(module: nn.Module, arguments: Any, output_BTH: Tensor) -> Tensor:
            return change(output_BTH.flatten(0, 1)).view_as(output_BTH)

        return hook

    handles = [module.register_forward_hook(hook_of(change)) for module, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
