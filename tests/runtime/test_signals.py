"""Signals: the first asks polled work and interrupts other work; the process ends whatever hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from raycomplete.runtime import signals
from raycomplete.runtime.errors import StoppedError
from raycomplete.runtime.signals import handled, stop, take_over

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_polled_work_is_asked_and_other_work_is_interrupted(number: int) -> None:
    before = [signal.getsignal(item) for item in SIGNALS]
    with handled(), stop.polled():
        stop.check()
        send(number)
        send(number)  # `timeout` signals a process and then its group
        assert stop.requested
        stop.check(grace_s=60.0)
        with pytest.raises(StoppedError) as caught:
            stop.check()
        assert caught.value.exit_code == 1
    assert [signal.getsignal(item) for item in SIGNALS] == before
    assert not stop.requested
    with handled(), pytest.raises(KeyboardInterrupt):
        send(number)


def test_a_second_signal_and_a_long_way_out_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(signals, "_ONE_REQUEST_S", 0.0)
    monkeypatch.setattr(signals, "LEAVE_S", 0.05)
    with handled(), stop.polled():
        send()
        deadline = time.monotonic() + 10
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert codes == [1]
        send()
        assert codes == [1, 1]
    with handled(), stop.polled():
        send()
    time.sleep(0.2)
    assert codes == [1, 1], "a command that ended in time is left alone"


def test_the_handler_is_taken_back_from_ray() -> None:
    with handled(), stop.polled():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
        take_over()
        with handled():  # an inner block shares the request of the outer one
            send()
        assert stop.requested


def test_other_threads_and_programs_that_handle_no_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    take_over()
    seen: list[bool] = []

    def work() -> None:
        with handled():
            seen.append(stop.is_handled)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before


HANGS = """
import sys, threading
from raycomplete import cli
from raycomplete.runtime import signals
signals.LEAVE_S = 1.0
def work():
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    finally:
        threading.Event().wait(60)  # a way out that hangs
sys.exit(cli.guarded(work))
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_line_leaves_whatever_hangs(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("Stopped.")
    assert "Traceback" not in said
