"""Handles SIGTERM and SIGINT: the first asks work to stop where it can go on later, the second ends it at once.

`ray job stop` and `kill` send SIGTERM, Ctrl-C sends SIGINT; both mean the same here.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raycomplete.runtime.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """The requests to stop so far.

    Attributes:
        requested: True once someone has asked.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_deferred = False

    def is_requested(self) -> bool:
        """Returns `requested`; work calls it between its steps."""
        return self.requested

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Marks work that asks `is_requested` and ends by itself; elsewhere a signal interrupts, as Ctrl-C does.

        Raises:
            StoppedError: The work ended before it saw the request; what comes after it must not start.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.requested:
            raise StoppedError("Stopped on request after the present stage.", "Resume with --resume.")

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self.requested or not self._is_deferred:
            # A third signal meets Python's own handlers, should the way out hang.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handles both signals while the block runs; outside the main thread, where Python delivers none, it does nothing.

    Enter it after `ray.init`, which sets a handler of its own.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.signal(number, stop.take) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
