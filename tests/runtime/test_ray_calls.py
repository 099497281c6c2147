"""Deaths in words: the likeliest cause from what Ray says."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import ObjectLostError, ObjectReconstructionFailedError, OwnerDiedError

from raycomplete.runtime.errors import ProcessDiedError, WorkError
from raycomplete.runtime.ray_calls import likely_cause, wait_for

CLOSED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Scorer\n\tpid: 7\n\tip: 10.0.0.2\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. There are some potential root causes. (1) The "
    "process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The "
    "worker is crashed unexpectedly due to SIGSEGV or other unexpected errors."
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ObjectLostError("ab" * 14, None, "here"), ProcessDiedError),
        (ObjectReconstructionFailedError("ab" * 14, None, "here"), ProcessDiedError),
        (OwnerDiedError("ab" * 14, None, "here"), WorkError),
    ],
)
def test_an_answer_lost_with_its_node_is_a_death(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits asks again after a death, and gives up after other errors."""

    def get(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(expected) as caught:
        wait_for(None, who="base scorer", what="scores", timeout_s=1.0)
    assert type(caught.value) is expected
    assert "base scorer" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (CLOSED, "killed by SIGKILL"),
        ("Task was killed due to the node running low on memory.", "out of memory: Ray's memory monitor"),
        ("The actor is dead because its node has died. Node Id: 4f", "its node is gone"),
        ("The actor is dead because it was killed by `ray.kill`.", "stopped on purpose"),
        ("Worker exit type: SYSTEM_ERROR Worker exit detail: exit code 139", "exit code 139"),
        ("The actor 4f is unavailable: rpc failed.", "Ray starts it again"),
        ("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: ended due to low memory", "out of memory: Ray's"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "on its GPU"),
        ("A worker health check has been hanging for 600.00 seconds.", "did not answer"),
        ("Something new.\nMore.", ""),
        ("", ""),
    ],
)
def test_the_cause_is_told_from_what_ray_says(said: str, cause: str) -> None:
    found = likely_cause(said)
    assert cause in found
    assert bool(found) == bool(cause)
