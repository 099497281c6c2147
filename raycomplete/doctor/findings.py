"""Findings of checks, the context that checks look at, and questions that are put to a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from raycomplete.config import RunConfig
from raycomplete.engines.vllm_start import WAIT
from raycomplete.runtime.errors import RaycompleteError

Status: TypeAlias = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")  # from good to bad
PROBES = "raycomplete.doctor.probes"
MARK = "raycomplete-doctor "  # opens the lines of a child that are meant for us; libraries print what they like


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was measured, and what to do about it.

    "fail": a run would be refused, or die. "warn": worth knowing, a run may still work. "ok" asks for nothing.
    """

    status: Status
    found: str
    remedy: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warn(found: str, remedy: str) -> Finding:
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding("fail", found, remedy)


@dataclass
class Context:
    """All that a check may look at: the run file, `config` if it loads, else the `problem` with it."""

    run_file: Path | None = None
    config: RunConfig | None = None
    problem: RaycompleteError | None = None
    quick: bool = False
    _known: dict[str, ChildReport] = field(default_factory=dict)

    @property
    def address(self) -> str | None:
        """The cluster that a run would join; None where it starts one on this machine."""
        address = (self.config.cluster.address if self.config else None) or os.environ.get("RAY_ADDRESS")
        return None if address == "local" else address

    @property
    def root(self) -> Path:
        """The folder of all runs, which every worker writes into."""
        return (self.config.output.root if self.config else Path("runs")).absolute()

    def once(self, name: str, ask: Callable[[], ChildReport]) -> ChildReport:
        """Returns the answer to a slow question that several checks share; the first of them asks."""
        if name not in self._known:
            self._known[name] = ask()
        return self._known[name]


@dataclass(frozen=True)
class ChildReport:
    """The messages of a child process, its exit code (None: not within `limit_s`), and its last words on stderr."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = 0
    last_words: str = ""
    limit_s: float = 0.0

    @property
    def merged(self) -> dict[str, Any]:
        """All messages as one mapping."""
        return {key: value for message in self.messages for key, value in message.items()}

    def ending(self) -> str:
        """Says in words how it ended."""
        if self.code is None:
            return f"no answer within {self.limit_s:g} s"
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        return f"{how}: {self.last_words}" if self.last_words else how


def ask(*command: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> ChildReport:
    """Runs a module (`command[0]`) with arguments as a program of its own and collects its messages.

    When the time is up, it and all its children are killed. Before that, it gives up what it waits for itself.
    """
    limit_s, code = min(timeout_s, float(os.environ.get(WAIT, timeout_s))), None
    environment = {**os.environ, WAIT: str(limit_s / 2), **(environment or {})}
    arguments = [sys.executable, "-m", *command]
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as log:
        # In a session of its own, so that what it started can be ended with it.
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        log.seek(0)
        messages = []
        for line in out:
            with suppress(ValueError):  # no message, or one that was torn by a kill
                messages.append(json.loads(line.partition(MARK)[2]))
        words = [line.strip() for line in log if line.strip()]
    return ChildReport(messages, code, words[-1][:300] if words else "", limit_s)


def tell(message: Mapping[str, Any]) -> None:
    """Sends a message from a child process to the doctor."""
    print(MARK + json.dumps(message), flush=True)
