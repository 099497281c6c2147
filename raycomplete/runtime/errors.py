"""Exceptions that say what went wrong and what to do about it.

Two families matter to the command line: `RefusedError` (nothing was started, exit code 2) and `WorkError` (failed at
work, finished steps are saved, exit code 1). Each also derives from the standard exception that a caller of the Python
API would expect, and each survives pickling, since most of them cross a Ray process boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RaycompleteError(Exception):
    """A failure with its remedy.

    Args:
        problem: One sentence: what is wrong, with the offending value and where it stands.
        remedy: One sentence: what the reader should do now. May be empty when the problem says it.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)  # both in args, so that pickle rebuilds the exception
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}".strip()


class RefusedError(RaycompleteError, ValueError):
    """Refused before anything was started or written."""

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
    """Failed while working; what was finished is on disk."""


class ParityError(WorkError):
    """Logits rebuilt from hidden states differ from the model's own, so scores would be silently wrong."""


class WaitTimeoutError(WorkError, TimeoutError):
    """A wait ended without its result; the message says what was needed and what was there."""


class StoppedError(WorkError):
    """Someone asked to stop: the present step was finished and kept, and nothing failed."""


class LostJobError(WorkError):
    """The connection to a submitted job is lost; the job goes on, and the same command would start a second one."""


class DiskFullError(WorkError):
    """No space is left for a checkpoint, a row of metrics or the student; the message says how much is free."""


class ProcessDiedError(WorkError):
    """A worker, an engine or a node is gone. The command line prints it as one console.

    Args:
        problem: One sentence: who died.
        remedy: How to go on.
        role: Who died: "training worker 1", "base scorer".
        node: Address or id of its node; empty where it is not known.
        cause: The likeliest reason, as far as it can be told.
        log_path: Where its last words are; empty where there are none.
        saved: What is kept: "the checkpoint of step 40 in runs/demo/checkpoints".
    """

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
        """Names and values of what is known, for the console."""
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
    """Sequences that killed their engine again and again, and were quarantined.

    Args:
        problem: One sentence: how many, and of whom.
        remedy: Where they are recorded.
        places: Which items of the call they were.
        partial: What the call would have returned, with None in their places.
    """

    def __init__(
        self, problem: str, remedy: str = "", *, places: Sequence[int] = (), partial: Sequence[Any] = ()
    ) -> None:
        super().__init__(problem, remedy)
        self.places, self.partial = list(places), list(partial)


class NotFiniteError(WorkError, FloatingPointError):
    """A tensor that must be finite holds NaN or infinity; the message names it."""
