"""Jobs on a real cluster with a token: how they are followed, stopped and refused."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_port


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
    """Waits for the end of a process and returns its output, which a failure to end shows as far as it came."""
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
    options = f"""--head --block --port=0 --temp-dir={base}/ray --num-cpus=2 --object-store-memory=80000000
        --dashboard-host=127.0.0.1 --dashboard-port={port} --dashboard-agent-listen-port=0
        --ray-client-server-port={free_port()} --disable-usage-stats""".split()
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
