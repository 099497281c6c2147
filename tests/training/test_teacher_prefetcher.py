"""Scores asked for ahead of time: which sequences each model reads, and how they are found again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.methods.completion import LossWeights
from raycomplete.methods.registry import TeacherContext
from raycomplete.training.batches import cut_harmful
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher
from tests.training.tiny import LocalScores, completion, make_model, prefetcher_of

ANCHOR = [AnchorSample("a0", (1, 2), (3, 4, 5)), AnchorSample("a1", (1,), (6, 7))]
RECOVERY = cut_harmful([RecoverySample("r0", (10, 11), (20, 10, 11), (12, 13, 14, 15), (16, 17, 18))], 3)
ANCHOR_READ = [((1, 2, 3, 4, 5), 2), ((1, 6, 7), 1)]
REFUSAL_READ = [((20, 10, 11, 16, 17, 18), 3)]  # the teacher's own prompt, without h
HARMFUL_READ = [((20, 10, 11, 12, 13, 14), 3)]  # the teacher's prompt, h as far as any step reads


class Recorder:
    """A source that remembers what it was asked, and answers with the tokens that each row predicts."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[tuple[int, ...], int]]] = []
        self.collected = 0

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        self.asked.append(list(sequences))
        return list(sequences)

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        self.collected += 1
        return [torch.tensor(tokens[num_prompt:])[:, None].float() for tokens, num_prompt in reference]


def prefetcher(*, penalty: bool, contrastive: bool) -> tuple[TeacherPrefetcher, Recorder, Recorder]:
    base, aligned = Recorder(), Recorder()
    sources = {"base": base, "aligned": aligned}
    method = completion(
        weights=LossWeights(penalty=0.1 if penalty else 0.0),
        contrastive_alpha=0.5 if contrastive else 0.0,
    )
    return prefetcher_of(method, sources), base, aligned


@pytest.mark.parametrize(
    ("penalty", "contrastive", "base_reads", "aligned_reads"),
    [
        (False, False, [], ANCHOR_READ + REFUSAL_READ),
        (True, False, HARMFUL_READ, ANCHOR_READ + REFUSAL_READ),
        (False, True, ANCHOR_READ + REFUSAL_READ, ANCHOR_READ + REFUSAL_READ),
        (True, True, ANCHOR_READ + REFUSAL_READ + HARMFUL_READ, ANCHOR_READ + REFUSAL_READ),
    ],
)
def test_each_model_reads_what_the_loss_needs_and_no_more(
    penalty: bool, contrastive: bool, base_reads: list[Any], aligned_reads: list[Any]
) -> None:
    one, base, aligned = prefetcher(penalty=penalty, contrastive=contrastive)
    one.request(0, ANCHOR, RECOVERY)
    assert [item for call in base.asked for item in call] == base_reads
    assert [item for call in aligned.asked for item in call] == aligned_reads


def test_the_states_of_a_prefix_are_those_of_the_whole(tmp_path: Path) -> None:
    """h is read once to the largest depth and cut later, which is right for a causal model only."""
    source = LocalScores(make_model(tmp_path / "m", 0))
    sample = RecoverySample("r", (5, 6, 7), (5, 6, 7), tuple(range(20, 30)), (40, 41))
    one = prefetcher_of(completion(weights=LossWeights(penalty=1.0)), {"base": source, "aligned": source})
    one.request(0, [], [sample])
    whole_TH = one.take(0).hidden("base", TeacherContext(sample.prompt_ids, sample.harmful_ids))
    for depth in (1, 4, 8):
        (cut_DH,) = source.collect_tensors([(sample.prompt_ids + sample.harmful_ids[:depth], 3)])
        torch.testing.assert_close(whole_TH[:depth], cut_DH, atol=1e-5, rtol=0)
