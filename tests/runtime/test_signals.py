"""Signals: the first asks, and interrupts where nobody listens; nobody has to send a second one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest

from raycomplete.runtime import signals
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
def test_a_second_signal_ends_at_once(second: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ONE_REQUEST_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        interrupted(signal.SIGTERM, second, deferred=True)


def test_a_process_and_its_group_are_signalled_at_once() -> None:
    """As `timeout` does: that is one request."""
    assert interrupted(signal.SIGTERM, signal.SIGTERM, deferred=True) == [True, True]


def test_work_that_does_not_end_by_itself_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_S", 0.2)
    monkeypatch.setattr(signals, "_ONE_REQUEST_S", 0.0)

    def work() -> None:
        with stop_signals() as stop, stop.deferred():
            send(signal.SIGTERM)
            threading.Event().wait(30)  # a long batch

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert 0.1 < time.monotonic() - started < 15


def test_work_that_ends_in_time_is_not_interrupted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_S", 0.05)
    monkeypatch.setattr(signals, "_ONE_REQUEST_S", 0.0)
    with stop_signals() as stop:
        with pytest.raises(StoppedError), stop.deferred():
            send(signal.SIGTERM)
        threading.Event().wait(0.3)  # the way out


def test_an_inner_block_shares_the_request_and_takes_over_from_ray() -> None:
    with stop_signals() as outer:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
        with stop_signals() as inner, pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        assert inner is outer
        assert outer.requested


HANGS = """
import signal, sys, threading
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
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.startswith("Stopped.")
    assert "--resume" in said
    assert "Traceback" not in said


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


IMPORT_THAT_SWALLOWS = """
import os, signal, time
os.kill(os.getpid(), signal.SIGTERM)
try:
    time.sleep(0.2)
    INTERRUPTED = False
except BaseException:  # as compiled modules, and callbacks of the import system, do
    INTERRUPTED = True
"""


def test_an_import_ends_before_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception inside would be lost there, or leave half a module that fails when it is imported again."""
    (tmp_path / "swallows.py").write_text(IMPORT_THAT_SWALLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def work() -> None:
        with stop_signals():
            import_module("swallows")
            threading.Event().wait(10)  # the work that the modules are for

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - started < 5
    assert not sys.modules["swallows"].INTERRUPTED


def test_an_import_that_does_not_end_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text(
        "import os, signal, threading\nos.kill(os.getpid(), signal.SIGTERM)\nthreading.Event().wait(30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(signals, "GRACE_S", 0.3)

    def work() -> None:
        with stop_signals():
            import_module("waits")

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert 0.3 <= time.monotonic() - started < 10


def test_an_import_that_fails_after_a_signal_fails_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no signal is sent once the handlers are put back: it would end this process."""
    (tmp_path / "fails.py").write_text("import os\nos.kill(os.getpid(), 15)\nraise ValueError(42)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with stop_signals(), pytest.raises(ValueError, match="42"):
        import_module("fails")
    threading.Event().wait(0.3)
