"""Following a job: connections, stops and exit codes. One slow test speaks to a real cluster with a token."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.commands import job_client
from raycomplete.commands.job_client import connect_to, follow
from raycomplete.runtime.errors import SetupError, WorkError

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """The part of Ray's client that `follow` uses: each tail brings the whole log again, and may break."""

    def __init__(self, status: str, code: int | None, tails: list[list[str | BaseException]]) -> None:
        self.info = SimpleNamespace(status=status, driver_exit_code=code, message="why")
        self._tails = iter(tails)
        self.stopped = 0
        self.running_for = 0  # questions after its status that are answered with "running"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for item in next(self._tails):
            if isinstance(item, BaseException):
                raise item
            yield item

    def get_job_info(self, job: str) -> Any:
        self.running_for -= 1
        return SimpleNamespace(status="RUNNING") if self.running_for >= 0 else self.info

    def stop_job(self, job: str) -> bool:
        self.stopped += 1
        return True


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
    ],
)
def test_a_job_ends_with_its_own_exit_code(status: str, code: int | None, expected: int) -> None:
    said: list[str] = []
    assert follow(Client(status, code, [["log\n"]]), "job", said.append) == expected
    assert ("why" in said) == (expected == 1 and code != 1 and status == "FAILED")


def test_a_lost_connection_is_taken_up_where_it_broke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_client, "_RETRY_S", 0.0)
    client = Client("SUCCEEDED", 0, [["one\n", RuntimeError("gone")], ["one\ntwo\n", "three\n"]])
    assert follow(client, "job", lambda _: None) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    silent = Client("SUCCEEDED", 0, [["one\n"], ["one\n", "two\n"]])
    silent.running_for = 1
    assert follow(silent, "job", lambda _: None) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    broken = Client("RUNNING", None, [[RuntimeError("gone")]] * 10)
    with pytest.raises(WorkError, match="The job goes on"):
        follow(broken, "job", lambda _: None)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["known"], "known"), ([RuntimeError("does not exist")], OSError), ([OSError("down")] * 9, WorkError)],
)
def test_a_job_whose_answer_was_lost_is_not_submitted_twice(
    answers: list[Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_client, "_RETRY_S", 0.0)
    names: list[str] = []
    replies = iter(answers)

    def submit_job(**given: Any) -> str:
        names.append(given["submission_id"])
        raise ConnectionResetError("gone")

    def get_job_info(job: str) -> Any:
        assert job == names[0]
        reply = next(replies)
        if isinstance(reply, Exception):
            raise reply
        return reply

    client = SimpleNamespace(submit_job=submit_job, get_job_info=get_job_info)
    submission = SimpleNamespace(entrypoint=["python"], working_dir="x", runtime_env={})
    if expected == "known":
        assert job_client._submit(client, submission) == names[0]  # type: ignore[arg-type]
    else:
        with pytest.raises(expected):
            job_client._submit(client, submission)  # type: ignore[arg-type]
    assert len(names) == 1


def test_ctrl_c_stops_the_job_and_a_second_one_leaves_it() -> None:
    once = Client("STOPPED", None, [["a", KeyboardInterrupt()], ["a", "saved"]])
    assert follow(once, "job", lambda _: None) == 1
    assert once.stopped == 1
    twice = Client("RUNNING", None, [[KeyboardInterrupt()], [KeyboardInterrupt()]])
    said: list[str] = []
    assert follow(twice, "job", said.append) == 1
    assert twice.stopped == 1
    assert "goes on" in said[-1]


@pytest.mark.parametrize(("status", "words"), [(401, "asks for a token"), (403, "refuses this token")])
def test_a_token_that_is_missing_or_wrong_is_explained(status: int, words: str) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"Unauthorized" if status == 401 else b"Forbidden")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(SetupError, match=rf"{words}.*RAY_AUTH_MODE=token"):
            connect_to(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()


def test_no_cluster_is_said_at_once() -> None:
    with pytest.raises(SetupError, match="'http://head:many' is no address"):
        connect_to("http://head:many")
    with pytest.raises(SetupError, match=r"No Ray cluster answers at http://127.0.0.1:\d+ .*--address"):
        connect_to(f"http://127.0.0.1:{free_port()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Head:
    """A running cluster of one node with a token, and the folder that jobs are submitted from."""

    address: str
    environment: dict[str, str]
    folder: Path

    def submit(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "raycomplete", "submit", "run.yaml", "--address", self.address, *arguments],
            cwd=self.folder,
            env=self.environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )


def ended(process: subprocess.Popen[str], timeout_s: float = 180) -> str:
    """What a process still says until its end; where it does not end, the failure shows how far it came."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"no end within {timeout_s} s: {process.communicate()[0]}") from None


@pytest.fixture
def head() -> Iterator[Head]:
    base = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # Ray's sockets need a short path
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-only-0123456789",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = [
        "--head",
        "--block",
        "--port=0",
        f"--temp-dir={base}/ray",
        "--num-cpus=2",
        "--object-store-memory=80000000",
    ]
    options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"]
    options += [f"--ray-client-server-port={free_port()}", "--disable-usage-stats"]
    folder = base / "work"
    (folder / "jobs").mkdir(parents=True)
    shutil.copy(ROOT / "jobs" / "organism.yaml", folder / "run.yaml")
    log = (base / "head.log").open("w")
    process = subprocess.Popen(["ray", "start", *options], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (base / "head.log").read_text()
                assert time.monotonic() < deadline, (base / "head.log").read_text()
                time.sleep(0.2)
        yield Head(f"http://127.0.0.1:{port}", environment, folder)
    finally:
        if process.poll() is not None:  # pytest shows it where the test failed
            print("The head died:", (base / "head.log").read_text())
        process.send_signal(signal.SIGTERM)  # `--block` takes the node's processes along
        process.wait(60)
        shutil.rmtree(base, ignore_errors=True)


GRACEFUL = """
import signal, sys, time

def stop(*_):
    time.sleep(4)  # longer than Ray waits by itself
    print("checkpoint written", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("at work", sys.argv[1:], flush=True)
time.sleep(120)
"""


@pytest.mark.slow
def test_jobs_on_a_real_cluster_end_as_they_do_here(head: Head) -> None:
    (head.folder / "jobs" / "train.py").write_text(GRACEFUL)
    (head.folder / "jobs" / "diagnose.py").write_text("import sys\nprint('hello', *sys.argv[1:])\n")
    unknown = head.submit(RAY_AUTH_MODE="disabled")
    refused = head.submit("models.base=no/such/folder", "--job", "evaluate")  # by raycomplete itself, over there
    assert "asks for a token (401)" in ended(unknown)
    assert unknown.returncode == 2

    stopped = head.submit("train.steps=3")
    assert stopped.stdout is not None
    said = []
    for line in stopped.stdout:
        said.append(line)
        if line.startswith("at work"):
            break
    assert said[-1].startswith("at work ['run.yaml', 'train.steps=3']"), "".join(said)
    stopped.send_signal(signal.SIGINT)
    text = ended(stopped)
    assert "checkpoint written" in text
    assert "stopped" in text
    assert stopped.returncode == 1

    greeting = head.submit("--job", "diagnose")
    assert "hello run.yaml" in ended(greeting)
    assert greeting.returncode == 0

    text = ended(refused)
    assert "Refused:" in text
    assert "no/such/folder" in text
    assert refused.returncode == 2
