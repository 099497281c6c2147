"""What the service needs from the rest of the package: something that evaluates, and perhaps something that chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from raycomplete.serving.schemas import CompletionRequest, CompletionText, EvaluationRequest

OnProgress = Callable[[Mapping[str, Any]], None]
Cancelled = Callable[[], bool]


class EvaluationBackend(Protocol):
    """Evaluates models. One call works at a time, but a call may follow one that was killed."""

    def run(self, request: EvaluationRequest, folder: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
        """Leaves `summary.json` and `evaluation/` in the folder, and continues what an earlier call left there.

        Args:
            request: As admitted.
            folder: Of this evaluation alone.
            on_progress: Takes `role`, `attack`, `variant`, `done`, `total`, `reused` and `outcomes`.
            cancelled: Asked often; once it is true, the call ends soon, in any way.

        Raises:
            RefusedError: It cannot be done, now or later.
            Exception: It failed; another attempt may succeed.
        """


class ChatBackend(Protocol):
    """Completes single prompts with the student."""

    async def complete(self, request: CompletionRequest) -> CompletionText:
        """The student's own greedy or sampled continuation."""
