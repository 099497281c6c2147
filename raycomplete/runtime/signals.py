"""One request to stop for the whole process, set by SIGTERM or SIGINT (`kill`, `ray job stop`, Ctrl-C).

The handler sets a flag. Once a command is connected to a cluster, its work and its waits for Ray actors poll the flag;
before that, the handler interrupts. A second signal, or `LEAVE_S` seconds, ends the process: Kubernetes and others kill
after 30. The flag is no `threading.Event`, whose lock the interrupted thread may hold.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from raycomplete.runtime.errors import StoppedError

GRACE_S = 12.0
"""Seconds that work whose result is kept gets to end."""
LEAVE_S = 27.0
"""Seconds from the signal to the end of the process."""
KEPT = "What was finished is kept; the same command continues it (train, align, diagnose, study, demo: with --resume)."

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST_S = 1.0  # `timeout` signals a process and then its group, so that one request comes twice


class InterruptedWork(StoppedError):
    """A stop on request of work that did not end by itself."""


class Stop:
    """The request to stop; `requested` is true once somebody has asked."""

    def __init__(self) -> None:
        self.requested = False
        self.is_handled = False
        self._is_polled = False
        self._since = 0.0

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            timer = threading.Timer(LEAVE_S, self._leave)
            timer.daemon = True
            timer.start()
            if self._is_polled:
                return
            if _is_importing(frame):  # where libraries swallow an exception, or are left half-loaded
                self._leave()
            raise KeyboardInterrupt
        if time.monotonic() - self._since > _ONE_REQUEST_S:
            self._leave()

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Marks work that polls the request; a signal does not interrupt it."""
        before, self._is_polled = self._is_polled, True
        try:
            yield
        finally:
            self._is_polled = before

    def check(self, grace_s: float = 0.0) -> None:
        """Raises InterruptedWork once a stop was requested, `grace_s` seconds ago or earlier."""
        if self.requested and time.monotonic() - self._since >= grace_s:
            raise InterruptedWork("Stopped on request; what was done is kept.", "Go on with --resume.")

    def _leave(self) -> None:
        if self.requested:  # else the command ended in the meantime
            os.write(2, f"Stopped. {KEPT}\n".encode())
            os._exit(1)


stop = Stop()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


@contextmanager
def handled() -> Iterator[Stop]:
    """Handles both signals while the block runs; outside the main thread, where Python delivers none, does nothing."""
    if stop.is_handled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.request) for number in _SIGNALS}
    stop.is_handled = True
    try:
        yield stop
    finally:
        stop.is_handled = stop.requested = False
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def take_over() -> None:
    """Puts back the handler of SIGTERM, which `ray.init` replaces by its own."""
    if stop.is_handled and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop.request)
