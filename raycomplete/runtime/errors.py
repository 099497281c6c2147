"""Exceptions that say what went wrong and what to do about it.

Two families matter to the command line: `RefusedError` (nothing was started, exit code 2) and `WorkError` (failed at
work, finished steps are saved, exit code 1). Each also derives from the standard exception that a caller of the Python
API would expect, and each survives pickling, since most of them cross a Ray process boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RaycompleteError(Exception):
    """A failure with its remedy."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)  # both in args, so that pickle rebuilds the exception
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}".strip()


class RefusedError(RaycompleteError, ValueError):
    """A run that is refused before anything was started or written."""

    exit_code = 2


class ConfigError(RefusedError):
    """A run file, or an override on the command line, that cannot be used."""


class DataError(RefusedError):
    """A prompt or answer file that is missing, empty or malformed, or a prompt that does not fit the model."""


class CheckpointError(RefusedError):
    """A checkpoint that is missing, unreadable or unsafe, or two checkpoints that do not fit together."""


class SetupError(RefusedError):
    """A package, device or cluster resource that the run needs and this machine does not have."""


class WorkError(RaycompleteError, RuntimeError):
    """A failure at work; what was finished is on disk."""


class ParityError(WorkError):
    """Logits rebuilt from hidden states that differ from the model's own, so that scores would be silently wrong."""


class WaitTimeoutError(WorkError, TimeoutError):
    """A wait that ended without its result; the message says what was needed and what was there."""


class StoppedError(WorkError):
    """A stop on request: the present step was finished and kept, and nothing failed."""


class LostJobError(WorkError):
    """A lost connection to a submitted job, which goes on; the same command would start a second one."""


class DiskFullError(WorkError):
    """A disk without space for a checkpoint, a row of metrics or the student; the message says how much is free."""


class ProcessDiedError(WorkError):
    """The death of a worker, an engine or a node. The command line prints its `details` below the problem."""

    def __init__(
        self,
        problem: str,
        remedy: str = "",
        *,
        role: str = "",
        node: str = "",
        cause: str = "",
        log_path: str = "",
        saved: str = "",
    ) -> None:
        super().__init__(problem, remedy)
        self.role, self.node, self.cause, self.log_path, self.saved = role, node, cause, log_path, saved

    def details(self) -> list[tuple[str, str]]:
        """Returns the names and values that are known, for the terminal."""
        known = {
            "who": self.role,
            "node": self.node,
            "likely cause": self.cause,
            "log": self.log_path,
            "kept": self.saved,
            "go on": self.remedy,
        }
        return [(name, value) for name, value in known.items() if value]


class QuarantinedSequenceError(WorkError):
    """Sequences that killed their engine again and again, and were quarantined."""

    def __init__(
        self, problem: str, remedy: str = "", *, places: Sequence[int] = (), partial: Sequence[Any] = ()
    ) -> None:
        super().__init__(problem, remedy)
        self.places, self.partial = list(places), list(partial)


class NotFiniteError(WorkError, FloatingPointError):
    """A tensor with NaN or infinity that must be finite; the message names it."""
