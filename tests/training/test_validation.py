"""What early stopping remembers."""

from __future__ import annotations

from dataclasses import replace

from raycomplete.config import TrainConfig
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.rollout_engines import WeightSync
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher
from raycomplete.training.validation import Validator
from tests.training.tiny import make_samples


def test_measurements_pack_as_training_does() -> None:
    """A model that does not keep packed sequences apart would be measured wrongly."""
    prefetcher = TeacherPrefetcher({}, max_depth=4, penalty=False, contrastive=False)
    samples = make_samples(0)
    for packed in (True, False):
        builder = BatchBuilder(penalty=False, contrastive=False, scale=8.0, packed=packed)
        assert Validator(None, samples, prefetcher, builder, TrainConfig())._builder == replace(builder, scale=1.0)
        sync = WeightSync(None, None, None, samples.anchor, packed=packed)  # type: ignore[arg-type]
        assert sync._builder == BatchBuilder(penalty=False, contrastive=False, scale=1.0, packed=packed)


def test_a_lost_best_checkpoint_is_looked_for_again() -> None:
    """Else a run that was about to end would end with the weights of its last step, which were not the best."""
    prefetcher = TeacherPrefetcher({}, max_depth=4, penalty=False, contrastive=False)
    builder = BatchBuilder(penalty=False, contrastive=False, scale=1.0)
    validator = Validator(None, make_samples(0), prefetcher, builder, TrainConfig())
    validator.load_state_dict({"best": 1.0, "best_step": 4, "since": 3})
    assert validator.is_over
    validator.forget_best()
    assert not validator.is_over
    assert validator.state_dict() == {"best": None, "best_step": 0, "since": 0}
