"""Questions that are put to a child process, because the answer may hang, crash or print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "raycomplete-doctor "  # opens the lines of a child that are meant for us; libraries print what they like


@dataclass(frozen=True)
class Answer:
    """What a child said, and how it ended.

    Attributes:
        messages: In order.
        code: Exit code; negative for a signal, None where it was ended after `timeout_s`.
        last_words: End of its standard error.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = 0
    last_words: str = ""

    @property
    def whole(self) -> bool:
        """Whether it ended by itself, and well."""
        return self.code == 0

    @property
    def merged(self) -> dict[str, Any]:
        """All messages as one mapping."""
        return {key: value for message in self.messages for key, value in message.items()}

    def ending(self, timeout_s: float) -> str:
        """How it ended, in words."""
        if self.code is None:
            return f"no answer within {timeout_s:g} s"
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        return f"{how}: {self.last_words}" if self.last_words else how


def ask(module: str, *arguments: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> Answer:
    """Runs a module of this package as a program of its own and listens.

    Args:
        module: Name below `raycomplete.doctor`.
        arguments: Its command line.
        timeout_s: After which it and all its children are killed.
        environment: Added to this process's own.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", f"raycomplete.doctor.{module}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that what it started can be ended with it
        )
        code: int | None
        try:
            out, _ = process.communicate(timeout=timeout_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            _kill_group(process.pid)
            out, _ = process.communicate()
            code = None
        errors.seek(0)
        words = errors.read().decode("utf-8", "replace")
    return Answer(_messages(out.decode("utf-8", "replace").splitlines()), code, _last_line(words))


def tell(message: Mapping[str, Any]) -> None:
    """What a child calls to be heard."""
    print(MARK + json.dumps(message), flush=True)


def _messages(lines: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        _, mark, text = line.partition(MARK)  # a library may have left its own line unfinished
        if not mark:
            continue
        try:
            found.append(json.loads(text))
        except ValueError:
            continue  # torn where it was killed
    return [message for message in found if isinstance(message, dict)]


def _last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has just ended
