"""Waiting for Ray actors with a limit, and saying in words what went wrong."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raycomplete.errors import RaycompleteError, WaitTimeoutError, WorkError


def wait_for(reference: Any, *, who: str, what: str, timeout_s: float) -> Any:
    """`ray.get` with a limit.

    Args:
        reference: What to wait for.
        who: The actor, for messages: "base scorer".
        what: What it should deliver: "a batch of scores".
        timeout_s: Longest wait.

    Raises:
        WaitTimeoutError: Nothing came in time.
        WorkError: The actor died, or failed in a way of its own.
        RaycompleteError: The actor raised one; it is raised here unchanged.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise WaitTimeoutError(
            f"The {who} did not deliver {what} within {timeout_s:.0f} s.",
            f"The cluster has {_resources(ray.cluster_resources())}, of which free: "
            f"{_resources(ray.available_resources())}. Free what is missing, or raise the timeout if it was working.",
        ) from error
    except RayActorError as error:
        raise WorkError(
            f"The {who} died ({_first_line(error)}).",
            "Likely out of memory or a crashed engine: see the Ray session's logs, then run again with --resume.",
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, RaycompleteError):
            raise error.cause from error
        raise WorkError(f"The {who} failed: {_first_line(error.cause or error)}.") from error
    except RayError as error:  # lost objects, unschedulable actors, a head node that is gone
        raise WorkError(f"Ray could not get {what} from the {who} ({_first_line(error)}).") from error


def free_resources() -> str:
    """What the cluster has free, for messages."""
    return _resources(ray.available_resources())


def _resources(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
