"""The names that callers of a single generator use."""

from raycomplete.rollout.pool import RolloutPool as RolloutClient
from raycomplete.rollout.worker import RolloutOptions

__all__ = ["RolloutClient", "RolloutOptions"]
