"""Sends a job to a Ray cluster, follows it, and says how it ended by raycomplete's own exit codes."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from raycomplete.commands.submit import STOP_WAIT_S, Submission
from raycomplete.runtime.errors import SetupError, WaitTimeoutError, WorkError
from raycomplete.runtime.waiting import within

_CONNECT_S = 5.0
_AGENT_S = 60.0  # a head that has just started takes no job yet
_RETRIES = 5  # lost connections in a row, between which nothing was read
_RETRY_S = 2.0
_ANSWER_S = 60.0  # to one question; Ray's client has no limit of its own
_QUIET_S = 300.0  # without a line: a connection that a firewall dropped says nothing either
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

Say = Callable[[str], None]


def send(submission: Submission, say: Say, *, wait: bool = True) -> int:
    """Submits a job and, unless told otherwise, follows its log to the end.

    The first Ctrl-C asks the job to stop, as it does with `raycomplete train`: it writes a checkpoint and ends. The
    second leaves it alone.

    Args:
        submission: From `raycomplete.commands.submit.prepare`.
        say: Where remarks go; the job's own output goes to standard output.
        wait: Whether to follow the job.

    Returns:
        That of the job: 0, 1 or 2; 0 at once without `wait`.

    Raises:
        SetupError: No cluster answers, or it does not know the token; nothing was started.
        WorkError: The connection was lost for good; the job goes on.
    """
    client = connect_to(submission.address)
    with _explained(submission.address):
        job = _submit(client, submission)
    say(f"Job {job} at {submission.address}. Its log: ray job logs {job} --follow --address {submission.address}")
    if not wait:
        return 0
    say("Ctrl-C asks the job to stop and waits for it; a second one leaves it alone.")
    return follow(client, job, say)


def connect_to(address: str) -> Any:
    """A client of the job server at an address.

    Raises:
        SetupError: See `send`.
    """
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise SetupError(f"{address!r} is no address ({error}).", "Give --address as http://HOST:8265.") from error
    try:  # Ray itself would wait for as long as the network does
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise SetupError(
            f"No Ray cluster answers at {address} ({error.strerror or error}).",
            "Give --address the dashboard's address, or open the way to it: ray dashboard cluster.yaml, or kubectl "
            "port-forward service/...-head-svc 8265.",
        ) from error
    from ray.job_submission import JobSubmissionClient

    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # Ray would prefer them to the address it is given
    with _explained(address):
        return JobSubmissionClient(address)


def _submit(client: Any, submission: Submission) -> str:
    name = f"raycomplete-{uuid.uuid4().hex[:12]}"
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            job: str = client.submit_job(
                entrypoint=shlex.join(submission.entrypoint),
                runtime_env={"working_dir": str(submission.working_dir), **submission.runtime_env},
                submission_id=name,
            )
            return job
        except OSError as error:  # the answer was lost; the job may have begun
            if _is_known(client, name, error):
                return name
            raise
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def _is_known(client: Any, job: str, lost: OSError) -> bool:
    """Whether the cluster has a job of this name.

    Raises:
        WorkError: It cannot be asked.
    """
    for _ in range(_RETRIES):
        try:
            within(_ANSWER_S, "The job server did not answer", lambda: client.get_job_info(job))
            return True
        except RuntimeError:  # Ray: there is no such job
            return False
        except (OSError, WaitTimeoutError):
            time.sleep(_RETRY_S)
    raise WorkError(
        f"The connection was lost while the job was submitted ({lost}), and whether it began is unknown.",
        f"Before you submit it again: ray job status {job}",
    ) from lost


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Ray's errors in one sentence with the remedy."""
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except (RayError, RuntimeError, ValueError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, AuthenticationError):
            cause = cause.__cause__
        if cause is not None:
            wrong = "Forbidden" in str(cause)
            raise SetupError(
                f"The cluster at {address} {'refuses this token (403)' if wrong else 'asks for a token (401)'}.",
                "Set RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN, into a file that "
                "RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token; on the head, `ray get-auth-token` prints it.",
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SetupError(f"The job server at {address} did not take the job: {lines[0]}", "") from error


def follow(client: Any, job: str, say: Say) -> int:
    """Prints a job's log until the job ends.

    Raises:
        WorkError: The connection was lost for good.
    """
    log = _Log(client, job)
    stopping = False
    while True:
        try:
            info = log.follow()
            break
        except KeyboardInterrupt:
            if stopping:
                say(f"The job goes on; ray job status {job} says how it does.")
                return 1
            stopping = True
            say(_ask_to_stop(client, job))
    say(f"Job {job}: {str(info.status).rpartition('.')[2].lower()}.")
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        say("What was finished is kept; the last lines of the log say how to go on.")
        return 1
    if info.driver_exit_code not in (1, 2):  # those have said in the log why
        say(str(info.message or "").strip()[:2000])
    return 2 if info.driver_exit_code == 2 else 1


def _ask_to_stop(client: Any, job: str) -> str:
    try:
        within(_ANSWER_S, "The job server did not answer", lambda: client.stop_job(job))
    except (OSError, RuntimeError, WaitTimeoutError) as error:
        return f"The job could not be asked to stop ({error}): ray job stop {job}."
    return f"Asked the job to stop; it has {STOP_WAIT_S} s to write a checkpoint."


class _Log:
    """A job's log, printed once whatever interrupts it."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job = client, job
        self._printed = 0  # characters

    def follow(self) -> Any:
        """Prints until the job has ended, however long it takes, and returns Ray's last word on it."""
        failures = 0
        while True:
            before = self._printed
            try:
                asyncio.run(self._print())
                ask = partial(self._client.get_job_info, self._job)
                info = within(_ANSWER_S, "The job server did not answer", ask)
                if info.status in _ENDED:
                    return info
                failures = 0  # a proxy between here and there closed a silent connection
            except Exception as error:  # of aiohttp, requests or Ray; bounded by the retries
                failures = 1 if self._printed > before else failures + 1
                if failures > _RETRIES:
                    raise WorkError(
                        f"The connection to job {self._job} was lost ({str(error).strip() or type(error).__name__}).",
                        f"The job goes on: ray job logs {self._job} --follow.",
                    ) from error
            time.sleep(_RETRY_S)

    async def _print(self) -> None:
        """Prints what was not printed yet; the server always begins at the first line."""
        seen, log = 0, aiter(self._client.tail_job_logs(self._job))
        while True:
            try:
                async with asyncio.timeout(_QUIET_S):
                    text = await anext(log)
            except (StopAsyncIteration, TimeoutError):  # after a long silence: is the connection alive?
                return
            new = text[max(self._printed - seen, 0) :]
            seen += len(text)
            if new:
                print(new, end="", flush=True)
                self._printed = seen
