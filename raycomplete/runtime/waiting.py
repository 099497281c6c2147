"""A limit for calls that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from raycomplete.runtime.errors import WaitTimeoutError

T = TypeVar("T")


def within(timeout_s: float, problem: str, work: Callable[[], T]) -> T:
    """Does something in a thread of its own and waits for it with a limit.

    Raises:
        WaitTimeoutError: It did not end in time; it is left behind.
    """
    outcome: list[Any] = [None, None]

    def run() -> None:
        try:
            outcome[0] = work()
        except BaseException as error:  # handed to the waiting thread below
            outcome[1] = error

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise WaitTimeoutError(f"{problem} within {timeout_s:.0f} s.")
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
