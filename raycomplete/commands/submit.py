"""`raycomplete submit`: runs a command on a cluster as a job of Ray, and ends with the job's exit code.

Everything is checked here before anything is uploaded. The printed line is what anyone may type instead:
`ray job submit ... -- python jobs/train.py RUNFILE`. On the cluster the job runs in a copy of the working folder, so
every path of the run file is looked at from there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig, load_run_file, map_paths
from raycomplete.runtime.errors import ConfigError, LostJobError, SetupError

JOBS = {"train": True, "align": True, "diagnose": True, "evaluate": False, "serve": False}  # takes --resume?
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXCLUDES = ("/runs", ".*_cache")  # beside .git, .venv and __pycache__, and what .gitignore and .rayignore name
STOP_WAIT_S = 300  # between `ray job stop` and SIGKILL; Ray's own 3 s are too short for a checkpoint
_PASSED_ON = ("RAYCOMPLETE_LOG", "RAYCOMPLETE_TRACEBACK")  # no token or key is ever among them
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to the address it is given
_WRITTEN = ("output.root", "serve.state")
_OWN_SECTIONS = ("align", "diagnose", "serve")  # read by the job of that name only
_ANSWER_S = (5.0, 60.0)  # to connect, and to be answered; Ray's client has no limit of its own
_AGENT_S, _RETRY_S = 60.0, 2.0  # a head that has just started takes no job yet
_QUIET_S = 300.0  # without a line: a connection that a firewall dropped says nothing either

Say = Callable[[str], None]


@dataclass(frozen=True)
class Submission:
    """A job that is ready to be sent: its command in the copy of `working_dir`, and paths that nodes may not find."""

    address: str
    working_dir: Path
    entrypoint: tuple[str, ...]
    runtime_env: dict[str, Any] = field(default_factory=dict)  # without the working folder
    warnings: tuple[str, ...] = ()

    def command(self) -> str:
        """Returns the job as a line for a shell."""
        words = ["ray", "job", "submit", "--address", self.address, "--working-dir", str(self.working_dir)]
        words += ["--runtime-env-json", json.dumps(self.runtime_env), "--", *self.entrypoint]
        others = [name for name in _ADDRESSES if os.environ.get(name, self.address) != self.address]
        return shlex.join([*(["env"] if others else []), *(word for name in others for word in ("-u", name)), *words])


def prepare(
    run_file: Path,
    overrides: Sequence[str] = (),
    *,
    job: str = "train",
    address: str | None = None,
    working_dir: Path = Path(),
    flags: Sequence[str] = (),
) -> Submission:
    """Checks a job of `JOBS` on this machine; without `address` the environment names the job server."""
    if job not in JOBS:
        raise ConfigError(f"There is no job {job!r}.", f"--job takes {', '.join(JOBS)}.")
    if flags and not JOBS[job]:
        raise ConfigError(f"{flags[0]} is not for --job {job}.", "Leave it out: what is finished is never made again.")
    config = load_run_file(run_file, overrides)
    folder, file = working_dir.resolve(), run_file.parent.resolve() / run_file.name
    if not folder.is_dir():
        raise ConfigError(f"The working folder {working_dir} does not exist.", "Give --working-dir a folder.")
    if not file.is_relative_to(folder):
        words = f"The run file {run_file} lies outside the working folder {folder}, so the job would not find it."
        raise ConfigError(words, "Give --working-dir a folder that holds it.")
    files = uploaded_files(folder)
    if file not in files:
        words = f"The run file {run_file} is not uploaded, since .gitignore, .rayignore or submit itself leaves it out."
        raise ConfigError(words, "Move it to another folder of the working folder.")
    start = [f"jobs/{job}.py"] if folder / "jobs" / f"{job}.py" in files else ["-m", "raycomplete", job]
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_S))}
    environment |= {variable: os.environ[variable] for variable in _PASSED_ON if variable in os.environ}
    known = [value for name in _ADDRESSES if "://" in (value := os.environ.get(name, "")) and "ray://" not in value]
    return Submission(
        address=(address or next(iter(known), DEFAULT_ADDRESS)).rstrip("/"),
        working_dir=folder,
        entrypoint=("python", *start, file.relative_to(folder).as_posix(), *overrides, *flags),
        runtime_env={"excludes": list(EXCLUDES), "env_vars": environment},
        warnings=tuple(_warnings(config, job, folder, files)),
    )


def uploaded_files(folder: Path, limit: int | None = None) -> set[Path]:
    """Finds the files that Ray would upload, by Ray's own rules; refuses more than Ray takes."""
    from ray._private import ray_constants  # Ray offers its rules nowhere else
    from ray._private.runtime_env import packaging

    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    excludes = [packaging._get_excludes(folder, [*ray_constants.get_runtime_env_default_excludes(), *EXCLUDES])]
    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    logger = logging.getLogger(__name__)
    packaging._dir_travel(folder, excludes, note, include_gitignore=with_gitignore, logger=logger)
    limit = packaging.GCS_STORAGE_MAX_SIZE if limit is None else limit
    if sum(sizes.values()) > limit:
        largest = max(sizes, key=lambda path: sizes[path])
        raise SetupError(
            f"The working folder {folder} has more than the {limit >> 20} MiB that Ray uploads; the largest file is "
            f"{largest.relative_to(folder)} ({sizes[largest] >> 20} MiB).",
            "Name what the job does not need in .rayignore, or give --working-dir a smaller folder.",
        )
    return set(sizes)


def _warnings(config: RunConfig, job: str, folder: Path, files: Iterable[Path]) -> Iterator[str]:
    """Names the paths of a run file that a node of the cluster may not find, each with what to do."""
    there = set(files).union(*(path.parents for path in files))
    roles = ("base",) if job == "align" else ("base", "aligned", "student")  # align makes the others
    specs = [(f"models.{role}", getattr(config.models, role)) for role in roles]
    # hub:, organism: and package: are found by name
    paths = [(key, Path(spec).expanduser()) for key, spec in specs if spec is not None and ":" not in spec]

    def note(key: str, path: Path) -> Path:
        paths.append((key, path))
        return path

    map_paths(config, note)
    for key, path in paths:
        section = key.partition(".")[0]
        if section in _OWN_SECTIONS and section != job:
            continue
        if key in _WRITTEN:
            if not path.is_absolute() and ":/" not in str(path):
                yield (
                    f"{key} is {str(path)!r}: it would lie in the job's own copy of the working folder, which goes "
                    f"with the job. Add {key}=/a/folder/that/every/node/sees."
                )
        elif path.is_absolute() and not path.is_relative_to(folder):
            yield f"{key}: {path} is outside of the working folder: name a path that every node sees."
        elif folder / path not in there:
            reason = "is left out of the upload" if (folder / path).exists() else "does not exist in the working folder"
            yield f"{key}: {path} {reason}, so the job will not find it."


def submit(submission: Submission, say: Say, *, wait: bool = True) -> int:
    """Sends a job and, unless told otherwise, prints its log to the end; returns its exit code."""
    client, job, address = connect_to(submission.address), f"raycomplete-{uuid.uuid4().hex[:12]}", submission.address
    environment = {"working_dir": str(submission.working_dir), **submission.runtime_env}
    command, deadline = shlex.join(submission.entrypoint), time.monotonic() + _AGENT_S
    with _explained(address):
        while True:
            try:
                client.submit_job(entrypoint=command, runtime_env=environment, submission_id=job)
                break
            except OSError as error:  # the answer was lost, and the job may have begun
                words = (
                    f"The connection was lost while the job was submitted ({error}), and whether it began is unknown."
                )
                raise LostJobError(words, f"Before you submit it again: ray job status {job}") from error
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
    say(f"Job {job} at {address}. Its log: ray job logs {job} --follow --address {address}")
    if not wait:
        return 0
    say("Ctrl-C asks the job to stop and waits for it; a second one leaves it alone.")
    return follow(client, job, say)


def connect_to(address: str) -> Any:
    """Makes a client of the job server at an address, which waits for answers with a limit."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, timeout=_ANSWER_S, **options)

    for name in _ADDRESSES:
        os.environ.pop(name, None)
    with _explained(address):
        return Client(address)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns errors of Ray's client into one sentence with the remedy."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        wrong = "refuses this token (403)" if "Forbidden" in str(error) else "asks for a token (401)"
        raise SetupError(
            f"The cluster at {address} {wrong}.",
            "Set RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN, into a file that "
            "RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token; on the head, `ray get-auth-token` prints it.",
        ) from error
    except ConnectionError as error:
        raise SetupError(
            f"No Ray cluster answers at {address}.",
            "Give --address the dashboard's address, or open the way to it: ray dashboard cluster.yaml, or kubectl "
            "port-forward service/...-head-svc 8265.",
        ) from error
    except LostJobError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SetupError(f"The job server at {address} did not take the job: {reason}") from error


def follow(client: Any, job: str, say: Say) -> int:
    """Prints a job's log until the job ends, and returns its exit code.

    The first Ctrl-C asks the job to stop, as it does with `raycomplete train`: it writes a checkpoint and ends. The
    second leaves it alone.
    """
    printed, interrupts, is_asked = [0], 0, False
    while True:
        try:
            if interrupts and not is_asked:
                client.stop_job(job)
                is_asked = True
                say(f"Asked the job to stop; it has {STOP_WAIT_S} s to write a checkpoint.")
            asyncio.run(_print_log(client, job, printed))
            info = client.get_job_info(job)
            if info.status in ("SUCCEEDED", "FAILED", "STOPPED"):
                break
            time.sleep(_RETRY_S)  # a proxy between here and there closed a silent connection
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                say(f"The job goes on; ray job status {job} says how it does.")
                return 1
        except Exception as error:  # of aiohttp, requests or Ray
            words = f"The connection to job {job} was lost ({str(error).strip() or type(error).__name__})."
            raise LostJobError(words, f"The job goes on: ray job logs {job} --follow.") from error
    say(f"Job {job}: {str(info.status).rpartition('.')[2].lower()}.")
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        say("What was finished is kept; the last lines of the log say how to go on.")
    elif info.driver_exit_code not in (1, 2):  # those have said in the log why
        say(str(info.message or "").strip()[:2000])
    return 2 if info.driver_exit_code == 2 else 1


async def _print_log(client: Any, job: str, printed: list[int]) -> None:
    """Prints the characters after the first `printed[0]`, which it counts up; the server sends the log from its start.

    Returns where the log ends, or after a long silence, so that the caller asks whether the connection is alive.
    """
    seen, log = 0, aiter(client.tail_job_logs(job))
    with suppress(StopAsyncIteration, TimeoutError):
        while True:
            async with asyncio.timeout(_QUIET_S):
                text = await anext(log)
            new = text[max(printed[0] - seen, 0) :]
            seen += len(text)
            print(new, end="", flush=True)
            printed[0] = max(printed[0], seen)
