"""An adversary who moves the suffix of a harmful prompt while the student trains.

A suffix search such as GCG's finds tokens behind x after which the student says h. This adversary is cheaper and not
bound to tokens: he moves the embeddings e of all tokens of a suffix at once. With T at most `target_tokens`, and s the
root mean square of the entries of a token's embedding:

    e <- e - lr s sign(gradient of -log p_s(h_0 .. h_T-1 | x, e)), `steps` times from random words of the vocabulary

Behind this suffix the student then trains what completion trains behind x alone: recovery, and push-forward, here from
position 0 of h on, where the search would break in. The gradient of the loss treats e as given. Another start at every
step matters: behind suffixes that always begin with the same words, GCG got through again. Harmless prompts with
suffixes that nobody moved are anchored, so that a suffix is no reason to refuse.

Ours. Nearest are latent adversarial training, which perturbs x itself, and R2D2 (Mazeika et al., arXiv 2402.04249),
which searches tokens by GCG.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from raycomplete.methods.perturbation import perturbed, refuse_sharded
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raycomplete.losses.loss import LossOutput
    from raycomplete.methods.registry import StudentPass
    from raycomplete.training.batches import MicroBatch
    from raycomplete.training.student import StudentModule


class SuffixAdversaryConfig(Section):
    """The adversary of recovery samples whose prompt has a suffix (`rollout.prompt_augmentation`)."""

    steps: int = Field(0, ge=0, description="steps of the adversary; 0: suffixes stay as they are")
    lr: float = Field(
        0.1, gt=0, description="step of a coordinate, as a share of the root mean square of its token's embedding"
    )
    target_tokens: int = Field(20, ge=1, description="tokens of h that the adversary wants, at most")


def adversarial_pass(lm: Any, settings: SuffixAdversaryConfig, term: str) -> StudentPass:
    """Lets the adversary move first.

    Args:
        lm: The student, a transformers model.
        settings: Steps and their size.
        term: Loss term whose rows predict h.
    """
    embedding = lm.get_input_embeddings()

    def run(student: StudentModule, batch: MicroBatch) -> LossOutput:
        refuse_sharded(embedding, "method.suffix_adversary")
        search = Search.of_batch(batch, term, settings.target_tokens)
        if search is None:
            return student.total(student.states(batch).last_hidden_state, batch, {})
        delta_PH = moved(student, embedding, search, settings)
        with perturbed([embedding], [delta_PH], search.origin_P):
            return student.total(student.states(batch).last_hidden_state, batch, {})

    return run


@dataclass(frozen=True, eq=False)
class Search:
    """The sequences of a micro-batch that have a suffix, one a row and cut after the h that the adversary wants.

    Attributes:
        batch: Those sequences; its rows predict the first tokens of h.
        place_P: Flat positions of all suffix tokens in it.
        origin_P: Flat positions of the same tokens in the whole micro-batch.
    """

    batch: MicroBatch
    place_P: Tensor
    origin_P: Tensor

    @classmethod
    def of_batch(cls, batch: MicroBatch, term: str, target_tokens: int) -> Search | None:
        """Cuts them out of a micro-batch; None where no sequence has both a suffix and rows of h."""
        import torch

        is_term_N = batch.term_N == batch.terms.index(term)
        input_N, position_N = batch.input_ids_BT.flatten(), batch.position_ids_BT.flatten()
        reads, rows, following, places, origins = [], [], [], [], []
        for sequence, (start, count) in enumerate(batch.suffix_S2.tolist()):
            own_N = (is_term_N & (batch.sequence_N == sequence)).nonzero()[:target_tokens, 0]
            if not count or not len(own_N):
                continue
            first = start - int(position_N[start])
            row_T = batch.row_N[own_N] - first
            reads.append(input_N[first : first + int(row_T[-1]) + 1])
            rows.append(row_T)
            following.append(batch.token_N[own_N])
            origins.append(torch.arange(start, start + count, device=input_N.device))
            places.append(origins[-1] - first)
        if not reads:
            return None
        input_ids_BT = torch.nn.utils.rnn.pad_sequence(reads, batch_first=True)
        width = input_ids_BT.shape[1]
        position_ids_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.arange(len(read), device=read.device) for read in reads], batch_first=True
        )
        cut = replace(
            batch,
            input_ids_BT=input_ids_BT,
            position_ids_BT=position_ids_BT,
            row_N=torch.cat([row_T + number * width for number, row_T in enumerate(rows)]),
            token_N=torch.cat(following),
        )
        place_P = torch.cat([place_P + number * width for number, place_P in enumerate(places)])
        return cls(cut, place_P, torch.cat(origins))

    def words(self, vocab_size: int) -> Tensor:
        """Draws token ids [P]: the same for the same sequences, whose depths differ from step to step."""
        import torch

        batch = self.batch
        read = (batch.input_ids_BT, batch.row_N, batch.token_N)
        digest = hashlib.sha256(b"".join(ids.cpu().numpy().tobytes() for ids in read)).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randint(vocab_size, (len(self.place_P),), generator=generator).to(self.place_P.device)


def moved(student: StudentModule, embedding: nn.Embedding, search: Search, settings: SuffixAdversaryConfig) -> Tensor:
    """Searches what is added to the embeddings of all suffix tokens [P, H], in float32 or wider."""
    import torch

    with torch.no_grad():
        drawn_PH = embedding(search.batch.input_ids_BT).flatten(0, 1)[search.place_P]
        start_PH = embedding(search.words(embedding.num_embeddings))
    wide = torch.promote_types(start_PH.dtype, torch.float32)
    step_P1 = settings.lr * start_PH.to(wide).square().mean(-1, keepdim=True).sqrt()
    delta_PH: Tensor = start_PH.to(wide) - drawn_PH.to(wide)
    for _ in range(settings.steps):
        delta_PH.requires_grad_()
        with perturbed([embedding], [delta_PH], search.place_P):
            hidden_NH = student.states(search.batch).last_hidden_state.flatten(0, 1)[search.batch.row_N]
        (log_p_N,) = student.head_loss("log_probs", hidden_NH, search.batch)
        # The gradient of d alone: nothing reaches the student's own.
        (gradient_PH,) = torch.autograd.grad(-log_p_N.sum(), delta_PH)
        delta_PH = delta_PH.detach() - step_P1 * gradient_PH.sign()
    return delta_PH
