"""The queue: leases, fencing, retries, idempotency, and what survives."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from raycomplete.runtime.errors import SetupError
from raycomplete.serving.schemas import State
from raycomplete.serving.store import Claimed, EvaluationStore, KeyReusedError, QueueFullError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

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
    found = store.claim(lease_s=10, max_attempts=3)
    assert found is not None
    return found


def kinds(store: EvaluationStore, identity: str) -> list[str]:
    return [event.kind for event in store.events(identity)]


def test_first_come_first_served(store: EvaluationStore) -> None:
    wanted = [submit(store, number) for number in range(5)]
    assert [claim(store).evaluation.id for _ in wanted] == wanted
    assert store.claim(lease_s=10, max_attempts=3) is None


def test_a_running_evaluation_is_claimed_again_only_after_its_lease(store: EvaluationStore, clock: Clock) -> None:
    identity = submit(store)
    first = claim(store)
    clock.now += 9
    assert store.claim(lease_s=10, max_attempts=3) is None
    assert store.renew(first, lease_s=10) is not None
    clock.now += 9
    assert store.claim(lease_s=10, max_attempts=3) is None
    clock.now += 2
    second = claim(store)
    assert second.evaluation.id == identity
    assert second.evaluation.attempts == 2


def test_writes_of_a_lost_claim_are_void(store: EvaluationStore, clock: Clock) -> None:
    identity = submit(store)
    first = claim(store)
    clock.now += 11
    second = claim(store)
    before = store.events(identity)
    assert store.renew(first, lease_s=10) is None
    assert not store.progress(first, {"role": "base", "done": 99})
    assert not store.finish(first, State.SUCCEEDED)
    assert not store.put_back(first)
    assert store.events(identity) == before
    assert store.finish(second, State.SUCCEEDED)
    assert not store.finish(second, State.FAILED, "twice")
    found = store.get(identity)
    assert found is not None
    assert (found.state, found.error) == (State.SUCCEEDED, None)


def test_a_runner_that_is_always_lost_ends_in_one_sentence(store: EvaluationStore, clock: Clock) -> None:
    identity = submit(store)
    for _ in range(3):
        claim(store)
        clock.now += 11
    assert store.claim(lease_s=10, max_attempts=3) is None
    found = store.get(identity)
    assert found is not None
    assert found.state is State.FAILED
    assert found.error is not None
    assert found.error.startswith("The evaluation's runner was lost in the last of 3 attempts, most likely out of")
    assert f"evaluations/{identity}.log says more" in found.error
    assert "earlier" not in found.error
    assert kinds(store, identity) == ["queued", "started", "started", "started", "failed"]


def test_an_error_before_the_runner_was_lost_is_not_forgotten(store: EvaluationStore, clock: Clock) -> None:
    identity = submit(store)
    for _ in range(2):
        assert store.put_back(claim(store), error="It failed.")
    claim(store)
    clock.now += 11
    assert store.claim(lease_s=10, max_attempts=3) is None
    found = store.get(identity)
    assert found is not None
    assert "An earlier attempt failed: It failed. Free memory" in str(found.error)


def test_failures_wait_and_count_but_stops_do_not(store: EvaluationStore, clock: Clock) -> None:
    submit(store)
    for _ in range(5):
        assert store.put_back(claim(store))
    assert store.put_back(claim(store), error="It failed.", delay_s=4)
    assert store.claim(lease_s=10, max_attempts=3) is None
    clock.now += 4
    again = claim(store)
    assert again.evaluation.attempts == 2
    assert again.evaluation.error == "It failed."


def test_cancelling(store: EvaluationStore, clock: Clock) -> None:
    waiting, running, lost = (submit(store, number) for number in range(3))
    claim(store)  # the first runs
    ended = store.cancel(waiting)
    assert ended is not None
    assert ended.state is State.RUNNING
    assert ended.cancelling
    store.cancel(waiting)  # twice tells once
    assert kinds(store, waiting).count("cancelling") == 1
    found = store.cancel(running)
    assert found is not None
    assert found.state is State.CANCELLED
    claim(store)
    store.cancel(lost)
    clock.now += 11
    assert store.claim(lease_s=10, max_attempts=3) is None, "what lost its runner and was cancelled is not run again"
    assert {identity: store.get(identity).state for identity in (waiting, lost)} == {  # type: ignore[union-attr]
        waiting: State.CANCELLED,
        lost: State.CANCELLED,
    }
    assert store.cancel("none") is None


def test_a_key_finds_its_evaluation_again(store: EvaluationStore) -> None:
    first, is_new = store.submit({"seed": 1}, label="", key="k", max_queued=1)
    assert is_new
    again, is_new = store.submit({"seed": 1}, label="", key="k", max_queued=1)  # though the queue is full
    assert not is_new
    assert again.id == first.id
    with pytest.raises(KeyReusedError):
        store.submit({"seed": 2}, label="", key="k", max_queued=1)
    with pytest.raises(QueueFullError, match="1 evaluations are waiting"):
        store.submit({"seed": 1}, label="", key="other", max_queued=1)


def test_pages_hold_everything_once(store: EvaluationStore) -> None:
    wanted = [submit(store, number) for number in range(7)]
    seen, before = [], None
    while True:
        found = store.page(limit=3, before=before)
        assert found.total == 7
        seen += [item.id for item in found.items]
        before = found.next
        if before is None:
            break
    assert seen == wanted[::-1]
    assert store.page(limit=10, label="4").total == 1
    none = store.page(limit=10, state=State.FAILED)
    assert (none.items, none.total, none.next) == ([], 0, None)


def test_everything_is_there_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    store = EvaluationStore(tmp_path, clock)
    identity = submit(store, key="k")
    claimed = claim(store)
    store.progress(claimed, {"role": "base", "done": 3})
    before, events = store.get(identity), store.events(identity)
    store.close()
    again = EvaluationStore(tmp_path, clock)
    assert again.get(identity) == before
    assert again.events(identity) == events
    assert again.renew(claimed, lease_s=10) is not None, "a controller's restart takes nothing from a living runner"
    again.close()


def test_two_processes_claim_nothing_twice(tmp_path: Path) -> None:
    stores = [EvaluationStore(tmp_path) for _ in range(4)]  # connections of their own, as processes have
    for number in range(60):
        submit(stores[0], number)
    start = threading.Barrier(4)

    def work(store: EvaluationStore) -> list[str]:
        start.wait(timeout=30)
        found = []
        while (claimed := store.claim(lease_s=60, max_attempts=3)) is not None:
            found.append(claimed.evaluation.id)
            store.finish(claimed, State.SUCCEEDED)
        return found

    with ThreadPoolExecutor(4) as pool:
        claimed = [identity for found in pool.map(work, stores) for identity in found]
    assert len(claimed) == len(set(claimed)) == 60
    for store in stores:
        store.close()


def test_another_format_is_refused(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path)
    store._connection.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(SetupError, match="has format 99"):
        EvaluationStore(tmp_path)


def test_requests_are_private(tmp_path: Path) -> None:
    EvaluationStore(tmp_path / "state").close()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "evaluations.sqlite").stat().st_mode) == 0o600


class Queue(RuleBasedStateMachine):
    """Runners, clients and time in any order: nothing ends twice, and only the last claim can write."""

    claims: Bundle[Claimed] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.store = EvaluationStore(Path(self.folder.name), self.clock)
        self.last: dict[str, str] = {}
        self.ended: dict[str, State] = {}

    @rule(key=st.one_of(st.none(), st.sampled_from("ab")))
    def submit(self, key: str | None) -> None:
        self.store.submit({"key": key}, label="", key=key, max_queued=10**6)

    @rule(target=claims)
    def claim(self) -> Claimed | None:
        found = self.store.claim(lease_s=10, max_attempts=2)
        if found is not None:
            self.last[found.evaluation.id] = found.claim
        return found

    @rule(seconds=st.sampled_from([1, 6, 11]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(claimed=claims)
    def progress(self, claimed: Claimed | None) -> None:
        if claimed is not None and self.store.progress(claimed, {"role": "base"}):
            assert self.last[claimed.evaluation.id] == claimed.claim

    @rule(claimed=claims, error=st.sampled_from([None, "It failed."]))
    def put_back(self, claimed: Claimed | None, error: str | None) -> None:
        if claimed is not None and self.store.put_back(claimed, error=error):
            assert self.last.pop(claimed.evaluation.id) == claimed.claim

    @rule(claimed=claims)
    def finish(self, claimed: Claimed | None) -> None:
        if claimed is not None and self.store.finish(claimed, State.SUCCEEDED):
            assert self.last.pop(claimed.evaluation.id) == claimed.claim

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
            assert item.attempts <= 2

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


Queue.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestQueue = Queue.TestCase
