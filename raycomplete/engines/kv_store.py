"""Notes that outlive a scorer: what it was reading when it died, and which sequences nobody shall send again.

They are kept by the head of the cluster, so that they are there after a process or a node is gone, for every process
that asks the same scorers.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from ray.experimental import internal_kv

from raycomplete.engines.payload import ScoreRequest

_NAMESPACE = "raycomplete"


class KvStore(Protocol):
    """Where notes are kept."""

    def write(self, key: str, value: str) -> None:
        """Replaces a note."""

    def read(self, key: str) -> str:
        """A note; empty where there is none."""

    def below(self, prefix: str) -> list[str]:
        """Keys that start with a prefix."""

    def clear(self, prefix: str) -> None:
        """Removes the notes whose keys start with a prefix."""


class ClusterKvStore:
    """Notes in the key-value store of the cluster's head. Picklable: it holds nothing."""

    def write(self, key: str, value: str) -> None:
        """See `KvStore`."""
        internal_kv._internal_kv_put(key, value, namespace=_NAMESPACE)

    def read(self, key: str) -> str:
        """See `KvStore`."""
        return (internal_kv._internal_kv_get(key, namespace=_NAMESPACE) or b"").decode()

    def below(self, prefix: str) -> list[str]:
        """See `KvStore`."""
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)]

    def clear(self, prefix: str) -> None:
        """See `KvStore`."""
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


def digest(request: ScoreRequest) -> str:
    """Names a sequence without its tokens."""
    tokens = np.asarray(request.token_ids, dtype=np.int64).tobytes()
    return hashlib.sha256(f"{request.num_prompt_tokens}:".encode() + tokens).hexdigest()[:32]
