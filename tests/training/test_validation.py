"""Early stopping: how it packs, and what it remembers."""

from __future__ import annotations

from dataclasses import replace

import torch

from raycomplete.config import TrainConfig
from raycomplete.data.samples import AnchorSample
from raycomplete.training.batches import BatchBuilder, answer_batch
from raycomplete.training.rollout_engines import WeightSync
from raycomplete.training.validation import Validator
from tests.training.tiny import completion, make_samples, prefetcher_of

METHOD = completion()
LOSS = METHOD.loss(TrainConfig())


def test_measurements_pack_as_training_does() -> None:
    """A model that does not keep packed sequences apart would be measured wrongly."""
    prefetcher = prefetcher_of(METHOD, {})
    short = tuple(AnchorSample(f"a{i}", (5, 6), tuple(range(7, 9 + 8 * (i % 2)))) for i in range(4))
    samples = replace(make_samples(0), anchor=short)
    for packed in (True, False):
        builder = BatchBuilder(LOSS, scale=8.0, packed=packed)
        validator = Validator(None, samples, prefetcher, builder, METHOD, TrainConfig())
        assert validator._builder == replace(builder, scale=1.0)
        sync = WeightSync(None, None, None, samples.anchor, packed=packed)  # type: ignore[arg-type]
        expected = answer_batch(short, packed=packed)
        assert torch.equal(sync._batch.input_ids_BT, expected.input_ids_BT)
        assert (len(expected.input_ids_BT) < 4) == packed, "else nothing shares a row, and this proves nothing"


def test_a_lost_best_checkpoint_is_looked_for_again() -> None:
    """Else a run that was about to end would end with the weights of its last step, which were not the best."""
    prefetcher = prefetcher_of(METHOD, {})
    validator = Validator(None, make_samples(0), prefetcher, BatchBuilder(LOSS, 1.0), METHOD, TrainConfig())
    validator.load_state_dict({"best": 1.0, "best_step": 4, "since": 3})
    assert validator.is_over
    validator.forget_best()
    assert not validator.is_over
    assert validator.state_dict() == {"best": None, "best_step": 0, "since": 0}
