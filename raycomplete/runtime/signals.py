"""Handles SIGTERM and SIGINT, of which one is enough: work ends by itself where it can, and is interrupted elsewhere.

An import is not interrupted: libraries swallow the exception there or are left half-loaded. The interrupt waits for it.

`kill` and `ray job stop` send SIGTERM, Ctrl-C sends SIGINT; both mean the same here. Work that looks between its steps
gets `GRACE_S` seconds to reach the end of one and is interrupted then. The command line leaves after `LEAVE_S` seconds,
whatever hangs on the way out: Kubernetes and others kill after 30.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raycomplete.runtime.errors import StoppedError

GRACE_S = 12.0
"""Seconds that work gets to end by itself."""
LEAVE_S = 27.0
"""Seconds from the signal to the end of the process, where the command line handles signals."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_IMPORT_POLL_S = 0.05  # between two looks at whether an import has ended
_ONE_REQUEST_S = 1.0  # `timeout` signals a process and then its group, so that one request comes twice
_current: StopSignals | None = None


class StopSignals:
    """The requests to stop so far.

    Args:
        leave: Ends the process; called `LEAVE_S` seconds after the first signal, in a thread.

    Attributes:
        requested: True once someone has asked.
    """

    def __init__(self, leave: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._leave = leave
        self._is_deferred = False
        self._grace_s = GRACE_S
        self._requested_at = 0.0
        self._waits_for_import = False

    def is_requested(self) -> bool:
        """Returns `requested`; work calls it between its steps."""
        return self.requested

    @contextmanager
    def deferred(self, grace_s: float | None = None) -> Iterator[None]:
        """Marks work that asks `is_requested` and ends by itself; elsewhere a signal interrupts at once.

        Args:
            grace_s: Seconds that it gets for that; `GRACE_S` when absent.

        Raises:
            StoppedError: The work ended before it saw the request; what comes after it must not start.
            KeyboardInterrupt: It did not end in that time, or a second signal came.
        """
        self._is_deferred, self._grace_s = True, GRACE_S if grace_s is None else grace_s
        try:
            yield
        finally:
            self._is_deferred = False
        if self.requested:
            raise StoppedError("Stopped on request after the present stage.", "Resume with --resume.")

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal, and, while an import makes the interrupt wait, the signals by which it looks again.

        Raises:
            KeyboardInterrupt: The work that is interrupted does not look for requests, or was asked before.
        """
        now = time.monotonic()
        if not self._waits_for_import:
            if self.requested and now - self._requested_at < _ONE_REQUEST_S:
                return
            first, self.requested, self._requested_at = not self.requested, True, now
            if first and self._leave is not None:
                _later(LEAVE_S, self._leave)
            if first and self._is_deferred:
                _later(self._grace_s, self._insist)
                return
        self._waits_for_import = _is_importing(frame) and now - self._requested_at < GRACE_S
        if not self._waits_for_import:
            raise KeyboardInterrupt
        _later(_IMPORT_POLL_S, self._ask_again)

    def _ask_again(self) -> None:
        if self._waits_for_import:
            _signal_main_thread()

    def _insist(self) -> None:
        """Interrupts work that was asked and is still busy, as a second signal does."""
        if self._is_deferred:
            _signal_main_thread()


def _is_importing(frame: FrameType | None) -> bool:
    """Returns whether the code that a signal interrupted runs inside an import statement, at any depth."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _signal_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _later(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


@contextmanager
def stop_signals(leave: Callable[[], None] | None = None) -> Iterator[StopSignals]:
    """Handles both signals while the block runs; outside the main thread, where Python delivers none, it does nothing.

    An inner block shares the requests of the outer one. Enter one after `ray.init`, which sets a handler of its own.

    Args:
        leave: See `StopSignals`; the outermost block's counts.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield StopSignals()
        return
    outer = _current
    stop = _current = outer or StopSignals(leave)
    before: dict[int, Any] = {number: signal.signal(number, stop.take) for number in _SIGNALS}
    try:
        yield stop
    finally:
        _current = outer
        if outer is None:
            stop._waits_for_import = False  # the import failed by itself
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
