"""The service with a fake backend, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from raycomplete.config import RunConfig, parse
from raycomplete.serving.app import Service, create_app
from raycomplete.serving.requests import Admission, digest
from raycomplete.serving.runner import Runner
from raycomplete.serving.store import EvaluationStore
from tests.serving.fakes import FakeBackend, FakeModel

TOKEN = "a-token-for-these-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def make_config(state: Path, **serve: Any) -> RunConfig:
    return parse(
        {
            "models": {"base": "organism:base", "aligned": "organism:aligned"},
            "data": {"source": "organism"},
            "serve": {"state": str(state), **serve},
        },
        "test",
    )


class Server:
    """A service, its client, and a runner that works when it is told to."""

    def __init__(self, state: Path, *, token: str | None = TOKEN, chat: bool = False, **serve: Any) -> None:
        self.config = make_config(state, **serve)
        self.state = self.config.serve.state
        self.store = EvaluationStore(self.state)
        self.runner = Runner(self.store, FakeBackend(unit_s=0.02), self.state, retry_delay_s=0.0)
        self.models = {role: FakeModel(self.config, role) for role in ("base", "aligned") if chat}
        answers = {role: model.answer for role, model in self.models.items()}
        service = Service(Admission(self.config), self.store, digest(token) if token else None, answers)
        self.app = create_app(service)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = TestClient(self.app, headers=headers, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
        self._thread: threading.Thread | None = None

    def work(self) -> None:
        """Everything that waits, now."""
        while self.runner.run_one():
            pass

    def work_meanwhile(self) -> None:
        self._thread = threading.Thread(target=self.runner.run_forever, daemon=True)
        self._thread.start()

    def close_runner(self) -> None:
        self.runner.stop()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def close(self) -> None:
        self.close_runner()
        self.store.close()

    def submit(self, **body: Any) -> str:
        answer = self.client.post("/v1/evaluations", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(**options: Any) -> Server:
        servers.append(Server(tmp_path / "state", **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()
