"""What early stopping remembers."""

from __future__ import annotations

from raycomplete.config import TrainConfig
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.feed import ScoreFeed
from raycomplete.training.validation import Validator
from tests.training.tiny import make_samples


def test_a_lost_best_checkpoint_is_looked_for_again() -> None:
    """Else a run that was about to end would end with the weights of its last step, which were not the best."""
    feed = ScoreFeed({}, max_depth=4, penalty=False, contrastive=False)
    builder = BatchBuilder(penalty=False, contrastive=False, scale=1.0)
    validator = Validator(None, make_samples(0), feed, builder, TrainConfig())
    validator.load_state_dict({"best": 1.0, "best_step": 4, "since": 3})
    assert validator.is_over
    validator.forget_best()
    assert not validator.is_over
    assert validator.state_dict() == {"best": None, "best_step": 0, "since": 0}
