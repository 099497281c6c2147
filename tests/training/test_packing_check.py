"""Models that keep packed sequences apart are told from those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import AnchorSample
from raycomplete.training.batches import MicroBatch
from raycomplete.training.packing_check import keeps_sequences_apart
from tests.training.tiny import make_model

SAMPLE = AnchorSample("a", (5, 6, 7, 8, 9, 10), (11, 12, 13, 14, 15, 16))


class Reader:
    """What DeepSpeed's engine does here: log-probabilities of the targets of a batch."""

    device = torch.device("cpu")

    def __init__(self, model: Any, *, sees_neighbours: bool) -> None:
        self._model, self._sees_neighbours = model, sees_neighbours

    def eval(self) -> None:
        self._model.eval()

    def train(self) -> None:
        self._model.train()

    def __call__(self, batch: MicroBatch, mode: str) -> tuple[torch.Tensor]:
        inputs = batch.model_inputs()
        if self._sees_neighbours:  # as a model whose mask knows nothing of positions
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        log_probs_NV = self._model(**inputs).logits.flatten(0, 1)[batch.row_N].log_softmax(-1)
        return (log_probs_NV.gather(1, batch.target_N[:, None])[:, 0],)


@pytest.mark.parametrize("sees_neighbours", [True, False])
def test_a_leak_between_sequences_of_a_row_is_seen(sees_neighbours: bool, tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path, 0), "float32")
    reader = Reader(model, sees_neighbours=sees_neighbours)
    assert keeps_sequences_apart(reader, SAMPLE, "float32") is not sees_neighbours
    assert model.training, "left as it was found"


def test_a_sample_of_two_tokens_is_enough(tmp_path: Path) -> None:
    reader = Reader(load_model(make_model(tmp_path, 0), "float32"), sees_neighbours=False)
    assert keeps_sequences_apart(reader, AnchorSample("a", (5,), (6,)), "float32")
