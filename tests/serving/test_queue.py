"""The queue and its runners: claims, retries, cancellation, and what survives a lost process."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from raycomplete.config import RunConfig
from raycomplete.runtime.errors import ConfigError, RefusedError, SetupError, WorkError
from raycomplete.runtime.types import ModelRole
from raycomplete.serving import deployment, runner
from raycomplete.serving.runner import Follower, ProcessBackend, Runner, one_sentence
from raycomplete.serving.schemas import EvaluationRequest, EvaluationView, State
from raycomplete.serving.store import (
    MAX_ATTEMPTS,
    Claimed,
    EvaluationStore,
    KeyReusedError,
    QueueFullError,
    evaluation_folder,
    lock_of,
)
from tests.serving.conftest import Server, make_config
from tests.serving.fakes import FakeBackend, make_fake_backend


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[EvaluationStore]:
    found = EvaluationStore(tmp_path, clock)
    yield found
    found.close()


def submit(store: EvaluationStore, number: int = 0, key: str | None = None) -> str:
    return store.submit({"seed": number}, label=str(number), key=key, max_queued=100)[0].id


def claim(store: EvaluationStore) -> Claimed:
    found = store.claim()
    assert found is not None
    return found


def view(store: EvaluationStore, identity: str) -> EvaluationView:
    found = store.get(identity)
    assert found is not None
    return found


def test_first_come_first_served_and_nothing_is_claimed_twice(store: EvaluationStore) -> None:
    wanted = [submit(store, number) for number in range(5)]
    held = [claim(store) for _ in wanted]
    assert [item.evaluation.id for item in held] == wanted
    assert store.claim() is None
    held[2].release()  # as the kernel does when its runner ends
    again = claim(store)
    assert (again.evaluation.id, again.evaluation.attempts) == (wanted[2], 2)


def test_the_process_of_an_evaluation_keeps_it_from_the_next_runner(store: EvaluationStore, tmp_path: Path) -> None:
    identity = submit(store)
    claimed, process = claim(store), lock_of(evaluation_folder(tmp_path, identity))
    assert process is not None
    claimed.release()
    assert store.claim() is None
    process.close()
    claim(store)


@pytest.mark.parametrize("errors", [0, 2])
def test_a_runner_that_is_always_lost_ends_in_a_failure(store: EvaluationStore, errors: int) -> None:
    identity = submit(store)
    for attempt in range(MAX_ATTEMPTS):
        claimed = claim(store)
        if attempt < errors:
            store.put_back(identity, error="It failed.")
        claimed.release()
    assert store.claim() is None
    found = view(store, identity)
    assert found.state is State.FAILED
    assert f"evaluations/{identity}.log" in str(found.error)
    assert ("It failed." in str(found.error)) is (errors > 0)


def test_failures_wait_and_count_but_stops_do_not(store: EvaluationStore, clock: Clock) -> None:
    identity = submit(store)
    for _ in range(5):
        claimed = claim(store)
        store.put_back(identity)
        claimed.release()
    claimed = claim(store)
    store.put_back(identity, error="It failed.", delay_s=4)
    claimed.release()
    assert store.claim() is None
    clock.now += 4
    again = claim(store)
    assert (again.evaluation.attempts, again.evaluation.error) == (2, "It failed.")


def test_cancelling(store: EvaluationStore) -> None:
    running, waiting, lost = (submit(store, number) for number in range(3))
    held = claim(store)
    for _ in range(2):  # twice tells once
        ended = store.cancel(running)
        assert ended is not None
        assert (ended.state, ended.cancelling) == (State.RUNNING, True)
    assert [event.kind for event in store.events(running)].count("cancelling") == 1
    assert store.cancel(waiting) is not None
    assert view(store, waiting).state is State.CANCELLED
    claim(store).release()
    store.cancel(lost)
    assert store.claim() is None, "a cancelled evaluation whose runner was lost is not run again"
    assert view(store, lost).state is State.CANCELLED
    assert store.cancel("none") is None
    held.release()


def test_a_key_finds_its_evaluation_again(store: EvaluationStore) -> None:
    first, is_new = store.submit({"seed": 1}, label="", key="k", max_queued=1)
    again, is_new_again = store.submit({"seed": 1}, label="", key="k", max_queued=1)  # though the queue is full
    assert (is_new, is_new_again, again.id) == (True, False, first.id)
    with pytest.raises(KeyReusedError):
        store.submit({"seed": 2}, label="", key="k", max_queued=1)
    with pytest.raises(QueueFullError):
        store.submit({"seed": 1}, label="", key="other", max_queued=1)


def test_everything_is_there_after_a_restart_and_private(tmp_path: Path, clock: Clock) -> None:
    store = EvaluationStore(tmp_path / "state", clock)
    identity = submit(store, key="k")
    claim(store)
    store.progress(identity, {"role": "base", "done": 3})
    before, events = store.get(identity), store.events(identity)
    store.close()
    again = EvaluationStore(tmp_path / "state", clock)
    assert (again.get(identity), again.events(identity)) == (before, events)
    modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("state", "state/evaluations.sqlite")]
    assert modes == [0o700, 0o600]
    again._connection.execute("PRAGMA user_version = 99")
    again.close()
    with pytest.raises(SetupError, match="99"):
        EvaluationStore(tmp_path / "state")


def test_several_processes_claim_nothing_twice(tmp_path: Path) -> None:
    stores = [EvaluationStore(tmp_path) for _ in range(4)]  # connections of their own, as processes have
    for number in range(60):
        submit(stores[0], number)
    start = threading.Barrier(4)

    def work(store: EvaluationStore) -> list[str]:
        start.wait(timeout=30)
        found = []
        while (claimed := store.claim()) is not None:
            found.append(claimed.evaluation.id)
            store.finish(claimed.evaluation.id, State.SUCCEEDED)
            claimed.release()
        return found

    with ThreadPoolExecutor(4) as pool:
        claimed = [identity for found in pool.map(work, stores) for identity in found]
    assert len(claimed) == len(set(claimed)) == 60
    for store in stores:
        store.close()


class Queue(RuleBasedStateMachine):
    """Runners that end in every way, clients and time in any order: no evaluation ends twice or is held twice."""

    claims: Bundle[Claimed] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.folder = Clock(), tempfile.TemporaryDirectory()
        self.store = EvaluationStore(Path(self.folder.name), self.clock)
        self.held: dict[str, Claimed] = {}
        self.ended: dict[str, State] = {}

    @rule(key=st.one_of(st.none(), st.sampled_from("ab")))
    def submit(self, key: str | None) -> None:
        self.store.submit({"key": key}, label="", key=key, max_queued=10**6)

    @rule()
    def claim(self) -> None:
        if (found := self.store.claim()) is not None:
            assert found.evaluation.id not in self.held
            self.held[found.evaluation.id] = found

    @rule(seconds=st.sampled_from([1, 6]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(place=st.integers(0, 3), end=st.sampled_from(["progress", "die", "put_back", "error", State.SUCCEEDED]))
    def work(self, place: int, end: str) -> None:
        identity = next(iter(list(self.held)[place : place + 1]), None)
        if identity is None:
            return
        if end == "progress":
            self.store.progress(identity, {"role": "base"})
            return
        if end in ("put_back", "error"):
            self.store.put_back(identity, error="It failed." if end == "error" else None, delay_s=5)
        elif end != "die":
            self.store.finish(identity, State(end))
        self.held.pop(identity).release()

    @rule(newest=st.integers(0, 3))
    def cancel(self, newest: int) -> None:
        items = self.store.page(limit=4).items
        if newest < len(items):
            self.store.cancel(items[newest].id)

    @invariant()
    def final_states_stay(self) -> None:
        for item in self.store.page(limit=200).items:
            assert self.ended.setdefault(item.id, item.state) == item.state or not self.ended[item.id].final
            self.ended[item.id] = item.state
            events = self.store.events(item.id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            assert sum(State(event.kind).final for event in events if event.kind in list(State)) == item.state.final
            assert item.attempts <= MAX_ATTEMPTS

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


Queue.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestQueue = Queue.TestCase


# ---- runners


def lines(server: Server, identity: str, name: str) -> list[str]:
    return (evaluation_folder(server.state, identity) / name).read_text().splitlines()


@pytest.mark.parametrize(
    ("label", "state", "error", "attempts"),
    [
        ("", State.SUCCEEDED, None, 1),
        ("flaky", State.SUCCEEDED, None, 2),
        ("fail", State.FAILED, "The engine died. Try again.", 3),
        ("refuse", State.FAILED, "The checkpoint is not there. Check the path.", 1),
    ],
)
def test_failures_are_tried_again_and_refusals_are_not(
    server: Server, label: str, state: State, error: str | None, attempts: int
) -> None:
    identity = server.submit(label=label, roles=["student", "base"])
    server.work()
    found = view(server.store, identity)
    assert (found.state, found.error, found.attempts) == (state, error, attempts)
    assert len(lines(server, identity, "runs.txt")) == attempts
    assert found.started is not None
    assert found.finished is not None
    assert found.created <= found.started <= found.finished
    if state is State.SUCCEEDED:
        assert {role: work["done"] for role, work in found.progress.items()} == {"base": 6, "student": 6}


def test_a_running_evaluation_is_cancelled_and_keeps_what_was_finished(server: Server) -> None:
    server.runner._backend = FakeBackend(trials=10_000, unit_s=0.01)
    identity = server.submit(label="slow")
    server.work_meanwhile()
    until(lambda: bool(view(server.store, identity).progress))
    assert server.client.delete(f"/v1/evaluations/{identity}").json()["cancelling"]
    until(lambda: view(server.store, identity).state.final)
    found = view(server.store, identity)
    assert (found.state, found.error) == (State.CANCELLED, None)
    assert lines(server, identity, "trials.txt")


def test_a_stopped_runner_puts_its_work_back_and_the_next_one_repeats_nothing(server: Server) -> None:
    server.runner._backend = FakeBackend(trials=20, unit_s=0.05)
    identity = server.submit(label="slow", roles=["base"])
    server.work_meanwhile()
    until(lambda: bool(view(server.store, identity).progress))
    server.close_runner()
    assert (view(server.store, identity).state, view(server.store, identity).attempts) == (State.QUEUED, 0)
    assert Runner(server.store, FakeBackend(trials=20), server.state).run_one()
    assert view(server.store, identity).state is State.SUCCEEDED
    assert lines(server, identity, "trials.txt") == [f"base-{number}" for number in range(20)]
    assert view(server.store, identity).progress["base"]["reused"] > 0


def test_a_store_that_fails_for_a_while_ends_no_runner(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"is_cancelling": 2, "progress": 3, "claim": 1, "finish": 1}
    for name in failures:
        plain = getattr(server.store, name)

        def failing(*arguments: Any, name: str = name, plain: Any = plain, **options: Any) -> Any:
            if failures[name]:
                failures[name] -= 1
                raise sqlite3.OperationalError("database is locked")
            return plain(*arguments, **options)

        monkeypatch.setattr(server.store, name, failing)
    identity = server.submit(label="slow")
    server.work_meanwhile()
    until(lambda: view(server.store, identity).state is State.SUCCEEDED)
    assert set(failures.values()) == {0}
    assert view(server.store, identity).attempts == 2, "its end could not be stored at first"
    assert len(lines(server, identity, "trials.txt")) == 18


def test_a_runner_whose_thread_ended_is_unhealthy(tmp_path: Path) -> None:
    replica = deployment.EvaluationRunner(make_config(tmp_path), make_fake_backend)
    replica.check_health()
    replica._runner.stop()
    replica._thread.join(timeout=30)
    with pytest.raises(RuntimeError):
        replica.check_health()


def test_errors_become_one_short_sentence() -> None:
    assert one_sentence(ConfigError("It is wrong.", "Mend it.")) == "It is wrong. Mend it."
    assert one_sentence(ValueError("first\nsecond")) == "The evaluation failed (ValueError: first)."
    assert len(one_sentence(ValueError("x" * 5000))) == 600
    assert one_sentence(ValueError("\ud800")).isascii()


@pytest.mark.parametrize("sizes", [(1, 1), (50, 3), (3, 50)])
def test_thinned_progress_keeps_the_last_word_on_each_part(sizes: tuple[int, int]) -> None:
    told: list[Any] = []
    follow = Follower(told.append)
    for attack, size in zip(("prefill", "gcg"), sizes, strict=True):
        for done in range(size):
            follow({"role": "base", "attack": attack, "done": done})
    follow.flush()
    last = {progress["attack"]: progress["done"] for progress in told}
    assert list(last.items()) == [("prefill", sizes[0] - 1), ("gcg", sizes[1] - 1)]
    assert len(told) <= 5


# ---- the process of an evaluation


def test_cancelling_is_told_and_then_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(runner, "_CANCEL_GRACE_S", 0.3)
    with pytest.raises(WorkError):
        runner.follow(ours, print, lambda: True)
    assert theirs.recv() == "cancel"


def obey(config: RunConfig, roles: list[ModelRole], on_progress: Any, cancelled: Callable[[], bool]) -> None:
    """An evaluation in a real process, which does what its roles say."""
    print("noise", flush=True)
    on_progress({"token": os.environ.get("RAYCOMPLETE_TOKEN"), "address": config.cluster.address})
    if "student" in roles:
        raise RefusedError("The student is missing.", "Train it.")
    if "aligned" in roles:
        os._exit(9)
    while not cancelled():
        time.sleep(0.05)


def test_a_real_process_tells_progress_obeys_and_does_not_know_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "a-secret-of-the-cluster")
    context = SimpleNamespace(gcs_address="head:6379")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    backend = ProcessBackend(make_config(tmp_path), obey)
    told: list[Any] = []
    folder = tmp_path / "evaluations" / "x"
    folder.parent.mkdir()
    backend(EvaluationRequest(roles=["base"]), folder, told.append, lambda: bool(told))
    assert told == [{"token": None, "address": "head:6379"}]
    log = folder.with_name("x.log")
    assert "noise" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RefusedError, match="The student is missing"):
        backend(EvaluationRequest(roles=["student"]), folder, told.append, lambda: False)
    with pytest.raises(WorkError, match=r"code 9.*x\.log"):
        backend(EvaluationRequest(roles=["aligned"]), folder, told.append, lambda: False)


def test_the_process_ends_with_its_runner() -> None:
    script = (
        "import multiprocessing, threading\n"
        "from raycomplete.serving.runner import _obey\n"
        "ours, theirs = multiprocessing.Pipe()\n"
        "ours.send('cancel'); ours.close()\n"
        "_obey(theirs, threading.Event())\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 3


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
