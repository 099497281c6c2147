"""The service on Ray Serve as it runs in earnest, with parts of it killed while it works."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from raycomplete.serving.schemas import EvaluationRequest
from tests.serving.conftest import BEARER, TOKEN
from tests.serving.fakes import FakeBackend, fake_summary, frames

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 240.0
CLIENTS, REQUESTS = 50, 20


class Session:
    """A process with a Ray cluster and the service on it."""

    def __init__(self, folder: Path, temp_dir: Path) -> None:
        self.state = folder / "state"
        self.temp_dir = temp_dir
        self._log = folder / "session.log"
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.serve_session", str(self.state), str(self.port), str(temp_dir)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        assert said == "ready", self._log.read_text()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=BEARER, timeout=httpx.Timeout(WAIT_S)
        )

    def close(self) -> None:
        self.client.close()
        assert self.process.stdin is not None
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.stdin.close()
        self.process.wait(timeout=120)
        for process in psutil.wait_procs(started, timeout=30)[1]:
            process.kill()

    def kill(self, name: str) -> int:
        """Kills the process of this cluster whose title holds a name."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if name in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return int(process.pid)
        raise AssertionError(f"no process of the cluster is called {name}")

    def submit(self, key: str | None = None, **body: Any) -> str:
        """Submits as a careful client does: what gets no answer, or the answer to come back, is sent again."""
        headers = {"Idempotency-Key": key} if key else {}
        for answer in self._answers(lambda: self.client.post("/v1/evaluations", json=body, headers=headers)):
            if answer.status_code == 429:
                time.sleep(float(answer.headers["Retry-After"]))
                continue
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])
        raise AssertionError("never accepted")

    def get(self, identity: str) -> dict[str, Any]:
        return dict(next(self._answers(lambda: self.client.get(f"/v1/evaluations/{identity}"))).json())

    def finished(self, identity: str) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while (found := self.get(identity))["finished"] is None:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found

    def progress(self, identity: str) -> int:
        """Waits until it is under way."""
        deadline = time.monotonic() + WAIT_S
        while not (work := self.get(identity)["progress"]):
            assert time.monotonic() < deadline, "never under way"
            time.sleep(0.1)
        return sum(part["done"] for part in work.values())

    def file(self, identity: str, name: str) -> list[str]:
        return (self.state / "evaluations" / identity / name).read_text().splitlines()

    @staticmethod
    def _answers(ask: Callable[[], httpx.Response]) -> Iterator[httpx.Response]:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                answer = ask()
            except httpx.TransportError:
                time.sleep(0.3)
                continue
            if answer.status_code >= 500:  # Serve's own, while a replica is being replaced
                time.sleep(0.3)
                continue
            yield answer


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    # Ray's sockets lie in its folder, and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as short:
        found = Session(tmp_path_factory.mktemp("live"), Path(short))
        yield found
        found.close()


def undisturbed(seed: int) -> dict[str, Any]:
    """The results of the same request where nothing is killed."""
    return fake_summary(EvaluationRequest(seed=seed, label="slow"))


def assert_equal_results(session: Session, identity: str, seed: int) -> None:
    found = session.finished(identity)
    assert (found["state"], found["error"]) == ("succeeded", None)
    assert found["results"] == undisturbed(seed)
    trials = Counter(session.file(identity, "trials.txt"))
    assert set(trials.values()) == {1}, "no trial was worked twice"
    assert len(trials) == 3 * FakeBackend().trials


def test_the_gate_stands_on_serve_too(session: Session) -> None:
    bare = httpx.Client(base_url=f"http://127.0.0.1:{session.port}", timeout=WAIT_S)
    assert bare.get("/healthz").json() == {"status": "ok"}
    assert bare.get("/").headers["content-security-policy"].startswith("default-src 'none'")
    assert [bare.get(path).status_code for path in ("/v1/evaluations", "/metrics")] == [401, 401]
    post = session.client.post
    assert post("/v1/evaluations", json={"models": {"base": "/etc"}}).status_code == 403
    unknown = post("/v1/evaluations", json={"attacks": ["nope"]})
    assert (unknown.status_code, unknown.json()["known"][0]) == (422, "prefill")
    assert post("/v1/evaluations", content=b"x" * 200_000).status_code == 413
    assert [model["id"] for model in session.client.get("/v1/models").json()["data"]] == ["base", "aligned"]
    asked = {"model": "aligned", "prompt": "heat the flask", "stream": True}
    with session.client.stream("POST", "/v1/completions", json=asked) as streamed:
        chunks = [line.removeprefix("data: ") for line in streamed.iter_lines() if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    said = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1])
    assert said == post("/v1/completions", json=asked | {"stream": False}).json()["choices"][0]["text"]
    assert said == " flask the heat"
    refused = post(
        "/v1/chat/completions", json={"model": "aligned", "messages": [{"role": "assistant", "content": "a"}]}
    )
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_fifty_clients_lose_nothing_and_run_nothing_twice(session: Session) -> None:
    def client(number: int) -> list[str]:
        found = []
        for request in range(REQUESTS // 2):
            key, body = f"{number}-{request}", {"seed": 100 * number + request, "roles": ["base"]}
            first = session.submit(key, **body)
            again = session.submit(key, **body)  # as a client does whose first answer was lost
            assert again == first
            found.append(first)
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        submitted = [identity for found in pool.map(client, range(CLIENTS)) for identity in found]
    assert len(submitted) == len(set(submitted)) == CLIENTS * REQUESTS // 2
    assert {session.finished(identity)["state"] for identity in submitted} == {"succeeded"}
    starts = Counter(len(session.file(identity, "runs.txt")) for identity in submitted)
    assert starts == {1: len(submitted)}
    total = session.client.get("/v1/evaluations", params={"limit": 1}).json()["total"]
    assert total == len(submitted)


def test_a_killed_runner_is_replaced_and_repeats_nothing(session: Session) -> None:
    identity = session.submit(label="slow", seed=1)
    assert session.progress(identity) >= 1
    first = session.kill("EvaluationRunner")
    assert_equal_results(session, identity, seed=1)
    pids = session.file(identity, "runs.txt")
    assert pids[0] == str(first)
    assert len(pids) == 2
    assert session.get(identity)["attempts"] == 2


def test_a_killed_controller_stops_no_work(session: Session) -> None:
    identity = session.submit(label="slow", seed=2)
    session.progress(identity)
    session.kill("ServeController")
    assert_equal_results(session, identity, seed=2)
    assert len(session.file(identity, "runs.txt")) == 1
    assert session.finished(session.submit(seed=3))["state"] == "succeeded", "new work is taken after it"


def test_a_client_that_is_cut_off_finds_every_event_once(session: Session) -> None:
    identity = session.submit(label="slow", seed=4)
    path, seen = f"/v1/evaluations/{identity}/events", ""
    with session.client.stream("GET", path) as answer:  # a client that dies in the middle of its stream
        for part in answer.iter_text():
            seen += part
            if "event: progress" in seen:
                break
    session.kill("EvaluationApi")
    events = frames(seen[: seen.rindex("\n\n") + 2])
    deadline = time.monotonic() + WAIT_S
    while events[-1]["event"] != "succeeded":
        assert time.monotonic() < deadline, events
        try:
            last = {"Last-Event-ID": str(events[-1]["id"])}
            with session.client.stream("GET", path, headers=last) as answer:
                rest = "".join(answer.iter_text()) if answer.status_code == 200 else ""
        except httpx.TransportError:
            rest = ""
        events += frames(rest)
        time.sleep(0.2)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert_equal_results(session, identity, seed=4)


def test_the_token_is_in_no_file_of_the_cluster(session: Session) -> None:
    logs = [path for path in session.temp_dir.rglob("*") if path.is_file() and path.stat().st_size < 50 * 2**20]
    assert any("replica" in path.name for path in logs), "the logs of the replicas are among them"
    assert [str(path) for path in logs if TOKEN.encode() in path.read_bytes()] == []
