"""Structured logs: one JSON object a line, in `<run folder>/logs/`, from the driver and from every actor and worker.

`RAYCOMPLETE_LOG=json` switches them on. Each line says when, which run, role, rank and step, on which node, and what.
The driver names the run in its environment, from which all processes of the run inherit it; each process then says its
role once, by `begin`. Files are bounded, readable by their owner only, and hold no secret of the environment.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from raycomplete.runtime.machine import IDLE_THREADS

SWITCH = "RAYCOMPLETE_LOG"
RUN = "RAYCOMPLETE_RUN"
FOLDER = "RAYCOMPLETE_RUN_FOLDER"
_JOB_SETTINGS = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # there in the driver of a submitted job, whose variables workers inherit
_MAX_BYTES = 10 * 2**20
_OLD_FILES = 2
_HIDDEN = "***"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_NO_SECRET = re.compile(r"^(true|false|\d+|/.*)$", re.IGNORECASE)  # TOKENIZERS_PARALLELISM=false, RAY_AUTH_TOKEN_PATH
_SECRET_TEXT = re.compile(r"\b(Bearer\s+|hf_|sk-)[A-Za-z0-9._~+/=-]{8,}")


@dataclass(frozen=True)
class Identity:
    """The process that writes a line."""

    run: str = ""
    role: str = "driver"
    rank: int | None = None
    step: int | None = None


_identity = Identity()
_concealed: set[str] = set()
_handler: RotatingFileHandler | None = None


def identity() -> Identity:
    """Returns the identity of this process."""
    return replace(_identity, run=os.environ.get(RUN, ""))


def announce_run(name: str, folder: Path) -> None:
    """Names the run for this process and those that it will start; the driver calls it before it connects to Ray."""
    os.environ[RUN] = name
    os.environ[FOLDER] = str(folder.resolve())


def run_environment() -> dict[str, str]:
    """Returns the variables that the driver gives to every process of its run."""
    job = json.loads(os.environ.get(_JOB_SETTINGS, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}  # by `ray job submit`; Ray refuses a name given twice
    names = [RUN, FOLDER, SWITCH, IDLE_THREADS]
    return {name: os.environ[name] for name in names if name in os.environ and name not in given}


def begin(role: str, rank: int | None = None) -> None:
    """Gives this process its role, and opens its log where logs are on. A second call changes the role."""
    global _identity, _handler
    _identity = Identity(role=role, rank=rank)
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
        _handler.close()
        _handler = None
    folder = os.environ.get(FOLDER)
    if os.environ.get(SWITCH, "").lower() != "json" or not folder:
        return
    who = role if rank is None else f"{role} {rank}"
    path = Path(folder) / "logs" / f"{who.replace(' ', '-')}-{socket.gethostname()}-{os.getpid()}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _handler = _PrivateFile(path, maxBytes=_MAX_BYTES, backupCount=_OLD_FILES, encoding="utf-8", delay=True)
    except OSError as error:
        logging.getLogger(__name__).warning("No log is written to %s: %s", path, error)
        return
    _handler.setFormatter(JsonLines())
    _handler.addFilter(_of_interest)
    root.addHandler(_handler)
    logging.getLogger("raycomplete").setLevel(logging.INFO)
    logging.getLogger("raycomplete").info("Began as %s.", who)


def log_failure(error: BaseException) -> None:
    """Logs the error that ended a run; the command line prints it, so that nothing is said where logs are off."""
    if _handler is not None:
        logging.getLogger("raycomplete").error("%s", error, exc_info=error)


def append_log(name: str, lines: Iterable[str]) -> None:
    """Appends what another program says to a file in the run folder's `logs`, where there is a run folder yet."""
    folder = Path(os.environ.get(FOLDER, "/nonexistent"))
    if not folder.is_dir():
        return
    path = folder / "logs" / name
    with suppress(OSError):  # a full disk is told by what needs it
        path.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as stream:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            stream.writelines(f"{now} {hide_secrets(line)}\n" for line in lines)


def set_step(step: int) -> None:
    """Marks the lines written from now on as those of a training step."""
    global _identity
    _identity = replace(_identity, step=step)


def conceal(secret: str) -> None:
    """Keeps a value out of every later line, whatever its variable is called; a few letters would hide half a line."""
    if len(secret) >= 4:
        _concealed.add(secret)


def hide_secrets(text: str) -> str:
    """Masks concealed values, those of secret environment variables, bearer tokens and keys of known form in a text."""
    for secret in _concealed:
        text = text.replace(secret, _HIDDEN)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name) and not _NO_SECRET.match(value):
            text = text.replace(value, _HIDDEN)
    return _SECRET_TEXT.sub(_HIDDEN, text)


class JsonLines(logging.Formatter):
    """One JSON object for each record; `extra={"fields": {...}}` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **asdict(identity()),
            "node": socket.gethostname(),
            "pid": record.process,
            "logger": record.name,
            "message": hide_secrets(record.getMessage()),
        }
        for name, value in getattr(record, "fields", {}).items():
            line.setdefault(name, hide_secrets(value) if isinstance(value, str) else value)
        if record.exc_info:
            line["error"] = hide_secrets(self.formatException(record.exc_info))
        text = json.dumps(line, default=str, ensure_ascii=False)
        return text.encode("utf-8", errors="backslashreplace").decode()


class _PrivateFile(RotatingFileHandler):
    """A log file that its owner alone may read, since messages of libraries may quote prompts."""

    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.fdopen(descriptor, "a", encoding=self.encoding)


def _of_interest(record: logging.LogRecord) -> bool:
    """Passes the lines of raycomplete, and warnings of other libraries."""
    return record.name.startswith("raycomplete") or record.levelno >= logging.WARNING
