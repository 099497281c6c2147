"""How evaluations end: done, refused, failed, cancelled, stopped, lost."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raycomplete.runtime.errors import ConfigError
from raycomplete.serving.runner import Runner, evaluation_folder, one_sentence
from raycomplete.serving.schemas import EvaluationView, State
from tests.serving.conftest import Server
from tests.serving.fakes import FakeBackend


def found(server: Server, identity: str) -> EvaluationView:
    evaluation = server.store.get(identity)
    assert evaluation is not None
    return evaluation


def trials(server: Server, identity: str) -> list[str]:
    return (evaluation_folder(server.state, identity) / "trials.txt").read_text().splitlines()


def starts(server: Server, identity: str) -> int:
    return len((evaluation_folder(server.state, identity) / "runs.txt").read_text().splitlines())


def test_an_evaluation_succeeds(server: Server) -> None:
    identity = server.submit(roles=["student", "base"])
    server.work()
    evaluation = found(server, identity)
    assert evaluation.state is State.SUCCEEDED
    assert evaluation.finished is not None
    assert evaluation.started is not None
    assert evaluation.created <= evaluation.started <= evaluation.finished
    assert {role: work["done"] for role, work in evaluation.progress.items()} == {"base": 6, "student": 6}


@pytest.mark.parametrize(
    ("label", "state", "error", "attempts"),
    [
        ("flaky", State.SUCCEEDED, None, 2),
        ("fail", State.FAILED, "The engine died. Try again.", 3),
        ("refuse", State.FAILED, "The checkpoint is not there. Check the path.", 1),
    ],
)
def test_failures_are_tried_again_and_refusals_are_not(
    server: Server, label: str, state: State, error: str | None, attempts: int
) -> None:
    identity = server.submit(label=label)
    server.work()
    evaluation = found(server, identity)
    assert (evaluation.state, evaluation.error, evaluation.attempts) == (state, error, attempts)
    assert starts(server, identity) == attempts


def test_a_running_evaluation_is_cancelled_and_keeps_what_was_finished(server: Server) -> None:
    server.runner._backend = FakeBackend(trials=10_000, unit_s=0.01)
    identity = server.submit(label="slow")
    server.work_meanwhile()
    _until(lambda: bool(found(server, identity).progress))
    assert server.client.delete(f"/v1/evaluations/{identity}").json()["cancelling"]
    _until(lambda: found(server, identity).state.final)
    evaluation = found(server, identity)
    assert (evaluation.state, evaluation.error) == (State.CANCELLED, None)
    assert trials(server, identity)


def test_a_stopped_runner_puts_its_work_back_and_the_next_one_repeats_nothing(server: Server) -> None:
    server.runner._backend = FakeBackend(trials=20, unit_s=0.05)
    identity = server.submit(label="slow", roles=["base"])
    server.work_meanwhile()
    _until(lambda: bool(found(server, identity).progress))
    server.runner.stop()
    _until(lambda: found(server, identity).state is State.QUEUED)
    assert found(server, identity).attempts == 0
    second = Runner(server.store, FakeBackend(trials=20), server.state, lease_s=5, max_attempts=3)
    assert second.run_one()
    assert found(server, identity).state is State.SUCCEEDED
    assert trials(server, identity) == [f"base-{number}" for number in range(20)]
    assert found(server, identity).progress["base"]["reused"] > 0


def test_a_runner_that_lost_its_lease_stops_and_tells_nothing(server: Server) -> None:
    slow = Runner(server.store, FakeBackend(trials=10_000, unit_s=0.01), server.state, lease_s=0.8, max_attempts=3)
    identity = server.submit(label="slow")
    thread = threading.Thread(target=slow.run_one, daemon=True)
    thread.start()
    _until(lambda: bool(found(server, identity).progress))
    with server.store._writing() as connection:  # as if this process had been frozen and another runner had come
        connection.execute("UPDATE evaluations SET claim = 'another', lease_until = 1e12")
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert found(server, identity).state is State.RUNNING


def test_a_store_that_fails_for_a_while_ends_neither_lease_nor_runner(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewals and events fail at first; the evaluation is renewed all the same, told of its cancellation, and ends."""
    failures = {"renew": 2, "progress": 3, "claim": 1}
    for name in failures:
        plain = getattr(server.store, name)

        def failing(*arguments: Any, name: str = name, plain: Any = plain, **settings: Any) -> Any:
            if failures[name]:
                failures[name] -= 1
                raise sqlite3.OperationalError("database is locked")
            return plain(*arguments, **settings)

        monkeypatch.setattr(server.store, name, failing)
    runner = Runner(server.store, FakeBackend(10_000, 0.01), server.state, lease_s=4, max_attempts=3)
    identity = server.submit(label="slow")
    thread = threading.Thread(target=runner.run_forever, daemon=True)
    thread.start()
    _until(lambda: not any(failures.values()))
    server.store.cancel(identity)
    _until(lambda: found(server, identity).state is State.CANCELLED)
    assert found(server, identity).attempts == 1
    runner.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_work_stops_where_the_lease_cannot_be_renewed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(server.store, "renew", failing)
    runner = Runner(server.store, FakeBackend(10_000, 0.01), server.state, lease_s=0.4, max_attempts=3)
    server.submit(label="slow")
    thread = threading.Thread(target=runner.run_one, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_errors_become_one_short_sentence() -> None:
    assert one_sentence(ConfigError("It is wrong.", "Mend it.")) == "It is wrong. Mend it."
    assert one_sentence(KeyError("a\nb")) == r"The evaluation failed (KeyError: 'a\nb')."
    assert one_sentence(ValueError("first\nsecond")) == "The evaluation failed (ValueError: first)."
    assert len(one_sentence(ValueError("x" * 5000))) == 600
    assert one_sentence(ValueError("\ud800")).isascii()


def test_folders_of_evaluations_are_private(server: Server, tmp_path: Path) -> None:
    identity = server.submit()
    server.work()
    assert evaluation_folder(server.state, identity).parent.stat().st_mode & 0o077 == 0


def _until(true: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(600):
        if true():
            return
        waited.wait(0.05)
    raise AssertionError("it never came to that within 30 s")
