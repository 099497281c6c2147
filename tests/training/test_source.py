"""Where a step's input comes from: when an on-policy run may stop without changing what it does later."""

from __future__ import annotations

from typing import Any, cast

import pytest

from raycomplete.config import RolloutConfig, TrainConfig
from raycomplete.training.source import OnPolicySource


@pytest.mark.parametrize(("sync_every", "checkpoint_every", "stops"), [(1, 25, [1, 2, 3, 4, 5]), (3, 4, [3, 4])])
def test_a_run_stops_only_where_its_engines_get_new_weights(
    sync_every: int, checkpoint_every: int, stops: list[int]
) -> None:
    rollout = RolloutConfig(on_policy=True, sync_every=sync_every, max_staleness=sync_every)
    unused = cast(Any, None)
    train = TrainConfig(checkpoint_every=checkpoint_every)
    source = OnPolicySource(unused, unused, unused, unused, rollout, train, share=(0, 1))
    assert [step for step in range(1, 6) if source.can_stop(step)] == stops
