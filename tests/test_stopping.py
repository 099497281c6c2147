"""Signals: the first asks, the second ends at once, and outside deferred work the first ends at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from raycomplete.errors import StoppedError
from raycomplete.stopping import StopSignals, stop_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_work_that_asks_ends_by_itself(number: int) -> None:
    with stop_signals() as stop, pytest.raises(StoppedError, match="Resume"), stop.deferred():
        assert not stop.is_requested()
        send(number)
        assert stop.is_requested()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(number: int) -> None:
    with stop_signals() as stop, pytest.raises(KeyboardInterrupt), stop.deferred():
        send(number)
        send(number)
        raise AssertionError("the second signal did not arrive")


@pytest.mark.parametrize("number", SIGNALS)
def test_work_that_never_asks_is_ended_at_once(number: int) -> None:
    with stop_signals(), pytest.raises(KeyboardInterrupt):
        send(number)
        raise AssertionError("the signal did not arrive")


def test_an_error_of_the_work_is_not_hidden_by_the_request() -> None:
    with stop_signals() as stop, pytest.raises(ValueError, match="its own"), stop.deferred():
        send(signal.SIGTERM)
        raise ValueError("its own")


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
