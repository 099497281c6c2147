"""Waits for Ray actors with a limit, and says in words what went wrong: which process died, where, and why."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray.core.generated import common_pb2, gcs_pb2
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from raycomplete.runtime.errors import ProcessDiedError, RaycompleteError, WaitTimeoutError, WorkError
from raycomplete.runtime.logs import append_log
from raycomplete.runtime.signals import stop

_RESUME = (
    "Run the same command again (train, align, diagnose: with --resume); if memory ran out, give the engine more or "
    "lower teacher.* and rollout.* sizes."
)
_POLL_S = 0.5
_DEATH_REPORT_S = 1.0
_RECENT_S = 60.0

# Ray's words about a death, and their meaning; the first that fits.
_CAUSES = (
    (r"ray\.kill", "it was stopped on purpose, by raycomplete or by hand"),
    (r"CUDA out of memory", "out of memory on its GPU"),
    (r"memory monitor|low on memory|OutOfMemory|OUT_OF_MEMORY", "out of memory: Ray's memory monitor ended it"),
    (r"creation task", "its constructor failed"),
    (r"hanging for", "it did not answer Ray for too long"),
    (r"SIGSEGV.*received|Segmentation fault", "it crashed in native code"),
    (r"connection error code 2|End of file", "killed by SIGKILL, as when memory runs out, or crashed; see its log"),
    (r"node .*(died|dead|removed|terminated|lost|marked|fail)|NODE_?DIED|health check", "its node is gone"),
    (r"exit.{0,20}code (\d+)", "its process ended by itself with exit code {0}"),
    (r"failed to retrieve object", "the node that held its answer is gone"),
    (r"unavailable", "its process is gone or cannot be reached, and Ray starts it again"),
)
# From here on Ray lists every reason that there could be, which is no finding.
_EVERY_REASON = re.compile(r"Some common causes|There are some potential root causes")


def keep_off_the_screen() -> None:
    """Sends errors that Ray would print to `logs/ray.log` of the run folder; call it before `ray.init`.

    Ray (seen in 2.60) has no switch for these lines.
    """
    ray_worker.print_to_stdstream = lambda data, ignore_prefix=False: append_log("ray.log", data["lines"])


def wait_for(reference: Any, *, who: str, what: str, timeout_s: float, grace_s: float = 0.0) -> Any:
    """Calls `ray.get` with a limit, and raises an error in words: WaitTimeoutError, ProcessDiedError or WorkError.

    An error of raycomplete in the actor is raised unchanged. `who` is "base scorer", `what` "a batch of scores". A
    requested stop ends the wait after `grace_s` seconds.
    """
    try:
        return _get(reference, timeout_s, grace_s)
    except GetTimeoutError as error:
        raise WaitTimeoutError(
            f"The {who} did not deliver {what} within {timeout_s:.0f} s.",
            f"The cluster has {_resources(ray.cluster_resources())}, of which free: {free_resources()}. "
            "Free what is missing, or raise the timeout if it was working.",
        ) from error
    except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
        raise died(error, who) from error
    except RayTaskError as error:
        if isinstance(error.cause, RaycompleteError):
            raise error.cause from error
        raise WorkError(f"The {who} failed: {_first_line(error.cause or error)}.") from error
    except RayError as error:  # unschedulable actors, a head node that is gone, a caller that is gone
        if isinstance(error, ObjectLostError) and not isinstance(error, OwnerDiedError):
            raise died(error, who) from error  # it had answered, and its node died with the answer
        raise WorkError(f"Ray could not get {what} from the {who} ({_first_line(error)}).") from error


def _get(reference: Any, timeout_s: float, grace_s: float) -> Any:
    # Only a command that handles signals polls: each poll that ends early may start a transfer from another node again.
    if not stop.is_handled or threading.current_thread() is not threading.main_thread():
        return ray.get(reference, timeout=timeout_s)
    deadline = time.monotonic() + timeout_s
    while True:
        stop.check(grace_s)
        left_s = deadline - time.monotonic()
        try:
            return ray.get(reference, timeout=max(min(left_s, _POLL_S), 0.0))
        except GetTimeoutError:
            if left_s <= _POLL_S:
                raise


def died(error: RayError, who: str) -> ProcessDiedError:
    """Makes the error of an actor's death from Ray's error and its table of actors."""
    text = str(error)
    node, process, said = _last_process(getattr(error, "actor_id", None))
    said = said or text
    cause = likely_cause(said) or next((line.strip() for line in said.splitlines() if line.strip()), "unknown")
    log = log_path(process or _found(r"^\s*pid: (\d+)", text))
    node = node or _found(r"^\s*ip: (\S+)", text)
    return ProcessDiedError(f"The {who} died: {cause}.", _RESUME, role=who, node=node, cause=cause, log_path=log)


def likely_cause(text: str) -> str:
    """Finds the likeliest reason of a death in Ray's words; empty where nothing is recognised."""
    found = _EVERY_REASON.split(text)[0]
    for pattern, words in _CAUSES:
        match = re.search(pattern, found, re.IGNORECASE)
        if match is not None:
            return words.format(*match.groups())
    return ""


def log_path(process: str) -> str:
    """Returns a worker process's log, a pattern for it where it ran on another node, or the folder without a number."""
    node = ray_worker._global_node
    if node is None:
        return ""
    folder = Path(node.get_logs_dir_path())
    name = f"worker-*-{process}.err"
    return str(next(iter(sorted(folder.glob(name))), folder / name) if process else folder)


def is_gone(actor: Any) -> bool:
    """Tells whether an actor is dead and Ray will not start it again."""
    entry = _actor(actor._actor_id.hex())
    return entry is not None and entry.state == gcs_pb2.ActorTableData.DEAD


def _last_process(actor_id: str | None) -> tuple[str, str, str]:
    """Finds node, process number and Ray's words of an actor's last process that died; empty where it has none.

    The head learns of a death a moment after the caller whose connection broke, so it is asked for a while.
    """
    deadline = time.monotonic() + _DEATH_REPORT_S
    while actor_id and (entry := _actor(actor_id)) is not None:
        late = time.monotonic() > deadline
        lives = [(entry.address.worker_id, entry.address.node_id)]
        if late or not entry.address.worker_id:
            lives += [(former.worker_id, former.node_id) for former in entry.previous_incarnations[-1:]]
        with suppress(Exception):
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            for worker_id, node_id in lives:
                found = ray_state.state._connect_and_get_accessor().get_worker_info(ray.WorkerID(worker_id))
                process = gcs_pb2.WorkerTableData.FromString(found)
                if 0 < process.end_time_ms < 1000 * (time.time() - _RECENT_S):
                    continue  # it died earlier, and Ray still knows of it
                node = f"{process.worker_address.ip_address} (node {node_id.hex()[:12]})"
                if node_id.hex() not in alive:
                    return node, str(process.pid or ""), "its node died"
                if not process.is_alive:
                    oom = process.exit_type == common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY
                    return node, str(process.pid), "memory monitor" if oom else process.exit_detail
        if late:
            break
        time.sleep(0.1)
    return "", "", ""


def _actor(actor_id: str) -> Any:
    """Reads Ray's entry on an actor; None where there is none, or where Ray does not answer any more."""
    with suppress(Exception):
        entry = ray_state.state._connect_and_get_accessor().get_actor_info(ray.ActorID.from_hex(actor_id))
        return None if entry is None else gcs_pb2.ActorTableData.FromString(entry)
    return None


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else ""


def free_resources() -> str:
    """Names the free resources of the cluster, for messages."""
    return _resources(ray.available_resources())


def _resources(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
