"""Signals: the first asks, the second ends at once, and outside deferred work the first ends at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext

import pytest

from raycomplete.runtime.errors import StoppedError
from raycomplete.runtime.signals import StopSignals, stop_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def interrupted(*numbers: int, deferred: bool) -> list[bool]:
    """Sends signals one after another and returns what the work was told after each."""
    told = []
    with stop_signals() as stop, stop.deferred() if deferred else nullcontext():
        for number in numbers:
            send(number)
            told.append(stop.is_requested())
        if deferred:
            stop.requested = False  # leaves the block without StoppedError
    return told


@pytest.mark.parametrize("number", SIGNALS)
def test_deferred_work_is_told_and_ends_by_itself(number: int) -> None:
    assert interrupted(number, deferred=True) == [True]


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_at_once(second: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(signal.SIGTERM, second, deferred=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_other_work_is_ended_at_once(number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(number, deferred=False)


def test_what_comes_after_deferred_work_does_not_start() -> None:
    def work() -> None:
        with stop_signals() as stop, stop.deferred():
            send(signal.SIGTERM)

    with pytest.raises(StoppedError, match="Resume"):
        work()


def test_an_error_of_the_work_is_not_hidden_by_the_request() -> None:
    def work() -> None:
        with stop_signals() as stop, stop.deferred():
            send(signal.SIGTERM)
            raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        work()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_work_without_signals() -> None:
    seen: list[StopSignals] = []

    def work() -> None:
        with stop_signals() as stop, stop.deferred():
            seen.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert not seen[0].is_requested()
